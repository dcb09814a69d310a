"""The emulated Intel DSA: registers and commands in Python, the data path in C."""

from pvfio.devices.dsa.config import DsaConfig
from pvfio.devices.dsa.device import DsaDevice

__all__ = ["DsaConfig", "DsaDevice"]
