from __future__ import annotations

from onnx import TensorProto, helper

from eoracc.compiler.targets.wide_scales import wide_scale_bytes
from eoracc.plugins.op import DOMAIN, FUSED_OP, GATHER_OP


def test_only_scales_in_float32_count() -> None:
    """Of each kind of scale one in float32 (2 bytes too many) and one in float16."""
    shapes = {"s": 5, "a": 3, "b": 7, "bias": 100, "shared": 11}
    tensors = [
        helper.make_tensor(name, TensorProto.FLOAT, [1, size], [1.0] * size)
        for name, size in shapes.items()
    ]
    tensors.append(helper.make_tensor("half", TensorProto.FLOAT16, [50], [1.0] * 50))
    fused = ["x", "B", "s", "", "bias", "la", "lb", "a", "b"]
    cast = helper.make_node("Cast", ["half"], ["wide"], to=TensorProto.FLOAT)
    nodes = [
        cast,
        helper.make_node(FUSED_OP, fused, ["y"], domain=DOMAIN),
        helper.make_node(FUSED_OP, ["x", "B", "half"], ["z"], domain=DOMAIN),
        helper.make_node(FUSED_OP, ["x", "B", "shared", "", "", "la", "lb", "wide", "wide"], ["w"],
                         domain=DOMAIN),
        helper.make_node(GATHER_OP, ["ids", "B", "shared"], ["v"], domain=DOMAIN),
        helper.make_node("Mul", ["x", "x", "bias"], ["u"]),
    ]  # fmt: skip
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], initializer=tensors))
    assert wide_scale_bytes(model) == 2 * (5 + 3 + 7 + 11)
