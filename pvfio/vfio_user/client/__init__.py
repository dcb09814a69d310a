"""The vfio-user client: a backend of the VFIO API for devices that others serve. ``VfioUserVfio`` is the way in."""

from pvfio.vfio_user.client.backend import VfioUserVfio

__all__ = ["VfioUserVfio"]
