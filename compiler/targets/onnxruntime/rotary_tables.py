"""Compute tables of cosines and sines from their frequencies, instead of storing them.

Two float32 tables take 8 bytes for each position and frequency: 2.1 MB of SmolLM2's folder, 67 MB
of a model with 131,072 positions and 64 frequencies. A runtime folds the computation when it loads
the model, so a call reads the same constants as before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from eoracc.passes.graph.tensors import register_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["compute_rotary_tables", "table_frequencies"]

_SMALLEST = 1 << 14
"""Bytes of a table that is worth the nodes that compute it."""

_TOLERANCE = 4 * 2.0**-24
"""By how much a computed table may differ, relative to the largest cosine: two implementations of
the cosine differ by one or two roundings."""


def compute_rotary_tables(graph: ir.Graph) -> None:
    """Replace each pair of rotary tables in ``graph`` that equals computed ones.

    A pair that no frequencies give, up to float32 roundings, stays as it is.

    Args:
      graph: lowered; changed in place.
    """
    tape = ir.tape.Tape()
    for pair in dict.fromkeys(_pairs(graph)):
        arrays = [table.const_value.numpy() for table in pair]  # type: ignore[union-attr]
        segments = _segments(*arrays)
        if segments is None:
            continue
        computed = _compute(graph, tape, str(pair[0].name), segments)
        for table, value in zip(pair, computed, strict=True):
            graph.initializers.pop(str(table.name))
            value.name, value.type, value.shape = table.name, table.type, table.shape
            ir.convenience.replace_all_uses_with(table, value)
    if tape.nodes:
        graph.insert_before(graph[0], tape.nodes)


def _pairs(graph: ir.Graph) -> list[tuple[ir.Value, ir.Value]]:
    """Stored tables of cosines and sines that attentions of ``graph`` rotate by."""
    found = []
    for node in graph:
        operands: Sequence[ir.Value | None] = ()
        if node.op_type == "GroupQueryAttention":
            operands = node.inputs[7:9]
        elif node.op_type == "RotaryEmbedding":
            gathers = [value.producer() if value is not None else None for value in node.inputs[1:]]
            operands = [
                gather.inputs[0] if gather is not None and gather.op_type == "Gather" else None
                for gather in gathers
            ]
        tables = [value for value in operands if value is not None and _is_stored(value)]
        if len(tables) == len(operands) == 2:
            found.append((tables[0], tables[1]))
    return found


def _is_stored(table: ir.Value) -> bool:
    tensor = table.const_value
    return (
        tensor is not None
        and tensor.dtype == ir.DataType.FLOAT
        and len(tensor.shape) == 2
        and tensor.nbytes >= _SMALLEST
        and not table.is_graph_input()
    )


_Segment = tuple[int, "NDArray[np.float32]", np.float32]
"""Positions from 0 on, frequencies, and the scale of their cosines and sines."""


def _segments(cos: NDArray[np.float32], sin: NDArray[np.float32]) -> list[_Segment] | None:
    """Runs of rows that begin at position 0: one, or two in tables of LongRoPE.

    Returns:
      None where the tables are not computed from frequencies.
    """
    if cos.shape != sin.shape:
        return None
    starts = np.flatnonzero(~sin.any(axis=1))
    if not len(starts) or starts[0] != 0:
        return None
    segments = []
    for start, end in zip(starts, [*starts[1:], len(cos)], strict=True):
        found = table_frequencies(cos[start:end], sin[start:end])
        if found is None:
            return None
        segments.append((int(end - start), *found))
    return segments


def table_frequencies(
    cos: NDArray[np.float32], sin: NDArray[np.float32]
) -> tuple[NDArray[np.float32], np.float32] | None:
    """The frequencies of which tables are cosines and sines.

    Each doubling of the position halves the error of a frequency, because the frequency so far
    tells which turn an angle is in.

    Args:
      cos: ``[P, F]``, scale times the cosine of position times frequency, both of them float32.
      sin: ``[P, F]``, the same with the sine.

    Returns:
      Frequencies ``float32 [F]`` in radians per position, at most half a turn, and the scale; None
      where the tables differ from what these give by more than a few roundings.
    """
    scale = np.float32(cos[0, 0])
    if not scale > 0:
        return None
    frequencies = np.zeros(cos.shape[1])
    for position in (1 << np.arange(int(len(cos) - 1).bit_length())).tolist():
        measured = np.arctan2(sin[position].astype(np.float64), cos[position])
        error = np.remainder(measured - position * frequencies + np.pi, 2 * np.pi) - np.pi
        frequencies += error / position
    near = frequencies.astype(np.float32)
    candidates = np.stack([np.nextafter(near, np.float32(-np.inf)), near])
    candidates = np.stack([*candidates, np.nextafter(near, np.float32(np.inf))])
    # Late positions tell neighbours apart.
    late = slice(max(len(cos) - 64, 0), None)
    errors = [_error(cos, sin, late, candidate, scale).max(axis=0) for candidate in candidates]
    best = candidates[np.argmin(errors, axis=0), np.arange(len(near))]
    whole = _error(cos, sin, slice(None), best, scale).max()
    return (best, scale) if whole <= _TOLERANCE * scale else None


def _error(
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    rows: slice,
    frequencies: NDArray[np.float32],
    scale: np.float32,
) -> NDArray[np.float32]:
    """How far ``rows`` of the tables are from computed ones, ``[n, F]``."""
    positions = np.arange(len(cos), dtype=np.float32)[rows, None]
    angles = positions * frequencies
    error: NDArray[np.float32] = np.maximum(
        np.abs(np.cos(angles) * scale - cos[rows]), np.abs(np.sin(angles) * scale - sin[rows])
    )
    return error


def _compute(
    graph: ir.Graph, tape: ir.tape.Tape, name: str, segments: Sequence[_Segment]
) -> list[ir.Value]:
    """Nodes that compute the cosines and the sines of ``segments``, one below the other."""

    def constant(role: str, array: NDArray[np.float32] | np.float32) -> ir.Value:
        return register_tensor(graph, ir.tensor(np.asarray(array), name=f"{name}.{role}"))

    parts: tuple[list[ir.Value], list[ir.Value]] = ([], [])
    axis = register_tensor(graph, ir.tensor(np.array([1]), name=f"{name}.axis"))
    first, step = constant("first", np.float32(0)), constant("step", np.float32(1))
    for place, (count, frequencies, scale) in enumerate(segments):
        end = constant(f"{place}.positions", np.float32(count))
        positions = tape.op("Unsqueeze", [tape.op("Range", [first, end, step]), axis])
        angles = tape.op("Mul", [positions, constant(f"{place}.frequencies", frequencies)])
        factor = None if scale == 1 else constant(f"{place}.scale", scale)
        for part, operator in zip(parts, ("Cos", "Sin"), strict=True):
            value = tape.op(operator, [angles])
            part.append(value if factor is None else tape.op("Mul", [value, factor]))
    return [part[0] if len(part) == 1 else tape.op("Concat", part, {"axis": 0}) for part in parts]
