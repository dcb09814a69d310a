"""``pvfio serve``: devices behind vfio-user sockets, until SIGINT or SIGTERM.

A device is described by a kind and words: ``nvme,socket=/tmp/nvme.sock,image=disk.img``; a comma in a value is
doubled. What a word means is in ``_WORDS``. The line ``pvfio: ready`` on standard output says that every socket
listens. Not here: what a guest does with it.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from pvfio.cli_run import UsageError, run_program

if TYPE_CHECKING:
    from pvfio.devices.pci import PciFunction
    from pvfio.silicon import TableBus

__all__ = ["KINDS", "ServedSpec", "make_spec", "parse_device", "serve"]

_MANY: Final = "image"
"""The word that may be repeated."""


def _size(text: str) -> int:
    from pvfio.workloads.parameters import parse_size

    return parse_size(text)


def _flag(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError(f"on or off, not {text!r}")
    return text == "on"


def _lba_shift(text: str) -> int:
    if text not in ("512", "4096"):
        raise ValueError(f"blocks have 512 or 4096 bytes, not {text!r}")
    return int(text).bit_length() - 1


_WORDS: Final[dict[str, dict[str, Callable[[str], Any]]]] = {
    # image: a namespace that is this raw file; size: of a namespace in memory; lba, read-only: of all namespaces
    "nvme": {
        _MANY: Path,
        "size": _size,
        "lba": _lba_shift,
        "read-only": _flag,
        "serial": str,
        "queues": int,
    },
    "dsa": {"preset": str},
    "testdev": {"intx": _flag, "vectors": int},
}
KINDS: Final = tuple(_WORDS)


@dataclass(frozen=True, slots=True)
class ServedSpec:
    """One device: its kind, its socket's path, and its words, converted; images are a tuple of paths."""

    kind: str
    socket: Path
    words: Mapping[str, Any] = field(default_factory=dict)


def parse_device(text: str) -> ServedSpec:
    """``KIND,socket=PATH[,WORD=VALUE]...``. ``UsageError`` for what cannot be."""
    kind, *rest = text.replace(",,", "\0").split(",")
    pairs = []
    for item in rest:
        word, equals, value = item.replace("\0", ",").partition("=")
        if not equals:
            raise UsageError(f"{text!r}: {word!r} is not WORD=VALUE")
        pairs.append((word, value))
    sockets = [value for word, value in pairs if word == "socket"]
    if len(sockets) != 1:
        raise UsageError(f"{text!r}: a device has one socket=PATH")
    return make_spec(kind, Path(sockets[0]), [pair for pair in pairs if pair[0] != "socket"])


def make_spec(kind: str, socket: Path, pairs: list[tuple[str, str]]) -> ServedSpec:
    """A device of words as text. ``UsageError`` for a kind, a word or a value that cannot be."""
    known = _WORDS.get(kind)
    if known is None:
        raise UsageError(f"a device is one of {', '.join(KINDS)}, not {kind!r}")
    words: dict[str, Any] = {}
    for word, value in pairs:
        if word not in known:
            raise UsageError(f"{kind} takes {', '.join(('socket', *known))}, not {word!r}")
        if word in words and word != _MANY:
            raise UsageError(f"{kind}: {word} is given twice")
        try:
            made = known[word](value)
        except ValueError as error:
            raise UsageError(f"{kind}: {word}: {error}") from None
        words[word] = (*words.get(word, ()), made) if word == _MANY else made
    return ServedSpec(kind, socket, words)


def serve(
    kind: str | None,
    socket: Path | None,
    words: list[tuple[str, str]],
    devices: list[str],
    *,
    mode: int,
    wire: bool,
) -> int:
    """The command: one device by ``kind``, ``socket`` and ``words``, or those of ``devices``, or both. 0: ended by a
    signal; 1: a device cannot be, or crashed; 2: the request cannot be.
    """

    async def main() -> int:
        specs = _specs(kind, socket, words, devices)
        logging.basicConfig(format="pvfio: %(message)s", level=logging.INFO if wire else logging.WARNING)
        _raise_file_limit()
        return await _serve(specs, mode, wire)

    return run_program(main)


def _specs(
    kind: str | None, socket: Path | None, words: list[tuple[str, str]], devices: list[str]
) -> list[ServedSpec]:
    """What is served. ``UsageError`` for what cannot be."""
    specs = [parse_device(text) for text in devices]
    if kind is not None and socket is not None:
        specs.insert(0, make_spec(kind, socket, words))
    elif kind is not None or socket is not None or words:
        raise UsageError("a device needs a kind and a --socket")
    if not specs:
        raise UsageError("nothing to serve: name a device and its --socket, or --device")
    if len({os.path.abspath(spec.socket) for spec in specs}) != len(specs):
        raise UsageError("two devices with one socket")
    return specs


def _raise_file_limit() -> None:
    """A client's interrupts are a descriptor each, and more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _serve(devices: Sequence[ServedSpec], mode: int, wire: bool) -> int:
    """``mode``: permissions of the sockets; ``wire``: a line for every message."""
    from pvfio.silicon import TableBus
    from pvfio.vfio_user.server import DeviceServer

    with ExitStack() as stack, trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        servers, functions = [], []
        for spec in devices:
            bus = TableBus()
            function = _make(spec, bus)
            stack.callback(function.close)
            functions.append(function)
            log = _printer(spec) if wire else None
            servers.append(DeviceServer(function, bus, path=spec.socket, mode=mode, log=log))
        async with trio.open_nursery() as nursery:
            for spec, server in zip(devices, servers, strict=True):
                await nursery.start(server.run)
                print(f"pvfio: {spec.kind} at {spec.socket}", flush=True)
            print("pvfio: ready", flush=True)
            async for _ in signals:
                nursery.cancel_scope.cancel()
        return 0 if await _sync(functions) else 1


async def _sync(functions: Sequence[PciFunction]) -> bool:
    """Images are on disk when this returns; whether all are."""
    from pvfio.devices.nvme import NvmeDevice

    done = [await function.namespaces.sync() for function in functions if isinstance(function, NvmeDevice)]
    if not all(done):
        print("pvfio: not all of an image could be written to disk", file=sys.stderr)
    return all(done)


def _printer(spec: ServedSpec) -> Callable[[str], None]:
    name = spec.socket.name

    def write(line: str) -> None:
        print(f"{name} {line}", file=sys.stderr)

    return write


def _make(spec: ServedSpec, bus: TableBus) -> PciFunction:
    try:
        return _MAKERS[spec.kind](spec, bus)
    except ValueError as error:
        raise UsageError(f"{spec.kind}: {error}") from None


def _make_nvme(spec: ServedSpec, bus: TableBus) -> PciFunction:
    from pvfio.devices.nvme import NamespaceSpec, NvmeConfig, NvmeDevice

    words = spec.words
    images: tuple[Path, ...] = words.get(_MANY, ())
    kept = {"lba_shift": words.get("lba", _lba_shift("512")), "read_only": words.get("read-only", False)}
    namespaces = [NamespaceSpec(size=0, image=image, **kept) for image in images]
    if "size" in words or not images:
        namespaces.append(NamespaceSpec(size=words.get("size", 1 << 30), **kept))
    limits = {"queues": words["queues"]} if "queues" in words else {}
    return NvmeDevice(
        bus,
        engine="thread",
        config=NvmeConfig(poll_doorbells=True, serial=words.get("serial", ""), **limits),
        namespaces=namespaces,
        ats=False,
        identity=os.path.abspath(images[0] if images else spec.socket),
    )


def _make_dsa(spec: ServedSpec, bus: TableBus) -> PciFunction:
    from pvfio.devices.dsa import DsaConfig, DsaDevice

    name = spec.words.get("preset")
    config = DsaConfig() if name is None else DsaConfig.preset(name)
    return DsaDevice(bus, engine="thread", config=config, ats=False)


def _make_testdev(spec: ServedSpec, bus: TableBus) -> PciFunction:
    from pvfio.devices.testdev import TestDevice

    return TestDevice(bus, **spec.words)


_MAKERS: Final = {"nvme": _make_nvme, "dsa": _make_dsa, "testdev": _make_testdev}
