"""What passes ask of a group's statistics, and the errors that they put on record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from eoracc.compiler.errors import PassError

if TYPE_CHECKING:
    from eoracc.compiler.linears import Linear, LinearGroup
    from eoracc.passes.gram import Gram

__all__ = ["MIN_TOKENS", "record_error", "record_left_out", "require_gram", "saw_too_few_tokens"]

MIN_TOKENS: Final = 32
"""Below so many calibration tokens a Gram says too little: solvers then do without it."""


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
    """Whether solvers should do without ``gram``."""
    return gram.tokens < MIN_TOKENS


def record_error(pass_name: str, linear: Linear, weight: NDArray[np.float32], gram: Gram) -> None:
    """Put on record what ``linear`` as it is now loses of its output.

    The figure is ``||(W - W_hat) X||_F / ||W X||_F`` over the calibration tokens, for the weight
    and factors as they are stored; 0 where the output is zero to begin with.

    Args:
      pass_name: the stage that the error is recorded under.
      linear: compressed.
      weight: its original weight, ``float32 [N, K]``.
      gram: of its input.
    """
    if linear.output_norm is None:
        linear.output_norm = float(np.linalg.norm(weight @ gram.root))
    error = float(np.linalg.norm((weight - linear.effective_weight()) @ gram.root))
    linear.errors[pass_name] = error / linear.output_norm if linear.output_norm > 0 else 0.0


def record_left_out(pass_name: str, group: LinearGroup) -> None:
    """Put on record that members of a block which an override left uncompressed lose nothing.

    By that record a compensating pass tells them from linears that no pass has quantized yet.
    """
    for linear in group.linears:
        if linear.compressed is None and linear.block is not None:
            linear.errors[pass_name] = 0.0
