"""Live migration of a VM with an assigned device, in miniature: memory moves while the device writes to it.

Pre-copy: all of guest memory is copied once, then, round after round, what the host's dirty log says was written
meanwhile, until little is left; then the device stops, and one last round makes the copy complete. The log knows
DMA; what the VM's own CPUs write is another log's business (EPT or NPT dirty bits), and here is told apart at the end.
"""

import numpy as np
import trio

from pvfio.drivers.dsa import DsaDriver, descriptors
from pvfio.machine import Machine, MachineConfig

PAGE = 4096
BUFFER = 4 << 20
FEW = 48  # pages that one may send while the VM stands still


async def keep_writing(dsa: DsaDriver, target: int, stop: trio.Event) -> None:
    """The VM's workload: fills that wander over a buffer, now here, now there."""
    rng = np.random.default_rng(1)
    while not stop.is_set():
        hot = rng.integers(0, BUFFER // PAGE, 8).astype(np.uint64) * np.uint64(PAGE)
        fills = descriptors.fill(np.uint64(target) + hot, int(rng.integers(1 << 62)), 100)
        await (await dsa.wq(0).submit(fills)).wait()
        await trio.sleep(0.0005)


async def main() -> None:
    async with Machine(MachineConfig(ram=64 << 20)) as machine, machine.open("dsa0") as device:
        memory, log = machine.memory, machine.hypervisor.dirty
        buffer = await device.container.alloc(BUFFER)
        assert buffer.iova is not None
        here = np.frombuffer(memory.view_guest(0, memory.size), np.uint8).reshape(-1, PAGE)

        async with DsaDriver(device) as dsa, trio.open_nursery() as vm:
            stop = trio.Event()
            vm.start_soon(keep_writing, dsa, buffer.iova, stop)
            await trio.sleep(0.01)

            log.start()
            there = here.copy()  # every page once; the device goes on
            print(f"round 0: {len(here)} pages, all there are")
            for number in range(1, 30):
                await trio.sleep(0.02 / number)  # the less there was to send, the sooner the next round
                dirty = log.harvest() // np.uint64(PAGE)
                there[dirty] = here[dirty]
                if number <= 3 or len(dirty) <= FEW:
                    print(f"round {number}: {len(dirty)} pages written by DMA meanwhile")
                if len(dirty) <= FEW:
                    break
            stop.set()

        # The VM stands still: its device has stopped, and writes no more.
        dirty = log.harvest() // np.uint64(PAGE)
        there[dirty] = here[dirty]
        print(f"the last round: {len(dirty)} pages while the VM stands still")
        log.stop()

        first = memory.runs(buffer.vaddr, 1)[0][0] // PAGE
        moved = slice(first, first + BUFFER // PAGE)
        same = np.array_equal(there[moved], here[moved])
        print(f"the device's buffer arrived whole: {same}")
        others = np.flatnonzero((there != here).any(axis=1))
        print(f"pages that differ, written by the CPU: {len(others)}")


if __name__ == "__main__":
    trio.run(main)
