"""A guest small enough to hold: one hypercall page, and the packing of the structures, over a real host."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pvfio.abi import ffi, lib
from pvfio.devices.testdev import TestDevice
from pvfio.host import Hypervisor, IommuConfig
from pvfio.memory import GuestMemory
from pvfio.pagetable import Format, PageTable, Perm

GUID = uuid.UUID("6f8d3b0e-1a2c-4d5e-8f90-a1b2c3d4e5f6")
RAM = 8 << 20


class Guest:
    """Memory, host, one bus with three test functions, and a page for hypercalls."""

    SELF = lib.HV_PARTITION_ID_SELF

    def __init__(self, config: IommuConfig | None = None, *, functions: int = 3, ram: int = RAM) -> None:
        self.memory = GuestMemory(ram)
        self.host = Hypervisor(self.memory, config)
        self.bus = self.host.add_bus(GUID, 1)
        self.devices = [self.bus.plug(n, TestDevice) for n in range(functions)]
        for n in range(functions):
            self.bus.config_write(n, lib.PCI_COMMAND, 2, lib.PCI_COMMAND_MEMORY | lib.PCI_COMMAND_MASTER)
        self.page = self.memory.guest_page()
        self.output = self.page + 2048

    @staticmethod
    def domain(number: int, kind: int = 1) -> int:
        return number << 32 | kind

    def device_id(self, function: int) -> int:
        return self.bus.logical_id(function)

    def pack(self, name: str, fields: dict[str, Any]) -> bytes:
        """The bytes of an input structure; partition, VTL and padding are right unless given."""
        raw = ffi.new(f"struct hv_input_{name} *")
        entries = fields.pop("entries", ())
        inner = {"partition_id", "owner_vtl", "padding", "domain_id"}
        head = raw.device_domain if hasattr(raw, "device_domain") else raw
        head.partition_id = self.SELF
        for field, value in fields.items():
            setattr(head if field in inner else raw, field, value)
        size = ffi.sizeof(f"struct hv_input_{name}")
        return bytes(ffi.buffer(raw, size)) + b"".join(int(e).to_bytes(8, "little") for e in entries)

    def call(
        self,
        name: str,
        *,
        control: int | None = None,
        gpa: int | None = None,
        output: int | None = None,
        vp: int = 0,
        **fields: Any,
    ) -> int:
        """Fills the page, calls, returns the result word. ``control`` replaces the right control word."""
        code = getattr(lib, f"HVCALL_{name.upper()}")
        word = code | len(fields.get("entries", ())) << lib.HV_HYPERCALL_REP_COUNT_SHIFT
        data = self.pack(name, fields)
        view = self.memory.view_guest(self.page, 4096)
        view[: len(data)] = data
        return self.host.hypercall(
            vp,
            word if control is None else control,
            self.page if gpa is None else gpa,
            self.output if output is None else output,
        )

    def reply(self, name: str) -> Any:
        """The output structure of the last call."""
        raw = ffi.new(f"struct hv_output_{name} *")
        ffi.buffer(raw)[:] = self.memory.view_guest(self.output, ffi.sizeof(raw[0]))
        return raw

    def table(self, levels: int = 4) -> PageTable:
        return PageTable(Format.X86_64, self.memory, owner="guest", levels=levels)

    def make(self, number: int, *, flags: int, root: int = 0) -> int:
        """Creates and configures a domain; its id word."""
        domain = self.domain(number)
        assert self.call("create_device_domain", domain_id=domain) == 0
        configured = self.call("configure_device_domain", domain_id=domain, flags=flags, page_table_root=root)
        assert configured == 0
        return domain

    def attach(self, domain: int, function: int) -> None:
        status = self.call("attach_device_domain", domain_id=domain, device_id=self.device_id(function))
        assert status == 0

    def mapped(self, number: int, function: int, iova: int = 0x10000) -> tuple[int, PageTable, int]:
        """A paging domain with one page mapped and a function in it: (domain, table, GPA of the page)."""
        table = self.table()
        gpa = self.memory.guest_page()
        table.map_range(iova, gpa, 4096, Perm.READ | Perm.WRITE)
        domain = self.make(number, flags=lib.HV_DOMAIN_TRANSLATION_ENABLED, root=table.root)
        self.attach(domain, function)
        return domain, table, gpa

    def close(self) -> None:
        self.host.close()


@pytest.fixture
def make_guest() -> Iterator[Callable[..., Guest]]:
    """``make_guest(config, ...)``: a guest that is closed after the test."""
    made: list[Guest] = []

    def make(config: IommuConfig | None = None, **kwargs: Any) -> Guest:
        made.append(Guest(config, **kwargs))
        return made[-1]

    yield make
    for guest in made:
        guest.close()


@pytest.fixture
def guest(make_guest: Callable[..., Guest]) -> Guest:
    return make_guest()
