"""Statistics of a group for its passes, and the errors that passes record."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

from eoracc.errors import PassError
from eoracc.passes.quantize.row_blocks import row_blocks, rows_of
from eoracc.passes.solvers.factors import gram_root
from eoracc.passes.solvers.lost_output import LostOutput
from eoracc.plugins.operands.dense import DenseWeight

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.passes.graph.linears import Linear, LinearGroup
    from eoracc.passes.solvers.gram import Gram

__all__ = [
    "MIN_TOKENS",
    "lost_output",
    "note_too_few_tokens",
    "output_root",
    "record_error",
    "record_left_out",
    "require_gram",
    "saw_too_few_tokens",
]

MIN_TOKENS: Final = 32
"""Solvers ignore a Gram of fewer calibration tokens."""


def require_gram(pass_name: str, group: LinearGroup) -> Gram:
    """The Gram of ``group``.

    Raises:
      PassError: there is none, or it holds NaN or Inf.
    """
    if group.gram is None:
        raise PassError(group.name, f"has no gram: put 'calibrate' before {pass_name!r}")
    if not np.isfinite(group.gram.matrix).all():
        raise PassError(
            group.name,
            "its gram holds NaN or Inf: the checkpoint or the calibration text is damaged",
        )
    return group.gram


def saw_too_few_tokens(gram: Gram) -> bool:
    """Whether ``gram`` has too few tokens for a solver (:data:`MIN_TOKENS`)."""
    return gram.tokens < MIN_TOKENS


def note_too_few_tokens(
    pass_name: str, linear: Linear, gram: Gram, *, instead: str, asks: str
) -> None:
    """Note that a pass fell back to a method without ``gram``.

    Args:
      pass_name: the pass.
      linear: the linear that it changed.
      gram: of its input; it has too few tokens (:func:`saw_too_few_tokens`).
      instead: the fallback, ``rounded to nearest`` for example.
      asks: the method that needs more tokens.
    """
    linear.record.notes.append(
        f"{pass_name}: {instead}, for only {gram.tokens:.0f} calibration tokens "
        f"reached it ({asks} asks for {MIN_TOKENS})."
    )


def lost_output(linear: Linear, gram: Gram) -> LostOutput:
    """The output that quantization took of ``linear``, weighed by ``gram``, without its factors.

    It is computed once: the quantizing pass records its norm, compensating passes solve for it.

    Args:
      linear: quantized.
      gram: of its input.
    """
    weight = linear.compressed
    assert weight is not None  # noqa: S101 - callers have checked, or quantized it themselves
    known = gram.lost.get(weight)
    if known is None:
        delta: NDArray[np.float32] = gram.target(linear.weight()) - weight.dequantize()
        known = gram.lost[weight] = delta, delta @ gram.root
    delta, over_tokens = known
    return LostOutput(delta, gram, metric=gram, over_tokens=over_tokens)


def output_root(linear: Linear, gram: Gram) -> NDArray[np.float32] | None:
    """``L^T`` with ``G = L L^T``, the weights of output errors of ``linear``.

    It is read and factored once for all passes of a group.

    Args:
      linear: ``G`` is its :attr:`.Linear.output_gram`, from a survey.
      gram: of its input.

    Returns:
      ``float32 [N, N]``; None if a survey gave no ``G``: all outputs then weigh alike.
    """
    if linear.output_gram is None:
        return None
    if linear.name not in gram.output_roots:
        root = gram_root(linear.output_gram().astype(np.float64))
        gram.output_roots[linear.name] = root.T.astype(np.float32)
    return gram.output_roots[linear.name]


def record_error(pass_name: str, linear: Linear, gram: Gram) -> None:
    """Record the present output error of ``linear``.

    The error is ``||(T - W_hat) X||_F / ||T X||_F`` over the calibration tokens, for the weight and
    factors as they are stored, or for the product that replaced the weight; 0 if the output is
    zero. ``T`` is the weight ``W``, or with ``calibrate: {match: outputs}`` its target. Errors of
    the prefix that the target cannot correct do not count.

    Args:
      pass_name: the pass under whose name the error is recorded.
      linear: compressed.
      gram: of its input.
    """
    record = linear.record
    if linear.block is None:
        norm, error = _norms_by_rows(linear, gram)
    else:
        norm = _output_norm(linear, gram) if record.output_norm is None else record.output_norm
        error = float(np.linalg.norm(_lost(linear, gram)))
    record.output_norm = norm
    record.errors[pass_name] = error / norm if norm > 0 else 0.0


def _output_norm(linear: Linear, gram: Gram) -> float:
    return float(np.linalg.norm(gram.target(linear.weight()) @ gram.root))


def _lost(linear: Linear, gram: Gram) -> NDArray[np.float32]:
    """``(T - W_hat) L``, ``float32 [N, K]``, with the factors of ``linear``."""
    if linear.factorized is not None:
        delta: NDArray[np.float32] = gram.target(linear.weight()) - linear.factorized.product()
        lost: NDArray[np.float32] = delta @ gram.root
    else:
        lost = lost_output(linear, gram).weighted
    if linear.factors is not None:
        lost = lost - linear.factors.up() @ (linear.factors.down() @ gram.root)
    return lost


def _norms_by_rows(linear: Linear, gram: Gram) -> tuple[float, float]:
    """The norms of output and lost output of a head, which has a row for every token.

    Beside the weight, arrays of a block of rows are held at most, and nothing is kept:
    compensations leave a head alone but where an override names it.
    """
    weight, stored, factors = linear.weight(), linear.compressed, linear.factors
    assert stored is not None  # noqa: S101 - callers have compressed it
    parts = None if factors is None else (factors.up(), factors.down() @ gram.root)
    norm = error = 0.0
    for rows in row_blocks(weight.shape):
        target = gram.target(weight[rows])
        norm = math.hypot(norm, float(np.linalg.norm(target @ gram.root)))
        part = (
            stored.values[rows]
            if isinstance(stored, DenseWeight)
            else rows_of(stored, rows).dequantize()
        )
        lost = (target - part) @ gram.root
        if parts is not None:
            lost -= parts[0][rows] @ parts[1]
        error = math.hypot(error, float(np.linalg.norm(lost)))
    return norm, error


def record_left_out(pass_name: str, group: LinearGroup) -> None:
    """Record an error of 0 for the linears of a block that an override left uncompressed.

    A compensating pass skips them by that record, and refuses linears that no pass has quantized.
    """
    for linear in group.linears:
        if linear.compressed is None and linear.block is not None:
            linear.record.errors[pass_name] = 0.0
