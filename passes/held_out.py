"""Drop the low-rank factors that make a linear's output error on held-out text worse.

Factors are solved on the calibration tokens. With few tokens, or with text of another kind, they
may fit what only those tokens have in common. The check costs little (docs/adr/0012): the effect
of factors on the error of some hundred tokens takes one product of their rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from eoracc.passes.compensate.base import Compensation
from eoracc.passes.compensate.quantize_factors import QuantizeFactors
from eoracc.passes.graph.record import LinearWarning
from eoracc.passes.statistics import record_error

if TYPE_CHECKING:
    from eoracc.passes.base import LayerPass
    from eoracc.passes.graph.linears import Linear, LinearGroup
    from eoracc.passes.solvers.gram import Gram, HeldOut
    from eoracc.plugins.operands.dense import StoredWeight
    from eoracc.plugins.operands.low_rank import LowRank

__all__ = ["FACTORS_DROPPED", "call_checked", "error_change", "squared_error"]

FACTORS_DROPPED = "factors_dropped"

Float = NDArray[np.float32]


def call_checked(layer_pass: LayerPass, group: LinearGroup) -> None:
    """Run ``layer_pass`` on ``group``, then take back factors that do harm on held-out text.

    A linear whose error over the held-out tokens is larger behind a compensating pass than before
    it gets back the weight and the factors that it had. Factors that a pass has only rounded are
    compared with none. The error is the one that the pass minimises: the target and the tokens are
    those of ``calibrate``, outputs count as the pass weighs them.

    Args:
      layer_pass: of any kind; those that leave no factors are not checked.
      group: without held-out tokens or a Gram nothing is checked.
    """
    before = {linear.name: (linear.compressed, linear.factors) for linear in group.linears}
    layer_pass.call(group)
    gram = group.gram
    if gram is None or gram.held_out is None:
        return
    if not isinstance(layer_pass, Compensation | QuantizeFactors):
        return
    for options, linears in layer_pass.partition(group):
        for linear in linears:
            weight, factors = before[linear.name]
            if linear.factors is None or linear.factors is factors or weight is None:
                continue
            root = None
            if isinstance(options, Compensation):
                root = options.lost_output(linear, gram).output_root
            else:
                factors = None
            if _is_worse(linear, weight, factors, gram.held_out, root):
                _take_back(layer_pass.name, linear, weight, factors, gram, root)


def squared_error(
    tokens: HeldOut, weight: Float, present: Float, output_root: Float | None = None
) -> float:
    """``||R (W X - V X~)||_F^2``, the output error of a weight ``V`` over the tokens.

    Args:
      tokens: held-out ones.
      weight: the original weight ``W``, ``float32 [N, K]``.
      present: ``V``, ``float32 [N, K]``.
      output_root: ``R``, ``float32 [N, N]``; None weighs all outputs alike.

    >>> from eoracc.passes.solvers.gram import HeldOut
    >>> squared_error(HeldOut(np.eye(2)), np.diag([3.0, 4.0]), np.zeros((2, 2)))
    25.0
    """
    lost = tokens.inputs @ (weight - present).T
    if tokens.differences is not None:
        lost += tokens.differences @ weight.T
    if output_root is not None:
        lost = lost @ output_root.T
    return float(np.sum(np.square(lost), dtype=np.float64))


def error_change(
    tokens: HeldOut,
    weight: Float,
    present: Float,
    factors: LowRank | None,
    output_root: Float | None = None,
) -> float:
    """What ``factors`` add to :func:`squared_error`; below 0 if they help.

    With ``C = R B`` and the error ``e_t = R (W x_t - V x~_t)`` the change is ``sum_t |C A x~_t|^2 -
    2 (C^T e_t) . (A x~_t)``. It takes some ``N K r`` multiplications and none that are ``tokens N
    K``.

    Args:
      tokens: held-out ones.
      weight: the original weight ``W``, ``float32 [N, K]``.
      present: ``V``, the weight without the factors, ``float32 [N, K]``.
      factors: ``B [N, r]`` and ``A [r, K]``; None for no change.
      output_root: ``R``, ``float32 [N, N]``; None weighs all outputs alike.
    """
    if factors is None:
        return 0.0
    up = factors.up() if output_root is None else output_root @ factors.up()
    back = up.T if output_root is None else up.T @ output_root
    inner = tokens.inputs @ factors.down().T
    met = tokens.inputs @ (back @ (weight - present)).T
    if tokens.differences is not None:
        met += tokens.differences @ (back @ weight).T
    return float(np.sum((inner @ (up.T @ up) - 2 * met) * inner, dtype=np.float64))


def _is_worse(
    linear: Linear,
    weight: StoredWeight,
    factors: LowRank | None,
    tokens: HeldOut,
    root: Float | None,
) -> bool:
    """Whether the error of ``linear`` exceeds that of ``weight`` with ``factors``."""
    original, present = linear.weight(), linear.backbone_weight()
    change = error_change(tokens, original, present, linear.factors, root)
    if weight is linear.compressed:
        return change > error_change(tokens, original, present, factors, root)
    earlier = weight.dequantize()
    return change + squared_error(tokens, original, present, root) > (
        error_change(tokens, original, earlier, factors, root)
        + squared_error(tokens, original, earlier, root)
    )


def _take_back(
    pass_name: str,
    linear: Linear,
    weight: StoredWeight,
    factors: LowRank | None,
    gram: Gram,
    root: Float | None,
) -> None:
    """Give ``linear`` back the ``weight`` and ``factors`` that it had, and record a warning."""
    assert gram.held_out is not None  # noqa: S101 - call_checked() has looked
    error_with = _relative_error(linear, gram.held_out, root)
    if weight is not linear.compressed:
        linear.quantize(weight)
    linear.compensate(factors)
    error_without = _relative_error(linear, gram.held_out, root)
    record_error(pass_name, linear, gram)
    linear.record.warn(
        LinearWarning(
            code=FACTORS_DROPPED,
            message=f"the factors of '{pass_name}' were dropped: they raise its output error on "
            f"held-out text from {error_without:.4f} to {error_with:.4f}",
            figures={
                "held_out_error_without": error_without,
                "held_out_error_with": error_with,
                "held_out_tokens": len(gram.held_out.inputs),
            },
        )
    )


def _relative_error(linear: Linear, tokens: HeldOut, root: Float | None) -> float:
    """``||R (W X - V X~)||_F / ||R W X||_F``, with the present weight ``V`` of ``linear``."""
    weight = linear.weight()
    norm = squared_error(tokens, weight, np.zeros_like(weight), root)
    error = squared_error(tokens, weight, linear.effective_weight(), root)
    return float(np.sqrt(error / norm)) if norm > 0 else 0.0
