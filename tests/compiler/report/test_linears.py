from __future__ import annotations

import numpy as np
import onnx_ir as ir

from eoracc.compiler.report.linears import linear_report, padding_warnings
from eoracc.passes.graph.linears import Linear
from eoracc.passes.solvers.grid import round_to_nearest
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight


def test_linear_is_described_with_all_that_is_stored() -> None:
    rng = np.random.default_rng(0)
    node = ir.node("MatMul", [ir.Value(name="x"), ir.Value(name="w")])
    one = Linear(
        name="model.layers.3.mlp.up_proj",
        node=node,
        in_features=32,
        out_features=16,
        source=None,
        transposed=False,
    )
    plain = linear_report(one)
    assert (plain.bytes, plain.bits, plain.rank, plain.block) == (4 * 32 * 16, None, 0, 3)
    assert linear_report(one, stored_bytes=512).bytes == 512
    one.compressed = NBitsWeight.from_codes(
        rng.integers(0, 8, (16, 32)).astype(np.uint8),
        np.ones((16, 2), np.float16),
        np.zeros((16, 2), np.uint8),
        bits=3,
        group_size=16,
    )
    one.factors = LowRank(lora_a=np.ones((4, 32), np.float16), lora_b=np.ones((16, 4), np.float16))
    one.record.errors["eora"] = 0.5
    one.record.notes.append("note")
    described = linear_report(one)
    codes, scales, zero_points = 16 * 32 * 3 // 8, 16 * 2 * 2, 16 * 2 // 2
    factors = 2 * (16 * 32 + 16 * 4)  # the four rows of lora_a take a tile
    assert described.bytes == codes + scales + zero_points + factors
    assert (described.bits, described.group_size, described.rank) == (3, 16, 4)
    assert (described.role, described.shape) == ("up_proj", (16, 32))
    assert (described.errors, described.notes) == ({"eora": 0.5}, ["note"])


def _compressed(columns: int, group_size: int, *, zero_points: bool) -> Linear:
    node = ir.node("MatMul", [ir.Value(name="x"), ir.Value(name="w")])
    one = Linear(
        name=f"model.layers.0.in_{columns}",
        node=node,
        in_features=columns,
        out_features=16,
        source=None,
        transposed=False,
    )
    weight = np.random.default_rng(0).standard_normal((16, columns)).astype(np.float32)
    one.compressed = round_to_nearest(
        weight, bits=3, group_size=group_size, symmetric=not zero_points
    )
    return one


def test_one_warning_says_what_padding_costs() -> None:
    divided = _compressed(96, 32, zero_points=True)
    assert padding_warnings([divided, _compressed(20, -1, zero_points=True)]) == []
    padded = [_compressed(96, 64, zero_points=kept) for kept in (True, False)]
    (warning,) = padding_warnings([divided, *padded])
    stored = sum(linear_report(one).bytes for one in padded)
    # In groups of 64 columns, 96 columns of 3 bits, a scale and a zero point need 1.5 groups.
    meant = 16 * 1.5 * (24 + 2 + 0.5) + 16 * 1.5 * (24 + 2)
    assert warning.figures == {"linears": 2, "bytes": stored - meant}
    assert stored - meant == 16 * 0.5 * 2.5 + 16 * 0.5 * 2
    assert "the rows of 2 linears (model.layers.0.in_96 first)" in warning.message
