"""The layers of an engine, read from the builder's log.

An engine that is built ahead cannot be opened without a GPU's driver, so the engine inspector is of
no use here. The builder's own log says the same: its verbose part lists every layer of the finished
engine with its constants, and the rest what memory it takes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["EngineLayers", "read_layers"]

_LISTING = "Layers:"
_TYPE = re.compile(r"LayerType: (\w+)")
_CONSTANTS = re.compile(r"Constants: \[(.*?)\], Outputs: \[")
_CONSTANT = re.compile(r"Name: (\S+), Dimensions: \[([\d,]*)\][^}]*?Datatype: (\w+)")
_WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")
_BITS = {
    "Bool": 8,
    "BFloat16": 16,
    "Float": 32,
    "Half": 16,
    "Int4": 4,
    "Int8": 8,
    "Int32": 32,
    "Int64": 64,
    "UInt8": 8,
}


@dataclass(frozen=True)
class EngineLayers:
    """An engine as its builder describes it.

    Attributes:
      layers: how many layers it has of each type, the most frequent first.
      constant_bytes: bytes of their constants by data type, the largest first. Each name counts
        once; a weight that several profiles or layers read has a name in each.
      weight_bytes: what all weights take in a GPU's memory, each once.
      activation_bytes: what activations take there at most, over all profiles.
    """

    layers: Mapping[str, int]
    constant_bytes: Mapping[str, int]
    weight_bytes: int
    activation_bytes: int


def read_layers(messages: Iterable[str]) -> EngineLayers:
    r"""Parse the builder's log.

    Args:
      messages: of its log, verbose ones included, built with detailed profiling verbosity.

    >>> described = read_layers([
    ...     "Total Activation Memory: 4096 bytes", "Total Weights Memory: 640 bytes",
    ...     "Layers:\nName: a, LayerType: gemm, Inputs: [], Constants: [ { Name: w, Dimensions: "
    ...     "[32,40], Strides: [40,1], Datatype: Int4, Format: (Linear) }], Outputs: []\n"])
    >>> described.layers, described.constant_bytes, described.weight_bytes
    ({'gemm': 1}, {'Int4': 640}, 640)
    """
    layers: Counter[str] = Counter()
    constants: dict[str, tuple[str, int]] = {}
    weights = activations = 0
    for message in messages:
        if found := _WEIGHTS.match(message):
            weights += int(found[1])
        elif found := _ACTIVATIONS.match(message):
            activations = max(activations, int(found[1]))
        elif message.startswith(_LISTING):
            for line in message.splitlines():
                layers.update(_TYPE.findall(line))
                for part in _CONSTANTS.findall(line):
                    for name, sizes, dtype in _CONSTANT.findall(part):
                        count = math.prod(int(size) for size in sizes.split(",") if size)
                        constants[name] = dtype, (count * _BITS.get(dtype, 0) + 7) // 8
    by_type: Counter[str] = Counter()
    for dtype, size in constants.values():
        by_type[dtype] += size
    return EngineLayers(
        layers=dict(layers.most_common()),
        constant_bytes=dict(by_type.most_common()),
        weight_bytes=weights,
        activation_bytes=activations,
    )
