"""The first blocks of a large model, which stand for all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from onnx_ir.passes.common import RemoveUnusedNodesPass

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PretrainedConfig

__all__ = ["compared_blocks", "first_blocks", "shorten"]

_PARAMETERS = 1 << 29
"""Weights of decoder blocks that are compared: 2 GiB in float32."""

_LEAST = 2

_OF_BLOCK = re.compile(r"(?:^|/)layers\.(\d+)/")
_LAST_OF_BLOCK = re.compile(r"(?:^|/)layers\.(\d+)/[^/]+$")
_CACHE = re.compile(r"^(?:past_key_values|present)\.(\d+)\.")


def compared_blocks(config: PretrainedConfig, parameters: int) -> int:
    """How many blocks of a model are compared, the first ones.

    Args:
      config: of the model.
      parameters: weights of all blocks together.

    Returns:
      All, where they have 2**29 weights at most. Otherwise those that keep to this number, but two
      at least, and one of each kind: fields with an entry for each block tell them apart.
    """
    blocks = int(config.num_hidden_layers)
    kinds = list(zip(*(entries for _, entries in _per_block(config)), strict=True))
    every_kind = 1 + max((kinds.index(kind) for kind in set(kinds)), default=0)
    within = _PARAMETERS * blocks // max(parameters, 1)
    return min(blocks, max(_LEAST, every_kind, within))


def shorten(config: PretrainedConfig, blocks: int) -> None:
    """Make ``config`` that of the model's first ``blocks`` blocks."""
    for name, entries in list(_per_block(config)):
        setattr(config, name, entries[:blocks])
    config.num_hidden_layers = blocks


def _per_block(config: PretrainedConfig) -> Iterator[tuple[str, list[object]]]:
    for name, entries in vars(config).items():
        if isinstance(entries, list) and len(entries) == config.num_hidden_layers:
            yield name, entries


def first_blocks(model: ir.Model, blocks: int) -> ir.Model | None:
    """A copy of ``model`` with its first ``blocks`` blocks, and what follows the last.

    Args:
      model: the graph; its tensors are shared.
      blocks: fewer than it has.

    Returns:
      None where another value than the last one of block ``blocks - 1`` enters the next.
    """
    shortened = model.clone()
    graph = shortened.graph
    ends: dict[int, ir.Value] = {}
    crossing: set[ir.Value] = set()
    for node in graph:
        name = str(node.name)
        if last := _LAST_OF_BLOCK.search(name):
            ends[int(last[1])] = node.outputs[0]
        if (of := _OF_BLOCK.search(name)) and int(of[1]) == blocks:
            crossing |= {value for value in node.inputs if value and _block(value) == blocks - 1}
    if crossing != {ends.get(blocks - 1)}:
        return None
    ends[max(ends)].replace_all_uses_with(ends[blocks - 1])
    for values in (graph.outputs, graph.inputs):
        for value in list(values):
            cache = _CACHE.match(str(value.name))
            if cache and int(cache[1]) >= blocks:
                values.remove(value)
        if values is graph.outputs:
            RemoveUnusedNodesPass()(shortened)
    return shortened


def _block(value: ir.Value) -> int | None:
    node = value.producer()
    of = _OF_BLOCK.search(str(node.name)) if node is not None else None
    return int(of[1]) if of else None
