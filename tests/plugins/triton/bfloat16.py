"""bfloat16 for Triton's interpreter, which keeps the type as uint16 and computes on the bits.

Operands are widened to float32, results rounded to nearest, as a GPU does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

Array = NDArray[Any]


def widened(handle: TensorHandle) -> Array:
    if handle.dtype.scalar != tl.bfloat16:
        data: Array = handle.data
        return data
    bits: Array = handle.data.astype(np.uint32) << 16
    return bits.view(np.float32)


def rounded(values: Array) -> Array:
    values = np.array(values, np.float32)
    result: Array = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    return result


def install() -> None:
    """Teach it to the interpreter of this process."""
    binary_op, cast_impl = InterpreterBuilder.binary_op, InterpreterBuilder.cast_impl
    fp_to_fp = InterpreterBuilder.create_fp_to_fp

    def arithmetic(
        self: InterpreterBuilder,
        left: TensorHandle,
        right: TensorHandle,
        op: Callable[[Array, Array], Array],
    ) -> TensorHandle:
        if left.dtype.scalar != tl.bfloat16:
            return binary_op(self, left, right, op)
        return TensorHandle(rounded(op(widened(left), widened(right))), tl.bfloat16)

    def convert(
        self: InterpreterBuilder, source: TensorHandle, target: tl.dtype, *rest: object
    ) -> TensorHandle:
        if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            return TensorHandle(rounded(source.data), tl.bfloat16)
        return (fp_to_fp if rest else cast_impl)(self, source, target, *rest)

    def dot(
        _: InterpreterBuilder,
        left: TensorHandle,
        right: TensorHandle,
        sums: TensorHandle,
        *__: object,
    ) -> TensorHandle:
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            product = np.matmul(widened(left), widened(right), dtype=sums.data.dtype)
        return TensorHandle(product + sums.data, sums.dtype.scalar)

    InterpreterBuilder.binary_op = arithmetic
    InterpreterBuilder.cast_impl = convert
    InterpreterBuilder.create_fp_to_fp = convert
    InterpreterBuilder.create_dot = dot
