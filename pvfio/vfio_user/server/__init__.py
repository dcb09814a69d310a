"""A vfio-user server: PCI functions behind Unix sockets, for QEMU and others. See device_server.py."""

from pvfio.vfio_user.server.device_server import DeviceServer

__all__ = ["DeviceServer"]
