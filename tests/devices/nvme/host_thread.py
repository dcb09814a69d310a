"""A controller on a machine in a thread of its own, for tests that are no coroutines."""

from __future__ import annotations

import queue
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import trio

from pvfio.abi import lib
from pvfio.devices.nvme import NamespaceSpec, NvmeConfig
from pvfio.silicon import EngineKind
from tests.devices.nvme.rig import Platform, Rig, on_machine

Result = TypeVar("Result")


class HostThread:
    """A thread in which trio runs a machine; ``call`` runs a coroutine function there and returns what it returns."""

    def __init__(
        self, config: NvmeConfig, namespaces: Sequence[NamespaceSpec], platform: Platform, engine: EngineKind
    ) -> None:
        self._arguments = (config, namespaces, platform, engine)
        self._started: queue.Queue[BaseException | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        error = self._started.get()
        if error is not None:
            self._thread.join()
            raise error

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:
            self._started.put(error)

    async def _main(self) -> None:
        async with on_machine(*self._arguments) as (self.rig, self.device):
            self._token = trio.lowlevel.current_trio_token()
            self._over = trio.Event()
            self._started.put(None)
            await self._over.wait()

    def call(self, function: Callable[..., Awaitable[Result]], *arguments: Any) -> Result:
        """Waits for a coroutine of the machine's thread. Raises what it raises."""
        result: Result = trio.from_thread.run(function, *arguments, trio_token=self._token)
        return result

    def close(self) -> None:
        """Takes the machine down."""
        trio.from_thread.run_sync(self._over.set, trio_token=self._token)
        self._thread.join()


def switch_on(rig: Rig) -> None:
    """Memory decoding and bus mastering, which a reset of the function clears."""
    rig.config_write(lib.PCI_COMMAND, 2, lib.PCI_COMMAND_MEMORY | lib.PCI_COMMAND_MASTER)
