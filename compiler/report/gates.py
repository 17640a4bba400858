"""The fidelity gate: what each variant of the model scores, weighs, and whether that will do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from eoracc.compiler.config.sections import Limits
from eoracc.compiler.report.content import FidelityReport, FidelityRow
from eoracc.compiler.report.fidelity import Scores, Variant, score_variants
from eoracc.compiler.sweep.batch import WeightOf
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.sweep.run import Comparisons
from eoracc.compiler.text.windows import Windows
from eoracc.passes.graph.counted import counted
from eoracc.passes.graph.linears import Linear
from eoracc.passes.progress import Progress
from eoracc.plugins.operands.low_rank import LowRank

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
    factorized: str | None = None,
    pruned: bool = False,
) -> FidelityReport:
    """Score the original, what was factorised, the backbone, the comparators, last what is shipped.

    Args:
      original: the graph before any pass.
      compressed: the graph after all of them.
      windows: held-out text.
      shipped: name of the compensation that the artifact carries; None for none.
      comparisons: factors that are scored next to it.
      limits: what the last row must keep to.
      progress: shown one step per variant.
      factorized: name of the pass that factorised linears; None for none.
      pruned: whether a pass pruned linears: the backbone's row is then called "compressed".
    """
    linears = compressed.linears
    made: dict[str, _Made] = {}
    if factorized is not None:
        made[factorized] = _Made(Linear.weight, _plain_bytes)
    if factorized is None or any(linear.compressed is not None for linear in linears):
        made["compressed" if pruned else "quantized"] = _Made.compensated({})
        compensated: dict[str, Factors] = {
            name: factors for name, factors in comparisons.items() if name != shipped
        }
        if shipped is not None:
            compensated[shipped] = {
                linear.name: linear.factors for linear in linears if linear.factors is not None
            }
        made |= {name: _Made.compensated(factors) for name, factors in compensated.items()}
    variants = {name: Variant(compressed, variant.weight_of) for name, variant in made.items()}
    scores = score_variants(original, variants, windows, progress=progress)
    rows = [_original_row(scores["original"], original)]
    rows += [_row(name, scores[name], compressed, variant) for name, variant in made.items()]
    given = limits.model_dump(exclude_none=True)
    return FidelityReport(
        rows=rows,
        windows=len(windows.input_ids),
        window_length=windows.input_ids.shape[1],
        limits=given,
        exceeded=_exceeded(given, rows[0], rows[-1]),
    )


@dataclass(frozen=True)
class _Made:
    """The linears after some or all passes.

    Attributes:
      weight_of: the weight that a linear multiplies with.
      bytes_of: the stored bytes of that weight.
    """

    weight_of: WeightOf
    bytes_of: Callable[[Linear], int]

    @classmethod
    def compensated(cls, factors: Factors) -> _Made:
        """The backbone with ``factors`` by linear."""

        def weight_of(linear: Linear) -> NDArray[np.float32]:
            weight = linear.backbone_weight()
            correction = factors.get(linear.name)
            return weight if correction is None else weight + correction.product()

        def bytes_of(linear: Linear) -> int:
            correction = factors.get(linear.name)
            return _backbone_bytes(linear) + (0 if correction is None else correction.nbytes)

        return cls(weight_of, bytes_of)


def _plain_bytes(linear: Linear) -> int:
    return _BYTES_PLAIN * linear.in_features * linear.out_features


def _backbone_bytes(linear: Linear) -> int:
    return _plain_bytes(linear) if linear.compressed is None else linear.compressed.nbytes


def _shipped_bytes(linear: Linear) -> int:
    """The bytes that the graph stores for ``linear``."""
    return _backbone_bytes(linear) + (0 if linear.factors is None else linear.factors.nbytes)


def _original_row(scores: Scores, original: Executor) -> FidelityRow:
    return FidelityRow(
        name="original",
        **asdict(scores),
        bytes=original.parameter_bytes,
        bits_per_weight=8.0 * _BYTES_PLAIN,
    )


def _row(name: str, scores: Scores, executor: Executor, made: _Made) -> FidelityRow:
    """The row of the variant ``made``, run by ``executor``.

    Bits are counted over the linears of decoder blocks that the build compresses, per weight that
    the original has there: the two factors of one count against its weights.
    """
    touched = [
        linear for linear in executor.linears if linear.compressed is not None or linear.whole
    ]
    in_blocks = counted(touched)
    wholes = {linear.whole or linear for linear in in_blocks}
    weights = sum(linear.in_features * linear.out_features for linear in wholes)
    stored = sum(map(made.bytes_of, touched))
    return FidelityRow(
        name=name,
        **asdict(scores),
        # The graph carries what is shipped: this variant's is counted instead.
        bytes=executor.parameter_bytes - sum(map(_shipped_bytes, touched)) + stored,
        bits_per_weight=8 * sum(map(made.bytes_of, in_blocks)) / weights
        if weights
        else 8.0 * _BYTES_PLAIN,
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
