"""The Triton kernels in the interpreter against the NumPy oracle; test_interpreted.py runs it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton import knobs

from eoracc.plugins.triton import kernel
from eoracc.plugins.triton.tactics import DownTactic, Tactic, Variant, tactics
from tests.plugins.triton import bfloat16
from tests.plugins.triton.operands import Problem, problem, wide

assert knobs.runtime.interpret, "run test_interpreted.py"
bfloat16.install()

DOWN = DownTactic(block_m=16, block_r=16, block_k=32, span=64, num_warps=4, num_stages=2)


def tactic(block_m: int = 8, block_n: int = 16, block_k: int = 64, block_r: int = 16) -> Tactic:
    return Tactic(
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        block_r=block_r,
        num_warps=4,
        num_stages=2,
    )


def launch(
    given: Problem,
    tiles: Tactic,
    *,
    rank: int | None = None,
    down: torch.Tensor | None = None,
) -> torch.Tensor:
    """In two launches where ``tiles`` has a down tactic, or in the second with ``down``.

    ``rank`` is the R that is passed.
    """
    rows, in_features = given.x.shape
    out_features = len(given.scales)
    rank = given.rank if rank is None else rank
    codes = given.codes
    variant = Variant(bits=given.weight.bits, group_size=given.weight.group_size)
    if variant.code_dtype == "uint32":
        codes = codes.view(torch.uint32)
    lora_a, splits = given.lora_a, 0
    if down is not None:
        lora_a, splits = None, len(down)
    elif tiles.down is not None and lora_a is not None:
        splits = tiles.down.splits(in_features)
        down = torch.full((splits, rows, rank), float("nan"))
        kernel.low_rank_down[tiles.down.grid(rows, rank, in_features)](
            given.x,
            lora_a,
            rows,
            in_features,
            rank,
            tiles.down.span,
            down,
            BLOCK_M=tiles.down.block_m,
            BLOCK_K=tiles.down.block_k,
            BLOCK_R=tiles.down.block_r,
        )
        lora_a = None
    memory = torch.full((rows * out_features + 256,), 7.0, dtype=given.x.dtype)
    y = memory[128:-128].view(rows, out_features)
    y.fill_(float("nan"))
    kernel.matmul_nbits_low_rank[tiles.grid(rows, out_features)](
        given.x,
        codes,
        given.scales,
        given.zero_points,
        given.bias,
        lora_a,
        down,
        given.lora_b,
        rows,
        out_features,
        in_features,
        rank,
        splits,
        y,
        BITS=given.weight.bits,
        GROUP=given.weight.group_size,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        BLOCK_R=tiles.block_r,
    )
    assert (memory[:128] == 7).all()
    assert (memory[-128:] == 7).all()
    return y


def check(given: Problem, tiles: Tactic) -> None:
    expected = given.expected()
    tolerance = given.tolerance(rounds_weight=tiles.block_k > given.weight.group_size)
    # bfloat16 has 8 bits: what it rounds is within a few percent of what there is to see.
    assert np.median(tolerance) < 0.15 * expected.std()
    error = np.abs(wide(launch(given, tiles)) - expected)
    assert (error <= tolerance).all(), f"{(error / tolerance).max():.3g} times what is allowed"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("launches", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_every_width_in_both_forms_is_what_the_oracle_says(
    bits: int, launches: int, dtype: torch.dtype
) -> None:
    # No dimension is a multiple of its tile, and K not of the group.
    given = problem(
        bits=bits,
        group_size=64,
        shape=(11, 37, 200),
        rank=48,
        dtype=dtype,
        zero_points=(bits % 2 == 0) != (dtype is torch.bfloat16),
        bias=bits != 8,
    )
    tiles = tactic(block_r=64)
    if launches == 2:
        tiles = Tactic(**{**vars(tiles), "block_r": 32, "down": DOWN})
    check(given, tiles)


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_weights_enter_the_product_exactly(
    bits: int, dtype: torch.dtype, *, zero_points: bool
) -> None:
    # At scale 1 the unit vectors pick integers out that either type holds.
    for group_size in (16, 64):
        given = problem(
            bits=bits,
            group_size=group_size,
            shape=(72, 20, 72),
            dtype=dtype,
            zero_points=zero_points,
        )
        given.x.copy_(torch.eye(72))
        given.scales.fill_(1)
        zeros = np.full(given.scales.shape, 2 ** (bits - 1))
        if given.zero_points is not None:
            zeros = given.zero_points.numpy()
        integers = given.weight.codes() - np.repeat(zeros.astype(int), group_size, axis=1)[:, :72]
        assert np.array_equal(wide(launch(given, tactic(block_m=64))), integers.T)


@pytest.mark.parametrize("group_size", [16, 32, 48, 64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_every_group_size(bits: int, group_size: int) -> None:
    (tiles, *_) = tactics(bits, group_size, 1, 80)
    shape = (3, 40, 304)
    for zero_points in (False, True):
        given = problem(bits=bits, group_size=group_size, shape=shape, zero_points=zero_points)
        check(given, tiles)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_steps_of_several_groups_with_zero_points(bits: int, dtype: torch.dtype) -> None:
    given = problem(
        bits=bits, group_size=16, shape=(2, 17, 120), dtype=dtype, zero_points=True, seed=1
    )
    check(given, tactic(block_k=64))


@pytest.mark.parametrize("rank", [16, 32, 80, 128, 256])
def test_every_rank_with_the_tactics_that_are_proposed(rank: int) -> None:
    given = problem(bits=4, group_size=32, shape=(5, 33, 160), rank=rank, bias=True)
    proposed = tactics(4, 32, 5, 80, rank=rank)
    assert {tiles.down is None for tiles in proposed} == {True, False}
    for tiles in (proposed[0], proposed[-1]):
        check(given, tiles)


def test_down_projection_of_somebody_else_in_16_bits() -> None:
    given = problem(bits=4, group_size=64, shape=(5, 33, 96), rank=48)
    assert given.lora_a is not None
    down = torch.from_numpy(wide(given.x) @ wide(given.lora_a).T).to(torch.float16)
    y = launch(given, tactic(), down=down[None])
    assert (np.abs(wide(y) - given.expected()) <= given.tolerance(rounds_weight=False)).all()


@pytest.mark.parametrize("rows", [1, 8, 17, 70])
def test_any_number_of_rows(rows: int) -> None:
    given = problem(bits=4, group_size=64, shape=(rows, 20, 96), rank=16)
    for tiles in tactics(4, 64, rows, 90, rank=16):
        check(given, tiles)


@pytest.mark.parametrize("in_features", [1, 15, 16, 63, 64, 65])
@pytest.mark.parametrize("bits", [3, 4])
def test_any_number_of_columns(bits: int, in_features: int) -> None:
    given = problem(bits=bits, group_size=32, shape=(2, 5, in_features), rank=16)
    for down in (None, DOWN):
        check(given, Tactic(**{**vars(tactic(block_k=32)), "down": down}))


def test_rank_0_at_run_time_adds_nothing() -> None:
    given = problem(bits=4, group_size=64, shape=(3, 20, 96), rank=16)
    without = Problem(**{**vars(given), "lora_a": None, "lora_b": None})
    assert torch.equal(launch(given, tactic(), rank=0), launch(without, tactic()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_stays_alone(bad: float) -> None:
    given = problem(bits=4, group_size=64, shape=(5, 20, 96), rank=16)
    good = launch(given, tactic())
    given.x[2, 7] = bad
    y = launch(given, tactic())
    assert not torch.isfinite(y[2]).any()
    others = [0, 1, 3, 4]
    assert torch.equal(y[others], good[others])
