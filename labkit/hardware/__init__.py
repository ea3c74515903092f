"""What this computer says of itself; imports nothing of labkit but errors."""
