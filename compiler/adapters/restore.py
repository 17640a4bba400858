"""Restore the backbone of an artifact: the compressed graph, to solve further adapters on.

:func:`restore_backbone` puts an artifact's weights back into the graph of the original checkpoint.
The operands are bit for bit those of the build and have the same places in the graph, so an adapter
solved later equals one solved in the build.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from eoracc.compiler.sweep.backbone import Backbone
from eoracc.errors import ArtifactError
from eoracc.passes.graph.linears import Linear, find_again
from eoracc.passes.graph.stored import dense_weight, stored_factors
from eoracc.plugins.op import DENSE_OP, DOMAIN, FACTORS, FUSED_OP, GATHER_OP, Input
from eoracc.plugins.operands.codes import CHUNK, TILE, untile_integers, untile_rows
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight
from eoracc.printable import quoted
from eoracc.runtime.artifact.genai_files import read_model_files
from eoracc.runtime.artifact.graph_file import read_graph, stored_array
from eoracc.runtime.artifact.graph_names import LINEARS_KEY

__all__ = ["restore_backbone"]

Array = NDArray[Any]


def restore_backbone(folder: Path, model: ir.Model) -> Backbone:
    """Give the original graph the weights and the compensation that an artifact holds.

    Args:
      folder: the artifact, verified.
      model: of the checkpoint that the artifact was built from, after the build's model passes;
        changed in place.

    Raises:
      ArtifactError: the artifact's model cannot be read, is of another graph, or has quantized
        factors of a weight: what these were before is in neither of the two.
    """
    path = read_model_files(folder).model
    stored = read_graph(path)
    backbone = Backbone.of(model)
    _restore_products(stored, backbone)
    linears = {linear.name: linear for linear in backbone.linears}
    _restore_dense(stored, linears)
    by_codes: dict[str, Linear] = {}
    tables = {table.name: table for table in backbone.embeddings}
    for node in stored.graph:
        if node.domain != DOMAIN or node.op_type == DENSE_OP:
            continue
        if not node.attributes.get_int("layout", 0):
            raise ArtifactError(f"{path}: is of an older layout: build the artifact again")
        if node.op_type == FUSED_OP:
            for name, weight, factors in _linears_of(node):
                if name not in linears:
                    raise ArtifactError(f"{path}: {_unknown(name, linears)}")
                linears[name].quantize(weight)
                linears[name].compensate(factors)
                by_codes[_codes(node)] = linears[name]
    for node in stored.graph:
        if node.op_type == GATHER_OP and str(node.name) in tables:
            table = tables[str(node.name)]
            rows, _ = table.shape
            head = by_codes.get(_codes(node))
            if head is not None and head.quantized is not None:
                table.quantize(head.quantized, tied=head)
            else:
                table.quantize(_weight(node, slice(0, rows), out_features=rows))
    return backbone


def _restore_products(stored: ir.Model, backbone: Backbone) -> None:
    """Factorise the weights whose two factors ``stored`` holds as they are."""
    initializers = stored.graph.initializers
    for linear in backbone.linears:
        u, v = (initializers.get(f"{linear.name}.{factor}.weight") for factor in ("u", "v"))
        if u is not None and v is not None:
            assert u.const_value is not None and v.const_value is not None  # noqa: PT018, S101 - they are initializers
            linear.factorize(u.const_value.numpy().T, v.const_value.numpy().T)
    backbone.linears = find_again(backbone.model, backbone.linears)


def _restore_dense(stored: ir.Model, linears: Mapping[str, Linear]) -> None:
    """Give ``linears`` the pruned weights of floats that ``stored`` holds, and their factors."""
    for node in stored.graph:
        linear = linears.get(str(node.name))
        weight = None if linear is None else dense_weight(node)
        if linear is None or weight is None:
            continue
        linear.quantize(weight)
        if node.op_type == DENSE_OP:
            linear.compensate(stored_factors(node))


def _unknown(name: str, linears: Collection[str]) -> str:
    """What is to be said of a linear that the model has not."""
    whole, _, factor = name.rpartition(".")
    if factor in ("v", "u") and whole in linears:
        return (
            f"has quantized factors of {quoted(whole)}, and not what they were before: adapters of "
            "factorised models are solved with the build, under 'adapters' in model.yaml"
        )
    return f"has a linear {quoted(name)}, which the model has not"


def _linears_of(node: ir.Node) -> list[tuple[str, NBitsWeight, LowRank | None]]:
    """Name, weight and factors of each linear in a fused node."""
    names = node.metadata_props.get(LINEARS_KEY, str(node.name)).split(",")
    total = node.attributes["N"].as_int()
    parts = list(node.attributes.get_ints("parts", ())) or [total]
    # Linears that were packed before compression are one, of several parts that share lora_a.
    sizes = parts if len(names) > 1 else [total]
    edges = np.cumsum([0, *sizes])
    backbone = []
    for part, name in enumerate(names):
        rows = slice(int(edges[part]), int(edges[part + 1]))
        weight = _weight(node, rows, out_features=total)
        backbone.append((name, weight, _factors(node, part, len(parts), rows)))
    return backbone


def _weight(node: ir.Node, rows: slice, *, out_features: int) -> NBitsWeight:
    """Rows of the weight of a linear or a table, whose operands stand at the same places."""
    packed, scales, zero_points = (
        _array(node, place) for place in (Input.B, Input.scales, Input.zero_points)
    )
    assert packed is not None and scales is not None  # noqa: PT018, S101 - the op has them
    whole = NBitsWeight.from_tiles(
        packed,
        scales,
        zero_points,
        bits=node.attributes["bits"].as_int(),
        group_size=node.attributes["block_size"].as_int(),
        out_features=out_features,
        in_features=node.attributes["K"].as_int(),
    )
    return NBitsWeight(
        packed=whole.packed[rows],
        scales=whole.scales[rows],
        zero_points=None if whole.zero_points is None else whole.zero_points[rows],
        bits=whole.bits,
        group_size=whole.group_size,
        in_features=whole.in_features,
    )


def _codes(node: ir.Node) -> str:
    """Name of the codes, which a table shares with a tied head."""
    value = node.inputs[Input.B]
    assert value is not None  # noqa: S101 - the op has it
    return str(value.name)


def _factors(node: ir.Node, part: int, parts: int, rows: slice) -> LowRank | None:
    """Factors of one linear, without the ranks that only fill up tiles."""
    stored = {name: array for name in FACTORS if (array := _array(node, name)) is not None}
    if not stored:
        return None
    columns, total = node.attributes["K"].as_int(), node.attributes["N"].as_int()
    if "ranks" in node.attributes:
        stored = _own_tiles(node, part, stored)
        total = node.attributes["parts"].as_ints()[part]
        part, parts, rows = 0, 1, slice(0, total)
    a, b = stored[Input.lora_a], stored[Input.lora_b]
    tiles = len(a) // parts
    if not tiles:
        return None
    a = a[part * tiles : (part + 1) * tiles]
    if a.dtype != np.uint8:
        rank = b.shape[1]
        down, up = untile_rows(a, rank), untile_rows(b, total)[rows]
        own = _used(down)
        return LowRank(lora_a=down[:own], lora_b=up[:, :own])
    bits = _code_bits(a, columns)
    rank = min(tiles * TILE, b.shape[1] * CHUNK[bits])
    down = untile_integers(a, bits=bits, rows=rank, columns=columns)
    up = untile_integers(b, bits=bits, rows=total, columns=rank)[rows]
    own_scale = stored[Input.lora_a_scale][part * tiles * TILE :][:rank]
    own = _used(own_scale[:, None])
    return LowRank(
        lora_a=down[:own],
        lora_b=np.ascontiguousarray(up[:, :own]),
        lora_a_scale=own_scale[:own],
        lora_b_scale=stored[Input.lora_b_scale][rows],
        bits=bits,
    )


def _own_tiles(node: ir.Node, part: int, stored: Mapping[Input, Array]) -> dict[Input, Array]:
    """The tiles of a part with a rank of its own, as those of a linear alone."""
    sizes, ranks = (node.attributes[name].as_ints() for name in ("parts", "ranks"))
    a, b = stored[Input.lora_a], stored[Input.lora_b]
    chunk = 1
    if b.dtype == np.uint8:
        chunk = CHUNK[_code_bits(a, node.attributes["K"].as_int())]
    tiles = [-(-rank // TILE) for rank in ranks]
    lengths = {
        Input.lora_a: tiles,
        Input.lora_b: [
            size // TILE * -(-rank // chunk) for size, rank in zip(sizes, ranks, strict=True)
        ],
        Input.lora_a_scale: [TILE * count for count in tiles],
        Input.lora_b_scale: [size if rank else 0 for size, rank in zip(sizes, ranks, strict=True)],
    }
    own = {
        name: array[sum(lengths[name][:part]) :][: lengths[name][part]]
        for name, array in stored.items()
    }
    columns = -(-ranks[part] // chunk)
    own[Input.lora_b] = own[Input.lora_b].reshape(sizes[part] // TILE, columns, b.shape[-1])
    return own


def _code_bits(lora_a: Array, columns: int) -> int:
    """Code width of integer factors."""
    return 8 if lora_a.shape[1] == -(-columns // CHUNK[8]) else 4


def _used(rows: Array) -> int:
    """How many rows there are up to the last one that is not zero."""
    return int(np.flatnonzero(rows.any(axis=1)).max(initial=-1)) + 1


def _array(node: ir.Node, position: int) -> Array | None:
    return stored_array(node.inputs[position]) if position < len(node.inputs) else None
