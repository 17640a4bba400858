from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.compiler.frontend import load as frontend
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.report import fidelity
from eoracc.compiler.report.fidelity import Scores, Variant, score_variants
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.text.windows import Windows
from eoracc.passes.graph.linears import Linear
from tests.graph_session import padded_mask
from tests.tiny_models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

SEQUENCE = 14


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return result


def oracle(
    logits: NDArray[np.float32], original: NDArray[np.float32], windows: Windows
) -> tuple[float, float, float]:
    """Perplexity, KL and agreement, token by token in float64."""
    q, p = log_softmax(logits), log_softmax(original)
    nll, kl, agreed = [], [], []
    for row, mask in enumerate(windows.attention_mask):
        for t in range(SEQUENCE - 1):
            if mask[t] and mask[t + 1]:
                nll.append(-q[row, t, windows.input_ids[row, t + 1]])
                kl.append((np.exp(p[row, t]) * (p[row, t] - q[row, t])).sum())
                agreed.append(q[row, t].argmax() == p[row, t].argmax())
    return float(np.exp(np.mean(nll))), float(np.mean(kl)), float(np.mean(agreed))


@pytest.mark.parametrize("family", ["smollm", "gemma3", "phi3"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_scores_equal_the_eager_models(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, padding: str
) -> None:
    # Parts and batches that do not divide what is scored.
    monkeypatch.setattr(fidelity, "_HEAD_TOKENS", 5)
    loaded = frontend.load(str(tiny_model(family, tmp_path / "model")), work=tmp_path)
    executor = Executor(loaded.model)
    rng = np.random.default_rng(0)
    weights = {linear.name: linear.weight() for linear in executor.linears[:-1]}
    changed = {
        name: (weight + 0.03 * rng.standard_normal(weight.shape)).astype(np.float32)
        for name, weight in weights.items()
    }
    ids = rng.integers(3, VOCABULARY, (5, SEQUENCE))
    mask = padded_mask([SEQUENCE, 3, 9, 1, 12], SEQUENCE, left=padding == "left")
    windows = Windows(ids, np.ones_like(ids) if padding == "none" else mask)

    def weight_of(linear: Linear) -> NDArray[np.float32]:
        return changed[linear.name] if linear.name in changed else linear.weight()

    scores = score_variants(
        executor, {"changed": Variant(executor, weight_of)}, windows, progress=SilentProgress()
    )
    assert list(scores) == ["original", "changed"]
    original = reference_logits(load_eager(loaded.folder, {}), ids, windows.attention_mask)
    logits = reference_logits(load_eager(loaded.folder, changed), ids, windows.attention_mask)
    # Logits of size L from sums of some thousand products are off by about 8 sqrt(n) u L.
    off = 8 * 4000**0.5 * 2.0**-24 * float(np.abs(original).max())
    for name, found in (("original", original), ("changed", logits)):
        perplexity, kl, agreement = oracle(found, original, windows)
        score = scores[name]
        assert abs(np.log(score.perplexity) - np.log(perplexity)) < 2 * off
        assert abs(score.kl - kl) < 4 * off
        assert score.top1_agreement == agreement
    assert scores["original"].kl == pytest.approx(0, abs=4 * off)
    assert scores["original"].top1_agreement == 1
    assert scores["original"].last_layer_error == 0
    assert scores["changed"].kl > 100 * off, "the comparison means something"
    assert 0 < scores["changed"].last_layer_error < 1


def test_last_layer_error_is_of_what_enters_the_head(tmp_path: Path) -> None:
    import torch

    loaded = frontend.load(str(tiny_model("smollm", tmp_path / "model")), work=tmp_path)
    executor = Executor(loaded.model)
    down = executor.linears[6].name
    weight = executor.linears[6].weight() * np.float32(1.3)
    ids = np.random.default_rng(1).integers(3, VOCABULARY, (2, SEQUENCE))
    windows = Windows(ids, np.ones_like(ids))
    scores: dict[str, Scores] = score_variants(
        executor,
        {"down": Variant(executor, lambda one: weight if one.name == down else one.weight())},
        windows,
        progress=SilentProgress(),
    )

    def hidden(weights: dict[str, NDArray[np.float32]]) -> NDArray[np.float64]:
        model = load_eager(loaded.folder, weights)
        with torch.inference_mode():
            states = model.base_model(torch.from_numpy(ids)).last_hidden_state
        return np.asarray(states.double().numpy())

    exact, off = hidden({}), hidden({down: weight})
    expected = np.linalg.norm(off - exact) / np.linalg.norm(exact)
    tolerance = 8 * 4000**0.5 * 2.0**-24
    assert tolerance < 1e-2 * expected
    assert scores["down"].last_layer_error == pytest.approx(expected, abs=tolerance)
