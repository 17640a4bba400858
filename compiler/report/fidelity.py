"""How much of the original model is left: perplexity, KL, top-1 agreement, last-layer error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eoracc.compiler.sweep.batch import WeightOf, make_batches
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.text.windows import Windows
from eoracc.passes.graph.linears import Linear
from eoracc.passes.progress import Progress

__all__ = ["Scorer", "Scores", "Variant", "score_variants"]

_BATCH = 4
_HEAD_TOKENS = 256
"""Tokens whose logits are held at once: a vocabulary is wide."""


@dataclass(frozen=True)
class Variant:
    """A way to run the model: a graph and the weight of each of its linears."""

    executor: Executor
    weight_of: WeightOf


@dataclass(frozen=True)
class Scores:
    """Figures of one variant on held-out text.

    Attributes:
      perplexity: exp(total negative log-likelihood / predicted tokens), each window on its own.
      kl: mean KL(original || variant) per predicted token, in nats.
      top1_agreement: share of predicted tokens whose most likely token is the original's.
      last_layer_error: ``||h - h_original||_F / ||h_original||_F`` of what enters the head.
    """

    perplexity: float
    kl: float
    top1_agreement: float
    last_layer_error: float


def score_variants(
    original: Executor, variants: Mapping[str, Variant], windows: Windows, *, progress: Progress
) -> dict[str, Scores]:
    """Score each variant, and the original itself as ``original``, on ``windows``.

    Args:
      original: the uncompressed graph.
      variants: what is compared with it.
      windows: held-out text; each window is scored on its own.
      progress: shown one step per variant, and one for the head.
    """
    everyone = {"original": Variant(original, Linear.weight), **variants}
    hidden = {}
    with progress.phase("score", len(everyone) + 1) as phase:
        for name, variant in everyone.items():
            hidden[name] = _hidden(variant, windows)
            phase.advance(name)
        scores = _scores(everyone, hidden, windows)
        phase.advance("logits")
    return scores


class Scorer:
    """Scores one variant after another on one text; the original's forward pass is taken once."""

    def __init__(self, original: Executor, windows: Windows) -> None:
        """Take it.

        Args:
          original: the uncompressed graph.
          windows: held-out text; each window is scored on its own.
        """
        self._original = Variant(original, Linear.weight)
        self._windows = windows
        self._hidden = _hidden(self._original, windows)

    def original(self) -> Scores:
        """The original itself."""
        everyone = {"original": self._original}
        return _scores(everyone, {"original": self._hidden}, self._windows)["original"]

    def score(self, variant: Variant) -> Scores:
        """One variant, as :func:`score_variants` scores it."""
        everyone = {"original": self._original, "variant": variant}
        hidden = {"original": self._hidden, "variant": _hidden(variant, self._windows)}
        return _scores(everyone, hidden, self._windows)["variant"]


def _scores(
    everyone: Mapping[str, Variant], hidden: Mapping[str, NDArray[np.float32]], windows: Windows
) -> dict[str, Scores]:
    """Figures of each variant, ``original`` first, from what enters its head."""
    kept = windows.attention_mask.astype(bool)
    return {
        name: Scores(
            perplexity=float(np.exp(total.nll / total.tokens)),
            kl=total.kl / total.tokens,
            top1_agreement=total.agreed / total.tokens,
            last_layer_error=_relative_error(hidden[name][kept], hidden["original"][kept]),
        )
        for name, total in _head_sums(everyone, hidden, windows).items()
    }


@dataclass
class _Sums:
    nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    tokens: int = 0


def _hidden(variant: Variant, windows: Windows) -> NDArray[np.float32]:
    """What enters the head, ``float32 [windows, sequence, hidden]``."""
    batches = make_batches(windows.input_ids, windows.attention_mask, size=_BATCH)
    variant.executor.run_to_head(batches, variant.weight_of)
    return np.concatenate([variant.executor.head_input(batch) for batch in batches])


def _head_sums(
    variants: Mapping[str, Variant],
    hidden: Mapping[str, NDArray[np.float32]],
    windows: Windows,
) -> dict[str, _Sums]:
    heads = {name: v.weight_of(v.executor.linears[-1]) for name, v in variants.items()}
    kept = windows.attention_mask.astype(bool)
    # Position t predicts token t + 1, where both are text and not padding.
    scored = kept[:, 1:] & kept[:, :-1]
    targets = windows.input_ids[:, 1:][scored]
    rows = {name: h[:, :-1][scored] for name, h in hidden.items()}
    sums = {name: _Sums(tokens=len(targets)) for name in variants}
    for start in range(0, len(targets), _HEAD_TOKENS):
        part = slice(start, start + _HEAD_TOKENS)
        # The original comes first; its probabilities serve every variant of this part.
        probability = entropy = best = None
        for name, variant in variants.items():
            logits = variant.executor.logits(rows[name][None, part], heads[name])[0]
            top = logits.argmax(axis=1)
            logits -= np.take_along_axis(logits, top[:, None], axis=1)
            exponentials = np.exp(logits)
            totals = exponentials.sum(axis=1, dtype=np.float64)
            log_totals = np.log(totals)
            at_target = np.take_along_axis(logits, targets[part, None], axis=1)[:, 0]
            total = sums[name]
            total.nll += float((log_totals - at_target).sum())
            if probability is None:
                probability = exponentials
                probability /= totals[:, None].astype(np.float32)
                best = top
                entropy = log_totals - np.einsum("tv,tv->t", probability, logits)
            # KL(p || q) = cross entropy(p, q) - entropy(p), with log q = logits - log_totals.
            cross = log_totals - np.einsum("tv,tv->t", probability, logits)
            total.kl += float((cross - entropy).sum())
            total.agreed += int((top == best).sum())
    return sums


def _relative_error(value: NDArray[np.float32], original: NDArray[np.float32]) -> float:
    difference = (value - original).astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(original.astype(np.float64)))
