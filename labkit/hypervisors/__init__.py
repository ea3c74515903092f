"""What carries a VM: libvirt, labkit's own daemon for it, and the probe of accelerators."""
