"""The operator of PyTorch in Triton's interpreter, on the CPU; test_interpreted.py runs it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton import knobs

from eoracc.compiler.eager.triton_op import matmul_nbits_low_rank
from eoracc.plugins.triton.tactics import tactics
from tests.plugins.triton import bfloat16
from tests.plugins.triton.operands import Problem, problem, wide

assert knobs.runtime.interpret, "run test_interpreted.py"
bfloat16.install()


def arguments(given: Problem) -> tuple[torch.Tensor | int | None, ...]:
    factors = (given.lora_a, given.lora_b)
    sizes = (given.weight.bits, given.weight.group_size)
    return (given.x, given.codes, given.scales, given.zero_points, given.bias, *factors, *sizes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "rank", "rows"), [(3, 0, 3), (4, 16, 3), (4, 64, 40), (8, 96, 2)])
def test_operator_is_what_the_oracle_says(
    bits: int, rank: int, rows: int, dtype: torch.dtype
) -> None:
    given = problem(
        bits=bits,
        group_size=32,
        shape=(rows, 24, 136),
        rank=rank,
        dtype=dtype,
        zero_points=bits == 4,
        bias=bits == 3,
    )
    y = matmul_nbits_low_rank(*arguments(given))
    (tactic, *_) = tactics(bits, 32, rows, 80, rank=rank)
    tolerance = given.tolerance(rounds_weight=tactic.block_k > 32)
    expected = given.expected()
    assert np.median(tolerance) < 0.15 * expected.std()
    assert (np.abs(wide(y) - expected) <= tolerance).all()


def test_operator_takes_batches_and_strides() -> None:
    given = problem(bits=4, group_size=32, shape=(6, 24, 64), rank=16)
    y = matmul_nbits_low_rank(*arguments(given))
    x, *others = arguments(given)
    assert isinstance(x, torch.Tensor)
    strided = x.view(2, 3, 64).transpose(0, 1)
    batch = matmul_nbits_low_rank(strided, *others)
    assert torch.equal(batch.transpose(0, 1).reshape(6, 24), y)
    assert matmul_nbits_low_rank(x[:0], *others).shape == (0, 24)


# opcheck compares with what tracing gives: schema, fake kernel, and that autograd stays out.
@pytest.mark.parametrize("rank", [0, 16])
def test_opcheck(rank: int) -> None:
    given = problem(
        bits=4, group_size=32, shape=(3, 24, 64), rank=rank, zero_points=True, bias=True
    )
    result = torch.library.opcheck(matmul_nbits_low_rank, arguments(given))
    assert set(result.values()) == {"SUCCESS"}


def test_compiled_function_calls_it() -> None:
    given = problem(bits=4, group_size=32, shape=(3, 24, 64), rank=16)
    x, *others = arguments(given)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(matmul_nbits_low_rank(x, *others))

    assert isinstance(x, torch.Tensor)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
