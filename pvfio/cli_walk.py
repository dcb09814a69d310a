"""``pvfio walk``: one translation, level by level, through both stages.

It asks the IOMMU what it would do (no IOTLB, nothing logged) and shows every entry it reads. The tables of
the first stage lie in guest memory at guest physical addresses, so reaching each of them is a walk of the
second stage by itself; ``--all`` shows those entries too.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pvfio.cli_run import DEVICE, UsageError, machine_config, run_program
from pvfio.errors import VfioError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pvfio.cli_run import Platform
    from pvfio.machine import Machine
    from pvfio.silicon import Walk, WalkStep
    from pvfio.vfio import Container, DmaBuffer

__all__ = ["Translation", "render", "run", "show", "translate"]

_LEVELS = {1: "PT", 2: "PD", 3: "PDPT", 4: "PML4", 5: "PML5"}  # names of Intel SDM 3A 4.5
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class Translation:
    """A walk and what it was of; ``gpa`` is ``None`` where stage 1 gave none."""

    device: str
    iova: int
    walk: Walk
    gpa: int | None

    @property
    def line(self) -> str:
        """In one line."""
        if self.walk.hpa is not None:
            middle = f"GPA {self.gpa:#x}" if self.gpa is not None else "GPA the same"
            return f"IOVA {self.iova:#x} -> {middle} -> HPA {self.walk.hpa:#x}"
        fault = self.walk.fault
        if fault is None:
            return f"IOVA {self.iova:#x} -> no translation"
        level = f", level {fault.level}" if fault.level else ""
        where = f"stage {fault.stage}{level}" if fault.stage else "the device's domain"
        return f"IOVA {self.iova:#x} -> fault: {fault.reason_name} ({where})"


def translate(machine: Machine, name: str, iova: int) -> Translation:
    """What the IOMMU makes of a read of ``iova`` by a device. ``KeyError`` for an unknown name."""
    walk = machine.devices[name].requester.walk(iova)
    leaves = [step for step in walk.steps if step.stage == 1 and step.leaf]
    gpa = None
    if leaves:
        offset = iova & ((1 << _page_bits(leaves[0].level)) - 1)
        gpa = leaves[0].output + offset
    return Translation(machine.devices[name].pci_name, iova, walk, gpa)


def _page_bits(level: int) -> int:
    return 12 + 9 * (level - 1)


def _human(size: int) -> str:
    for unit in ("", "Ki", "Mi", "Gi"):
        if size < 1024:
            return f"{size} {unit}B"
        size //= 1024
    return f"{size} TiB"


def _size_of(step: WalkStep) -> str:
    """The size of the page a leaf maps; an AMD leaf may encode another than its level's (AMD IOMMU 2.2.6)."""
    if step.stage == 2 and step.entry >> 9 & 7 == 7:
        return "page"
    return f"{_human(1 << _page_bits(step.level))} page"


def _row(step: WalkStep) -> tuple[str, ...]:
    stage = "1 GPA" if step.stage == 1 else "2 HPA" if not step.depth else "+ HPA"
    level = f"{step.level} {_LEVELS[step.level]}" if step.stage == 1 else str(step.level)
    if step.leaf:
        leads = f"{step.output:#x} ({_size_of(step)})"
    else:
        leads = f"{step.output:#x} (table)" if step.output else "not present"
    return stage, level, f"{step.table:#x}", str(step.index), f"{step.entry:#x}", leads


def render(translation: Translation, *, full: bool = False) -> RenderableType:
    """A table for people, at most 80 columns wide.

    With ``full`` also the second-stage entries that are read on the way to first-stage tables.
    """
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("stage", "level", "table", "index", "entry", "leads to"):
        table.add_column(column, no_wrap=True, justify="right" if column in ("index", "entry") else "left")
    shown = [step for step in translation.walk.steps if full or not step.depth]
    for before, step in zip([None, *shown], shown, strict=False):
        if before is not None and before.stage != step.stage and not full:
            table.add_row()
        table.add_row(*_row(step))
    return table


def _split(translation: Translation) -> str:
    """How stage 1 cuts the IOVA up."""
    steps = [step for step in translation.walk.steps if step.stage == 1]
    parts = [f"{_LEVELS[step.level]} {step.index}" for step in steps]
    if steps and steps[-1].leaf:
        parts.append(f"offset {translation.iova & ((1 << _page_bits(steps[-1].level)) - 1):#x}")
    return " | ".join(parts)


_EXPLANATION = """\
An IOVA is what the device puts on the bus. Stage 1, the guest's page table (x86-64 format, in guest memory), \
makes it a GPA, a guest physical address. Stage 2, the host's table ({stage2} format), makes that an HPA, where \
the byte is. Addresses in stage 1's table are GPAs themselves, so each of its tables is reached through stage 2 \
first: {reads} entries are read in all{hint}."""


def run(addresses: list[int], platform: Platform, size: int, *, unmapped: bool, full: bool, ram: int) -> int:
    """Runs the command; its exit status."""

    async def main() -> int:
        from pvfio.machine import Machine

        if not 0 < size <= ram:
            raise UsageError(f"a buffer of {size} bytes does not fit into {ram} bytes of guest memory")
        if unmapped and not addresses:
            raise UsageError("--unmapped needs an IOVA")
        async with Machine(machine_config(platform, "inline", ram)) as machine:
            async with machine.open(DEVICE) as device:
                wanted = list(addresses)
                if not wanted:
                    buffer = await _map(device.container, None, size)
                    assert buffer.iova is not None
                    wanted = [buffer.iova]
                for number, iova in enumerate(wanted):
                    if addresses and not unmapped:
                        await _map_around(device.container, iova, size)
                    if number:
                        print()
                    show(translate(machine, DEVICE, iova), platform, full=full)
        return 0

    return run_program(main)


async def _map(container: Container, iova: int | None, size: int) -> DmaBuffer:
    try:
        return await container.alloc(size, iova=iova, align=2 << 20 if size >= 2 << 20 else _PAGE)
    except MemoryError:
        raise UsageError(f"a buffer of {size} bytes does not fit into guest memory") from None


async def _map_around(container: Container, iova: int, size: int) -> None:
    """Maps a buffer whose first page holds ``iova``; where the IOMMU refuses, the walk shows why nothing
    can be there.
    """
    alignment = 2 << 20 if size >= 2 << 20 else _PAGE
    try:
        await _map(container, iova // alignment * alignment, size)
    except VfioError as error:
        print(f"not mapped: {error}")


def show(translation: Translation, platform: Platform, *, full: bool = False) -> None:
    """Prints a translation and what it means."""
    from rich.console import Console

    print(f"IOVA {translation.iova:#x}, read by {translation.device}")
    print(f"    {_split(translation) or 'no table is read'}")
    steps = translation.walk.steps
    if steps:
        print()
        console = Console(highlight=False)
        console.print(render(translation, full=full), width=max(console.width, 80))
        hint = " (+ above)" if full else " (pvfio walk --all shows them)"
        stage2 = {"intel": "VT-d second stage", "amd": "AMD v1"}[platform]
        text = _EXPLANATION.format(stage2=stage2, reads=len(steps), hint=hint)
        print("\n" + textwrap.fill(text, 79) + "\n")
    print(translation.line)
