"""dmatest's parameters in the module's form."""

from __future__ import annotations

from typing import Any

import pytest

from pvfio.workloads.parameters import PARAMETERS, parse_parameters

GOOD: list[tuple[str, dict[str, Any]]] = [
    ("", {}),
    ("iterations=10", {"iterations": 10}),
    ("iterations=0x10", {"iterations": 16}),
    ("iterations=1 iterations=2", {"iterations": 2}),
    ("dmatest.timeout=2000 dmatest.run=1", {"timeout": 2000}),
    ("timeout=-1 alignment=-1", {"timeout": -1, "alignment": -1}),
    ("channel=dma0chan0", {"channel": [(0, 0)]}),
    ("channel=dma1chan7 channel=dma0chan2", {"channel": [(1, 7), (0, 2)]}),
    ("dmatest=0", {"dmatest": False}),
    ("dmatest=1", {"dmatest": True}),
    ("noverify norandom=1 polled=Y", {"noverify": True, "norandom": True, "polled": True}),
    ("polled=0 verbose=off norandom=N", {"polled": False, "verbose": False, "norandom": False}),
    ("test_buf_size=64K transfer-size=0x100", {"test_buf_size": 65536, "transfer_size": 256}),
    ("threads_per_chan=4 max_channels=2 run", {"threads_per_chan": 4, "max_channels": 2}),
]

BAD: list[tuple[str, str]] = [
    ("extra", "unknown parameter 'extra'"),
    ("iteration=5", "unknown parameter 'iteration'"),
    ("=5", "unknown parameter ''"),
    ("xor_sources=3", "unknown parameter"),
    ("iterations", "needs a value"),
    ("channel", "needs a value"),
    ("iterations=", "iterations: '' is not a number"),
    ("iterations=ten", "'ten' is not a number"),
    ("iterations=1.5", "not a number"),
    ("noverify=maybe", "noverify: 'maybe' is not 0 or 1"),
    ("noverify=", "'' is not 0 or 1"),
    ("dmatest=2", "memset"),
    ("dmatest=", "memset"),
    ("channel=dma0", "'dma0' is not a channel"),
    ("channel=dma0chan", "not a channel"),
    ("channel=dma-1chan0", "not a channel"),
    ("channel=dma99999chan0", "not a channel"),
    ("test_buf_size=1T", "not a size"),
    ("run=0", "does nothing"),
]


@pytest.mark.parametrize(("text", "found"), GOOD)
def test_good(text: str, found: dict[str, Any]) -> None:
    assert parse_parameters(text.split()) == found


@pytest.mark.parametrize(("text", "words"), BAD)
def test_bad(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_parameters(text.split())


def test_the_parameters_of_the_module_that_make_sense() -> None:
    assert {
        "channel", "threads_per_chan", "max_channels", "iterations", "test_buf_size", "timeout", "noverify",
        "norandom", "alignment", "transfer_size", "polled", "dmatest",
    } <= set(PARAMETERS)  # fmt: skip
