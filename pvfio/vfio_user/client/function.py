"""The device behind a connection, as one kernel's vfio-pci would have it: opened, reset, configured, with its
interrupts.

The first user finds it reset, with memory decoding on and DMA forbidden; the last one leaves it reset, with its
interrupts torn down. Between them several users share it. What vfio-pci does beyond the messages is done here: a
reset, asked for either way, keeps the header of configuration space; the MSI-X table is nobody's; while memory
decoding is off there is no BAR; one of INTx, MSI and MSI-X at a time. Rules and errnos: Linux vfio_pci_core.c,
vfio_pci_intrs.c.

Not modelled: hot reset, expansion ROMs, migration, device features.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import trio

from pvfio.abi import lib
from pvfio.errors import DeadlineExceeded, VfioError
from pvfio.vfio.device import DeviceInfo
from pvfio.vfio_user.messages import (
    Area,
    IrqInfo,
    IrqSet,
    RegionInfo,
    WireError,
    parse_region_reply,
    region_access,
)
from pvfio.vfio_user.messages import (
    DeviceInfo as WireDeviceInfo,
)
from pvfio.vfio_user.wire import PAGE

if TYPE_CHECKING:
    from pvfio.vfio_user.client.container import UserContainer
    from pvfio.vfio_user.client.link import Call, Link

__all__ = ["UserFunction"]

_log = logging.getLogger("pvfio.vfio_user.client")

_CONFIG: Final[int] = lib.VFIO_PCI_CONFIG_REGION_INDEX
_ROM: Final[int] = lib.VFIO_PCI_ROM_REGION_INDEX
_REGIONS: Final[int] = lib.VFIO_PCI_NUM_REGIONS
_IRQS: Final[int] = lib.VFIO_PCI_NUM_IRQS
_EXCLUSIVE: Final = (lib.VFIO_PCI_INTX_IRQ_INDEX, lib.VFIO_PCI_MSI_IRQ_INDEX, lib.VFIO_PCI_MSIX_IRQ_INDEX)
_EVENTFDS: Final[int] = lib.VFIO_IRQ_SET_DATA_EVENTFD | lib.VFIO_IRQ_SET_ACTION_TRIGGER
_TEAR_DOWN: Final[int] = lib.VFIO_IRQ_SET_DATA_NONE | lib.VFIO_IRQ_SET_ACTION_TRIGGER
_MEMORY: Final[int] = lib.PCI_COMMAND_MEMORY
_MASTER: Final[int] = lib.PCI_COMMAND_MASTER
_HEADER: Final = 0x40
_ROOM: Final = 4096


class UserFunction:
    """A device on a connection. ``users`` counts who has it open; what describes it exists while it is open.

    ``info``, ``regions`` and ``irqs`` are what the server said: VfioError EINVAL where it has no such region or
    interrupt. ``region_fds``: the files of regions that can be mapped. ``decodes``: memory decoding is on.
    ``flr_at``: where in configuration space a reset is asked for.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self.name = link.name
        self.users = 0
        self.info = DeviceInfo(0, 0, 0)
        self.regions: list[RegionInfo | VfioError] = []
        self.irqs: list[IrqInfo | VfioError] = []
        self.region_fds: dict[int, int] = {}
        self.decodes = False
        self.flr_at: int | None = None
        self.read_only = range(0)
        self.config_size = 0
        self.msix_table: tuple[int, int, int] | None = None
        self.closed_areas: dict[int, list[Area]] = {}
        # By index: how many vectors are enabled.
        self.vectors: dict[int, int] = {}
        self._lock = trio.Lock()

    def error(self, number: int, operation: str, reason: str = "") -> VfioError:
        """A VfioError that names this device."""
        return VfioError(number, operation, reason, device=self.name)

    # Open and closed.

    async def open(self, container: UserContainer, nursery: trio.Nursery) -> None:
        """Another user. Raises VfioError, DeadlineExceeded. Failed or cancelled: no user was added."""
        async with self._lock:
            if self.users == 0:
                try:
                    await self.link.connect(nursery)
                    await self._describe()
                    await self._enable()
                    await container.feed(self.link)
                except BaseException:
                    self.link.disconnect()
                    self._forget()
                    raise
            self.users += 1

    async def close(self) -> None:
        """One user fewer. Raises DeadlineExceeded where the server does not say that the last one's DMA has ended.

        Not cancelled, and bounded in time.
        """
        with trio.CancelScope(shield=True):
            async with self._lock:
                self.users -= 1
                if self.users == 0:
                    try:
                        await self._disable()
                    finally:
                        self._forget()

    async def _enable(self) -> None:
        """Reset, decoding memory, without DMA."""
        command = await self._command()
        await self._set_command(command & ~_MASTER)
        if self.info.flags & lib.VFIO_DEVICE_FLAGS_RESET:
            await self.link.call(lib.VFIO_USER_DEVICE_RESET, operation="reset")
            command = await self._command()
        await self._set_command(command & ~(_MASTER | lib.PCI_COMMAND_INTX_DISABLE) | _MEMORY)

    async def _disable(self) -> None:
        if not self.link.connected:
            if self.link.silent:
                raise DeadlineExceeded("close", self.link.deadline, device=self.name)
            return
        try:
            await self._set_command(await self._command() & ~_MASTER)
            for index in list(self.vectors):
                await self.set_irqs(index, _TEAR_DOWN, 0, 0, ())
            if self.info.flags & lib.VFIO_DEVICE_FLAGS_RESET:
                await self.link.call(lib.VFIO_USER_DEVICE_RESET, operation="reset")
        except VfioError as error:
            _log.warning("%s: not reset when it was closed: %s", self.name, error)
            self.link.disconnect()
        except DeadlineExceeded as error:
            self.link.lose(str(error), silent=True)
            raise

    def _forget(self) -> None:
        fds, self.region_fds = self.region_fds, {}
        for fd in fds.values():
            os.close(fd)
        self.vectors.clear()
        self.decodes = False

    # What it is.

    async def _describe(self) -> None:
        link = self.link
        call = await link.call(lib.VFIO_USER_DEVICE_GET_INFO, WireDeviceInfo.request(), operation="GET_INFO")
        with _ReadAs("GET_INFO", self):
            said = WireDeviceInfo.parse(call.body)
        if not said.flags & lib.VFIO_DEVICE_FLAGS_PCI:
            raise self.error(errno.ENODEV, "GET_INFO", "not a PCI device")
        self.info = DeviceInfo(said.flags, said.num_regions, said.num_irqs)
        self.regions = [await self._region(index) for index in range(min(said.num_regions, _REGIONS))]
        self.irqs = [await self._irq(index) for index in range(min(said.num_irqs, _IRQS))]
        config = self.regions[_CONFIG] if len(self.regions) > _CONFIG else None
        if not isinstance(config, RegionInfo) or config.size < lib.PCI_CFG_SPACE_SIZE:
            raise self.error(errno.ENODEV, "GET_REGION_INFO", "it has no configuration space")
        self.config_size = min(config.size, int(lib.PCI_CFG_SPACE_EXP_SIZE))
        await self._find_capabilities()

    async def _region(self, index: int) -> RegionInfo | VfioError:
        argsz = _ROOM
        while True:
            body = RegionInfo.request(index, argsz)
            try:
                call = await self.link.call(
                    lib.VFIO_USER_DEVICE_GET_REGION_INFO, body, operation="GET_REGION_INFO"
                )
            except VfioError as error:
                if not self.link.connected:
                    raise
                return error
            try:
                with _ReadAs("GET_REGION_INFO", self):
                    info = RegionInfo.parse(call.body)
                if info.index != index:
                    raise self.error(errno.EPROTO, "GET_REGION_INFO", f"{info.index} instead of {index}")
                if info.argsz > argsz and argsz == _ROOM and info.argsz <= 16 * _ROOM:
                    argsz = info.argsz
                    continue
                self._keep_fd(info, call)
                return info
            finally:
                for fd in call.fds:
                    os.close(fd)

    def _keep_fd(self, info: RegionInfo, call: Call) -> None:
        if call.fds and info.flags & lib.VFIO_REGION_INFO_FLAG_MMAP and info.index < _ROM:
            self.region_fds[info.index] = call.fds.pop(0)

    async def _irq(self, index: int) -> IrqInfo | VfioError:
        try:
            call = await self.link.call(
                lib.VFIO_USER_DEVICE_GET_IRQ_INFO, IrqInfo.request(index), operation="GET_IRQ_INFO"
            )
        except VfioError as error:
            if not self.link.connected:
                raise
            return error
        with _ReadAs("GET_IRQ_INFO", self):
            return IrqInfo.parse(call.body)

    async def _find_capabilities(self) -> None:
        """What of configuration space is minded here: device control, the MSI-X table."""
        config = await self.read_bytes(_CONFIG, 0, int(lib.PCI_CFG_SPACE_SIZE))
        found: dict[int, int] = {}
        at = config[lib.PCI_CAPABILITY_LIST] & 0xFC if config[lib.PCI_STATUS] & 0x10 else 0
        while at and at not in found.values():
            found.setdefault(config[at], at)
            at = config[at + 1] & 0xFC
        self.flr_at, self.msix_table, self.closed_areas, self.read_only = None, None, {}, range(0)
        express = found.get(lib.PCI_CAP_ID_EXP)
        if express is not None and config[express + 7] & 0x10:  # Device Capabilities: FLR
            self.flr_at = express + int(lib.PCI_EXP_DEVCTL) + 1
        msix = found.get(lib.PCI_CAP_ID_MSIX)
        if msix is not None:
            self.read_only = range(msix, msix + 12)
            vectors = (int.from_bytes(config[msix + 2 : msix + 4], "little") & 0x7FF) + 1
            table, pba = (int.from_bytes(config[msix + i : msix + i + 4], "little") for i in (4, 8))
            size = vectors * int(lib.PCI_MSIX_ENTRY_SIZE)
            self.msix_table = table & 7, table & ~7, size
            for where, length in ((table, size), (pba, -(-vectors // 64) * 8)):
                first, end = (where & ~7) & -PAGE, -(-((where & ~7) + length) // PAGE) * PAGE
                self.closed_areas.setdefault(where & 7, []).append((first, end - first))

    # Registers.

    async def read_bytes(self, region: int, offset: int, count: int) -> bytes:
        """Bytes of a region, in as many messages as the server's limit asks for."""
        pieces, most = [], self.link.limits.max_data_xfer_size
        while count:
            step = min(count, most)
            call = await self.link.call(
                lib.VFIO_USER_REGION_READ, region_access(offset, region, step), operation="read"
            )
            with _ReadAs("read", self):
                pieces.append(bytes(parse_region_reply(call.body, offset, region, step, read=True)))
            offset += step
            count -= step
        return b"".join(pieces)

    async def write_bytes(self, region: int, offset: int, data: bytes) -> None:
        """The counterpart of ``read_bytes``."""
        most = self.link.limits.max_data_xfer_size
        for at in range(0, len(data), most):
            part = data[at : at + most]
            body = region_access(offset + at, region, len(part), part)
            await self.link.call(lib.VFIO_USER_REGION_WRITE, body, operation="write")

    async def _command(self) -> int:
        return int.from_bytes(await self.read_bytes(_CONFIG, int(lib.PCI_COMMAND), 2), "little")

    async def _set_command(self, command: int) -> None:
        await self.write_bytes(_CONFIG, int(lib.PCI_COMMAND), command.to_bytes(2, "little"))
        self.decodes = bool(command & _MEMORY)

    async def reset(self) -> None:
        """Function level reset; the header of configuration space is put back. Raises EINVAL where there is none."""
        if not self.info.flags & lib.VFIO_DEVICE_FLAGS_RESET:
            raise self.error(errno.EINVAL, "DEVICE_RESET", "it cannot be reset")
        async with self._lock:
            before = await self.read_bytes(_CONFIG, 0, _HEADER)
            await self.link.call(lib.VFIO_USER_DEVICE_RESET, operation="reset")
            await self._restore(before)

    async def reset_by_write(self, offset: int, data: bytes) -> None:
        """A write to device control that asks for a function level reset."""
        async with self._lock:
            before = await self.read_bytes(_CONFIG, 0, _HEADER)
            await self.write_bytes(_CONFIG, offset, data)
            await self._restore(before)

    async def _restore(self, before: bytes) -> None:
        """The header as it was; the command last."""
        after = await self.read_bytes(_CONFIG, 0, _HEADER)
        for at in range(_HEADER - 4, 3, -4):
            if before[at : at + 4] != after[at : at + 4]:
                size = 2 if at == lib.PCI_COMMAND else 4
                await self.write_bytes(_CONFIG, at, before[at : at + size])

    # Interrupts.

    async def set_irqs(self, index: int, flags: int, start: int, count: int, fds: Sequence[int]) -> None:
        """SET_IRQS. With eventfds, in as many messages as the server takes descriptors for: the last vectors first, as
        they say how many there are. Raises EINVAL, ENOTTY, and what the server refuses; what had been set then is not
        any more.
        """
        info = self.irqs[index]
        if (
            isinstance(info, VfioError)
            or not 0 <= start < info.count
            or count < 0
            or start + count > info.count
        ):
            raise self.error(errno.EINVAL, "SET_IRQS", f"index {index} vectors {start}+{count}")
        action = flags & lib.VFIO_IRQ_SET_ACTION_TYPE_MASK
        if action != lib.VFIO_IRQ_SET_ACTION_TRIGGER and not info.flags & lib.VFIO_IRQ_INFO_MASKABLE:
            raise self.error(errno.ENOTTY, "SET_IRQS", f"index {index} cannot be masked")
        if fds:
            await self._set_eventfds(index, start, fds)
            return
        if start + count > self.vectors.get(index, 0):
            raise self.error(errno.EINVAL, "SET_IRQS", f"vectors {start}+{count} are not enabled")
        tears_down = flags == _TEAR_DOWN and not count
        if tears_down:
            self.vectors.pop(index, None)
        await self._send_irqs(IrqSet(index, flags, start, count), (), last=tears_down)

    async def _set_eventfds(self, index: int, start: int, fds: Sequence[int]) -> None:
        enabled = index in self.vectors
        if not enabled and index in _EXCLUSIVE and any(other in self.vectors for other in _EXCLUSIVE):
            raise self.error(errno.EINVAL, "SET_IRQS", "another index is enabled")
        if enabled and start + len(fds) > self.vectors[index]:
            raise self.error(
                errno.EINVAL, "SET_IRQS", f"{self.vectors[index]} vectors are enabled: disable them first"
            )
        self.vectors.setdefault(index, start + len(fds))
        most = min(max(1, self.link.limits.max_msg_fds), int(lib.PV_VFU_MAX_FDS))
        try:
            for at in range((len(fds) - 1) // most * most, -1, -most):
                part = fds[at : at + most]
                await self._send_irqs(IrqSet(index, _EVENTFDS, start + at, len(part)), part)
        except BaseException:
            self.vectors.pop(index, None)
            if self.link.connected:
                with trio.CancelScope(shield=True):
                    await self._send_irqs(IrqSet(index, _TEAR_DOWN), (), last=True)
            raise

    async def _send_irqs(self, request: IrqSet, fds: Sequence[int], *, last: bool = False) -> None:
        """``last``: the eventfds are no more after this, whatever comes; it is finished when cancelled."""
        if not self.link.connected:
            if last:
                return
            raise self.link.error("SET_IRQS")
        with trio.CancelScope(shield=last):
            try:
                await self.link.call(
                    lib.VFIO_USER_DEVICE_SET_IRQS, request.pack(), operation="SET_IRQS", fds=fds
                )
            except VfioError:
                if not last:
                    raise
            except DeadlineExceeded:
                if not last:
                    raise
                self.link.lose(f"no answer to SET_IRQS within {self.link.deadline:g} s", silent=True)


class _ReadAs:
    """What cannot be read of a reply is the server's mistake: VfioError EPROTO."""

    def __init__(self, operation: str, function: UserFunction) -> None:
        self._operation = operation
        self._function = function

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, WireError):
            raise self._function.error(errno.EPROTO, self._operation, error.reason) from None
