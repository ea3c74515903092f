/* Preloaded into labkit's libvirt daemon where root may make no user namespace (Docker's default seccomp
   profile, say): the daemon takes itself for an ordinary user's and keeps to its session driver. It changes
   what the daemon believes and nothing of what it may do. */

unsigned getuid(void) { return 1000; }
unsigned geteuid(void) { return 1000; }
unsigned getgid(void) { return 1000; }
unsigned getegid(void) { return 1000; }
