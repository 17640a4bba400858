"""What holds for every pass that sets weights to zero."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from eoracc.errors import ConfigError, PassError
from eoracc.passes import load_passes
from eoracc.passes.base import Pass, passes_of
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.compensate.base import Compensation
from eoracc.passes.compensate.caldera import Caldera
from eoracc.passes.compensate.eora import Eora
from eoracc.passes.compensate.quantize_factors import QuantizeFactors
from eoracc.passes.compensate.svd import Svd
from eoracc.passes.compression import Compression
from eoracc.passes.graph import spec
from eoracc.passes.graph.linears import LinearGroup, find_linears
from eoracc.passes.prune.prune_magnitude import PruneMagnitude
from eoracc.passes.prune.prune_sparsegpt import PruneSparsegpt
from eoracc.passes.prune.prune_wanda import PruneWanda
from eoracc.passes.prune.pruning import PruneOverride, Pruning
from eoracc.passes.quantize.quantization import Quantization, QuantizeOverride
from eoracc.passes.quantize.quantize_gptq import QuantizeGptq
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from eoracc.passes.recipe import Recipe
from eoracc.passes.solvers.factors import weighted_norm
from tests.passes.groups import make_group, qkv

load_passes()

METHODS = passes_of(Pruning)


def zeros_of_runs(weight: NDArray[np.float32], run: int) -> NDArray[np.int_]:
    zeros: NDArray[np.int_] = (weight == 0).reshape(len(weight), -1, run).sum(axis=2)
    return zeros


def run_all(group: LinearGroup, *passes: Compression | Compensation) -> LinearGroup:
    for item in passes:
        item.requires(group)
        item.call(group)
        spec.check_linears(group.linears, spec.Stage.COMPRESSED, after=item.name)
    return group


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("pattern", "run"), [("2:4", 4), ("4:8", 8), ("3:4", 4)])
def test_every_run_has_its_zeros(method: type[Pruning], pattern: str, run: int) -> None:
    removed = run - int(pattern[0])
    for linear in run_all(qkv(), method(pattern=pattern)).linears:
        assert (zeros_of_runs(linear.backbone_weight(), run) == removed).all()
        assert linear.record.sparsity == removed / run
        assert 0 < linear.record.errors[method.name] < 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
def test_a_share_is_removed_and_no_more(method: type[Pruning], sparsity: float) -> None:
    for linear in run_all(qkv(), method(sparsity=sparsity)).linears:
        weight = linear.backbone_weight()
        # Wanda removes it from every row, which may leave one more in each.
        removed = np.count_nonzero(weight == 0)
        assert sparsity * weight.size - len(weight) < removed <= sparsity * weight.size
        if not sparsity:
            np.testing.assert_array_equal(weight, linear.weight())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quantization", [QuantizeGptq, QuantizeRtn])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("options", [{"pattern": "2:4"}, {"sparsity": 0.5}])
def test_codes_keep_what_is_pruned_at_zero(
    method: type[Pruning],
    quantization: type[Quantization],
    symmetric: bool,
    options: dict[str, Any],
) -> None:
    group = run_all(qkv(), method(**options), quantization(bits=3, symmetric=symmetric))
    for linear in group.linears:
        assert linear.quantized is not None
        weight = linear.backbone_weight()
        if "pattern" in options:
            assert zeros_of_runs(weight, 4).min() >= 2
        assert np.count_nonzero(weight == 0) >= weight.size / 2 - len(weight)
        assert 0 < linear.record.errors[quantization.name] < 1


@pytest.mark.parametrize("method", [PruneMagnitude, PruneWanda])
@pytest.mark.parametrize("quantization", [QuantizeGptq, QuantizeRtn])
def test_a_mask_is_that_of_the_pruning_pass(
    method: type[Pruning], quantization: type[Quantization]
) -> None:
    alone = run_all(qkv(), method(pattern="2:4"))
    both = run_all(qkv(), method(pattern="2:4"), quantization(bits=8))
    for one, other in zip(alone.linears, both.linears, strict=True):
        assert not other.backbone_weight()[one.backbone_weight() == 0].any()


def test_weights_beyond_float16_scales_keep_their_zeros() -> None:
    rng = np.random.default_rng(3)
    weights = {"model.layers.0.mlp.up_proj": rng.standard_normal((16, 64)).astype(np.float32)}
    weights["model.layers.0.mlp.up_proj"] *= np.float32(1e-9)
    inputs = rng.standard_normal((200, 64)).astype(np.float32)
    for method in METHODS:
        group = run_all(make_group(weights, inputs), method(pattern="2:4"), QuantizeGptq(bits=4))
        (linear,) = group.linears
        assert linear.quantized is not None
        assert linear.quantized.scales.dtype == np.float32
        assert zeros_of_runs(linear.backbone_weight(), 4).min() >= 2
        assert 0 < linear.record.errors["quantize_gptq"] < 1


def test_sparsegpt_and_gptq_are_one_solve() -> None:
    joint = run_all(qkv(), PruneSparsegpt(pattern="2:4"), QuantizeGptq(bits=3))
    apart = run_all(qkv(), PruneSparsegpt(pattern="2:4"), QuantizeRtn(bits=3))
    wanda = run_all(qkv(), PruneWanda(pattern="2:4"), QuantizeGptq(bits=3))
    for one, other, third in zip(joint.linears, apart.linears, wanda.linears, strict=True):
        error = one.record.errors["quantize_gptq"]
        assert error < 0.9 * other.record.errors["quantize_rtn"]
        assert error < third.record.errors["quantize_gptq"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quantization", [None, QuantizeGptq(bits=3), QuantizeRtn(bits=3)])
def test_eora_gives_back_what_pruning_took(
    method: type[Pruning], quantization: Quantization | None
) -> None:
    passes: list[Compression] = [method(pattern="2:4")]
    passes += [] if quantization is None else [quantization]
    plain = run_all(qkv(), *passes)
    eora = run_all(qkv(), *passes, Eora(rank=6, factor_type="float16"))
    svd = run_all(qkv(), *passes, Svd(rank=6, factor_type="float16"))
    for one, two, three in zip(plain.linears, eora.linears, svd.linears, strict=True):
        assert two.record.errors["eora"] < three.record.errors["svd"]
        assert two.record.errors["eora"] < 0.98 * one.record.errors[passes[-1].name]
        # Eckart-Young in the metric of the Gram, on W minus what is stored.
        assert eora.gram is not None
        lost = (one.weight() - one.backbone_weight()).astype(np.float64)
        values = np.linalg.svd(
            lost @ np.linalg.cholesky(eora.gram.matrix + 1e-9 * np.eye(72)), compute_uv=False
        )
        left = weighted_norm(two.weight() - two.effective_weight(), eora.gram.matrix)
        # Factors in float16 leave 2**-11 of what they give back, at most.
        np.testing.assert_allclose(left, np.linalg.norm(values[6:]), rtol=5e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quantization", [None, QuantizeGptq(bits=3)])
def test_caldera_keeps_the_pattern(
    method: type[Pruning], quantization: Quantization | None
) -> None:
    passes: list[Compression] = [method(pattern="2:4")]
    passes += [] if quantization is None else [quantization]
    group = run_all(qkv(), *passes, Caldera(rank=6))
    eora = run_all(qkv(), *passes, Eora(rank=6))
    for linear, other in zip(group.linears, eora.linears, strict=True):
        assert zeros_of_runs(linear.backbone_weight(), 4).min() >= 2
        assert linear.record.errors["caldera"] <= other.record.errors["eora"]


@pytest.mark.parametrize("method", METHODS)
def test_a_pruned_graph_is_read_back(method: type[Pruning]) -> None:
    plain = run_all(qkv(), method(sparsity=0.4))
    factors = run_all(qkv(), method(sparsity=0.4), Eora(rank=3))
    for group in (plain, factors):
        graph = group.linears[0].node.graph
        assert isinstance(graph, ir.Graph)
        again = find_linears(ir.Model(graph, ir_version=10))
        for one, other in zip(group.linears, again, strict=True):
            assert (one.name, one.in_features) == (other.name, other.in_features)
            np.testing.assert_array_equal(one.effective_weight(), other.effective_weight())
            assert other.quantized is None
            assert other.source is None


def test_options_by_linear() -> None:
    overrides = {
        "*.k_proj": PruneOverride(sparsity=0.25),
        "*.q_proj": PruneOverride(pattern="4:8"),
    }
    q, k = run_all(qkv(), PruneMagnitude(pattern="2:4", overrides=overrides)).linears
    assert (zeros_of_runs(q.backbone_weight(), 8) == 4).all()
    assert zeros_of_runs(q.backbone_weight(), 4).max() > 2
    assert k.record.sparsity == 0.25


def test_an_override_has_one_of_the_two() -> None:
    with pytest.raises(ConfigError, match="'sparsity' or 'pattern', not both"):
        PruneOverride(sparsity=0.5, pattern="2:4")


def test_a_linear_that_is_skipped_is_quantized_as_ever() -> None:
    skip = {"*.k_proj": PruneOverride(skip=True)}
    q, k = run_all(qkv(), PruneWanda(overrides=skip), QuantizeGptq(bits=3)).linears
    _, alone = run_all(qkv(), QuantizeGptq(bits=3)).linears
    np.testing.assert_allclose(k.backbone_weight(), alone.backbone_weight(), rtol=1e-3, atol=1e-3)
    assert (q.record.sparsity, k.record.sparsity) == (0.5, None)
    assert k.record.errors["prune_wanda"] == 0


def test_a_linear_that_is_not_quantized_stays_pruned() -> None:
    skip = {"*.k_proj": QuantizeOverride(skip=True)}
    for factors in ([], [Eora(rank=2)]):
        _, k = run_all(
            qkv(), PruneWanda(pattern="2:4"), QuantizeGptq(overrides=skip), *factors
        ).linears
        assert k.quantized is None
        assert (zeros_of_runs(k.backbone_weight(), 4) == 2).all()
        assert (k.factors is not None) == bool(factors)


def test_rows_that_the_pattern_does_not_divide() -> None:
    group = make_group({"model.layers.0.mlp.up_proj": np.ones((4, 70), np.float32)})
    with pytest.raises(PassError, match=r"up_proj.*rows of 70 weights, no multiple of 4.*2:4"):
        PruneMagnitude(pattern="2:4").requires(group)
    run_all(group, PruneMagnitude(pattern="1:2"))
    override = {"*.up_proj": PruneOverride(sparsity=0.5)}
    run_all(
        make_group({"model.layers.0.mlp.up_proj": np.ones((4, 70), np.float32)}),
        PruneMagnitude(pattern="2:4", overrides=override),
    )


def test_a_head_is_not_pruned() -> None:
    weights = {"lm_head": np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)}
    (head,) = run_all(make_group(weights), PruneMagnitude()).linears
    assert head.compressed is None
    named = PruneMagnitude(overrides={"lm_head": PruneOverride(sparsity=0.1)})
    with pytest.raises(PassError, match=r"lm_head.*outside the decoder blocks"):
        named.requires(make_group(weights))


@pytest.mark.parametrize("pattern", ["2:3", "0:4", "4:4", "5:4", "2-4", 2.4, "2:16", ""])
def test_patterns_that_there_are_not(pattern: object) -> None:
    with pytest.raises(ValidationError, match="is no pattern: give 'N:M' in quotation marks"):
        TypeAdapter(PruneMagnitude).validate_python({"pattern": pattern})


@pytest.mark.parametrize(
    ("passes", "problem"),
    [
        ([PruneWanda()], "needs 'calibrate' before it"),
        ([QuantizeRtn(), PruneMagnitude()], "must come before 'quantize_rtn': move it up"),
        ([PruneMagnitude(), PruneMagnitude()], "occurs twice"),
        ([Calibrate(), PruneMagnitude(), PruneWanda()], "compressed already by 'prune_magnitude'"),
        (
            [Calibrate(), PruneWanda(), Eora(), QuantizeGptq()],
            "must follow 'prune_wanda' at once.*take 'eora' between them away",
        ),
        (
            [Calibrate(), PruneWanda(), Calibrate(), QuantizeGptq()],
            "must follow 'prune_wanda' at once.*take 'calibrate' between them away",
        ),
    ],
)
def test_orders_that_do_not_work(passes: list[Pass], problem: str) -> None:
    found = [text for _, text in Recipe(passes).problems()]
    assert any(re.search(problem, text) for text in found), found


def test_orders_that_work() -> None:
    for passes in (
        [PruneMagnitude()],
        [Calibrate(), PruneSparsegpt(), Eora()],
        [Calibrate(), PruneWanda(), QuantizeGptq(), Eora()],
    ):
        assert list(Recipe(passes).problems()) == []


def test_factors_beside_floats_may_be_rounded() -> None:
    wide = run_all(qkv(), PruneMagnitude(pattern="2:4"), Eora(rank=4, factor_type="float16"))
    group = run_all(qkv(), PruneMagnitude(pattern="2:4"), Eora(rank=4, factor_type="float16"))
    narrow = QuantizeFactors(bits=4)
    narrow.call(group)
    spec.check_linears(group.linears, spec.Stage.COMPRESSED, after=narrow.name)
    for linear, other in zip(group.linears, wide.linears, strict=True):
        assert linear.factors is not None
        assert linear.factors.factor_type == "int4"
        np.testing.assert_array_equal(linear.backbone_weight(), other.backbone_weight())
