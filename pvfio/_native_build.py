"""Builds ``pvfio._native``, the one abi3 extension, from every C source of the project.

Each room of C describes its public face twice in one place: ``<room>.h`` for C, and, for cffi, the part of
the same header between ``/* cffi: begin */`` and ``/* cffi: end */``. The headers of ``pvfio/abi`` are cdef
text as a whole. Environment: ``PVFIO_SANITIZE=address,undefined`` adds those sanitizers, ``PVFIO_WERROR=1``
makes every warning an error.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from cffi import FFI

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent

# Where C lives.
ROOMS = ("memory", "pagetable", "silicon", "guest", "vfio", "vfio_user", "devices", "drivers", "workloads")
# In the order in which the structures depend on each other.
ABI_HEADERS = ("hyperv", "vfio", "iommufd", "pci", "dsa", "nvme", "vfio_user")
ROOM_HEADERS = (
    "memory/memory.h",
    "memory/guard.h",
    "memory/mapped.h",
    "pagetable/pagetable.h",
    "silicon/bus.h",
    "silicon/crc16_t10.h",
    "silicon/iommu.h",
    "silicon/bench.h",
    "silicon/engine.h",
    "silicon/mmio.h",
    "silicon/msix.h",
    "guest/mappings.h",
    "guest/laps.h",
    "guest/type1_map.h",
    "guest/iova.h",
    "guest/dma_map.h",
    "guest/shadow.h",
    "vfio/wait.h",
    "vfio_user/channel.h",
    "vfio_user/channel_dma.h",
    "vfio_user/remote.h",
    "devices/dsa/crc32c.h",
    "devices/dsa/dsa_engine.h",
    "devices/rogue.h",
    "devices/nvme/nvme_engine.h",
    "drivers/nvme/ring.h",
    "workloads/bench_loops.h",
    "workloads/latency.h",
    "workloads/map_loop.h",
    "workloads/fio/blocks.h",
    "workloads/fio/slots.h",
)
CFFI_PART = re.compile(r"/\* cffi: begin \*/(.*?)/\* cffi: end \*/", re.DOTALL)


def abi_text() -> str:
    """The wire structures as one cdef text."""
    return "\n".join((PACKAGE / "abi" / f"{name}.h").read_text() for name in ABI_HEADERS)


def room_text(header: str) -> str:
    """The part of a room's header that Python sees."""
    parts = CFFI_PART.findall((PACKAGE / header).read_text())
    if not parts:
        raise ValueError(f"{header} has no cffi part")
    return "\n".join(parts)


def files(suffix: str, rooms: tuple[str, ...]) -> list[str]:
    """The files of a kind in these rooms, relative to the project's root; each room may be a symbolic link."""
    found = (path for room in rooms for path in sorted((PACKAGE / room).glob(f"**/*.{suffix}")))
    return [str(path.relative_to(ROOT)) for path in found]


def sources() -> list[str]:
    """Every C source, relative to the project's root, by the name it is imported under."""
    return files("c", ROOMS)


def flags() -> tuple[list[str], list[str]]:
    """Compiler and linker arguments for this build."""
    compile_args = ["-std=c11", "-D_GNU_SOURCE", "-O3", "-g1", "-fno-strict-aliasing", "-pthread"]
    compile_args += ["-Wall", "-Wextra"]
    link_args = ["-pthread"]
    sanitize = os.environ.get("PVFIO_SANITIZE")
    if sanitize:
        extra = [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
        compile_args += [*extra, "-O1"]
        link_args += extra
    if os.environ.get("PVFIO_WERROR"):
        compile_args.append("-Werror")
    return compile_args, link_args


def make_ffi() -> FFI:
    """The FFI object that setuptools compiles."""
    ffi = FFI()
    ffi.cdef(abi_text(), packed=True)
    for header in ROOM_HEADERS:
        ffi.cdef(room_text(header))
    includes = "\n".join(f'#include "{header}"' for header in ROOM_HEADERS)
    compile_args, link_args = flags()
    ffi.set_source(
        "pvfio._native",
        f'#pragma GCC diagnostic ignored "-Wunused-parameter"\n#include "abi/abi.h"\n{includes}\n',
        sources=sources(),
        include_dirs=["pvfio"],
        depends=files("h", ("abi", *ROOMS)),
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )
    return ffi


ffibuilder = make_ffi()

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
