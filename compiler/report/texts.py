"""Warn where the calibration text is of another kind than the held-out text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from eoracc.compiler.report.content import WarningReport

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.compiler.text.windows import Windows

__all__ = ["text_warnings"]

_UNSEEN: Final = 1 / 3
"""Share of held-out tokens, unknown to calibration, from which on the texts differ in kind."""
_BEYOND_CHANCE: Final = 3.0
"""Times the share that is to be expected. Documents repeat their own words, so two texts of one
kind reach twice the estimate, which takes every token for an independent draw."""


def text_warnings(calibration: Windows | None, held_out: Windows) -> list[WarningReport]:
    """Compare the tokens of both texts.

    A text of the same kind has unseen tokens too. Good and Turing estimate their share as ``n_1 /
    n``, with the ``n_1`` tokens that occur once among the ``n`` of calibration.

    Args:
      calibration: None where no pass reads text.
      held_out: that fidelity is measured on.
    """
    if calibration is None:
        return []
    seen, scored = _tokens(calibration), _tokens(held_out)
    if not len(seen) or not len(scored):
        return []
    known, counts = np.unique(seen, return_counts=True)
    unseen = float(np.mean(~np.isin(scored, known)))
    expected = float(np.sum(counts == 1)) / len(seen)
    if unseen <= max(_UNSEEN, _BEYOND_CHANCE * expected):
        return []
    return [
        WarningReport(
            code="unlike_text",
            linear=None,
            message=f"{unseen:.0%} of the held-out text are tokens that the calibration text does "
            f"not have, where {expected:.0%} are to be expected of the same kind of text",
            figures={
                "unseen": unseen,
                "expected_unseen": expected,
                "calibration_tokens": len(seen),
                "held_out_tokens": len(scored),
            },
        )
    ]


def _tokens(windows: Windows) -> NDArray[np.int64]:
    """All tokens without padding."""
    tokens: NDArray[np.int64] = windows.input_ids[windows.attention_mask == 1]
    return tokens
