"""The backends that the conformance cases run on: the same cases, whatever carries the requests out.

A case gets a ``Bench``: a backend, the names of two devices like ``pvfio.devices.testdev`` in groups of their
own, and what is not a backend's own about it. Cases marked ``every_shape`` run on machines of several shapes
(shapes.py), where the backend has a machine.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from pvfio.vfio import Backend
from tests.conformance.shapes import Shape, shapes

SERVED = ("vfio-user", "vfio-user, memory not shared")
BACKENDS = ("emulated", *SERVED)
MIB = 1 << 20


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``backend``, and ``shape`` of the machine: the teaching device has no engine thread, so its cases leave that axis
    out, and a device in another process has no machine that could have a shape.
    """
    every = metafunc.definition.get_closest_marker("every_shape")
    if "backend" in metafunc.fixturenames:
        taken = shapes(without=["engine"]) if every else [Shape()]
        rows = [("emulated", shape) for shape in taken]
        if "autojump_clock" not in metafunc.fixturenames:  # another process's time does not jump
            rows += [(served, Shape()) for served in SERVED]
        names = [f"{name}, {shape}" if name == "emulated" and every else name for name, shape in rows]
        metafunc.parametrize(("backend", "shape"), rows, indirect=["backend"], ids=names)
    elif "shape" in metafunc.fixturenames and every:
        metafunc.parametrize("shape", shapes(), ids=str)


@pytest.fixture
def shape() -> Shape:
    """The default one."""
    return Shape()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """``needs``: cases that not every backend can have, each by the property it takes."""
    callspec = getattr(item, "callspec", None)
    served = callspec is not None and callspec.params.get("backend") in SERVED
    for mark in item.iter_markers("needs"):
        if served:
            pytest.skip(SERVED_HAVE_NOT[mark.args[0]])


SERVED_HAVE_NOT = {"memlock": "shared memory is not locked"}


@dataclass
class Bench:
    """``names``: two devices. ``dma_entry_limit``: how many mappings a container may have. ``pins()``: how many
    pins are left of all containers.

    What not every backend has: ``nowait``: maps and register accesses never wait. ``memlock``: 8 MiB may be locked.
    ``refuses_submissions``: a BAR that takes none says so; a posted message has no answer that could.
    """

    vfio: Backend
    names: tuple[str, str]
    dma_entry_limit: int
    pins: Callable[[], int]
    nowait: bool = True
    memlock: bool = True
    refuses_submissions: bool = True


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The sockets of two teaching devices of another process."""
    paths = [str(tmp_path_factory.mktemp("served") / name) for name in ("first", "second")]
    devices = [part for path in paths for part in ("--device", f"testdev,socket={path},intx=on")]
    with Serving(*devices):
        yield paths[0], paths[1]


class Serving:
    """``pvfio serve`` with these arguments in another process, while it is entered; it must end well."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-P", "-m", "pvfio", "serve", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> subprocess.Popen[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line == "pvfio: ready\n":
                return self.process
        raise RuntimeError(f"pvfio serve ended with status {self.process.wait()}")

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        assert self.process.wait(30) == 0
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
async def backend(
    request: pytest.FixtureRequest, emulated: Callable[..., Awaitable[Any]], shape: Shape
) -> AsyncIterator[Bench]:
    """One bench per backend."""
    name = request.param
    if name == "emulated":
        yield await _emulated(emulated, shape)
    else:
        async with _served(request.getfixturevalue("served"), share=name == "vfio-user") as bench:
            yield bench


async def _emulated(emulated: Callable[..., Awaitable[Any]], shape: Shape) -> Bench:
    from pvfio.guest.type1 import Type1Limits

    limit = 16
    machine = await emulated(
        buses=(1, 1),
        limits=Type1Limits(dma_entry_limit=limit, memlock=8 * MIB),
        config=shape.iommu(),
        intx=True,
        ats=True,
    )
    first, second = machine.names
    return Bench(machine.vfio, (first, second), limit, lambda: machine.memory.stats().pins)


@asynccontextmanager
async def _served(paths: tuple[str, str], *, share: bool) -> AsyncIterator[Bench]:
    from pvfio.vfio_user.client import VfioUserVfio

    limit = 40
    async with VfioUserVfio(paths, ram=64 * MIB, share=share, max_dma_maps=limit) as vfio:
        yield Bench(
            vfio,
            paths,
            limit,
            lambda: sum(memory.stats().pins for memory in vfio.memories.values()),
            nowait=False,
            memlock=False,
            refuses_submissions=False,
        )
