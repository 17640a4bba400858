from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from eoracc.compiler.eager.int8_activations import (
    ROUNDING_DRAWS,
    factor_tolerance,
    random_rounding,
    representable_inputs,
    rounding_bound,
)
from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.compiler.frontend import load as frontend
from eoracc.passes.graph.linears import Linear, LinearGroup, find_linears
from eoracc.passes.pack_projections import PackProjections
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from eoracc.plugins.operands.weight import NBitsWeight
from tests.plugins.fused_op import random_factors, random_int8_factors, random_weight
from tests.tiny_models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from numpy.typing import NDArray


def linear_of(weight: NBitsWeight, factors: Any) -> Linear:  # noqa: ANN401 - LowRank or None
    node: Any = SimpleNamespace(name="linear")
    return Linear(
        "linear",
        node,
        weight.in_features,
        weight.out_features,
        None,
        False,
        compressed=weight,
        factors=factors,
    )


def rounded(
    x: NDArray[Any], block: int = 32, *, levels: int = 127, shift: int = 0, gain: float = 1
) -> NDArray[Any]:
    """``x [rows, K]`` as a kernel rounds it: to 255 levels about 0 in each block of columns.

    A kernel that is wrong has fewer levels, shifts each code, or multiplies scales by ``gain``.
    """
    result = np.empty_like(x)
    for start in range(0, x.shape[1], block):
        part = x[:, start : start + block]
        step = np.abs(part).max(axis=1, keepdims=True) / levels
        codes = np.rint(part / np.where(step > 0, step, 1)) + shift
        result[:, start : start + block] = codes * step * gain
    return result


WRONG: dict[str, dict[str, Any]] = {
    "levels": {"levels": 15},
    "shift": {"shift": 1},
    "scale": {"gain": 1.2},
}


@pytest.mark.parametrize("width", [576, 100, 24, 7])
def test_rounding_leaves_the_inputs_of_a_linear_as_they_are(width: int) -> None:
    inputs = representable_inputs(np.random.default_rng(0), 3, width)
    for block in (8, 16, 32):
        np.testing.assert_array_equal(rounded(inputs, block), inputs)
    assert len(np.unique(np.abs(inputs))) > width // 4


@pytest.mark.parametrize("wrong", [{"levels": 126}, {"shift": 1}, {"gain": 1 + 1 / 127}])
def test_a_linear_shows_wrong_rounding(wrong: dict[str, Any]) -> None:
    rng = np.random.default_rng(3)
    inputs = representable_inputs(rng, 2, 576).astype(np.float64)
    weight = random_weight(rng, (200, 576), bits=3, group_size=64, zero_points=True)
    dense = weight.dequantize().astype(np.float64)
    # The tolerance of float32 sums, which is all that such a linear has.
    tolerance = (576 + 3) * 2.0**-24 * np.abs(inputs) @ np.abs(dense.T)
    error = np.abs((rounded(inputs, **wrong) - inputs) @ dense.T)
    assert (error > tolerance).mean() > 0.5
    assert error.max() > 2 * tolerance.max()


@pytest.mark.parametrize("factors", [None, random_factors, random_int8_factors])
@pytest.mark.parametrize("group_size", [16, 24, 64])
def test_only_integer_factors_need_tolerance(group_size: int, factors: Any) -> None:  # noqa: ANN401
    rng = np.random.default_rng(1)
    shape = (200, 576)
    weight = random_weight(rng, shape, bits=3, group_size=group_size, zero_points=True)
    low_rank = None if factors is None else factors(rng, shape, rank=40)
    x = representable_inputs(rng, 8, 576)
    tolerance = factor_tolerance(linear_of(weight, low_rank), x)
    if factors is not random_int8_factors:
        assert tolerance is None
        return
    assert low_rank is not None
    assert tolerance is not None
    assert tolerance.shape == (8, 200)
    down = x.astype(np.float64) @ low_rank.down().astype(np.float64).T
    up = low_rank.up().astype(np.float64).T
    error = np.abs(rounded(down) @ up - down @ up)
    assert (error <= tolerance).all()
    assert error.max() > tolerance.mean() / 4, "no wider than it need be"


@pytest.mark.parametrize("place", ["factors", "adapter"])
def test_errors_between_factors_are_those_of_rounding(place: str) -> None:
    rng, rows = np.random.default_rng(4), 4000
    low_rank = random_int8_factors(rng, (24, 64), rank=40)
    weight = random_weight(rng, (24, 64), bits=4, group_size=32, zero_points=False)
    model: Any = torch.nn.ModuleDict({"linear": torch.nn.Linear(64, 24, bias=False)})
    model.config = SimpleNamespace()
    model.requires_grad_(requires_grad=False)
    model["linear"].weight.zero_()  # nothing but the errors is left
    linear = linear_of(weight, low_rank if place == "factors" else None)
    adapter = {"linear": low_rank} if place == "adapter" else {}
    x = torch.from_numpy(rng.standard_normal((1, 64), np.float32)).expand(rows, 64)
    with random_rounding(model, [linear], torch.Generator().manual_seed(0), adapter):
        errors = model["linear"](x).double().numpy()
    assert (model["linear"](x) == 0).all(), "all hooks are gone"
    down = low_rank.down().astype(np.float64) @ x[0].double().numpy()
    step = np.array([np.abs(down[:32]).max(), np.abs(down[32:]).max()]).repeat([32, 8]) / 127
    up = low_rank.up().astype(np.float64)
    expected = (step**2 / 12) @ up.T**2
    # Errors of the input move steps by a percent, and a sum of uniform errors has a standard error
    # of its variance of sqrt(2 / rows) at most.
    np.testing.assert_allclose(errors.var(axis=0), expected, rtol=0.02 + 5 * np.sqrt(2 / rows))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Linear]]:
    """An eager model with quantized weights, and its linears."""
    folder = tmp_path_factory.mktemp("tiny")
    loaded = frontend.load(str(tiny_model("gemma3", folder / "model")), work=folder)
    PackProjections(mlp=False).call(loaded.model)
    linears = find_linears(loaded.model)
    for linear in linears:
        QuantizeRtn(bits=4, group_size=16).call(LinearGroup((linear,)))
    weights = {one.name: one.effective_weight() for one in linears if one.compressed is not None}
    return load_eager(loaded.folder, weights), linears


def test_errors_are_those_of_rounding(tiny: tuple[Any, list[Linear]]) -> None:
    model, linears = tiny
    seen: dict[str, list[torch.Tensor]] = {}
    names = ("q_proj", "k_proj")
    ids = np.random.default_rng(2).integers(3, VOCABULARY, (2, 12))

    def keep(name: str) -> Any:  # noqa: ANN401 - a hook of PyTorch's
        return lambda _, inputs: seen.setdefault(name, []).append(inputs[0])

    modules = [(n, m) for n, m in model.named_modules() if n.endswith(names) and ".0." in n]
    before = [module.register_forward_pre_hook(keep(name)) for name, module in modules]
    exact = reference_logits(model, ids)
    with random_rounding(model, linears, torch.Generator().manual_seed(0)):
        # Registered later: these hooks see what the linears see.
        after = [module.register_forward_pre_hook(keep(name)) for name, module in modules]
        moved = reference_logits(model, ids)
        for handle in (*before, *after):
            handle.remove()
    assert (moved != exact).any()
    np.testing.assert_array_equal(reference_logits(model, ids), exact)
    q, k = (next(seen[name] for name in seen if name.endswith(end)) for end in names)
    assert q[2] is k[2], "one input, one rounding"
    x, noisy = (one.double().numpy().reshape(-1, 48) for one in q[1:])
    error = noisy - x
    step = np.abs(x).reshape(-1, 3, 16).max(-1).repeat(16, axis=1) / 127
    small = np.abs(x) < step / 2
    assert (np.abs(error) <= step / 2 * (1 + 1e-3)).all()
    np.testing.assert_allclose(error[small], -x[small], atol=1e-7)
    of_steps = (error / step)[~small]
    # Uniform: the standard error of the variance of n draws is (1 / 12) sqrt(0.8 / n).
    margin = 5 * np.sqrt(0.8 / of_steps.size)
    assert abs(12 * of_steps.var() - 1) < margin < 0.3


@pytest.mark.parametrize("wrong", [None, *WRONG])
def test_logits_of_a_rounding_kernel_are_within_the_bound(
    tiny: tuple[Any, list[Linear]], wrong: str | None
) -> None:
    model, linears = tiny
    ids = np.random.default_rng(2).integers(3, VOCABULARY, (2, 12))
    exact = reference_logits(model, ids).reshape(-1, VOCABULARY)
    generator = torch.Generator().manual_seed(0)
    with random_rounding(model, linears, generator):
        draws = [reference_logits(model, ids) for _ in range(ROUNDING_DRAWS)]
    bound = rounding_bound(np.stack(draws).reshape(ROUNDING_DRAWS, *exact.shape) - exact)
    names = [one.name for one in linears if one.compressed is not None]

    def hook(_: Any, given: tuple[torch.Tensor, ...]) -> torch.Tensor:  # noqa: ANN401
        x = given[0].reshape(-1, given[0].shape[-1]).numpy()
        kernel = rounded(x, 16, **WRONG.get(wrong or "", {}))
        return torch.from_numpy(kernel).reshape(given[0].shape)

    handles = [
        module.register_forward_pre_hook(hook)
        for name, module in model.named_modules()
        if name in names or name.endswith(("q_proj", "k_proj", "v_proj"))
    ]
    moved = np.abs(reference_logits(model, ids).reshape(-1, VOCABULARY) - exact).max()
    for handle in handles:
        handle.remove()
    if wrong is None:
        assert bound / 8 < moved <= bound < exact.std()
    else:
        assert moved > bound


def test_correct_kernels_hardly_ever_reach_the_bound(tiny: tuple[Any, list[Linear]]) -> None:
    """Over texts and draws, the largest deviation stays well inside."""
    model, linears = tiny
    shares = []
    for seed in range(8):
        ids = np.random.default_rng(seed).integers(3, VOCABULARY, (2, 12))
        exact = reference_logits(model, ids).reshape(-1, VOCABULARY)
        with random_rounding(model, linears, torch.Generator().manual_seed(seed)):
            draws = [reference_logits(model, ids) for _ in range(2 * ROUNDING_DRAWS)]
        moved = np.stack(draws).reshape(2 * ROUNDING_DRAWS, *exact.shape) - exact
        bound = rounding_bound(moved[:ROUNDING_DRAWS])
        shares.append(np.abs(moved[ROUNDING_DRAWS:]).max() / bound)
    assert 0.2 < max(shares) < 0.8


def test_the_bound_by_hand() -> None:
    moved = np.zeros((4, 2, 50))
    moved[:, 0], moved[:, 1] = 1e-3, 3e-3
    moved[:, :, 7] *= 2  # one logit moves twice as much as the others
    square = np.mean([4, *[1] * 49])
    deviations = np.sqrt(2 * np.log(4 * 100 / 1e-6))
    # What the largest token moves, as its mean square and the largest share of it.
    largest = 3e-3 * np.sqrt(square) * np.sqrt(4 / square)
    assert rounding_bound(moved.astype(np.float32)) == pytest.approx(deviations * largest, rel=1e-5)
    assert rounding_bound(np.zeros((4, 2, 50), np.float32)) == 0
