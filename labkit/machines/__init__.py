"""What runs commands: the host, VMs and, later, containers."""
