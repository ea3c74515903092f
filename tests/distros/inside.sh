#!/bin/bash
# Runs as the first process of its own mount and PID namespaces, made by test_distros.py. Its arguments are
# the root file system, a file with folders to show in it (read-only), and a command to run there.
#
# The root becomes the namespace's own (pivot_root, not chroot: in a chroot the kernel allows no user
# namespaces, which labkit and mmdebstrap use). All mounts end with the namespace.
set -euo pipefail
root=$1 shown=$2
shift 2
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
while read -r path; do
  if [[ -d $path ]]; then mkdir -p "$root$path"; else mkdir -p "$(dirname "$root$path")" && touch "$root$path"; fi
  mount --bind "$path" "$root$path"
  mount -o remount,bind,ro "$root$path"
done <"$shown"
mkdir -p "$root/.outside"
cd "$root"
pivot_root . .outside
umount -l /.outside
exec chroot . "$@"
