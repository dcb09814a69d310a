"""``open_device``: one line from a URI to an open device, whatever is behind it.

``emu:KIND`` starts an embedded machine with one such device and takes it down again, ``vfio-user:PATH`` is a device
that another process serves. A backend is imported when a URI names it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

if TYPE_CHECKING:
    from pvfio.machine import MachineConfig
    from pvfio.vfio import Device
    from pvfio.vfio_user.client import VfioUserVfio

__all__ = ["open_device"]

_EMU_KEYS = ("engine", "platform", "ram")
_SERVED_KEYS = ("deadline", "ram", "share")


def _emulated(kind: str, query: str) -> MachineConfig:
    from pvfio.host.config import IommuConfig
    from pvfio.machine import DeviceSpec, MachineConfig

    options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=True)) if query else {}
    keys: tuple[str, ...] = _EMU_KEYS
    if kind == "nvme":
        from pvfio.open_nvme import KEYS, nvme_options

        keys += KEYS
    for key in options:
        if key not in keys:
            raise ValueError(f"emu:{kind} takes {', '.join(keys)}, not {key!r}")
    platform = options.get("platform", "intel")
    if platform not in ("intel", "amd"):
        raise ValueError(f"platform is intel or amd, not {platform!r}")
    engine = options.get("engine", "thread")
    if engine not in ("inline", "thread"):
        raise ValueError(f"engine is inline or thread, not {engine!r}")
    return MachineConfig(
        iommu=IommuConfig(platform="amd" if platform == "amd" else "intel"),
        engine="inline" if engine == "inline" else "thread",
        ram=int(options.get("ram", 512)) << 20,
        devices=(DeviceSpec(kind=kind, options=nvme_options(options) if kind == "nvme" else {}),),
    )


def _served(path: str, query: str) -> VfioUserVfio:
    from pvfio.vfio_user.client import VfioUserVfio

    options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=True)) if query else {}
    for key in options:
        if key not in _SERVED_KEYS:
            raise ValueError(f"vfio-user:PATH takes {', '.join(_SERVED_KEYS)}, not {key!r}")
    share = options.get("share", "yes")
    if share not in ("yes", "no"):
        raise ValueError(f"share is yes or no, not {share!r}")
    deadline = float(options.get("deadline", 5))
    if not 0 < deadline < float("inf"):
        raise ValueError(f"deadline is a number of seconds, not {deadline}")
    return VfioUserVfio(
        [path], ram=int(options.get("ram", 512)) << 20, deadline=deadline, share=share == "yes"
    )


@asynccontextmanager
async def open_device(uri: str) -> AsyncIterator[Device]:
    """Opens the device a URI names: ``async with pvfio.open_device("emu:dsa") as device``.

    ``emu:KIND[?platform=intel|amd&engine=thread|inline&ram=MiB]``: an embedded machine with one device of
    that kind, in a container of its own (``device.container``). An NVMe controller has more words
    (``emu:nvme?image=/tmp/disk.img``, ``emu:nvme?size=1024&lba=512``): see open_nvme.py.

    ``vfio-user:PATH[?ram=MiB&share=yes|no&deadline=seconds]``: the device that is served at a Unix socket, in a
    container of its own with so much DMA memory; ``share=no`` keeps that memory from the server, which then asks
    for every byte; ``deadline`` is what its answers may take.

    Leaving closes the device, which resets it, and the machine. Raises ``ValueError`` for a URI that names nothing,
    and ``VfioError`` as opening does. Cancelled: everything is closed.
    """
    scheme, _, rest = uri.partition(":")
    kind, _, query = rest.partition("?")
    if scheme == "vfio-user" and kind:
        async with _served(kind, query) as vfio, vfio.open_device(kind) as device:
            yield device
        return
    if scheme != "emu" or not kind:
        raise ValueError(f"not a device URI: {uri!r} (emu:KIND, vfio-user:PATH)")
    from pvfio.machine import Machine

    config = _emulated(kind, query)
    async with Machine(config) as machine, machine.open(f"{kind}0") as device:
        yield device
