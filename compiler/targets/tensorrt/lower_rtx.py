"""Lowering to TensorRT for RTX: weights stay in their 4 or 8 bits as DequantizeLinear.

TensorRT for RTX takes no plugins. It knows weights of 4 and 8 bits as a blocked
``DequantizeLinear``, symmetric, which it fuses with the product that reads it. Every stored weight
is such a one with the very same values (:mod:`eoracc.compiler.targets.tensorrt.dequantize`);
low-rank factors are two further products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from eoracc.compiler.targets.tensorrt.dequantize import SignedFactor, SignedWeight, signed_factors
from eoracc.compiler.targets.tensorrt.lower_graph import (
    AdapterType,
    CacheLayout,
    Dtype,
    lower_decoder,
)
from eoracc.passes.graph.stored import stored_factors, stored_weight
from eoracc.passes.graph.tensors import constant, register_tensor
from eoracc.plugins.op import Input

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = ["DequantizeWriter", "lower"]


def lower(
    model: ir.Model,
    *,
    dtype: Dtype = "float16",
    adapter_type: AdapterType = "none",
    cache: CacheLayout = "concat",
    capacity: int | None = None,
    positions: int | None = None,
) -> ir.Model:
    """Rewrite ``model`` with operators that TensorRT for RTX builds well.

    Args and errors are those of
    :func:`eoracc.compiler.targets.tensorrt.lower_graph.lower_decoder`; the graph holds standard
    operators alone.
    """
    return lower_decoder(
        model,
        DequantizeWriter,
        dtype=dtype,
        adapter_type=adapter_type,
        cache=cache,
        capacity=capacity,
        positions=positions,
    )


@dataclass(frozen=True, eq=False)
class _Table:
    """The values from which a table's rows are gathered, shared with a tied head.

    Attributes:
      values: ``[N, K]``.
      offsets: ``[N, 2 G]``, or None.
    """

    values: ir.Value
    offsets: ir.Value | None


class DequantizeWriter:
    """Computes compressed linears and tables with standard operators on weights of 4 and 8 bits."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self._graph, self._dtype = graph, dtype
        self._sums: dict[tuple[ir.Value, int], ir.Value] = {}
        self._tables: dict[ir.Value | None, _Table] = {}

    def linear(self, tape: ir.tape.Tape, node: ir.Node, x: ir.Value) -> ir.Value:
        """See :class:`eoracc.compiler.targets.tensorrt.lower_graph.LinearWriter`."""
        name = str(node.name)
        weight = SignedWeight(name, stored_weight(node), self._dtype)
        y = tape.op("MatMul", [x, self._weight(tape, node, weight)], name=name)
        if weight.offset_bits:
            correction = tape.op(
                "MatMul",
                [self._sums_of(tape, x, weight.block // 2), self._offsets(tape, node, weight)],
                name=f"{name}/offset",
            )
            y = tape.op("Sub", [y, correction], name=f"{name}/sum")
        factors = stored_factors(node)
        if factors is not None and factors.rank:
            product = x
            for role, factor in zip("ab", signed_factors(factors, self._dtype, name), strict=True):
                operand = self._factor(tape, f"{name}.compensation_{role}", factor)
                product = tape.op("MatMul", [product, operand], name=f"{name}/compensation_{role}")
            y = tape.op("Add", [y, product], name=f"{name}/compensated")
        return y

    def table(self, tape: ir.tape.Tape, node: ir.Node, indices: ir.Value) -> ir.Value:
        """See :class:`eoracc.compiler.targets.tensorrt.lower_graph.LinearWriter`.

        TensorRT gathers neither 4-bit nor 8-bit integers, but it does gather from what it
        dequantizes, and keeps that in its bits.
        """
        name = str(node.name)
        weight = SignedWeight(name, stored_weight(node), self._dtype)
        values = self._dequantize(tape, name, weight, transposed=False)
        rows = tape.op("Gather", [values, indices], name=name)
        offsets = None
        if weight.offset_bits:
            offsets = self._dequantize_offsets(tape, name, weight, transposed=False)
            picked = tape.op("Gather", [offsets, indices], name=f"{name}/offset")
            last = constant(self._graph, "block.last", np.array([3], np.int64))
            picked = tape.op("Unsqueeze", [picked, last])
            rows = tape.op("Sub", [self._by_block(tape, rows, weight.block // 2), picked])
            merge = constant(self._graph, "block.merge", np.array([0, 0, -1], np.int64))
            rows = tape.op("Reshape", [rows, merge])
        self._tables[node.inputs[Input.B]] = _Table(values, offsets)
        return rows

    def _weight(self, tape: ir.tape.Tape, node: ir.Node, weight: SignedWeight) -> ir.Value:
        """``[K, N]``."""
        table = self._tables.get(node.inputs[Input.B])
        if table is None:
            return self._dequantize(tape, weight.name, weight, transposed=True)
        return tape.op("Transpose", [table.values], {"perm": [1, 0]})

    def _offsets(self, tape: ir.tape.Tape, node: ir.Node, weight: SignedWeight) -> ir.Value:
        """``[2 G, N]``."""
        table = self._tables.get(node.inputs[Input.B])
        if table is None or table.offsets is None:
            return self._dequantize_offsets(tape, weight.name, weight, transposed=True)
        return tape.op("Transpose", [table.offsets], {"perm": [1, 0]})

    def _dequantize(
        self, tape: ir.tape.Tape, name: str, weight: SignedWeight, *, transposed: bool
    ) -> ir.Value:
        rows, columns = weight.shape
        codes = self._integers(
            f"{name}.weight", weight.codes, (rows, columns), weight.bits, transposed=transposed
        )
        return self._blocked(tape, codes, weight, weight.block, transposed=transposed)

    def _dequantize_offsets(
        self, tape: ir.tape.Tape, name: str, weight: SignedWeight, *, transposed: bool
    ) -> ir.Value:
        rows = weight.shape[0]
        offsets = self._integers(
            f"{name}.offsets",
            weight.offsets,
            (rows, 2 * weight.blocks),
            weight.offset_bits,
            transposed=transposed,
        )
        return self._blocked(tape, offsets, weight, 2, transposed=transposed)

    def _blocked(
        self,
        tape: ir.tape.Tape,
        codes: ir.Value,
        weight: SignedWeight,
        block: int,
        *,
        transposed: bool,
    ) -> ir.Value:
        name = f"{weight.name}.scales"
        scales = self._graph.initializers.get(f"{name}.{_suffix(self._dtype)}")
        if scales is None:
            array = weight.scales()  # now, so that one that is too large is refused now
            shape = (weight.shape[0], weight.blocks)
            scales = self._lazy(name, lambda: array, shape, self._dtype, transposed=transposed)
        attributes = {"axis": 0 if transposed else 1, "block_size": block}
        return tape.op(
            "DequantizeLinear", [codes, scales], attributes, name=f"{codes.name}/DequantizeLinear"
        )

    def _factor(self, tape: ir.tape.Tape, name: str, factor: SignedFactor) -> ir.Value:
        """The factor transposed, ``[columns, rows]``."""
        rows, columns = factor.values.shape
        shape = (rows, columns)
        if factor.scales is None:
            return self._lazy(name, lambda: factor.values, shape, self._dtype, transposed=True)
        values = self._integers(name, lambda: factor.values, shape, factor.bits, transposed=True)
        scales = register_tensor(self._graph, ir.tensor(factor.scales, name=f"{name}.scales"))
        return tape.op(
            "DequantizeLinear", [values, scales], {"axis": 1}, name=f"{name}/DequantizeLinear"
        )

    def _sums_of(self, tape: ir.tape.Tape, x: ir.Value, block: int) -> ir.Value:
        """Sums of ``block`` features each, ``[B, S, K / block]``, added up in float32."""
        if (x, block) not in self._sums:
            wide = tape.op("Cast", [x], {"to": int(ir.DataType.FLOAT)})
            split = self._by_block(tape, wide, block)
            last = constant(self._graph, "block.last", np.array([3], np.int64))
            total = tape.op("ReduceSum", [split, last], {"keepdims": 0}, name=f"{x.name}/sums")
            for value in (wide, split, total):
                value.type = ir.TensorType(ir.DataType.FLOAT)
            self._sums[x, block] = tape.op("Cast", [total], {"to": int(self._dtype)})
        return self._sums[x, block]

    def _by_block(self, tape: ir.tape.Tape, x: ir.Value, block: int) -> ir.Value:
        """``[B, S, K]`` as ``[B, S, K / block, block]``."""
        shape = constant(self._graph, f"block.{block}", np.array([0, 0, -1, block], np.int64))
        return tape.op("Reshape", [x, shape])

    def _integers(
        self,
        name: str,
        make: Callable[[], NDArray[Any]],
        shape: tuple[int, int],
        bits: int,
        *,
        transposed: bool,
    ) -> ir.Value:
        dtype = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
        return self._lazy(name, make, shape, dtype, transposed=transposed)

    def _lazy(
        self,
        name: str,
        make: Callable[[], NDArray[Any]],
        shape: tuple[int, int],
        dtype: ir.DataType,
        *,
        transposed: bool,
    ) -> ir.Value:
        """An initializer whose array ``make`` computes on each read."""
        full = f"{name}.{_suffix(dtype)}"

        def stored() -> ir.TensorProtocol:
            array = make().T if transposed else make()
            return ir.Tensor(
                np.ascontiguousarray(array.astype(dtype.numpy())), dtype=dtype, name=full
            )

        lazy = ir.LazyTensor(
            stored,
            dtype=dtype,
            shape=ir.Shape(shape[::-1] if transposed else shape),
            name=full,
        )
        return register_tensor(self._graph, lazy)


def _suffix(dtype: ir.DataType) -> str:
    return dtype.name.lower()
