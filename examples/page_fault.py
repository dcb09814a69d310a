"""Breaks something on purpose: a buffer goes away in the middle of a batch. Who says what about it?"""

import numpy as np
import trio

from pvfio.abi import lib
from pvfio.drivers.dsa import DsaDriver, completion_name, descriptors
from pvfio.machine import Machine, MachineConfig

PAGE = 4096


async def main() -> None:
    # An inline engine runs in whoever rings the doorbell, and can be stopped before any descriptor.
    async with Machine(MachineConfig(engine="inline")) as machine, machine.open("dsa0") as device:
        engine = machine.devices["dsa0"].function.engine  # type: ignore[attr-defined]
        src = await device.container.alloc(4 * PAGE)
        dst = await device.container.alloc(4 * PAGE)
        assert src.iova is not None
        assert dst.iova is not None
        iova, pages = dst.iova, np.arange(4, dtype=np.uint64) * PAGE

        async with DsaDriver(device) as dsa:
            wq = dsa.wq(0)
            batch = await wq.alloc_batch(4)
            moves = descriptors.memmove(iova + pages, src.iova + pages, PAGE, flags=lib.IDXD_OP_FLAG_FENCE)
            descriptors.words_of(batch.descriptors)[:] = descriptors.words_of(moves)

            engine.stop_before(3)  # the batch, two of its members, then stop
            submission = wq.batch_nowait(batch)
            await device.container.unmap_dma(iova, 4 * PAGE)
            engine.resume()
            (record,) = await submission.wait()

            print(
                f"the batch: {completion_name(record['status'])}, {record['descs_completed']} members completed"
            )
            for number, member in enumerate(batch.records):
                print(
                    f"  member {number}: {completion_name(member['status'])}, fault address {member['fault_addr']:#x}"
                )
            for fault in machine.hypervisor.faults.snapshot():
                print(f"the fault log: {fault}")

            print(await dsa.recover())
            await device.container.map_dma(iova, dst)
            records = await wq.batch(batch)
            print(f"mapped again: {sorted(completion_name(status) for status in set(records['status']))}")


if __name__ == "__main__":
    trio.run(main)
