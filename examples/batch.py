"""Thousands of descriptors from numpy: gather every other page of one buffer into another, in batches of 512."""

import time

import numpy as np
import trio

import pvfio
from pvfio.drivers.dsa import DsaDriver, descriptors

PAGE, PAGES = 4096, 4096


async def main() -> None:
    async with pvfio.open_device("emu:dsa") as device, DsaDriver(device) as dsa:
        src = await device.container.alloc(2 * PAGES * PAGE)
        dst = await device.container.alloc(PAGES * PAGE)
        assert src.iova is not None
        assert dst.iova is not None
        words = np.asarray(src).view(np.uint64)
        words[:] = np.arange(words.size)

        pages = np.arange(PAGES, dtype=np.uint64) * PAGE
        moves = descriptors.memmove(dst.iova + pages, src.iova + 2 * pages, PAGE)
        began = time.perf_counter()
        for part in moves.reshape(-1, 512):
            await dsa.wq(0).batch(part)
        took = time.perf_counter() - began

        expected = np.asarray(src).reshape(PAGES, 2, PAGE)[:, 0]
        assert np.array_equal(np.asarray(dst).reshape(PAGES, PAGE), expected)
        print(f"{PAGES} pages gathered in {took * 1e3:.1f} ms, {PAGES * PAGE / took / 1e9:.2f} GB/s")


if __name__ == "__main__":
    trio.run(main)
