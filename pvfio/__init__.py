"""pvfio: userspace device drivers on emulated devices behind a Hyper-V para-virtualized IOMMU.

Importing the package is cheap: everything below it is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pvfio.machine import Machine, MachineConfig
    from pvfio.open import open_device

__all__ = ["Machine", "MachineConfig", "__version__", "open_device"]

__version__ = "0.1.0"

_LAZY = {"Machine": "pvfio.machine", "MachineConfig": "pvfio.machine", "open_device": "pvfio.open"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
