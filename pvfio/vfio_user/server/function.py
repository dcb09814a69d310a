"""What a vfio-user server needs of the function it serves. ``pvfio.devices.pci.PciFunction`` is one."""

from __future__ import annotations

from typing import Protocol

from pvfio.silicon import BusFunction, Msix

__all__ = ["Function", "MsixPlace"]


class MsixPlace(Protocol):
    """Where the MSI-X table is: ``vectors`` entries at ``offset`` of a BAR."""

    @property
    def bar(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def vectors(self) -> int: ...


class Function(BusFunction, Protocol):
    """A PCI function, built over a ``TableBus``.

    ``map_fd`` gives a descriptor, which stays the function's, and the place in it of an mmap area, or raises
    ``OSError`` for one that has no file. ``renew_memory`` has other memory, of zeroes, take the place of what was
    mapped, or raises ``OSError``. ``recheck_intx``, when an asserted pin is unmasked, says whether who is told its
    level will be told anew. ``cancel_dma``: while on, its DMA ends.
    """

    @property
    def msix(self) -> Msix | None: ...
    @property
    def msix_layout(self) -> MsixPlace | None: ...

    def map_fd(self, bar: int, offset: int, size: int) -> tuple[int, int]: ...
    def renew_memory(self) -> None: ...
    def recheck_intx(self) -> bool: ...
    def cancel_dma(self, on: bool) -> None: ...
