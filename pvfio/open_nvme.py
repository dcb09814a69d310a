"""The words of ``emu:nvme?...``: what an emulated NVMe controller is made of, from a URI's query.

One description serves all its namespaces. What a URI cannot say, ``DeviceSpec(kind="nvme", options=...)`` can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

__all__ = ["KEYS", "nvme_options"]

_PROTECTION: Final = 8


def _flag(value: str) -> bool:
    if value not in ("0", "1"):
        raise ValueError(f"0 or 1, not {value!r}")
    return value == "1"


def _lba_shift(value: str) -> int:
    if value not in ("512", "4096"):
        raise ValueError(f"blocks have 512 or 4096 bytes, not {value!r}")
    return int(value).bit_length() - 1


_NAMESPACE: Final[dict[str, tuple[str, Callable[[str], Any]]]] = {
    "image": ("image", str),
    "size": ("size", lambda value: int(value) << 20),
    "lba": ("lba_shift", _lba_shift),
    "metadata": ("metadata", int),
    "pi": ("protection", int),
    "read_only": ("read_only", _flag),
    "volatile_cache": ("volatile_cache", _flag),
}
_CONTROLLER: Final[dict[str, tuple[str, Callable[[str], Any]]]] = {
    "queues": ("queues", int),
    "capacity": ("capacity", lambda value: int(value) << 20),
    "serial": ("serial", str),
}
KEYS: Final = (*_NAMESPACE, *_CONTROLLER, "namespaces", "seed")
"""``size`` and ``capacity`` are in MiB; ``namespaces`` is how many there are; ``image`` is one namespace."""


def nvme_options(words: Mapping[str, str]) -> dict[str, Any]:
    """``DeviceSpec.options`` for these words, all of ``KEYS``. Raises ``ValueError`` for a value that cannot be."""
    from pvfio.devices.nvme import NamespaceSpec, NvmeConfig

    spec = _values(_NAMESPACE, words)
    if "image" in spec:
        spec.setdefault("size", 0)
        spec.setdefault("lba_shift", 9)
    if spec.get("protection"):
        spec.setdefault("metadata", _PROTECTION)
    count = int(words.get("namespaces", "1"))
    if count < 0 or (count > 1 and "image" in spec):
        raise ValueError(f"namespaces: {count}")
    return {
        "config": NvmeConfig(**_values(_CONTROLLER, words)),
        "namespaces": (NamespaceSpec(**spec),) * count,
        "seed": int(words.get("seed", "0")),
    }


def _values(
    table: Mapping[str, tuple[str, Callable[[str], Any]]], words: Mapping[str, str]
) -> dict[str, Any]:
    made = {}
    for word, (name, convert) in table.items():
        if word in words:
            try:
                made[name] = convert(words[word])
            except ValueError as error:
                raise ValueError(f"{word}: {error}") from error
    return made
