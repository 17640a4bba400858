from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from eoracc.compiler.config.sections import Limits
from eoracc.compiler.frontend import load as frontend
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.report import gates
from eoracc.compiler.report.fidelity import Scores, Variant
from eoracc.compiler.report.gates import fidelity_report
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.text.windows import Windows
from eoracc.passes.compensate.svd import Svd
from eoracc.passes.graph.linears import LinearGroup
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from eoracc.plugins.operands.low_rank import LowRank
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from eoracc.compiler.report.content import FidelityReport

RANK, COMPARED = 3, 5


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Executor, Executor]:
    """The original, and the same with its blocks in 3 bits and factors of rank 3."""
    loaded = frontend.load(str(tiny_model("smollm", tmp_path / "model")), work=tmp_path)
    original = Executor(loaded.model.clone())
    compressed = Executor(loaded.model)
    for linear in compressed.linears[:-1]:
        QuantizeRtn(bits=3, group_size=16).call(LinearGroup((linear,)))
        Svd(rank=RANK, factor_type="float16").call(LinearGroup((linear,)))
    return original, compressed


def report(
    pair: tuple[Executor, Executor],
    monkeypatch: pytest.MonkeyPatch,
    *,
    shipped: str | None = "eora",
    limits: Limits | None = None,
    scores: Mapping[str, float] | None = None,
) -> FidelityReport:
    """The gate's report where all variants but the original score what ``scores`` say."""
    original, compressed = pair
    figures = {"perplexity": 20.0, "kl": 0.5, "top1_agreement": 0.75, "last_layer_error": 0.1}
    figures |= scores or {}

    def score_variants(_: Executor, variants: dict[str, Variant], *__: Any, **___: Any) -> Any:  # noqa: ANN401
        exact = Scores(perplexity=10.0, kl=0.0, top1_agreement=1.0, last_layer_error=0.0)
        return {"original": exact} | {name: Scores(**figures) for name in variants}

    monkeypatch.setattr(gates, "score_variants", score_variants)
    found = {
        linear.name: LowRank(
            lora_a=np.zeros((COMPARED, linear.in_features), np.float16),
            lora_b=np.zeros((linear.out_features, COMPARED), np.float16),
        )
        for linear in compressed.linears[:-1]
    }
    ids = np.ones((2, 7), np.int64)
    return fidelity_report(
        original,
        compressed,
        Windows(ids, ids),
        shipped=shipped,
        comparisons={"svd": found},
        limits=Limits() if limits is None else limits,
        progress=SilentProgress(),
    )


def test_rows_weigh_what_each_variant_would(
    pair: tuple[Executor, Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = report(pair, monkeypatch)
    assert (result.windows, result.window_length) == (2, 7)
    rows = {row.name: row for row in result.rows}
    assert list(rows) == ["original", "quantized", "svd", "eora"]
    shapes = [(one.out_features, one.in_features) for one in pair[0].linears[:-1]]
    weights = sum(n * k for n, k in shapes)
    # In tiles of 16 rows: 3 bits a code, chunks of 32 filled up; a float16 scale and half a byte
    # of zero point for each group of 16. A factor's ranks are rows of the one and columns of the
    # other.
    tiles = [(-(-n // 16) * 16, k) for n, k in shapes]
    stored = sum(n * (-(-k // 32) * 12 + -(-k // 16) * 2.5) for n, k in tiles)

    def factors(rank: int) -> int:
        return sum(2 * (-(-rank // 16) * 16 * k + n * rank) for n, k in tiles)

    others = 4 * (131 * 48 + 5 * 48)  # the tied table and the norms
    assert rows["original"].bytes == 4 * weights + others
    assert rows["quantized"].bytes == stored + others
    assert rows["svd"].bytes == stored + factors(COMPARED) + others
    assert rows["eora"].bytes == stored + factors(RANK) + others
    assert rows["original"].bits_per_weight == 32
    assert rows["quantized"].bits_per_weight == pytest.approx(8 * stored / weights)
    assert rows["svd"].bits_per_weight == pytest.approx(8 * (stored + factors(COMPARED)) / weights)
    assert rows["eora"].bits_per_weight == pytest.approx(8 * (stored + factors(RANK)) / weights)


def test_what_is_shipped_comes_last(
    pair: tuple[Executor, Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = report(pair, monkeypatch, shipped="svd").rows
    assert [row.name for row in rows] == ["original", "quantized", "svd"]
    # At the rank of the graph, not of the comparison that goes by the same name.
    assert rows[-1].bytes == report(pair, monkeypatch, shipped="eora").rows[-1].bytes


@pytest.mark.parametrize(
    ("limits", "sentences"),
    [
        ({}, []),
        ({"perplexity": 20, "perplexity_ratio": 2, "kl": 0.5, "top1_agreement": 0.75}, []),
        ({"perplexity": 19.9}, ["perplexity 20 is above verify.limits.perplexity 19.9"]),
        ({"perplexity_ratio": 1.5}, ["perplexity_ratio 2 is above verify.limits.perplexity_ratio"]),
        (
            {"kl": 0.25, "top1_agreement": 0.8},
            [
                "kl 0.5 is above verify.limits.kl 0.25",
                "top1_agreement 0.75 is below verify.limits.top1_agreement 0.8",
            ],
        ),
    ],
)
def test_limits(
    pair: tuple[Executor, Executor],
    monkeypatch: pytest.MonkeyPatch,
    limits: dict[str, float],
    sentences: list[str],
) -> None:
    result = report(pair, monkeypatch, limits=Limits(**limits))
    assert dict(result.limits) == limits
    assert len(result.exceeded) == len(sentences)
    for said, expected in zip(result.exceeded, sentences, strict=True):
        assert said.startswith(expected)


@pytest.mark.parametrize("figure", ["perplexity", "kl", "top1_agreement"])
def test_nan_fails_any_limit(
    pair: tuple[Executor, Executor], monkeypatch: pytest.MonkeyPatch, figure: str
) -> None:
    limit = 0.0 if figure == "top1_agreement" else 1e30
    limits = Limits(**{figure: limit})
    assert not report(pair, monkeypatch, limits=limits).exceeded
    assert report(pair, monkeypatch, limits=limits, scores={figure: float("nan")}).exceeded
