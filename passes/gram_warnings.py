"""Warn where the calibration text says too little about the input of a linear."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from eoracc.passes.graph.record import LinearWarning
from eoracc.passes.solvers.factors import SUM_ROUNDOFF

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eoracc.passes.graph.linears import Linear, LinearGroup
    from eoracc.passes.solvers.gram import Gram

__all__ = ["ENOUGH_TOKENS_PER_COLUMN", "gram_warnings", "warn_of_gram"]

ENOUGH_TOKENS_PER_COLUMN: Final = 2
"""Tokens per input column below which a Gram is too noisy.

A least-squares fit of ``K`` numbers to ``n`` independent tokens leaves ``n / (n - K)`` times the
error that the best fit would leave on new text, as much as twice at ``n = 2 K`` and without bound
at ``n = K``. Below ``K`` tokens the Gram is singular: there are directions of the input that it has
not seen at all.
"""


def warn_of_gram(group: LinearGroup) -> None:
    """Record the warnings on the Gram of ``group`` for the linears that passes have changed."""
    changed = [linear for linear in group.linears if _is_changed(linear)]
    if group.gram is None or not changed:
        return
    warnings = list(gram_warnings(group.gram))
    for linear in changed:
        for warning in warnings:
            linear.record.warn(warning)


def gram_warnings(gram: Gram) -> Iterator[LinearWarning]:
    """What is wrong with ``gram``, from what solvers have computed of it and its diagonal.

    Args:
      gram: after the passes of its group have used it; nothing is factored here.
    """
    columns = len(gram.matrix)
    tokens = round(gram.tokens)  # a sum of weights, which rounding moves off their number
    dead = int(np.sum(np.diagonal(gram.matrix) <= 0))
    if tokens < ENOUGH_TOKENS_PER_COLUMN * columns:
        known = "singular" if tokens < columns else "noisy"
        yield LinearWarning(
            code="few_tokens",
            message=f"{tokens} calibration tokens for {columns} input columns make a "
            f"{known} Gram: give {ENOUGH_TOKENS_PER_COLUMN * columns} or more",
            figures={"tokens": tokens, "columns": columns},
        )
    if dead:
        yield LinearWarning(
            code="dead_channels",
            message=f"{dead} of {columns} input channels are zero on every calibration token: "
            "their weights are rounded without regard to any input",
            figures={"dead": dead, "columns": columns},
        )
    # A Gram of too few tokens is singular in any case: it needs no second warning.
    if gram.rank is not None and columns <= tokens and gram.rank < columns - dead:
        yield LinearWarning(
            code="rank_deficient",
            message=f"the calibration tokens span {gram.rank} of {columns} input columns: "
            "give text that repeats itself less",
            figures={"rank": gram.rank, "columns": columns, "tokens": tokens},
        )
    yield from _conditioning(gram)


def _conditioning(gram: Gram) -> Iterator[LinearWarning]:
    columns = len(gram.matrix)
    for asked, made in gram.factored:
        if made.damping > asked:
            yield LinearWarning(
                code="ill_conditioned",
                message=f"its Gram is not positive definite with a damping of {asked:g}, so "
                f"{made.damping:g} was used",
                figures={"damping": made.damping, "asked_damping": asked},
            )
            return
        if made.least_share < columns * SUM_ROUNDOFF:
            yield LinearWarning(
                code="ill_conditioned",
                message=f"a pivot of its damped Gram keeps {made.least_share:.1e} of its column, "
                "less than rounding: raise 'damping'",
                figures={"least_share": made.least_share, "damping": made.damping},
            )
            return


def _is_changed(linear: Linear) -> bool:
    return linear.compressed is not None or linear.factorized is not None
