"""EoRA in stages: what an earlier stage has given back is not solved for again."""

from __future__ import annotations

import numpy as np
import pytest

from eoracc.passes.compensate.eora import Eora
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from tests.passes.groups import qkv


@pytest.mark.parametrize("directions", [None, 10])
def test_two_stages_leave_what_one_of_both_ranks_does(directions: int | None) -> None:
    once, first, twice = qkv(), qkv(), qkv()
    for group, ranks in ((once, (7,)), (first, (4,)), (twice, (4, 3))):
        QuantizeRtn(bits=2).call(group)
        for rank in ranks:
            Eora(rank=rank, factor_type="float16", directions=directions).call(group)
    for whole, half, both in zip(once.linears, first.linears, twice.linears, strict=True):
        assert both.factors is not None
        assert both.factors.rank == 7
        # Each of 7 products is off by two roundings of float16, of an error no larger than before.
        rounding = 7 * 2 * 2.0**-11 * both.record.errors["quantize_rtn"]
        np.testing.assert_allclose(
            both.record.errors["eora"], whole.record.errors["eora"], atol=rounding
        )
        assert half.record.errors["eora"] - both.record.errors["eora"] > 3 * rounding
