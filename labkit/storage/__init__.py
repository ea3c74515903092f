"""Disks: making, copying and asking about them."""
