"""dtype_of: numpy sees a structure's bytes where C put them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cffi import FFI

from pvfio.abi import dtype_of

PACKED = """
struct inner { uint8_t a; uint32_t b; };
struct nested { uint16_t head; struct inner one; struct inner many[3]; uint8_t grid[2][3]; char tag[4]; };
struct overlapping {
    uint32_t kind;
    union { uint64_t address; struct { uint32_t low; uint32_t high; }; };
    union { uint32_t word; uint8_t bytes[4]; } named;
};
union bare { uint64_t whole; uint16_t parts[4]; };
struct flexible { uint32_t argsz; uint32_t flags; uint64_t ranges[]; };
struct of_structs { uint16_t count; struct inner items[]; };
struct empty_array { uint32_t argsz; uint8_t data[0]; };
struct only_signed { int8_t a; int16_t b; int32_t c; int64_t d; };
struct bits { uint32_t plain; uint32_t low : 4; uint32_t high : 28; };
struct bits_below { uint8_t pad; struct bits inner[2]; };
struct bits_anonymous { union { uint32_t word; struct { uint32_t low : 8; uint32_t rest : 24; }; }; };
struct pointer { uint8_t *where; };
struct floating { double x; };
struct boolean { _Bool yes; };
struct opaque;
enum choice { ONE, TWO };
"""


@pytest.fixture(scope="module")
def packed() -> FFI:
    ffi = FFI()
    ffi.cdef(PACKED, packed=True)
    return ffi


@pytest.fixture(scope="module")
def padded() -> FFI:
    ffi = FFI()
    ffi.cdef(
        "struct inner { uint8_t a; uint32_t b; uint8_t c; }; struct outer { uint8_t x; struct inner y[2]; };"
    )
    return ffi


def layout(dtype: np.dtype[Any]) -> dict[str, tuple[str, int]]:
    """Field name -> (numpy's description of its type, offset)."""
    assert dtype.fields is not None
    return {name: (str(field[0]), int(field[1])) for name, field in dtype.fields.items()}


def test_offsets_are_the_compilers(packed: FFI, padded: FFI) -> None:
    assert layout(dtype_of(packed.typeof("struct inner"))) == {"a": ("uint8", 0), "b": ("uint32", 1)}
    dtype = dtype_of(padded.typeof("struct inner"))
    assert layout(dtype) == {"a": ("uint8", 0), "b": ("uint32", 4), "c": ("uint8", 8)}
    assert dtype.itemsize == 12
    outer = dtype_of(padded.typeof("struct outer"))
    assert outer.fields is not None
    assert outer.fields["y"][1] == 4
    assert outer.itemsize == 28


def test_nested_structures_and_arrays(packed: FFI) -> None:
    inner = dtype_of(packed.typeof("struct inner"))
    dtype = dtype_of(packed.typeof("struct nested"))
    assert dtype["one"] == inner
    assert dtype["many"].subdtype == (inner, (3,))
    assert dtype["grid"].shape == (2, 3)
    assert dtype["tag"].subdtype == (np.dtype("S1"), (4,))
    assert dtype.itemsize == packed.sizeof("struct nested") == 2 + 5 + 15 + 6 + 4


def test_unions_overlap(packed: FFI) -> None:
    dtype = dtype_of(packed.typeof("struct overlapping"))
    assert list(dtype.names or ()) == ["kind", "address", "low", "high", "named"]
    record = np.zeros((), dtype)
    record["address"] = 0x1122334455667788
    assert (int(record["low"]), int(record["high"])) == (0x55667788, 0x11223344)
    record["named"]["word"] = 0x04030201
    assert record["named"]["bytes"].tolist() == [1, 2, 3, 4]
    assert dtype.itemsize == 16
    assert layout(dtype_of(packed.typeof("union bare")))["parts"] == ("('<u2', (4,))", 0)


@pytest.mark.parametrize(
    ("name", "names", "itemsize"),
    [
        ("struct flexible", ["argsz", "flags"], 8),
        ("struct of_structs", ["count"], 2),
        ("struct empty_array", ["argsz", "data"], 4),
    ],
)
def test_a_flexible_structure_ends_at_its_fixed_part(
    packed: FFI, name: str, names: list[str], itemsize: int
) -> None:
    dtype = dtype_of(packed.typeof(name))
    assert list(dtype.names or ()) == names
    assert dtype.itemsize == itemsize == packed.sizeof(name)


def test_signed_words_and_byte_order(packed: FFI) -> None:
    record = np.zeros((), dtype_of(packed.typeof("struct only_signed")))
    for name in "abcd":
        record[name] = -2
    assert record.tobytes() == b"".join((-2).to_bytes(n, "little", signed=True) for n in (1, 2, 4, 8))


def test_numpy_and_c_share_the_bytes(packed: FFI) -> None:
    structs = packed.new("struct nested[4]")
    memory: Any = packed.buffer(structs)
    array = np.frombuffer(memory, dtype_of(packed.typeof("struct nested")))
    array["one"]["b"] = [10, 20, 30, 40]
    structs[2].many[1].b = 0xDEADBEEF
    assert [s.one.b for s in structs] == [10, 20, 30, 40]
    assert array[2]["many"][1]["b"] == 0xDEADBEEF


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("struct bits", "struct bits.low is a bit field"),
        ("struct bits_below", "struct bits.low is a bit field"),
        ("struct bits_anonymous", "low is a bit field"),
        ("struct pointer", r"no numpy form of uint8_t \*"),
        ("struct inner *", r"no numpy form of struct inner \*"),
        ("struct inner[]", r"no numpy form of struct inner\[\]"),
        ("struct floating", "no numpy form of double"),
        ("struct boolean", "no numpy form of _Bool"),
        ("struct opaque", "no numpy form of struct opaque"),
        ("enum choice", "no numpy form of enum choice"),
        ("void", "no numpy form of void"),
    ],
)
def test_what_numpy_cannot_see_is_refused(packed: FFI, name: str, reason: str) -> None:
    with pytest.raises(TypeError, match=reason):
        dtype_of(packed.typeof(name))


def test_a_name_is_looked_up_in_the_extension_and_kept() -> None:
    assert dtype_of("uint16_t") == np.dtype("<u2")
    assert dtype_of("uint64_t[8]") is dtype_of("uint64_t[8]")
