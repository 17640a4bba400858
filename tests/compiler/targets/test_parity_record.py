from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.compiler.frontend import load as frontend
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.targets import parity_record as verify
from eoracc.compiler.targets.parity_record import PARITY_STEPS, record_parity
from eoracc.compiler.text.windows import Windows
from eoracc.passes.compensate.svd import Svd
from eoracc.passes.graph.embeddings import find_embeddings
from eoracc.passes.graph.linears import LinearGroup
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from tests.tiny_models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from eoracc.passes.graph.linears import Linear
    from eoracc.runtime.parity.record import ParityRecord


class Counter:
    def __init__(self) -> None:
        self.steps = 0

    def advance(self, note: str = "") -> None:
        assert note
        self.steps += 1

    def skip(self) -> None:
        raise AssertionError("nothing was done before")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Linear], ParityRecord]:
    folder = tmp_path_factory.mktemp("verify")
    loaded = frontend.load(str(tiny_model("smollm", folder / "model")), work=folder)
    original, embeddings = Executor(loaded.model.clone()), find_embeddings(loaded.model)
    linears = Executor(loaded.model).linears
    for linear in linears[:-1]:
        QuantizeRtn(bits=3, group_size=16).call(LinearGroup((linear,)))
        if linear.role != "o_proj":
            Svd(rank=3, factor_type="float16").call(LinearGroup((linear,)))
    # Shorter than the prompts: the text wraps around.
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (2, 20))
    mask = np.ones_like(ids)
    mask[1, 15:] = 0
    counter = Counter()
    record = record_parity(
        linears, embeddings, original, Windows(ids, mask), folder=loaded.folder, phase=counter
    )
    assert counter.steps == PARITY_STEPS
    return loaded.folder, linears, record


def test_linears_are_what_their_weights_say_in_float64(
    recorded: tuple[Path, list[Linear], ParityRecord],
) -> None:
    _, linears, record = recorded
    assert [one.name for one in record.linears] == [linear.name for linear in linears[:-1]]
    assert sorted(record.inputs) == sorted({linear.in_features for linear in linears[:-1]})
    for one, linear in zip(record.linears, linears, strict=False):
        inputs = record.inputs[linear.in_features].astype(np.float64)
        weight = linear.backbone_weight().astype(np.float64)
        expected = inputs @ weight.T
        magnitude = np.abs(inputs) @ np.abs(weight.T)
        rank = 0
        if linear.factors is not None:
            a = linear.factors.lora_a.astype(np.float64)
            b = linear.factors.lora_b.astype(np.float64)
            rank = len(a)
            expected += inputs @ a.T @ b.T
            magnitude += np.abs(inputs) @ np.abs(a.T) @ np.abs(b.T)
        np.testing.assert_allclose(one.outputs, expected, rtol=2.0**-23, atol=1e-12)
        bound = (linear.in_features + rank + 3) * 2.0**-24 * magnitude
        np.testing.assert_allclose(one.tolerance, bound, rtol=1e-5)
        assert one.tolerance.max() < 1e-3 * np.abs(one.outputs).max()


def test_cases_cover_every_way_of_calling_and_agree_with_whole_calls(
    recorded: tuple[Path, list[Linear], ParityRecord],
) -> None:
    folder, linears, record = recorded
    weights = {one.name: one.effective_weight() for one in linears if one.compressed is not None}
    model = load_eager(folder, weights)
    chunks = {case.name: case.chunks for case in record.cases}
    assert chunks["prefill"] == (64,)
    assert chunks["decode and chunk on cache"] == (32, 1, 1, 16)
    lengths = record.cases[-1].attention_mask.sum(axis=1)
    assert len(set(lengths)) == len(lengths) == 3, "rows of unequal lengths"
    for case in record.cases:
        assert case.input_ids.min() >= 0
        assert (case.attention_mask[case.rows, case.columns] == 1).all(), "padding is not compared"
        # At once and without the cache.
        logits = reference_logits(model, case.input_ids, case.attention_mask)
        kept = logits[case.rows, case.columns]
        np.testing.assert_allclose(case.logits, kept, rtol=0, atol=case.tolerance)
        assert case.tolerance < 1e-3 * record.compression_effect


def test_compression_effect_is_what_compression_did_to_the_logits(
    recorded: tuple[Path, list[Linear], ParityRecord],
) -> None:
    folder, _, record = recorded
    case = record.cases[0]
    original = reference_logits(load_eager(folder, {}), case.input_ids, case.attention_mask)
    effect = np.abs(case.logits - original[case.rows, case.columns]).max()
    assert record.compression_effect == pytest.approx(effect, abs=2 * case.tolerance)


def test_tolerance_grows_with_depth_and_size(
    recorded: tuple[Path, list[Linear], ParityRecord],
) -> None:
    _, linears, _ = recorded
    logits: Any = np.array([[1.0, -3.0]], np.float32)
    whole = verify.logits_tolerance(linears, logits)
    depths = [48 + 3] * 3 + [96] + [48 + 3] * 2 + [88 + 3]
    assert whole == pytest.approx(2.0**-24 * 3 * (2 * np.sqrt(depths).sum() + np.sqrt(48)))
    assert verify.logits_tolerance(linears[:3], logits) < whole
    assert verify.logits_tolerance(linears, 2 * logits) == pytest.approx(2 * whole)
