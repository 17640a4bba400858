from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from eoracc.errors import PluginError
from eoracc.plugins.functions.overload import local_function, use_local_functions
from eoracc.plugins.operands.codes import BITS
from eoracc.plugins.operands.weight import NBitsWeight
from tests.plugins.fused_op import (
    attributes_of,
    fused_operands,
    random_factors,
    random_weight,
)

SHAPE = (37, 90)


def test_overloads_share_one_kernel() -> None:
    """Nodes of different widths in one model: each takes its own function, or the one kernel."""
    rng = np.random.default_rng(4)
    names = set()
    for bits in BITS:
        weight = random_weight(rng, SHAPE, bits=bits, group_size=32, zero_points=bits == 3)
        for factors in (None, random_factors(rng, SHAPE, rank=2)):
            names.add(_function_of(weight, fused_operands(weight, factors)).overload)
    assert names == {
        "bits2",
        "bits2_lora",
        "bits3_zeros",
        "bits3_zeros_lora",
        "bits4",
        "bits4_lora",
        "bits6",
        "bits6_lora",
        "bits8",
        "bits8_lora",
    }


def test_function_does_not_depend_on_sizes() -> None:
    rng = np.random.default_rng(5)
    protos = []
    for columns in (90, 128):
        weight = random_weight(rng, (4, columns), bits=3, group_size=32, zero_points=True)
        function = _function_of(weight, fused_operands(weight))
        protos.append(ir.to_proto(function).SerializeToString(deterministic=True))
    assert protos[0] == protos[1]


def _function_of(weight: NBitsWeight, operands: dict[str, NDArray[Any] | None]) -> ir.Function:
    inputs: list[ir.Value | None] = [ir.Value(name="X")]
    inputs += [None if array is None else ir.Value(name=name) for name, array in operands.items()]
    return local_function(
        ir.node("MatMulNBitsLowRank", inputs, attributes_of(weight), domain="eoracc", name="n")
    )


def test_nodes_of_one_overload_share_the_function() -> None:
    nodes = [_node("MatMulNBitsLowRank", 3, bits=bits, layout=1) for bits in (3, 4, 3)]
    functions: dict[ir.OperatorIdentifier, ir.Function] = {}
    use_local_functions(nodes[:2], functions)
    first = dict(functions)
    use_local_functions(nodes[2:], functions)
    assert functions == first  # functions are equal only to themselves
    assert [node.overload for node in nodes] == ["bits3_tiles", "bits4_tiles", "bits3_tiles"]
    for node in nodes:
        expected = ir.to_proto(local_function(node))
        assert ir.to_proto(functions[node.op_identifier()]) == expected


def _node(op_type: str, inputs: int | list[ir.Value | None], **attributes: Any) -> ir.Node:  # noqa: ANN401
    if isinstance(inputs, int):
        inputs = [ir.Value(name=f"i{i}") for i in range(inputs)]
    return ir.node(op_type, inputs, attributes, domain="eoracc", name="some.linear")


_FUSED = partial(_node, "MatMulNBitsLowRank", 3, bits=3, layout=1)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (_node("Other", 3, bits=3), "Other is no op of the eoracc domain"),
        (_node("MatMulNBitsLowRank", 3, bits=5), r"bits must be one of \(2, 3, 4, 6, 8\), not 5"),
        (_node("MatMulNBitsLowRank", 3), "not None"),
        (_node("MatMulNBitsLowRank", 2, bits=3), "its input scales is missing"),
        (_node("MatMulNBitsLowRank", 6, bits=3), "lora_a and lora_b come together"),
        (_node("GatherNBits", 5, bits=3), "GatherNBits has at most 4 inputs"),
        (_node("GatherNBits", 3, bits=3, layout=2), "layout must be 0 or 1, not 2"),
        (_node("MatMulNBitsLowRank", 11, bits=3), "only layout 1 is fused"),
        (_FUSED(parts=(16, 8), N=24), r"parts \(16, 8\) are no multiples of 16 that add up to N"),
        (_FUSED(parts=(16, 16), N=48), "add up to N"),
        (_FUSED(parts=(16, 32), N=48, activation="silu"), "silu takes two equal parts"),
        (_FUSED(activation="silu"), "silu takes two equal parts"),
        (_FUSED(parts=(16, 16), N=32, ranks=(8,)), r"ranks \(8,\) are not one for each of the"),
        (_FUSED(parts=(16, 16), N=32, ranks=(8, -1)), r"ranks \(8, -1\) are not one for each"),
        (_FUSED(ranks=(8,)), r"not one for each of the parts \(\)"),
        (_FUSED(activation="relu"), "activation must be one of"),
    ],
)
def test_foreign_nodes_are_refused(node: ir.Node, message: str) -> None:
    with pytest.raises(PluginError, match=f"node some.linear: .*{message}"):
        local_function(node)
