"""Score adapters: the perplexity of every adapter on every task's held-out text.

The tokens of a text go through the backbone once for all adapters: at each linear, batches share
one product with the backbone's weight, dequantized once, and each adds its own low-rank term.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from eoracc.compiler.sweep.batch import Batch, WeightOf, make_batches
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.text.windows import Windows
from eoracc.passes.graph.linears import Linear
from eoracc.passes.progress import Progress
from eoracc.plugins.operands.low_rank import LowRank

__all__ = ["Factors", "perplexities"]

_BATCH = 4
_HEAD_TOKENS = 256
"""Tokens whose logits are held at once: a vocabulary is wide."""

Factors = Mapping[str, LowRank]
"""An adapter's factors by linear; empty for none."""


def perplexities(
    executor: Executor,
    weight_of: WeightOf,
    texts: Mapping[str, Windows],
    variants: Mapping[str, Mapping[str, Factors]],
    *,
    progress: Progress,
    phase: str = "score adapters",
) -> dict[str, dict[str, float]]:
    """Perplexity by text and variant, each window scored on its own.

    Args:
      executor: of the backbone.
      weight_of: the weights that all variants share.
      texts: held-out text by name.
      variants: for each text, what is scored on it: adapters by a name.
      progress: shown one step per text.
      phase: its name.
    """
    found: dict[str, dict[str, float]] = {}
    with progress.phase(phase, len(texts)) as steps:
        for text, windows in texts.items():
            found[text] = _score(executor, weight_of, windows, variants[text])
            steps.advance(text)
    return found


def _score(
    executor: Executor, weight_of: WeightOf, windows: Windows, variants: Mapping[str, Factors]
) -> dict[str, float]:
    batches = {
        name: make_batches(windows.input_ids, windows.attention_mask, size=_BATCH)
        for name in variants
    }
    factors = {batch: variants[name] for name, own in batches.items() for batch in own}

    def factors_of(linear: Linear, batch: Batch) -> LowRank | None:
        return factors[batch].get(linear.name)

    executor.run_to_head(list(factors), weight_of, factors_of)
    head = weight_of(executor.linears[-1])
    return {
        name: _perplexity(executor, head, np.concatenate([*map(executor.head_input, own)]), windows)
        for name, own in batches.items()
    }


def _perplexity(
    executor: Executor, head: NDArray[np.float32], hidden: NDArray[np.float32], windows: Windows
) -> float:
    """``exp`` of the mean negative log-likelihood over all tokens but the first of each window.

    Args:
      executor: which has the head.
      head: its weight, ``[vocabulary, width]``.
      hidden: what enters it, ``[windows, sequence, width]``.
      windows: the tokens.
    """
    kept = windows.attention_mask.astype(bool)
    # Position t predicts token t + 1, where both are text and not padding.
    scored = kept[:, 1:] & kept[:, :-1]
    targets, rows = windows.input_ids[:, 1:][scored], hidden[:, :-1][scored]
    total = 0.0
    for start in range(0, len(targets), _HEAD_TOKENS):
        part = slice(start, start + _HEAD_TOKENS)
        logits = executor.logits(rows[None, part], head)[0]
        logits -= logits.max(axis=1, keepdims=True)
        at_target = np.take_along_axis(logits, targets[part, None], axis=1)[:, 0]
        sums = np.exp(logits).sum(axis=1, dtype=np.float64)
        total += float((np.log(sums) - at_target).sum())
    return float(np.exp(total / len(targets)))
