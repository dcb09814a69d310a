"""Controller registers: the enable, ready, shutdown and fatal states of a controller (NVMe Base 2.0c 3.1.3, 3.5, 3.6).

Doorbells are C's. What takes time (shutting down) is asked of the controller, which reports back. Not modelled: the
controller memory buffer, boot partitions, the persistent memory region: their registers read zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from pvfio.abi import lib
from pvfio.devices.nvme.config import NvmeConfig

__all__ = ["EnableSettings", "Owner", "Registers"]

_ENABLE: Final[int] = lib.NVME_CC_ENABLE
_SHN: Final[int] = lib.NVME_CC_SHN_MASK
_MPS: Final[int] = lib.NVME_CC_MPS_MASK
_AMS: Final[int] = lib.NVME_CC_AMS_MASK
_CSS: Final[int] = lib.NVME_CC_CSS_MASK
_SHST: Final[int] = lib.NVME_CSTS_SHST_MASK
_WRITABLE_CC: Final[int] = (
    _ENABLE
    | _CSS
    | _MPS
    | _AMS
    | _SHN
    | lib.NVME_CC_IOSQES_MASK
    | lib.NVME_CC_IOCQES_MASK
    | lib.NVME_CC_CRIME
)
_AQA_MASK: Final[int] = lib.NVME_AQA_ASQS_MASK | lib.NVME_AQA_ACQS_MASK
_LOW: Final = 0xFFFFFFFF


@dataclass(frozen=True)
class EnableSettings:
    """What CC, AQA, ASQ and ACQ say when a controller is enabled: sizes in entries, addresses as IOVAs."""

    asq: int
    asq_size: int
    acq: int
    acq_size: int
    page_shift: int
    arbitration: int


class Owner(Protocol):
    """The controller behind the registers."""

    def enable(self, settings: EnableSettings) -> bool:
        """CC.EN was set: whether the controller can be enabled so; it is ready then."""

    def disable(self) -> None:
        """CC.EN was cleared: the reset of the controller (Base 3.7.2)."""

    def shut_down(self) -> None:
        """CC.SHN was written; ``shut_down_complete`` follows."""

    def subsystem_reset(self) -> None:
        """NSSR was written with its word."""

    def mask_pin(self, mask: int) -> None:
        """INTMS and INTMC, as the mask they make."""


class Registers:
    """The registers of BAR 0 below the doorbells. Accesses of 4 or 8 aligned bytes; others have no effect."""

    def __init__(self, config: NvmeConfig, owner: Owner) -> None:
        self._config = config
        self._cap = config.cap
        self._owner = owner
        self.subsystem_was_reset = False
        self.safe = True
        """Power may go: never enabled, or shut down since."""
        self.power_on()

    def power_on(self) -> None:
        """Every register as after power-on, but NSSRO."""
        self.cc = 0
        self.csts = int(lib.NVME_CSTS_NSSRO) * self.subsystem_was_reset
        self.aqa = self.asq = self.acq = 0
        self.interrupt_mask = 0

    @property
    def ready(self) -> bool:
        """CSTS.RDY."""
        return bool(self.csts & lib.NVME_CSTS_RDY)

    @property
    def fatal(self) -> bool:
        """CSTS.CFS."""
        return bool(self.csts & lib.NVME_CSTS_CFS)

    @property
    def queue_entry_sizes(self) -> tuple[int, int]:
        """CC.IOSQES and CC.IOCQES: powers of two."""
        cc = self.cc
        return (
            (cc & lib.NVME_CC_IOSQES_MASK) >> lib.NVME_CC_IOSQES_SHIFT,
            (cc & lib.NVME_CC_IOCQES_MASK) >> lib.NVME_CC_IOCQES_SHIFT,
        )

    @property
    def all_command_sets(self) -> bool:
        """CC.CSS asks for every I/O command set there is."""
        return bool((self.cc & _CSS) >> lib.NVME_CC_CSS_SHIFT == lib.NVME_CC_CSS_IO)

    def fail(self) -> None:
        """Controller Fatal Status: until a reset."""
        self.csts |= int(lib.NVME_CSTS_CFS)

    def shut_down_complete(self) -> None:
        """Shutdown processing has ended."""
        if self.csts & _SHST == lib.NVME_CSTS_SHST_OCCUR:
            self.csts = self.csts & ~_SHST | int(lib.NVME_CSTS_SHST_CMPLT)
            self.safe = True

    def read(self, offset: int, size: int) -> int:
        """A load."""
        if size not in (4, 8) or offset % 4:
            return 0
        low = _READS.get(offset)
        value = 0 if low is None else low(self)
        if size == 8 and (high := _READS.get(offset + 4)) is not None:
            value |= high(self) << 32
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """A store; one of 8 bytes is made of its two halves, the low one first."""
        if size not in (4, 8) or offset % 4:
            return
        self._write32(offset, value & _LOW)
        if size == 8:
            self._write32(offset + 4, value >> 32)

    def _write32(self, offset: int, value: int) -> None:
        if offset == lib.NVME_REG_CC:
            self._write_cc(value & _WRITABLE_CC)
        elif offset == lib.NVME_REG_CSTS:
            self._clear_nssro(value)
        elif offset == lib.NVME_REG_INTMS:
            self._mask(self.interrupt_mask | value)
        elif offset == lib.NVME_REG_INTMC:
            self._mask(self.interrupt_mask & ~value)
        elif offset == lib.NVME_REG_NSSR:
            if value == lib.NVME_NSSR_RESET:
                self._owner.subsystem_reset()
        elif not self.cc & _ENABLE:
            self._write_admin_queue(offset, value)

    def _write_admin_queue(self, offset: int, value: int) -> None:
        """AQA, ASQ and ACQ may be written while the controller is disabled (Base 3.1.3.8 to 3.1.3.10)."""
        if offset == lib.NVME_REG_AQA:
            self.aqa = value & _AQA_MASK
        elif offset in (lib.NVME_REG_ASQ, lib.NVME_REG_ASQ + 4):
            self.asq = _half(self.asq, offset - lib.NVME_REG_ASQ, value) & ~0xFFF
        elif offset in (lib.NVME_REG_ACQ, lib.NVME_REG_ACQ + 4):
            self.acq = _half(self.acq, offset - lib.NVME_REG_ACQ, value) & ~0xFFF

    def _mask(self, mask: int) -> None:
        self.interrupt_mask = mask
        self._owner.mask_pin(mask)

    def _clear_nssro(self, value: int) -> None:
        """NSSRO is cleared by writing one (Base 3.1.3.6)."""
        if value & lib.NVME_CSTS_NSSRO:
            self.subsystem_was_reset = False
            self.csts &= ~int(lib.NVME_CSTS_NSSRO)

    def _write_cc(self, value: int) -> None:
        old, self.cc = self.cc, value
        if old & _ENABLE and not value & _ENABLE:
            self._owner.disable()
            self.csts &= int(lib.NVME_CSTS_NSSRO)
            self.cc = value & ~_SHN
            self.interrupt_mask = 0
            return
        if value & _ENABLE and not old & _ENABLE:
            self._enable(value)
        if value & _SHN and not old & _SHN:
            self.csts = self.csts & ~_SHST | int(lib.NVME_CSTS_SHST_OCCUR)
            self._owner.shut_down()

    def _enable(self, cc: int) -> None:
        """Ready, or in fatal status where what was written cannot be (Base 3.5.1)."""
        settings = EnableSettings(
            asq=self.asq,
            asq_size=(self.aqa & lib.NVME_AQA_ASQS_MASK) + 1,
            acq=self.acq,
            acq_size=((self.aqa & lib.NVME_AQA_ACQS_MASK) >> lib.NVME_AQA_ACQS_SHIFT) + 1,
            page_shift=12 + ((cc & _MPS) >> lib.NVME_CC_MPS_SHIFT),
            arbitration=(cc & _AMS) >> lib.NVME_CC_AMS_SHIFT,
        )
        command_sets = (cc & _CSS) >> lib.NVME_CC_CSS_SHIFT
        weighted = settings.arbitration == lib.NVME_CC_AMS_WRRU and self._config.weighted
        possible = (
            settings.page_shift <= self._config.max_page_shift
            and (settings.arbitration == lib.NVME_CC_AMS_RR or weighted)
            and command_sets in (lib.NVME_CC_CSS_NVM, lib.NVME_CC_CSS_IO)
        )
        if possible and self._owner.enable(settings):
            self.csts |= int(lib.NVME_CSTS_RDY)
            self.safe = False
        else:
            self.fail()


def _half(whole: int, byte: int, value: int) -> int:
    shift = 8 * byte
    return whole & ~(0xFFFFFFFF << shift) | value << shift


_READS: Final[dict[int, Callable[[Registers], int]]] = {
    lib.NVME_REG_CAP: lambda self: self._cap & _LOW,
    lib.NVME_REG_CAP + 4: lambda self: self._cap >> 32,
    lib.NVME_REG_VS: lambda _: int(lib.NVME_VS_2_0),
    lib.NVME_REG_INTMS: lambda self: self.interrupt_mask,
    lib.NVME_REG_INTMC: lambda self: self.interrupt_mask,
    lib.NVME_REG_CC: lambda self: self.cc,
    lib.NVME_REG_CSTS: lambda self: self.csts,
    lib.NVME_REG_AQA: lambda self: self.aqa,
    lib.NVME_REG_ASQ: lambda self: self.asq & _LOW,
    lib.NVME_REG_ASQ + 4: lambda self: self.asq >> 32,
    lib.NVME_REG_ACQ: lambda self: self.acq & _LOW,
    lib.NVME_REG_ACQ + 4: lambda self: self.acq >> 32,
}
"""The 32-bit registers that do not read zero."""
