from __future__ import annotations

import numpy as np
import pytest

from eoracc.passes.compensation import RankOverride
from eoracc.passes.eora import Eora
from eoracc.passes.factor_types import round_to_int8, store_factors
from eoracc.passes.quantize_rtn import QuantizeRtn
from tests.passes.groups import qkv


def test_int8_rounds_to_half_a_step_of_each_row() -> None:
    factor = np.random.default_rng(0).standard_normal((6, 50)) * np.geomspace(1e-3, 1e3, 6)[:, None]
    factor[2] = 0
    codes, scale = round_to_int8(factor)
    assert codes.dtype == np.int8
    assert scale.dtype == np.float32
    assert codes.min() >= -127, "-128 has no counterpart"
    error = np.abs(codes * scale[:, None].astype(np.float64) - factor)
    # The scale itself is rounded to float32: 127 roundings of a step at most.
    assert (error <= (0.5 + 127 * 2.0**-24) * scale[:, None]).all()
    assert (scale[2], codes[2].any()) == (0, False)
    largest = np.abs(codes.astype(np.int16)).max(axis=1)
    assert (largest[[0, 1, 3, 4, 5]] == 127).all(), "the whole range is used"


@pytest.mark.parametrize("values", [1e-42, 1e-320])
def test_rows_too_small_for_a_scale_become_zero(values: float) -> None:
    codes, scale = round_to_int8(np.full((1, 3), values))
    assert not codes.any()
    assert not scale.any()


def test_int8_product_is_close_although_singular_values_fall() -> None:
    """Errors are half a step each; without equal columns in B the last ranks would be lost."""
    rng = np.random.default_rng(1)
    sigma = np.geomspace(1, 1e-4, 16)
    u, v = (np.linalg.qr(rng.standard_normal((n, 16)))[0] for n in (80, 120))
    b, a = u * np.sqrt(sigma), (v * np.sqrt(sigma)).T
    stored = store_factors(b, a, "int8")
    assert stored.nbytes == 16 * (80 + 120) + 4 * (16 + 80)
    for rank in (0, 15):  # each rank on its own is off by a few steps of its own size
        alone = np.outer(stored.up()[:, rank], stored.down()[rank])
        expected = np.outer(b[:, rank], a[rank])
        assert np.linalg.norm(alone - expected) < 0.05 * np.linalg.norm(expected)
    assert store_factors(b, a, "float16").lora_a.dtype == np.float16


@pytest.mark.parametrize("rank", [0, 6])
def test_pass_option_and_override(rank: int) -> None:
    group, peer = qkv(), qkv()
    for one in (group, peer):
        QuantizeRtn(bits=2).call(one)
    Eora(
        rank=rank, factor_type="int8", overrides={"*.k_proj": RankOverride(factor_type="float16")}
    ).call(group)
    Eora(rank=rank).call(peer)
    query, key = group.linears
    assert query.factors is not None
    assert key.factors is not None
    assert query.factors.lora_a.dtype == np.int8
    assert key.factors.lora_a.dtype == np.float16
    assert query.factors.lora_a_scale is not None
    assert query.factors.rank == rank
    # What int8 loses of the correction is little against what the correction gives back.
    gained = query.errors["quantize_rtn"] - peer.linears[0].errors["eora"]
    assert query.errors["eora"] - peer.linears[0].errors["eora"] <= 0.02 * gained
