"""An emulated NVMe controller: the data path in C (``nvme_engine.h``), registers and admin commands in Python."""

from __future__ import annotations

from pvfio.devices.nvme.config import NamespaceSpec, NvmeConfig
from pvfio.devices.nvme.device import NvmeDevice

__all__ = ["NamespaceSpec", "NvmeConfig", "NvmeDevice"]
