"""``pvfio devices``: the PCI functions of the default machine, in lspci's manner, as the guest kernel sees
them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pvfio.cli_run import Platform, machine_config, run_program

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pvfio.guest.pci import PciDevice

__all__ = ["describe", "run"]

_RAM = 64 << 20

# The PCI ID database's names for what this project has.
_CLASSES = {
    0x010802: "Non-Volatile memory controller",
    0x088000: "System peripheral",
    0x00FF00: "Unclassified device",
}
_VENDORS = {0x8086: "Intel Corporation", 0x1414: "Microsoft Corporation", 0x1234: "QEMU"}
_DEVICES = {
    (0x8086, 0x0B25): "Data Streaming Accelerator",
    (0x1414, 0x00A9): "Hyper-V NVMe Controller",
    (0x1234, 0x11E8): "Educational device",
}
_CAPABILITIES = {0x01: "Power Management", 0x05: "MSI", 0x10: "Express", 0x11: "MSI-X"}
_EXTENDED = {
    0x000F: "Address Translation Service (ATS)",
    0x0013: "Page Request Interface (PRI)",
    0x001B: "PASID",
}


def _size(size: int) -> str:
    for unit in ("", "K", "M", "G"):
        if size < 1024:
            return f"{size}{unit}"
        size //= 1024
    return f"{size}T"


def _capabilities(device: PciDevice) -> Iterator[str]:
    for number, name in _CAPABILITIES.items():
        offset = device.find_capability(number)
        if offset is None:
            continue
        if device.msix is not None and number == 0x11:
            msix = device.msix
            where = f"vector table: BAR={msix.table_bar} offset={msix.table_offset:08x}"
            yield f"Capabilities: [{offset:02x}] MSI-X: Count={msix.vectors}, {where}"
        else:
            yield f"Capabilities: [{offset:02x}] {name}"
    for number, name in _EXTENDED.items():
        offset = device.find_extended_capability(number)
        if offset is not None:
            yield f"Capabilities: [{offset:03x}] {name}"


def describe(device: PciDevice, *, verbose: bool) -> list[str]:
    """The lines about one function; the first one alone, or also BARs, capabilities, group, driver."""
    kind = _CLASSES.get(device.class_code, f"Class [{device.class_code >> 8:04x}]")
    vendor = _VENDORS.get(device.vendor, f"Vendor [{device.vendor:04x}]")
    model = _DEVICES.get((device.vendor, device.device), "Device")
    head = f"{device.name} {kind} [{device.class_code >> 8:04x}]: {vendor} {model} "
    head += f"[{device.vendor:04x}:{device.device:04x}] (rev {device.revision:02x})"
    if not verbose:
        return [head]
    lines = [f"Subsystem: [{device.subsystem_vendor:04x}:{device.subsystem:04x}]"]
    if device.iommu_group is not None:
        lines.append(f"IOMMU group: {device.iommu_group.id}")
    lines.append(f"Logical device ID: {device.logical_id:#x}")
    for bar in device.bars:
        width = "64-bit" if bar.is_64bit else "32-bit"
        prefetch = "prefetchable" if bar.prefetchable else "non-prefetchable"
        lines.append(f"Region {bar.index}: Memory ({width}, {prefetch}) [size={_size(bar.size)}]")
    if device.interrupt_pin:
        lines.append(f"Interrupt: pin {chr(ord('A') + device.interrupt_pin - 1)}")
    lines.extend(_capabilities(device))
    lines.append(f"Kernel driver in use: {device.driver or 'none'}")
    return [head, *("\t" + line for line in lines)]


def run(platform: Platform, *, verbose: bool) -> int:
    """Runs the command; its exit status."""

    async def main() -> int:
        from pvfio.machine import Machine

        async with Machine(machine_config(platform, "inline", _RAM)) as machine:
            for number, device in enumerate(machine.kernel.devices):
                if verbose and number:
                    print()
                print("\n".join(describe(device, verbose=verbose)))
        return 0

    return run_program(main)
