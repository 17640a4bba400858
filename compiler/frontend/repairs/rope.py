"""Rotary embeddings: the tables that the eager model has, for each layer and each row.

mobius computes its own tables, which leave out options: YaRN's ``attention_factor`` and
``truncate``, all that is special about LongRoPE and proportional embeddings; and it heeds a
``partial_rotary_factor`` that some families ignore. A table that differs is replaced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from eoracc.compiler.frontend.repairs.rope_tables import layer_tables
from eoracc.errors import ModelError, reason
from eoracc.passes.graph.names import ROPE_LENGTHS, ROPE_ROWS
from eoracc.passes.graph.tensors import register_tensor
from eoracc.runtime.artifact.long_rope import LongRope

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PretrainedConfig

    from eoracc.compiler.frontend.repairs.rope_tables import RopeTables

__all__ = ["restore_rope"]


def restore_rope(model: ir.Model, config: PretrainedConfig, folder: Path) -> None:
    """Let every layer rotate its queries and keys as the eager model does.

    Tables that are right, rounding aside, stay as they are. Each row of a LongRoPE model is looked
    up by its own length, and the graph's metadata say at which length the tables change
    (:class:`eoracc.runtime.artifact.long_rope.LongRope`).

    Raises:
      ModelError: the configuration has no rotary embedding that can be computed, or the layers of
        a LongRoPE model have different original lengths.
    """
    graph = model.graph
    attentions = [node for node in graph if node.op_type == "Attention"]
    try:
        layers = layer_tables(config)
    except Exception as error:  # as many kinds as there are wrong fields
        said = f"no entry {error}" if isinstance(error, KeyError) else reason(error)
        raise ModelError(
            f"{folder / 'config.json'}: rope_parameters: transformers cannot compute a rotary "
            f"embedding from them ({said}): correct them"
        ) from error
    if len(attentions) != len(layers):
        return
    lookups = _Lookups(graph)
    for attention, tables in zip(attentions, layers, strict=True):
        rotaries = _rotaries(attention)
        if tables is None or all(_has(rotary, tables) for rotary in rotaries):
            continue
        cos, sin = lookups.of(tables)
        for rotary in rotaries:
            rotary.replace_input_with(1, cos)
            rotary.replace_input_with(2, sin)
            _rotate_columns(rotary, attention, tables.frequencies)
    if not lookups.nodes:
        return
    graph.insert_before(graph[0], lookups.nodes)
    common.RemoveUnusedNodesPass()(model)
    if len(lookups.originals) > 1:
        raise ModelError(
            f"{folder / 'config.json'}: rope_parameters have original_max_position_embeddings of "
            f"{' and '.join(map(str, sorted(lookups.originals)))}: layers that change their rotary "
            "embedding at different lengths are not supported"
        )
    for original in lookups.originals:
        longest = int(config.max_position_embeddings)
        model.metadata_props.update(LongRope(original, longest).to_metadata())


def _rotaries(attention: ir.Node) -> list[ir.Node]:
    """The nodes that rotate queries and keys before this attention; none in a layer without."""
    found = []
    for value in attention.inputs[:2]:
        node = value.producer() if value is not None else None
        while node is not None and node.op_type not in ("MatMul", "RotaryEmbedding"):
            node = node.inputs[0].producer() if node.inputs[0] is not None else None
        if node is not None and node.op_type == "RotaryEmbedding":
            found.append(node)
    return found


def _has(rotary: ir.Node, tables: RopeTables) -> bool:
    """Whether ``rotary`` looks the positions up in ``tables`` already."""
    arrays = []
    for value in rotary.inputs[1:]:
        gather = value.producer() if value is not None else None
        if gather is None or gather.op_type != "Gather":
            return False
        table, indices = gather.inputs
        if indices is None or indices.name != "position_ids":
            return False
        if table is None or table.const_value is None:
            return False
        arrays.append(table.const_value.numpy())
    return tables.equal(*arrays)


def _rotate_columns(rotary: ir.Node, attention: ir.Node, frequencies: int) -> None:
    """Rotate two columns of a head for each of the frequencies, which may be fewer than it has."""
    past = attention.inputs[4]
    head = past.shape[3] if past is not None and past.shape is not None else None
    columns = 0 if 2 * frequencies == head else 2 * frequencies
    rotary.attributes.add(ir.AttrInt64("rotary_embedding_dim", columns))


class _Lookups:
    """Nodes that look positions up in tables.

    Attributes:
      originals: original lengths of the LongRoPE tables among them.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.originals: dict[int, ir.Value] = {}
        self._graph = graph
        self._tape = ir.tape.Tape()
        self._gathered: dict[RopeTables, Sequence[ir.Value]] = {}

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """In an order in which they can run, before all others."""
        return self._tape.nodes

    def of(self, tables: RopeTables) -> Sequence[ir.Value]:
        """Cosines and sines, ``float32 [B, S, F]``."""
        if tables not in self._gathered:
            self._gathered[tables] = self._gather(tables)
        return self._gathered[tables]

    def _gather(self, tables: RopeTables) -> Sequence[ir.Value]:
        rows = self._positions()
        if tables.original is not None:
            if tables.original not in self.originals:
                self.originals[tables.original] = self._long_rows(tables.original)
            rows = self.originals[tables.original]
        prefix = "rope" if tables.layer_type is None else f"rope.{tables.layer_type}"
        values = []
        for kind, array in zip(("cos", "sin"), tables.whole(), strict=True):
            tensor = ir.tensor(array, name=f"{prefix}.{kind}_table")
            table = register_tensor(self._graph, tensor)
            shape = [*self._shape(), array.shape[1]]
            values.append(self._value("Gather", [table, rows], f"{prefix}.{kind}", shape))
        return values

    def _long_rows(self, original: int) -> ir.Value:
        """Rows of the tables, ``int64 [B, S]``: those behind ``original`` for longer texts.

        A row of the batch is as long as it is up to its last token here.
        """
        prefix, (batch, length) = f"rope.{original}", self._shape()

        def constant(role: str, value: int | list[int]) -> ir.Value:
            tensor = ir.tensor(np.array(value), name=f"{prefix}.{role}")
            return register_tensor(self._graph, tensor)

        last = self._value(
            "ReduceMax",
            [self._positions(), constant("axes", [1])],
            f"{prefix}.last",
            [batch, 1],
            {"keepdims": 1},
        )
        limit = constant("length", original)
        one, zero = constant("one", 1), constant("zero", 0)
        lengths = self._value("Add", [last, one], ROPE_LENGTHS, [batch, 1])
        is_long = self._value("Greater", [lengths, limit], f"{prefix}.is_long", [batch, 1])
        first = self._value("Where", [is_long, limit, zero], f"{prefix}.first", [batch, 1])
        return self._value("Add", [self._positions(), first], ROPE_ROWS, [batch, length])

    def _positions(self) -> ir.Value:
        return next(value for value in self._graph.inputs if value.name == "position_ids")

    def _shape(self) -> Sequence[int | ir.SymbolicDim]:
        shape = self._positions().shape
        assert shape is not None  # noqa: S101 - mobius declares the shapes of its inputs
        return tuple(shape)

    def _value(
        self,
        operator: str,
        inputs: Sequence[ir.Value],
        name: str,
        shape: Sequence[int | ir.SymbolicDim],
        attributes: dict[str, int] | None = None,
    ) -> ir.Value:
        value = self._tape.op(operator, inputs, attributes)
        kind = {"Gather": ir.DataType.FLOAT, "Greater": ir.DataType.BOOL}
        value.name = name
        value.type = ir.TensorType(kind.get(operator, ir.DataType.INT64))
        value.shape = ir.Shape(shape)
        return value
