from __future__ import annotations

import numpy as np
import onnx_ir as ir

from eoracc.compiler.report.linears import linear_report
from eoracc.passes.graph.linears import Linear
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight


def test_linear_is_described_with_all_that_is_stored() -> None:
    rng = np.random.default_rng(0)
    node = ir.node("MatMul", [ir.Value(name="x"), ir.Value(name="w")])
    one = Linear(
        name="model.layers.3.mlp.up_proj",
        node=node,
        in_features=32,
        out_features=8,
        source=None,
        transposed=False,
    )
    plain = linear_report(one)
    assert (plain.bytes, plain.bits, plain.rank, plain.block) == (4 * 32 * 8, None, 0, 3)
    assert linear_report(one, stored_bytes=512).bytes == 512
    one.compressed = NBitsWeight.from_codes(
        rng.integers(0, 8, (8, 32)).astype(np.uint8),
        np.ones((8, 2), np.float16),
        np.zeros((8, 2), np.uint8),
        bits=3,
        group_size=16,
    )
    one.factors = LowRank(lora_a=np.ones((4, 32), np.float16), lora_b=np.ones((8, 4), np.float16))
    one.record.errors["eora"] = 0.5
    one.record.notes.append("note")
    described = linear_report(one)
    codes, scales, zero_points, factors = 8 * 32 * 3 // 8, 8 * 2 * 2, 8 * 2, (4 * 32 + 8 * 4) * 2
    assert described.bytes == codes + scales + zero_points + factors
    assert (described.bits, described.group_size, described.rank) == (3, 16, 4)
    assert (described.role, described.shape) == ("up_proj", (8, 32))
    assert (described.errors, described.notes) == ({"eora": 0.5}, ["note"])
