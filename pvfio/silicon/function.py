"""What every bus needs of a PCI function that is plugged into it. ``pvfio.devices.pci.PciFunction`` is one.

Types alone. Not here: what one kind of bus asks for besides (``host/vpci.py``, ``vfio_user/server/function.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import trio

__all__ = ["BarInfo", "BusFunction"]


class BarInfo(Protocol):
    """A memory BAR: ``size`` in bytes, ``mmap_areas`` as (offset, size) of the pages a driver may map."""

    @property
    def index(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def is_64bit(self) -> bool: ...
    @property
    def prefetchable(self) -> bool: ...
    @property
    def mmap_areas(self) -> tuple[tuple[int, int], ...]: ...


class BusFunction(Protocol):
    """A PCI function.

    Configuration space is accessed in 1, 2 or 4 bytes, a BAR (``read``, ``write``) in 1, 2, 4 or 8; offsets and
    sizes are bytes. ``mmio`` gives a BAR's ``struct pv_mmio *`` or None, ``connect_intx`` takes who is told the level
    of the pin. ``reset`` is a function level reset, done even when it is cancelled; ``run`` is the device's task,
    ended by cancelling it.
    """

    def config_read(self, offset: int, size: int) -> int: ...
    def config_write(self, offset: int, size: int, value: int) -> None: ...
    def bars(self) -> tuple[BarInfo, ...]: ...
    def read(self, bar: int, offset: int, size: int) -> int: ...
    def write(self, bar: int, offset: int, size: int, value: int) -> None: ...
    def mmio(self, bar: int) -> Any: ...
    def connect_intx(self, callback: Callable[[bool], None] | None) -> None: ...
    async def reset(self) -> None: ...
    async def run(self, *, task_status: trio.TaskStatus[None] = ...) -> None: ...
    def close(self) -> None: ...
