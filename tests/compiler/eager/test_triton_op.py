"""The Triton kernel as an operator of PyTorch: what needs no kernel to run."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from typing_extensions import override

from eoracc.compiler.eager.triton_op import matmul_nbits_low_rank
from eoracc.errors import PluginError
from tests.optional import require

Operands = dict[str, Any]


def operands(**changes: object) -> Operands:
    """Of a linear with N = 24, K = 72 and R = 16; ``changes`` replace some."""
    given: Operands = {
        "x": torch.zeros(2, 3, 72, dtype=torch.float16),
        "codes": torch.zeros(24, 3, 16, dtype=torch.uint8),
        "scales": torch.zeros(24, 3, dtype=torch.float16),
        "zero_points": torch.zeros(24, 3, dtype=torch.uint8),
        "bias": torch.zeros(24, dtype=torch.float16),
        "lora_a": torch.zeros(16, 72, dtype=torch.float16),
        "lora_b": torch.zeros(24, 16, dtype=torch.float16),
        "bits": 4,
        "block_size": 32,
    }
    return given | changes


def test_fake_kernel_says_shape_type_and_device() -> None:
    with FakeTensorMode() as mode:
        given = {
            name: mode.from_tensor(value).to("meta") if isinstance(value, torch.Tensor) else value
            for name, value in operands().items()
        }
        y = matmul_nbits_low_rank(**given)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 24), torch.float16, "meta")


def test_export_keeps_the_operator_for_any_number_of_rows() -> None:
    class Linear(torch.nn.Module):
        @override
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = matmul_nbits_low_rank(**operands(x=x))
            return y

    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(
        Linear(), (torch.zeros(3, 72, dtype=torch.float16),), dynamic_shapes=({0: rows},)
    )
    calls = [
        node
        for node in program.graph.nodes
        if node.target is torch.ops.eoracc.matmul_nbits_low_rank.default
    ]
    assert len(calls) == 1
    rows_of_y, outputs = calls[0].meta["val"].shape
    assert isinstance(rows_of_y, torch.SymInt)
    assert outputs == 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 72)}, "x is float32 [2, 72] where float16 or bfloat16 [..., K] fits"),
        ({"bits": 5}, "bits is 5: the Triton kernel knows 2, 3, 4, 6 and 8"),
        ({"block_size": 24}, "block_size is 24: the Triton kernel takes multiples of 16"),
        (
            {"codes": torch.zeros(24, 2, 16, dtype=torch.uint8)},
            "codes is uint8 [24, 2, 16] where uint8 [24, 3, 16] fits",
        ),
        (
            {"zero_points": torch.zeros(24, 3)},
            "zero_points is float32 [24, 3] where uint8 [24, 3] fits",
        ),
        ({"bias": torch.zeros(24)}, "bias is float32 [24] where float16 [24] fits"),
        ({"lora_b": None}, "lora_a and lora_b go together"),
        (
            {"lora_a": torch.zeros(8, 72), "lora_b": torch.zeros(24, 8)},
            "the rank is 8: the kernel takes multiples of 16 up to 256",
        ),
        ({"scales": torch.zeros(24, 3, device="meta")}, "scales is on meta, x on cpu"),
    ],
)
def test_operand_that_does_not_fit_is_named(changes: Operands, message: str) -> None:
    with pytest.raises(PluginError, match=re.escape(message)):
        matmul_nbits_low_rank(**operands(**changes))


def test_no_gpu_and_no_triton_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    require("triton")
    with pytest.raises(PluginError, match="x is on cpu, and the kernel runs on NVIDIA GPUs"):
        matmul_nbits_low_rank(**operands())
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(PluginError, match=re.escape("run pip install 'eoracc[triton]'")):
        matmul_nbits_low_rank(**operands())
