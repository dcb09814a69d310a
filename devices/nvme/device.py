"""The NVMe controller as a PCI function: BAR 0, the task that executes admin commands, resets.

Doorbells go straight to C; registers are in registers.py, admin commands in admin*.py and their subjects' modules.
See nvme_engine.h for what the data path does not model.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import time
from collections.abc import Sequence
from typing import Any, Final

import trio

from pvfio.abi import ffi, lib
from pvfio.devices.data_path import DataPath
from pvfio.devices.nvme.admin import Admin
from pvfio.devices.nvme.admin_namespaces import NamespaceCommands
from pvfio.devices.nvme.admin_queues import QueueCommands
from pvfio.devices.nvme.background import Background
from pvfio.devices.nvme.config import NamespaceSpec, NvmeConfig, serial_of
from pvfio.devices.nvme.events import AsyncEvents
from pvfio.devices.nvme.faults import FaultHooks
from pvfio.devices.nvme.feature_table import UNTIL_POWER_CYCLE, FeatureTable
from pvfio.devices.nvme.features import Features
from pvfio.devices.nvme.firmware import Firmware
from pvfio.devices.nvme.format import Format
from pvfio.devices.nvme.health import Health
from pvfio.devices.nvme.identify import Identify
from pvfio.devices.nvme.keep_alive import KeepAlive
from pvfio.devices.nvme.logs import Logs
from pvfio.devices.nvme.namespaces import Namespaces
from pvfio.devices.nvme.registers import EnableSettings, Registers
from pvfio.devices.nvme.sanitize import Sanitize
from pvfio.devices.nvme.self_test import SelfTest
from pvfio.devices.pci import Bar, MsixLayout, PciFunction, PciIdentity
from pvfio.silicon import BusMaster, Engine, EngineKind
from pvfio.silicon.engine import KINDS

__all__ = ["NvmeDevice"]

_BAR: Final = lib.NVME_BAR
_DOORBELLS: Final[int] = lib.NVME_REG_DBS


class NvmeDevice(FaultHooks, PciFunction):
    """An NVMe controller.

    ``engine``: ``"inline"`` runs commands in whoever rings a doorbell, ``"thread"`` in a thread of the device's own;
    the attribute ``engine`` is its handle. ``identity``: what this controller is called where it is (a machine's name
    for it, a socket's path), of which its serial number is made unless ``config`` has one: to a driver, two controllers
    with the same are one. ``seed``: of injected faults (``inject``). ``health`` is what the drive says of itself. Admin
    commands are executed by ``run``. Raises ``MemoryError``, and ``OSError`` for an image that cannot be opened.
    """

    def __init__(
        self,
        bus: BusMaster,
        *,
        engine: EngineKind = "inline",
        config: NvmeConfig | None = None,
        namespaces: Sequence[NamespaceSpec] = (NamespaceSpec(),),
        identity: str = "nvme",
        ats: bool = True,
        seed: int = 0,
    ) -> None:
        config = config or NvmeConfig()
        config = dataclasses.replace(config, serial=config.serial or serial_of(identity))
        self.nvme_config = config
        msix = MsixLayout(bar=_BAR, offset=config.msix_offset, vectors=config.vector_count)
        size = 1 << (msix.offset + msix.size - 1).bit_length()
        areas = ((_DOORBELLS, config.doorbell_bytes),) if config.poll_doorbells else ()
        super().__init__(
            bus,
            PciIdentity(vendor=config.vendor, device=config.device, class_code=lib.NVME_PCI_CLASS),
            bars=(Bar(index=_BAR, size=size, mmap_areas=areas),),
            msix=msix,
            intx_pin=1,
            ats=ats,
        )
        assert self.msix is not None
        made = lib.pv_nvme_create(_raw(config), bus.ptr, self.msix.ptr, KINDS[engine])
        path = DataPath(made, lib.pv_nvme_engine, lib.pv_nvme_destroy, name="an NVMe controller")
        self._nvme = path.ptr
        self._mmio = path.keeps(lib.pv_nvme_mmio(self._nvme))
        self.engine = Engine(lib.pv_nvme_engine(self._nvme), path, engine)
        self.seed_injections(seed)
        self._gone = False
        self._tell_pin = False
        self.registers = Registers(config, self)
        self._due_changed = trio.Event()
        self._shutdown_wanted = trio.Event()
        self.namespaces = Namespaces(config, self._nvme, namespaces)
        self._make_subjects()

    def _make_subjects(self) -> None:
        """Everything that executes admin commands."""
        config, nvme = self.nvme_config, self._nvme
        self._background = Background()
        self._admin = Admin(nvme, self.bus, self._background.start)
        self.events = AsyncEvents(self._admin)
        self.health = Health(config, nvme, self.events)
        self._queues = QueueCommands(config, self.registers, nvme, self.events)
        self._keep_alive = KeepAlive(self._silent_host)
        self._features = Features(self.namespaces)
        self._firmware = Firmware(config, self.events)
        self._logs = Logs(config, nvme, self._admin, self.events, self._features)
        self._self_test = SelfTest(
            config,
            namespaces=self.namespaces,
            events=self.events,
            health=self.health,
            background=self._background,
        )
        self.sanitize = Sanitize(
            config,
            nvme,
            namespaces=self.namespaces,
            events=self.events,
            firmware=self._firmware,
            admin=self._admin,
            background=self._background,
            begins=lambda: self._self_test.abort(lib.NVME_SELF_TEST_RESULT_SANITIZE),
        )
        self._admin.guard = self.sanitize.guard
        self._logs.hides_blocks = lambda: self.sanitize.hides_blocks
        self._logs.add(
            {
                lib.NVME_LOG_SMART: lambda _: self.health.log(),
                lib.NVME_LOG_FW_SLOT: lambda _: self._firmware.log(),
                lib.NVME_LOG_SELF_TEST: lambda _: self._self_test.log(),
                lib.NVME_LOG_SANITIZE: lambda _: self.sanitize.log(),
            }
        )
        FeatureTable(
            config,
            nvme,
            registers=self.registers,
            queues=self._queues,
            namespaces=self.namespaces,
            events=self.events,
            health=self.health,
            keep_alive=self._keep_alive,
        ).fill(self._features)
        for subject in (
            self._queues,
            self.events,
            self._features,
            self._keep_alive,
            self._firmware,
            self._logs,
            self._self_test,
            self.sanitize,
            NamespaceCommands(self.namespaces, self._namespace_changed, self._features.forget),
            Format(
                self.namespaces,
                self._admin,
                self._background,
                lambda: self._self_test.abort(lib.NVME_SELF_TEST_RESULT_FORMAT),
                self._logs.namespace_changed,
            ),
            Identify(config, self.namespaces, self._firmware),
        ):
            self._admin.register(subject.handlers())

    def _namespace_changed(self, nsid: int) -> None:
        found = self.namespaces.by_nsid.get(nsid)
        if found is None or not found.attached:
            self._self_test.namespace_gone(nsid)
        self._logs.namespace_changed(nsid)

    # The device's task.

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Executes admin commands, shutdowns and timers until cancelled. Commands in progress are left as they are."""
        async with trio.open_nursery() as nursery:
            self._background.nursery = nursery
            nursery.start_soon(self._watch)
            nursery.start_soon(self._keep_alive.run)
            if self.engine.kind == "inline":
                nursery.start_soon(self._kick_when_due)
            task_status.started()
            while True:
                await self._shutdown_wanted.wait()
                self._shutdown_wanted = trio.Event()
                await self.namespaces.sync()
                self.registers.shut_down_complete()

    async def _watch(self) -> None:
        descriptor = lib.pv_nvme_event_fd(self._nvme)
        while True:
            await trio.lowlevel.wait_readable(descriptor)
            events = lib.pv_nvme_events(self._nvme)
            if events & lib.PV_NVME_EVENT_PIN:
                await self._update_pin()
            self._heed(events)

    async def _update_pin(self) -> None:
        """The pin's level as the queues are. Where the engine may wait for somebody, a worker thread waits for it."""
        resets = lib.pv_nvme_resets(self._nvme)
        if self.bus.remote:
            level = await trio.to_thread.run_sync(lib.pv_nvme_pin, self._nvme)
        else:
            level = lib.pv_nvme_pin(self._nvme)
        if resets == lib.pv_nvme_resets(self._nvme):
            tell, self._tell_pin = self._tell_pin, False
            self.set_intx(bool(level), tell=tell)

    def _heed(self, events: int) -> None:
        """What the data path has to say."""
        if events & lib.PV_NVME_EVENT_VANISH:
            self.remove()
        if events & lib.PV_NVME_EVENT_FATAL:
            self.registers.fail()
        if events & lib.PV_NVME_EVENT_DOORBELL:
            self.events.post_error(lib.NVME_AER_ERROR_INVALID_DB_REG, lib.NVME_SC_QID_INVALID)
        if events & lib.PV_NVME_EVENT_DOORBELL_VALUE:
            self.events.post_error(lib.NVME_AER_ERROR_INVALID_DB_VALUE, lib.NVME_SC_INVALID_FIELD)
        if events & lib.PV_NVME_EVENT_TIMER:
            self._due_changed.set()
        if events & lib.PV_NVME_EVENT_ADMIN:
            self._admin.run_waiting()

    async def _kick_when_due(self) -> None:
        """An inline engine has nobody else to run it when a delay or a coalescing time is over."""
        while True:
            due = lib.pv_nvme_due(self._nvme)
            left = max(0.0, (due - time.monotonic_ns()) / 1e9) if due else math.inf
            with trio.move_on_after(left):
                await self._due_changed.wait()
            self._due_changed = trio.Event()
            self.engine.kick()

    # What the registers ask.

    def enable(self, settings: EnableSettings) -> bool:
        """CC.EN was set (NVMe Base 2.0c 3.5.1)."""
        return not lib.pv_nvme_enable(
            self._nvme,
            settings.asq,
            settings.asq_size,
            settings.acq,
            settings.acq_size,
            settings.page_shift,
            settings.arbitration,
        )

    def disable(self) -> None:
        """The reset of the controller: queues and what is in flight go, no completion follows (Base 3.7.2)."""
        self._drop_queues()
        for subject in (self.events, self._queues, self._logs, self._firmware, self.health, self._self_test):
            subject.reset()
        self._keep_alive.set_timeout(0)
        self._features.reset()
        self.set_intx(False)

    def shut_down(self) -> None:
        """CC.SHN: what is cached becomes durable; an abrupt one is no other here."""
        self._shutdown_wanted.set()

    def subsystem_reset(self) -> None:
        """NSSR (Base 3.7.1): as power-on, but for CSTS.NSSRO."""
        self.registers.subsystem_was_reset = True
        self.on_reset()

    def _silent_host(self) -> None:
        """The keep alive timer expired (Base 3.9): logged, fatal, and no command is executed any more."""
        self._admin.log_error(lib.NVME_SC_KAT_EXPIRED)
        self.registers.fail()
        self._drop_queues()

    def _drop_queues(self) -> None:
        """DMA is cancelled meanwhile, so that nothing of it waits for anybody."""
        self.cancel_dma(True)
        lib.pv_nvme_disable(self._nvme)
        self.cancel_dma(False)

    def mask_pin(self, mask: int) -> None:
        """INTMS and INTMC."""
        lib.pv_nvme_mask_pin(self._nvme, mask)

    # The host's side.

    def power_cycle(self) -> None:
        """Power goes and comes back: as a reset, counted; protection until a power cycle ends (Base 8.12).

        Unsafe unless the driver had shut the controller down. What the image has not on disk is not lost by this: kill
        the process for that.
        """
        self.health.power_cycle(unsafe=not self.registers.safe)
        self.registers.subsystem_was_reset = False
        self.function_level_reset()
        for nsid, found in self.namespaces.by_nsid.items():
            if found.protection_state == UNTIL_POWER_CYCLE:
                self.namespaces.protect(nsid, 0)
                self._features.put(lib.NVME_FEAT_WRITE_PROTECT, nsid, 0)

    def remove(self) -> None:
        """Surprise removal: nothing answers any more, loads give ones, no DMA and no interrupt follows. For good."""
        self._gone = True
        self.stop_decoding()
        lib.pv_nvme_decode(self._nvme, 0)
        lib.pv_nvme_disable(self._nvme)
        self.set_intx(False)

    @property
    def removed(self) -> bool:
        """``remove`` happened, by itself or by an injected fault."""
        return self._gone

    # Hooks of the PCI function.

    def config_read(self, offset: int, size: int) -> int:
        """Ones where the device is gone."""
        value = super().config_read(offset, size)
        return (1 << 8 * size) - 1 if self._gone else value

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Dropped where the device is gone. Interrupts go to the pin while MSI-X is off."""
        if not self._gone:
            super().config_write(offset, size, value)
            self._choose_pin()

    def function_level_reset(self) -> None:
        """A device that is gone does not come back by it."""
        if not self._gone:
            super().function_level_reset()

    def mmio_read(self, bar: int, offset: int, size: int) -> int:
        """A register; doorbells read zero."""
        return self.registers.read(offset, size) if offset < _DOORBELLS else 0

    def mmio_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """A register, or a doorbell."""
        if offset < _DOORBELLS:
            self.registers.write(offset, size, value)
        else:
            lib.pv_mmio_store(self._mmio, offset, size, value)

    def mmio(self, bar: int) -> Any:
        """The doorbells' path in C."""
        return self._mmio if bar == _BAR else None

    def bar_fd(self, bar: int) -> int:
        """The doorbell page(s)."""
        return int(lib.pv_nvme_doorbell_fd(self._nvme)) if bar == _BAR else super().bar_fd(bar)

    def renew_memory(self) -> None:
        """Other doorbell pages; the controller must be disabled."""
        if lib.pv_nvme_renew_doorbells(self._nvme):
            raise OSError(errno.ENOMEM, "no room for doorbells")

    def on_enable(self, memory: bool, master: bool) -> None:
        """Doorbells count only while memory decodes; work that waited for bus mastering goes on."""
        lib.pv_nvme_decode(self._nvme, memory)
        self._choose_pin()
        if master:
            self.engine.kick()

    def recheck_intx(self) -> bool:
        """The completion queues' heads may have been stored, in the doorbell page or a buffer, and not been heard."""
        self._tell_pin = True
        self._choose_pin()
        return True

    def _choose_pin(self) -> None:
        lib.pv_nvme_set_pin(self._nvme, not self.msix_enabled)

    def on_reset(self) -> None:
        """Everything as after power-on; what was acknowledged as durable still is."""
        self.disable()
        self.registers.power_on()

    def close(self) -> None:
        """Ends DMA and the engine's work for good."""
        if not self._closed:
            super().close()
            lib.pv_nvme_decode(self._nvme, 0)
            lib.pv_nvme_disable(self._nvme)
            self.engine.pause()
            self.namespaces.close()


def _raw(config: NvmeConfig) -> Any:
    values = {
        "dstrd": config.dstrd,
        "mdts_shift": config.mdts_shift,
        "namespaces": config.max_namespaces,
        "poll_doorbells": config.poll_doorbells,
    }
    return ffi.new("struct pv_nvme_config *", values)
