"""Controller registers: capabilities, enabling, disabling, shutting down (NVMe Base 2.0c 3.1.3, 3.5, 3.6).

Every wait has a deadline: CAP.TO, or RTD3E, at most a minute, for a shutdown where the controller says one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from pvfio.abi import lib
from pvfio.errors import DeadlineExceeded, DeviceFailed

if TYPE_CHECKING:
    from pvfio.vfio import Region

__all__ = ["Capabilities", "Registers"]

_GONE: Final = 0xFFFFFFFF  # what a register of a device that is not there reads as
_FIRST_NAP: Final = 50e-6
_LONGEST_NAP: Final = 5e-3
_SHST: Final[int] = lib.NVME_CSTS_SHST_MASK
_SQES, _CQES = 6, 4


@dataclass(frozen=True, slots=True)
class Capabilities:
    """CAP and VS: ``entries``, the most in a queue; ``timeout`` in seconds; ``stride`` of doorbells in bytes;
    ``page_shift``, the smallest memory page; ``version`` as in VS.
    """

    entries: int
    timeout: float
    stride: int
    page_shift: int
    version: int
    nvm: bool

    @classmethod
    def parse(cls, cap: int, version: int) -> Capabilities:
        """NVMe Base 2.0c 3.1.3.1."""
        return cls(
            entries=(cap & int(lib.NVME_CAP_MQES_MASK)) + 1,
            timeout=max(1, cap >> int(lib.NVME_CAP_TO_SHIFT) & 0xFF) * 0.5,
            stride=4 << (cap >> int(lib.NVME_CAP_DSTRD_SHIFT) & 0xF),
            page_shift=12 + (cap >> int(lib.NVME_CAP_MPSMIN_SHIFT) & 0xF),
            version=version,
            nvm=bool(cap >> int(lib.NVME_CAP_CSS_SHIFT) & int(lib.NVME_CAP_CSS_NVM)),
        )

    def doorbells(self, queue: int) -> tuple[int, int]:
        """Where the tail and the head doorbell of a queue are (NVMe Base 2.0c 3.1.3.12 and 3.1.3.13)."""
        first = int(lib.NVME_REG_DBS) + 2 * queue * self.stride
        return first, first + self.stride


class Registers:
    """The registers of one controller. All raise ``DeviceFailed`` where it is gone, ``VfioError``."""

    def __init__(self, region: Region, device: str) -> None:
        self.region = region
        self._device = device

    async def capabilities(self) -> Capabilities:
        """Reads CAP and VS."""
        await self.status()
        cap = await self.region.read(lib.NVME_REG_CAP, 8)
        return Capabilities.parse(cap, await self.region.read(lib.NVME_REG_VS, 4))

    async def status(self) -> int:
        """CSTS."""
        status = await self.region.read(lib.NVME_REG_CSTS, 4)
        if status == _GONE:
            raise DeviceFailed(self._device, "removed")
        return status

    async def disable(self, seconds: float) -> None:
        """CC.EN = 0, until it is not ready: a reset of the controller (NVMe Base 2.0c 3.5.3, 3.7.2).

        Raises ``DeadlineExceeded``.
        """
        config = await self.region.read(lib.NVME_REG_CC, 4)
        if config & lib.NVME_CC_ENABLE:
            # EN may be cleared while it is still becoming ready, where it failed to.
            await self._until(self._settled, seconds, "enable", fatal=False)
        await self.region.write(lib.NVME_REG_CC, config & ~int(lib.NVME_CC_ENABLE | lib.NVME_CC_SHN_MASK), 4)
        await self._until(self._not_ready, seconds, "disable")

    async def enable(self, capabilities: Capabilities, admin: tuple[int, int, int]) -> None:
        """From disabled to ready; ``admin``: addresses of the admin queues, and how many entries both have.

        Raises ``DeadlineExceeded``, ``DeviceFailed`` where it goes into fatal status.
        """
        submissions, completions, entries = admin
        await self.region.write(
            lib.NVME_REG_AQA, entries - 1 | entries - 1 << int(lib.NVME_AQA_ACQS_SHIFT), 4
        )
        for register, address in ((lib.NVME_REG_ASQ, submissions), (lib.NVME_REG_ACQ, completions)):
            await self.region.write(register, address & 0xFFFFFFFF, 4)
            await self.region.write(register + 4, address >> 32, 4)
        config = (
            lib.NVME_CC_ENABLE
            | lib.NVME_CC_CSS_NVM << lib.NVME_CC_CSS_SHIFT
            | (capabilities.page_shift - 12) << lib.NVME_CC_MPS_SHIFT
            | lib.NVME_CC_AMS_RR << lib.NVME_CC_AMS_SHIFT
            | _SQES << lib.NVME_CC_IOSQES_SHIFT
            | _CQES << lib.NVME_CC_IOCQES_SHIFT
        )
        await self.region.write(lib.NVME_REG_CC, int(config), 4)
        await self._until(self._ready, capabilities.timeout, "enable")

    async def shut_down(self, seconds: float) -> None:
        """A normal shutdown (NVMe Base 2.0c 3.6.1). Raises ``DeadlineExceeded``."""
        config = await self.region.read(lib.NVME_REG_CC, 4)
        config = config & ~int(lib.NVME_CC_SHN_MASK) | int(lib.NVME_CC_SHN_NORMAL)
        await self.region.write(lib.NVME_REG_CC, config, 4)
        await self._until(self._shut_down, seconds, "shut down")

    async def _ready(self) -> bool:
        status = await self.status()
        if status & lib.NVME_CSTS_CFS:
            raise DeviceFailed(self._device, "fatal status when it was enabled")
        return bool(status & lib.NVME_CSTS_RDY)

    async def _settled(self) -> bool:
        return bool(await self.status() & (lib.NVME_CSTS_RDY | lib.NVME_CSTS_CFS))

    async def _not_ready(self) -> bool:
        return not await self.status() & lib.NVME_CSTS_RDY

    async def _shut_down(self) -> bool:
        return bool(await self.status() & _SHST == lib.NVME_CSTS_SHST_CMPLT)

    async def _until(
        self, look: Callable[[], Awaitable[bool]], seconds: float, operation: str, *, fatal: bool = True
    ) -> None:
        """``fatal``: that it does not come to be so is an error."""
        nap = _FIRST_NAP
        with trio.move_on_after(seconds):
            while not await look():
                await trio.sleep(nap)
                nap = min(2 * nap, _LONGEST_NAP)
            return
        if fatal:
            raise DeadlineExceeded(operation, seconds, device=self._device)
