"""Print how long ``import pvfio`` takes and how long a machine with one DSA takes to start, best of five each.

Each import runs in a new interpreter, which times the statement itself; the machine starts in one that has
imported everything already. Run by hand and by .ci/run: it states figures and judges nothing.
"""

from __future__ import annotations

import subprocess
import sys
import time

RUNS = 5
TIME_THE_IMPORT = """
import time
start = time.perf_counter()
import pvfio
print(time.perf_counter() - start)
"""


def import_seconds() -> float:
    """Seconds that ``import pvfio`` takes in a new interpreter."""
    command = [sys.executable, "-P", "-c", TIME_THE_IMPORT]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


async def start_seconds() -> float:
    """Seconds from asking for a machine with one DSA until it can be used."""
    from pvfio import Machine, MachineConfig

    start = time.perf_counter()
    async with Machine(MachineConfig()):
        ready = time.perf_counter()
    return ready - start


def main() -> None:
    """Print both figures."""
    best = min(import_seconds() for _ in range(RUNS))
    print(f"import pvfio: {best * 1e3:.1f} ms, best of {RUNS}")

    import trio

    best = min(trio.run(start_seconds) for _ in range(RUNS))
    print(f"a machine with one DSA starts in {best * 1e3:.1f} ms, best of {RUNS}")


if __name__ == "__main__":
    main()
