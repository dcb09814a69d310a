"""Emulated devices, imported as ``pvfio.devices``."""

if __name__ != "pvfio.devices":
    raise ImportError("import pvfio.devices, not devices: this folder is the package pvfio.devices")
