"""The survey that finds what errors of outputs count for, and the pass that goes by it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from eoracc.compiler.config.load import load_config
from eoracc.compiler.driver import build
from eoracc.compiler.eager.model import load_eager
from eoracc.compiler.frontend.load import load
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.report.lines import report_lines
from eoracc.compiler.sweep import survey
from eoracc.compiler.sweep.survey import Survey
from eoracc.compiler.text.windows import Windows
from eoracc.errors import ConfigError, PassError
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.compensate.eora import Eora
from eoracc.passes.graph.linears import find_again, find_linears
from eoracc.passes.plan.calibrate_outputs import CalibrateOutputs
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from eoracc.passes.solvers.factors import gram_root, output_weighted_factors
from tests.passes.groups import qkv
from tests.passes.plan.surveys import survey_of
from tests.tiny_build import tiny_config, tiny_workspace
from tests.tiny_models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from eoracc.compiler.config.sections import BuildConfig
    from eoracc.compiler.frontend.load import LoadedModel
    from eoracc.passes.graph.linears import LinearGroup
    from eoracc.passes.solvers.factor_types import FactorType

EPS = float(np.finfo(np.float32).eps)


def windows() -> Windows:
    ids = np.random.default_rng(1).integers(3, VOCABULARY, (5, 10))
    mask = np.ones_like(ids)
    mask[0, 6:] = 0
    return Windows(ids, mask)


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedModel:
    return load(str(tiny_model("llama", tmp_path / "model")), work=tmp_path / "work")


def context_of(loaded: LoadedModel, folder: Path, **changes: object) -> Survey:
    return replace(survey_of(loaded, windows(), folder), **changes)  # type: ignore[arg-type]


def grams_of(context: Survey) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    return {
        linear.name: linear.output_gram()
        for linear in context.linears
        if linear.output_gram is not None
    }


def test_gives_every_linear_of_a_block_the_gram_of_its_gradients(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    context = context_of(loaded, tmp_path / "survey")
    found = CalibrateOutputs(damping=0.0, precision="float32").survey(context)
    assert (found["by"], found["linears"], found["tokens"]) == ("logits", 14, 46)
    grams = grams_of(context)
    assert "lm_head" not in grams
    for name, gram in grams.items():
        kept = load_file(tmp_path / "survey" / "output_grams" / f"{name}.safetensors")
        np.testing.assert_array_equal(gram, kept["output_gram"])
    assert grams["model.layers.0.self_attn.k_proj"].shape == (32, 32)


def test_damping_raises_the_diagonal_by_its_mean(loaded: LoadedModel, tmp_path: Path) -> None:
    context = context_of(loaded, tmp_path)
    CalibrateOutputs(damping=0.0, precision="float32").survey(context)
    plain = grams_of(context)
    CalibrateOutputs(damping=0.5, precision="float32").survey(context)
    for name, gram in grams_of(context).items():
        expected = plain[name] + 0.5 * np.trace(plain[name]) / len(gram) * np.eye(len(gram))
        np.testing.assert_allclose(gram, expected, rtol=8 * EPS, atol=8 * EPS * plain[name].max())


def test_the_covariance_is_that_of_the_original_outputs(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    context = context_of(loaded, tmp_path / "survey")
    CalibrateOutputs(by="covariance", damping=0.0, precision="float32").survey(context)
    model: Any = load_eager(loaded.folder, {})
    outputs: dict[str, torch.Tensor] = {}
    for name in grams_of(context):
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: outputs.__setitem__(name, output)
        )
    text = windows()
    with torch.inference_mode():
        model(
            torch.from_numpy(text.input_ids), attention_mask=torch.from_numpy(text.attention_mask)
        )
    for name, gram in grams_of(context).items():
        rows = outputs[name].numpy()[text.attention_mask == 1].astype(np.float64)
        expected = rows.T @ rows / len(rows)
        # Three blocks of products, each 88 long at most.
        np.testing.assert_allclose(gram, expected, rtol=0, atol=300 * EPS * expected.max())


def test_its_inverse_weighs_outputs_by_what_they_carry(loaded: LoadedModel, tmp_path: Path) -> None:
    context = context_of(loaded, tmp_path)
    CalibrateOutputs(by="covariance", damping=0.1, precision="float32").survey(context)
    plain = grams_of(context)
    CalibrateOutputs(by="inverse_covariance", damping=0.1, precision="float32").survey(context)
    for name, gram in grams_of(context).items():
        # The ridge keeps the condition below the ratio of the trace to a tenth of its mean.
        limit = 20 * len(gram) * len(gram) * EPS
        assert limit < 0.1
        np.testing.assert_allclose(gram @ plain[name], np.eye(len(gram)), atol=limit)


def test_factors_of_a_linear_share_the_gradients_of_its_output(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    survey = CalibrateOutputs(damping=0.0, precision="float32")
    before = context_of(loaded, tmp_path / "a")
    survey.survey(before)
    name = "model.layers.1.self_attn.q_proj"
    linear = next(one for one in before.linears if one.name == name)
    rng = np.random.default_rng(2)
    u, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((96, 5), (5, 48)))
    linear.factorize(u, v)
    after = context_of(
        loaded, tmp_path / "b", linears=find_again(loaded.model, list(before.linears))
    )
    survey.survey(after)
    whole, grams = grams_of(before)[name], grams_of(after)
    assert name not in grams
    np.testing.assert_array_equal(grams[f"{name}.u"], whole)
    expected = u.T.astype(np.float64) @ whole @ u
    np.testing.assert_allclose(
        grams[f"{name}.v"], expected, rtol=0, atol=8 * EPS * np.abs(expected).max()
    )


def test_an_output_that_nothing_depends_on_counts_alike(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    context = context_of(loaded, tmp_path)
    survey = CalibrateOutputs()
    survey.survey(context)
    gram = survey._damped(np.zeros((3, 3)))
    np.testing.assert_array_equal(gram, np.eye(3))


def test_a_finished_survey_is_not_made_again(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = context_of(loaded, tmp_path)
    found = CalibrateOutputs().survey(first)
    monkeypatch.setattr(survey, "output_gradient_grams", lambda *_, **__: pytest.fail("made again"))
    again = context_of(loaded, tmp_path)
    assert CalibrateOutputs().survey(again) == found
    for name, gram in grams_of(again).items():
        np.testing.assert_array_equal(gram, grams_of(first)[name])


def test_says_what_to_do_without_text(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(PassError, match="has no text: give 'calibration'"):
        CalibrateOutputs().survey(context_of(loaded, tmp_path, windows=None))


def test_a_model_without_blocks_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    head = [linear for linear in find_linears(loaded.model) if linear.block is None]
    with pytest.raises(PassError, match="no linear in a decoder block"):
        CalibrateOutputs().survey(context_of(loaded, tmp_path, linears=head))


# --- eora by it -----------------------------------------------------------------------------------


@pytest.fixture
def group() -> LinearGroup:
    group = qkv()
    QuantizeRtn(bits=2, group_size=24).call(group)
    rng = np.random.default_rng(5)
    for linear in group.linears:
        rows = rng.standard_normal((200, linear.out_features))
        rows *= np.geomspace(1, 0.05, linear.out_features)
        gram = (rows.T @ rows / 200).astype(np.float32)
        linear.output_gram = lambda gram=gram: gram
    return group


def compensate(group: LinearGroup, eora: Eora) -> None:
    """As if it were the first to do so."""
    for linear in group.linears:
        linear.factors = None
    eora.call(group)


def left_of(group: LinearGroup) -> list[float]:
    """What each linear loses by the weights of its outputs."""
    assert group.gram is not None
    losses = []
    for linear in group.linears:
        assert linear.output_gram is not None
        delta = (linear.weight() - linear.effective_weight()).astype(np.float64)
        root = gram_root(linear.output_gram().astype(np.float64))
        losses.append(float(np.linalg.norm(root.T @ delta @ gram_root(group.gram.matrix))))
    return losses


@pytest.mark.parametrize("factor_type", ["float16", "int8", "int4"])
def test_eora_leaves_less_of_what_counts(group: LinearGroup, factor_type: FactorType) -> None:
    compensate(group, Eora(rank=6, factor_type=factor_type, weigh_outputs=False))
    plain, errors = left_of(group), [linear.record.errors["eora"] for linear in group.linears]
    compensate(group, Eora(rank=6, factor_type=factor_type))
    for left, before in zip(left_of(group), plain, strict=True):
        assert left < 0.98 * before
    # On record is the plain output error, of which the plain factors leave less.
    for linear, before in zip(group.linears, errors, strict=True):
        assert linear.record.errors["eora"] > before


def test_eora_gives_the_factors_of_the_solver(group: LinearGroup) -> None:
    assert group.gram is not None
    compensate(group, Eora(rank=6, factor_type="float16"))
    for linear in group.linears:
        assert linear.output_gram is not None
        assert linear.factors is not None
        assert linear.compressed is not None
        b, a = output_weighted_factors(
            linear.weight() - linear.compressed.dequantize(),
            group.gram.matrix,
            gram_root(linear.output_gram().astype(np.float64)).T,
            6,
        )
        limit = 2**-9 * np.abs(b @ a).max()
        np.testing.assert_allclose(linear.factors.product(), b @ a, atol=limit)


def test_outputs_that_count_alike_change_nothing(group: LinearGroup) -> None:
    compensate(group, Eora(rank=6, weigh_outputs=False))
    plain = left_of(group)
    for linear in group.linears:
        linear.output_gram = lambda size=linear.out_features: np.eye(size, dtype=np.float32)
    alike = left_of(group)
    compensate(group, Eora(rank=6))
    np.testing.assert_allclose(left_of(group), alike, rtol=1e-3)
    assert not np.allclose(plain, alike, rtol=1e-2)


def test_energy_counts_what_the_weights_leave(group: LinearGroup) -> None:
    assert group.gram is not None
    before = left_of(group)
    compensate(group, Eora(rank=24, energy=0.3))
    for linear, left, whole in zip(group.linears, left_of(group), before, strict=True):
        assert linear.factors is not None
        rank = linear.factors.rank
        assert 0 < rank < 24
        assert left**2 < 0.3 * whole**2
    compensate(group, Eora(rank=rank - 1))
    assert left_of(group)[-1] ** 2 > 0.3 * before[-1] ** 2


def test_few_tokens_leave_outputs_out() -> None:
    group = qkv(tokens=20)
    QuantizeRtn(bits=2, group_size=24).call(group)
    compensate(group, Eora(rank=4))
    plain = [linear.effective_weight() for linear in group.linears]
    for linear in group.linears:
        linear.output_gram = lambda: pytest.fail("loaded what no one can use")
    compensate(group, Eora(rank=4))
    for linear, weight in zip(group.linears, plain, strict=True):
        np.testing.assert_array_equal(linear.effective_weight(), weight)


# --- tokens by gradients --------------------------------------------------------------------------


def test_calibrate_counts_tokens_by_their_gradients() -> None:
    group = qkv(tokens=64)
    assert group.gram is not None
    group.activations = group.gram.activations
    rng = np.random.default_rng(9)
    counts = [rng.exponential(size=64).astype(np.float32) for _ in group.linears]
    counts[0][:3] = counts[1][:3] = 0
    for linear, own in zip(group.linears, counts, strict=True):
        linear.token_weights = lambda own=own: own
    calibrate = Calibrate(tokens="gradients", precision="float32")
    calibrate.requires(group)
    assert group.activations is not None
    ((rows, _),) = group.activations()
    calibrate.call(group)
    total = np.sqrt(np.sum(counts, axis=0))
    total /= total[3:].mean()
    expected = (rows.astype(np.float64) * total[:, None]).T @ rows
    np.testing.assert_allclose(
        group.gram.matrix, expected, rtol=0, atol=64 * EPS * np.abs(expected).max()
    )
    assert group.gram.tokens == pytest.approx(61, rel=1e-5)
    # Statistics that other passes take in this sweep count them alike.
    mean = total @ np.abs(rows) / 61
    np.testing.assert_allclose(group.gram.magnitudes, mean, rtol=1e-4)


def test_tokens_without_gradients_are_refused(group: LinearGroup) -> None:
    assert group.gram is not None
    group.activations = group.gram.activations
    with pytest.raises(PassError, match="put 'calibrate_outputs' right before this sweep"):
        Calibrate(tokens="gradients").requires(group)


# --- in a build -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "linears"),
    [
        (["pack_projections"], 8),
        # Each weight is two linears, of which the survey finds the Gram of the whole.
        (["calibrate", {"svd_llm": {"ratio": 0.3}}], 28),
    ],
)
def test_a_build_goes_by_it(before: list[object], linears: int, tmp_path: Path) -> None:
    workspace = tiny_workspace(tmp_path)
    errors = []
    for weigh in (True, False):
        config = tiny_config(
            [
                *before,
                "calibrate_outputs",
                {"calibrate": {"tokens": "gradients"}},
                {"quantize_gptq": {"bits": 3, "group_size": 16}},
                {"eora": {"rank": 4, "weigh_outputs": weigh}},
            ],
            verify={"windows": 1, "window_length": 16, "parity": False},
            output=f"out-{weigh}",
        )
        report = build(config, config_dir=workspace, progress=SilentProgress()).report
        (survey,) = report.surveys
        assert (survey["pass"], survey["by"]) == ("calibrate_outputs", "logits")
        assert survey["linears"] == linears
        tokens = survey["tokens"]
        assert (
            f"calibrate_outputs: by logits, {linears} linears over {tokens:,} tokens"
            in report_lines(report)
        )
        errors.append([linear.errors["eora"] for linear in report.linears if linear.rank])
    # The first group sees the same either way, and its plain output error is eora's own.
    assert errors[0][0] > errors[1][0]
    assert {path.name for path in workspace.iterdir()} == {
        "model",
        "text.txt",
        "out-True",
        "out-False",
    }


def test_what_packs_must_come_first() -> None:
    with pytest.raises(ConfigError, match="pack_projections"):
        load_config_of(["calibrate_outputs", "pack_projections", "calibrate", "quantize_rtn"])


def load_config_of(passes: list[object]) -> BuildConfig:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.yaml"
        content = {"model": "m", "calibration": {"text": "t"}, "passes": passes, "output": "o"}
        path.write_text(json.dumps(content))
        return load_config(path)
