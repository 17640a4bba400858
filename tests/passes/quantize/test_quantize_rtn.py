from __future__ import annotations

import numpy as np

from eoracc.passes.quantize.quantization import QuantizeOverride
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from eoracc.passes.solvers.factors import weighted_norm
from eoracc.passes.solvers.grid import find_grid, quantize, to_nbits
from tests.passes.groups import make_group, qkv


def test_rounds_each_linear_on_its_own_and_needs_no_gram() -> None:
    group = qkv(tokens=None)
    QuantizeRtn(bits=3, group_size=24).call(group)
    for linear in group.linears:
        weight = linear.weight()
        grid = find_grid(weight, bits=3, group_size=24)
        assert linear.compressed is not None
        np.testing.assert_array_equal(
            linear.compressed.dequantize(), to_nbits(quantize(weight, grid), grid).dequantize()
        )
        assert linear.node.op_type == "MatMulNBitsLowRank"
        assert linear.record.errors == {}


def test_a_gram_guides_the_clipping_and_measures_the_error() -> None:
    group, plain = qkv(), qkv(tokens=None)
    QuantizeRtn(bits=2).call(group)
    QuantizeRtn(bits=2).call(plain)
    assert group.gram is not None
    for linear, unguided in zip(group.linears, plain.linears, strict=True):
        weight = linear.weight()
        whole = weighted_norm(weight, group.gram.matrix)
        left = weighted_norm(weight - linear.effective_weight(), group.gram.matrix)
        np.testing.assert_allclose(linear.record.errors["quantize_rtn"], left / whole, rtol=1e-4)
        assert left < weighted_norm(weight - unguided.effective_weight(), group.gram.matrix)


def test_changes_nothing_where_all_is_skipped() -> None:
    group = qkv()
    nodes = [linear.node for linear in group.linears]
    QuantizeRtn(overrides={"*": QuantizeOverride(skip=True)}).call(group)
    assert [linear.node for linear in group.linears] == nodes
    head = make_group({"lm_head": np.ones((16, 16), np.float32)})
    QuantizeRtn(embedding_bits=None).call(head)
    assert head.linears[0].compressed is None
