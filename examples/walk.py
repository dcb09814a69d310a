"""Where is a byte really? One translation looked at: IOVA -> GPA (the guest's table) -> HPA (the host's table)."""

import trio

from pvfio.machine import Machine, MachineConfig


async def main() -> None:
    async with Machine(MachineConfig()) as machine, machine.open("dsa0") as device:
        buffer = await device.container.alloc(8192)
        iova = buffer.iova
        assert iova is not None
        buffer[:5] = list(b"Hello")

        # What the IOMMU would do with a read by the device: nothing is cached or logged by asking.
        walk = machine.devices["dsa0"].requester.walk(iova)
        for step in walk.steps:
            why = "to reach a table of stage 1" if step.depth else f"level {step.level}"
            kind = "leaf" if step.leaf else "table"
            print(
                f"stage {step.stage} {why:28} entry {step.index:3} = {step.entry:#018x} -> {kind} {step.output:#x}"
            )
        assert walk.hpa is not None
        print(
            f"IOVA {iova:#x} is HPA {walk.hpa:#x}, where there is {bytes(machine.memory.view_host(walk.hpa, 5))!r}"
        )

        # The guest sees the same byte at a GPA that is never equal to the HPA.
        (gpa, _), *_ = machine.memory.runs(buffer.vaddr, 1)
        print(f"GPA {gpa:#x} -> HPA {machine.memory.gpa_to_hpa(gpa):#x}")

        await device.container.unmap_dma(iova, 8192)
        fault = machine.devices["dsa0"].requester.walk(iova).fault
        assert fault is not None
        print(f"unmapped: {fault.reason_name} at stage {fault.stage} level {fault.level}")


if __name__ == "__main__":
    trio.run(main)
