"""One client of a vfio-user server, from its first message to its last.

Models the server's half of the specification 0.9.2: negotiation first, then a reply to every command that wants one, in
the order they came. What a client asks wrongly is answered with an errno; what cannot be understood, a client that
is silent at first, and one that does not read its replies, end the connection. DMA_READ and DMA_WRITE are asked by the
device's engine in C, while messages go on being answered here.

Not modelled: GET_REGION_IO_FDS, device features and migration (ENOTSUP; ENOTTY for a feature, as Linux has it).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

import trio

from pvfio.abi import lib
from pvfio.errors import DeadlineExceeded
from pvfio.silicon import TableBus
from pvfio.vfio_user import messages, wire_log
from pvfio.vfio_user.channel import HEADER_SIZE, Channel, ChannelEnded, Message, ProtocolError
from pvfio.vfio_user.messages import Body, DeviceInfo, DmaMap, DmaUnmap, IrqInfo, IrqSet, RegionInfo
from pvfio.vfio_user.remote import RemoteMemory
from pvfio.vfio_user.server.dma import DmaMaps
from pvfio.vfio_user.server.function import Function
from pvfio.vfio_user.server.irqs import ServerIrqs
from pvfio.vfio_user.server.regions import Regions
from pvfio.vfio_user.version import Limits, Version
from pvfio.vfio_user.wire import WireError

__all__ = ["LIMITS", "MAX_MESSAGE", "Session"]

LIMITS: Final = Limits(max_msg_fds=lib.VFIO_USER_MAX_MSG_FDS, write_multiple=True)
"""What the server takes."""
MAX_MESSAGE: Final[int] = HEADER_SIZE + 16 + LIMITS.max_data_xfer_size
_FIRST_SECONDS: Final = 10.0
_SEND_SECONDS: Final = 10.0
_TYPE_MASK: Final[int] = lib.VFIO_USER_F_TYPE_MASK
_REPLY: Final[int] = lib.VFIO_USER_F_TYPE_REPLY
_RESET: Final[int] = lib.VFIO_USER_DEVICE_RESET
_MOST_DATA: Final = LIMITS.max_data_xfer_size

_Answer = tuple[Body, Body, tuple[int, ...]]
"""A reply's body, in two parts, and its descriptors, which stay whose they are."""


def _answer(body: Body = b"", data: Body = b"", fds: tuple[int, ...] = ()) -> _Answer:
    return body, data, fds


class Session:
    """A connection. ``run`` it; then ``close`` it, whatever happened. ``log`` gets a line for every message."""

    def __init__(
        self,
        channel: Channel,
        function: Function,
        bus: TableBus,
        regions: Regions,
        irqs: ServerIrqs,
        log: Callable[[str], None] | None,
    ) -> None:
        self.channel = channel
        self._function = function
        self._regions = regions
        self._irqs = irqs
        self._log = log
        self.maps = DmaMaps(bus, LIMITS.max_dma_maps)
        self._remote = RemoteMemory(bus, channel)

    async def run(self) -> str:
        """Serves until the client goes, and says why it ended. Cancelled: nothing is cleaned up, see ``close``."""
        ends = ""
        async with trio.open_nursery() as nursery:
            self._irqs.nursery = nursery
            nursery.start_soon(self._watch_memory, nursery.cancel_scope)
            try:
                await self._negotiate()
                await self._serve()
            except (ChannelEnded, ProtocolError, DeadlineExceeded, WireError, OSError, MemoryError) as error:
                ends = str(error)
            nursery.cancel_scope.cancel()
        return ends or "a file of its memory was truncated"

    def close(self) -> None:
        """The socket is closed, the client's memory let go; DMA must have been cancelled. May be called again."""
        self.channel.close()
        self._remote.close()
        self.maps.close()

    async def _watch_memory(self, scope: trio.CancelScope) -> None:
        await trio.lowlevel.wait_readable(self.maps.poisoned_fd)
        scope.cancel()

    async def _negotiate(self) -> None:
        """VERSION. A client that asks for what cannot be gets its errno, and the connection ends."""
        message = await self.channel.receive(_FIRST_SECONDS)
        self._record(message)
        try:
            if message.command != lib.VFIO_USER_VERSION or not message.wants_reply:
                raise WireError(errno.EINVAL, "VERSION is first")
            asked = Version.parse(message.body)
            answer = asked.answer(LIMITS)
        except WireError as error:
            await self._reply(message, _answer(), error.errno)
            raise
        self.channel.set_transfer_limit(min(asked.limits.max_data_xfer_size, LIMITS.max_data_xfer_size))
        await self._reply(message, _answer(answer.pack()))

    async def _serve(self) -> None:
        while True:
            message = await self.channel.receive()
            if self._log is not None:
                self._record(message)
            if message.flags & _TYPE_MASK:
                if not message.is_reply:
                    raise ProtocolError(f"a message of type {message.flags:#x}")
                continue  # A reply nobody waits for any more.
            try:
                if message.command == _RESET:
                    messages.parse_empty(message.body)
                    await self._reset()
                    answer = _answer()
                else:
                    answer = self._handle(message)
            except WireError as error:
                await self._reply(message, _answer(), error.errno)
            else:
                await self._reply(message, answer)

    def _handle(self, message: Message) -> _Answer:
        handler = _HANDLERS.get(message.command)
        if message.fds_lost:
            raise WireError(errno.EINVAL, "too many file descriptors")
        if handler is None:
            known = message.command in (lib.VFIO_USER_MIG_DATA_READ, lib.VFIO_USER_MIG_DATA_WRITE)
            raise WireError(errno.ENOTSUP if known else errno.EINVAL, messages.command_name(message.command))
        return handler(self, message)

    async def _reply(self, message: Message, answer: _Answer, error: int = 0) -> None:
        if not message.wants_reply:
            return
        body, data, fds = answer
        if self._log is not None:
            whole = bytes(body) + bytes(data)
            self._log(wire_log.line(">", message.command, message.id, _REPLY, error, whole, len(fds)))
        try:
            self.channel.reply_nowait(message, body, data, error=error, fds=fds)
        except trio.WouldBlock:
            flags = _REPLY | (lib.VFIO_USER_F_ERROR if error else 0)
            await self.channel.send(
                message.command, message.id, flags, error, body, data, fds, deadline=_SEND_SECONDS
            )

    def _record(self, message: Message) -> None:
        if self._log is not None:
            head = (message.command, message.id, message.flags, message.error)
            self._log(wire_log.line("<", *head, message.body, len(message.fds)))

    async def _reset(self) -> None:
        """DEVICE_RESET, with what vfio-pci puts back after it."""
        state = self._regions.save()
        await self._function.reset()
        self._regions.restore(state)
        self._irqs.restore()

    # Commands

    def _dma_map(self, message: Message) -> _Answer:
        request = DmaMap.parse(message.body)
        if len(message.fds) > 1:
            raise WireError(errno.EINVAL, f"{len(message.fds)} file descriptors for one map")
        self.maps.map(request, message.fds[0] if message.fds else None)
        return _answer()

    def _dma_unmap(self, message: Message) -> _Answer:
        request = DmaUnmap.parse(message.body)
        self.maps.unmap(request)
        return _answer(request.pack())

    def _get_info(self, message: Message) -> _Answer:
        DeviceInfo.parse_request(message.body)
        flags = lib.VFIO_DEVICE_FLAGS_PCI | lib.VFIO_DEVICE_FLAGS_RESET
        return _answer(DeviceInfo(flags, lib.VFIO_PCI_NUM_REGIONS, lib.VFIO_PCI_NUM_IRQS).pack())

    def _get_region_info(self, message: Message) -> _Answer:
        index, argsz = RegionInfo.parse_request(message.body)
        info, fd = self._regions.info(index)
        return _answer(info.pack(argsz), fds=() if fd is None else (fd,))

    def _get_region_io_fds(self, message: Message) -> _Answer:
        index = messages.parse_region_io_fds(message.body)
        self._regions.info(index)
        raise WireError(errno.ENOTSUP, "no region has ioeventfds or ioregionfds")

    def _get_irq_info(self, message: Message) -> _Answer:
        return _answer(self._irqs.info(IrqInfo.parse_request(message.body)).pack())

    def _set_irqs(self, message: Message) -> _Answer:
        self._irqs.set_irqs(IrqSet.parse(message.body), message.fds)
        return _answer()

    def _region_read(self, message: Message) -> _Answer:
        offset, region, count = messages.parse_region_read(message.body, _MOST_DATA)
        return bytes(message.body), self._regions.read(region, offset, count), ()

    def _region_write(self, message: Message) -> _Answer:
        offset, region, data = messages.parse_region_write(message.body, _MOST_DATA)
        self._regions.write(region, offset, data)
        return _answer(messages.region_access(offset, region, len(data)))

    def _region_write_multi(self, message: Message) -> _Answer:
        """Stops at the first write that cannot be; the writes before it are done, and it is what is answered."""
        writes = messages.parse_write_multi(message.body)
        for offset, region, data in writes:
            self._regions.write(region, offset, data)
        return _answer(messages.write_multi_reply(len(writes)))

    def _device_feature(self, message: Message) -> _Answer:
        flags = messages.parse_device_feature(message.body)
        raise WireError(errno.ENOTTY, f"device feature {flags & 0xFFFF}")


_Handler = Callable[[Session, Message], _Answer]
_HANDLERS: Final[dict[int, _Handler]] = {
    lib.VFIO_USER_DMA_MAP: Session._dma_map,
    lib.VFIO_USER_DMA_UNMAP: Session._dma_unmap,
    lib.VFIO_USER_DEVICE_GET_INFO: Session._get_info,
    lib.VFIO_USER_DEVICE_GET_REGION_INFO: Session._get_region_info,
    lib.VFIO_USER_DEVICE_GET_REGION_IO_FDS: Session._get_region_io_fds,
    lib.VFIO_USER_DEVICE_GET_IRQ_INFO: Session._get_irq_info,
    lib.VFIO_USER_DEVICE_SET_IRQS: Session._set_irqs,
    lib.VFIO_USER_REGION_READ: Session._region_read,
    lib.VFIO_USER_REGION_WRITE: Session._region_write,
    lib.VFIO_USER_REGION_WRITE_MULTI: Session._region_write_multi,
    lib.VFIO_USER_DEVICE_FEATURE: Session._device_feature,
}
