from __future__ import annotations

import numpy as np
import pytest

from eoracc.errors import PassError
from eoracc.passes.quantize.quantization import QuantizeOverride
from eoracc.passes.quantize.quantize_gptq import QuantizeGptq
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from eoracc.passes.solvers.descent import descend
from eoracc.passes.solvers.gptq import gptq
from eoracc.passes.solvers.gram import Gram
from tests.passes.groups import qkv


@pytest.mark.parametrize("descent", [0, 2])
def test_solves_the_group_as_one_stack(descent: int) -> None:
    group = qkv()
    assert group.gram is not None
    stack = np.concatenate([linear.weight() for linear in group.linears])
    solved_at_once = gptq(stack, group.gram.matrix, bits=3, group_size=24)
    if descent:
        solved_at_once = descend(stack, solved_at_once, group.gram.matrix, sweeps=descent)
    expected = solved_at_once.dequantize()
    quantize = QuantizeGptq(bits=3, group_size=24, descent=descent)
    quantize.requires(group)
    quantize.call(group)
    solved = np.concatenate([linear.effective_weight() for linear in group.linears])
    np.testing.assert_array_equal(solved, expected)
    assert [linear.record.notes for linear in group.linears] == [[], []]


def test_beats_rounding_to_nearest_by_the_recorded_errors() -> None:
    group, nearest = qkv(), qkv()
    QuantizeGptq(bits=3).call(group)
    QuantizeRtn(bits=3).call(nearest)
    for solved, rounded in zip(group.linears, nearest.linears, strict=True):
        assert (
            0 < solved.record.errors["quantize_gptq"] < 0.8 * rounded.record.errors["quantize_rtn"]
        )


def test_members_may_have_their_own_options() -> None:
    group = qkv()
    overrides = {"*.k_proj": QuantizeOverride(bits=8, group_size=-1, symmetric=True)}
    QuantizeGptq(bits=2, group_size=64, overrides=overrides).call(group)
    q, k = (linear.quantized for linear in group.linears)
    assert q is not None
    assert k is not None
    assert (q.bits, q.group_size, q.zero_points is None) == (2, 64, False)
    assert (k.bits, k.group_size, k.zero_points is None) == (8, 72, True)
    assert group.linears[1].record.errors["quantize_gptq"] < 0.01


def test_a_skipped_member_is_on_record_as_lossless() -> None:
    group = qkv()
    QuantizeGptq(overrides={"*.k_proj": QuantizeOverride(skip=True)}).call(group)
    assert group.linears[1].quantized is None
    assert group.linears[1].record.errors == {"quantize_gptq": 0.0}


@pytest.mark.parametrize("tokens", [0, 31])
def test_too_few_tokens_fall_back_to_rounding_and_say_so(tokens: int) -> None:
    group, nearest = qkv(tokens=tokens), qkv(tokens=None)
    QuantizeGptq(bits=3).call(group)
    QuantizeRtn(bits=3).call(nearest)
    for solved, rounded in zip(group.linears, nearest.linears, strict=True):
        np.testing.assert_array_equal(solved.effective_weight(), rounded.effective_weight())
        (note,) = solved.record.notes
        assert f"rounded to nearest, for only {tokens} calibration tokens reached it" in note
        assert np.isfinite(solved.record.errors["quantize_gptq"])


def test_a_singular_gram_is_damped_more_and_says_so() -> None:
    group = qkv(tokens=40)
    QuantizeGptq(bits=3, damping=0.0).call(group)
    assert "damping raised from 0 to" in group.linears[0].record.notes[0]
    assert 0 < group.linears[0].record.errors["quantize_gptq"] < 1


def test_without_a_gram_it_says_what_to_do() -> None:
    with pytest.raises(PassError, match=r"q_proj.*has no gram: put 'calibrate' before 'quantize_g"):
        QuantizeGptq().requires(qkv(tokens=None))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gram_that_is_not_finite_is_refused(bad: float) -> None:
    group = qkv()
    assert group.gram is not None
    matrix = group.gram.matrix.copy()
    matrix[3, 5] = bad
    group.gram = Gram(matrix, 400)
    with pytest.raises(PassError, match=r"q_proj.*its gram holds NaN or Inf"):
        QuantizeGptq().requires(group)
