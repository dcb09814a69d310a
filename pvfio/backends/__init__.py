"""Backends: what gives a driver its containers, groups and devices. Import the one you need."""
