"""Truncate tables by position to the positions that a target's calls can have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from eoracc.passes.graph.names import ROPE_ROWS
from eoracc.passes.graph.tensors import register_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["cut_position_tables"]


def cut_position_tables(graph: ir.Graph, length: int) -> None:
    """Keep the first ``length`` rows of each table that ``position_ids`` are looked up in.

    Those are the rows for short texts in the tables of a LongRoPE model, whose original length
    ``length`` does not exceed.

    A checkpoint's tables of cosines and sines go as far as its family was trained, which is a
    quarter of Gemma-3-270M's engine where 2048 are enough.

    Args:
      graph: is changed.
      length: positions are below it.
    """
    _look_up_short_texts(graph)
    cut: dict[ir.Value, ir.Value] = {}
    for node in list(_lookups(graph)):
        table = node.inputs[0]
        if table is None or table.const_value is None:
            continue
        rows = table.const_value.numpy()
        if len(rows) <= length:
            continue
        if table not in cut:
            tensor = ir.tensor(rows[:length].copy(), name=f"{table.name}.first_{length}")
            cut[table] = register_tensor(graph, tensor)
        node.replace_input_with(0, cut[table])
    for table in cut:
        if not table.uses():
            graph.initializers.pop(str(table.name))


def _look_up_short_texts(graph: ir.Graph) -> None:
    """Look up the positions themselves where a row's length would decide."""
    values = (value for node in graph for value in node.outputs)
    rows = next((value for value in values if value.name == ROPE_ROWS), None)
    if rows is None:
        return
    positions = next(value for value in graph.inputs if value.name == "position_ids")
    for use in list(rows.uses()):
        use.node.replace_input_with(use.idx, positions)


def _lookups(graph: ir.Graph) -> Iterator[ir.Node]:
    """``Gather`` nodes along rows whose indices are the input ``position_ids``."""
    positions = next((value for value in graph.inputs if value.name == "position_ids"), None)
    for use in positions.uses() if positions is not None else ():
        node = use.node
        if node.op_type == "Gather" and use.idx == 1 and node.attributes.get_int("axis", 0) == 0:
            yield node
