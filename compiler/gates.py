"""The fidelity gate: what each variant of the model scores, weighs, and whether that will do."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from eoracc.compiler.config import Limits
from eoracc.compiler.executor import Executor, WeightOf
from eoracc.compiler.fidelity import Scores, Variant, score_variants
from eoracc.compiler.linears import Linear
from eoracc.compiler.progress import Progress
from eoracc.compiler.report import FidelityReport, FidelityRow
from eoracc.compiler.sweep import Comparisons
from eoracc.compiler.text import Windows
from eoracc.plugins.operands import LowRank

__all__ = ["fidelity_report"]

_BYTES_PLAIN = 4
"""Artifacts hold what is not compressed as float32."""

Factors = Mapping[str, LowRank]


def fidelity_report(
    original: Executor,
    compressed: Executor,
    windows: Windows,
    *,
    shipped: str | None,
    comparisons: Comparisons,
    limits: Limits,
    progress: Progress,
) -> FidelityReport:
    """Score the original, the backbone alone, the comparators, and last what is shipped.

    Args:
      original: the graph before any pass.
      compressed: the graph after all of them.
      windows: held-out text.
      shipped: name of the compensation that the artifact carries; None for none.
      comparisons: factors that are scored next to it.
      limits: what the last row must keep to.
      progress: shown one step per variant.
    """
    factors: dict[str, Factors] = {"quantized": {}}
    factors |= {name: found for name, found in comparisons.items() if name != shipped}
    if shipped is not None:
        factors[shipped] = {
            linear.name: linear.factors
            for linear in compressed.linears
            if linear.factors is not None
        }
    variants = {name: Variant(compressed, _weight_with(found)) for name, found in factors.items()}
    scores = score_variants(original, variants, windows, progress=progress)
    rows = [
        _row(
            name,
            score,
            original if name == "original" else compressed,
            {linear.name for linear in compressed.linears if linear.compressed is not None},
            factors.get(name, {}),
        )
        for name, score in scores.items()
    ]
    given = limits.model_dump(exclude_none=True)
    return FidelityReport(
        rows=rows,
        windows=len(windows.input_ids),
        window_length=windows.input_ids.shape[1],
        limits=given,
        exceeded=_exceeded(given, rows[0], rows[-1]),
    )


def _weight_with(factors: Factors) -> WeightOf:
    def weight_of(linear: Linear) -> NDArray[np.float32]:
        weight = linear.backbone_weight()
        found = factors.get(linear.name)
        return weight if found is None else weight + found.product()

    return weight_of


def _row(
    name: str, scores: Scores, executor: Executor, compressed: Collection[str], factors: Factors
) -> FidelityRow:
    """The row of the variant that ``executor`` runs with ``factors``.

    ``compressed`` names the linears that the build compresses: bits are counted over those.
    """
    linears = [linear for linear in executor.linears if linear.name in compressed]
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    in_linears = sum(
        _BYTES_PLAIN * linear.in_features * linear.out_features
        if linear.compressed is None
        else linear.compressed.nbytes
        for linear in linears
    )
    added = sum(found.nbytes for found in factors.values())
    # The graph carries the factors that are shipped: this variant's are counted instead.
    carried = sum(linear.factors.nbytes for linear in linears if linear.factors is not None)
    return FidelityRow(
        name=name,
        perplexity=scores.perplexity,
        kl=scores.kl,
        top1_agreement=scores.top1_agreement,
        last_layer_error=scores.last_layer_error,
        bytes=executor.parameter_bytes - carried + added,
        bits_per_weight=8 * (in_linears + added) / weights if weights else 8.0 * _BYTES_PLAIN,
    )


def _exceeded(
    limits: Mapping[str, float], original: FidelityRow, shipped: FidelityRow
) -> tuple[str, ...]:
    measured = {
        "perplexity": shipped.perplexity,
        "perplexity_ratio": shipped.perplexity / original.perplexity,
        "kl": shipped.kl,
        "top1_agreement": shipped.top1_agreement,
    }
    sentences = []
    for name, limit in limits.items():
        lowest = name == "top1_agreement"
        # Written so that NaN fails too.
        if (lowest and measured[name] >= limit) or (not lowest and measured[name] <= limit):
            continue
        side = "below" if lowest else "above"
        sentences.append(f"{name} {measured[name]:.4g} is {side} verify.limits.{name} {limit:g}")
    return tuple(sentences)
