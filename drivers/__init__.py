"""Userspace drivers, imported as ``pvfio.drivers``."""

if __name__ != "pvfio.drivers":
    raise ImportError("import pvfio.drivers, not drivers: this folder is the package pvfio.drivers")
