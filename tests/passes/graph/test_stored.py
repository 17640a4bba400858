from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from eoracc.errors import ModelError
from eoracc.passes.graph.linears import Linear
from eoracc.passes.graph.stored import factor_arrays, stored_factors, stored_weight
from eoracc.passes.solvers.factor_types import FactorType, store_factors
from eoracc.passes.solvers.grid import round_to_nearest
from tests.passes.groups import qkv

RNG = np.random.default_rng(11)


def compressed(*, symmetric: bool = False) -> Linear:
    linear = qkv(tokens=None).linears[0]
    weight = round_to_nearest(linear.weight(), bits=3, group_size=24, symmetric=symmetric)
    linear.quantize(weight)
    return linear


@pytest.mark.parametrize("symmetric", [True, False])
def test_weight_is_read_back_from_its_node(*, symmetric: bool) -> None:
    linear = compressed(symmetric=symmetric)
    kept, read = linear.compressed, stored_weight(linear.node)
    assert kept is not None
    assert (read.bits, read.group_size, read.in_features) == (3, 24, 72)
    assert (read.zero_points is None) == symmetric
    np.testing.assert_array_equal(read.dequantize(), kept.dequantize())


@pytest.mark.parametrize("factor_type", ["float16", "int8", "int4"])
def test_factors_are_read_back_from_their_node(factor_type: FactorType) -> None:
    linear = compressed()
    assert stored_factors(linear.node) is None
    b, a = RNG.standard_normal((40, 5)), RNG.standard_normal((5, 72))
    factors = store_factors(b, a, factor_type)
    linear.compensate(factors)
    read = stored_factors(linear.node)
    assert read is not None
    assert (read.factor_type, read.nbytes) == (factor_type, factors.nbytes)
    np.testing.assert_array_equal(read.product(), factors.product())
    arrays = factor_arrays(factors)
    assert ("lora_a_scale" in arrays) == (factor_type != "float16")
    assert ir.DataType.from_numpy(arrays["lora_a"].dtype).name == factor_type.upper()


def test_weight_that_the_graph_computes_is_refused() -> None:
    node = compressed().node
    node.replace_input_with(1, ir.Value(name="computed"))
    with pytest.raises(ModelError, match="q_proj: its weight is not an initializer"):
        stored_weight(node)
