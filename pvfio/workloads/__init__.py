"""Programs that put a device to work and check what it did by means of their own."""
