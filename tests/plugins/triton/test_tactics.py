"""Tilings and launch grids of the Triton kernels."""

from __future__ import annotations

from itertools import product

import pytest

from eoracc.errors import PluginError
from eoracc.plugins.triton.tactics import (
    CAPABILITIES,
    FEW_RANKS,
    LARGEST_RANK,
    DownTactic,
    Tactic,
    Variant,
    tactics,
)

CASES = list(
    product((2, 3, 4, 6, 8), (16, 32, 48, 64, 96, 128, 256, 576), (1, 9, 32, 33, 512), (80, 90))
)


def is_power_of_two(value: int) -> bool:
    return value.bit_count() == 1


@pytest.mark.parametrize("rank", [0, 16, 48, 256])
def test_every_tiling_is_one_that_the_kernels_take(rank: int) -> None:
    for bits, group_size, rows, capability in CASES:
        listed = tactics(bits, group_size, rows, capability, rank=rank)
        assert len({tactic.name for tactic in listed}) == len(listed) >= 2
        for tactic in listed:
            blocks = (tactic.block_m, tactic.block_n, tactic.block_k, tactic.block_r)
            assert all(is_power_of_two(block) for block in (*blocks, tactic.num_warps))
            assert tactic.block_k >= 16
            assert group_size % tactic.block_k == 0 or tactic.block_k % group_size == 0
            assert tactic.num_stages >= 2
            if tactic.down is not None:
                assert tactic.down.span % tactic.down.block_k == 0
                assert tactic.block_r <= 64
            elif rank:
                assert rank <= tactic.block_r < 2 * rank


def test_one_launch_comes_first_for_few_rows_of_small_rank_only() -> None:
    def first(rows: int, rank: int) -> bool:
        return tactics(4, 128, rows, 80, rank=rank)[0].down is None

    assert first(1, FEW_RANKS)
    assert not first(1, FEW_RANKS + 16)
    assert not first(512, 16)


@pytest.mark.parametrize(
    ("group_size", "block_k"), [(16, 128), (32, 128), (64, 64), (96, 32), (128, 128), (576, 64)]
)
def test_steps_stay_within_groups_of_64_and_more(group_size: int, block_k: int) -> None:
    assert tactics(4, group_size, 1, 80)[0].block_k == block_k


def test_grids_cover_every_output_once() -> None:
    tiles = Tactic(block_m=8, block_n=32, block_k=64, block_r=16, num_warps=4, num_stages=2)
    assert tiles.grid(1, 4096) == (1, 128, 1)
    assert tiles.grid(9, 33) == (2, 2, 1)
    down = DownTactic(block_m=16, block_r=16, block_k=64, span=512, num_warps=4, num_stages=2)
    assert down.grid(17, 48, 4096) == (2, 3, 8)
    assert down.splits(4097) == 9


def test_arguments_are_the_operands_that_are_there() -> None:
    variant = Variant(bits=3, group_size=64, dtype="bfloat16", low_rank="two_launches")
    assert variant.arguments == (
        ("x", "bfloat16"),
        ("codes", "uint32"),
        ("scales", "float16"),
        ("down", "float32"),
        ("lora_b", "float16"),
        *((name, "int32") for name in ("M", "N", "K", "R", "splits")),
        ("y", "bfloat16"),
    )
    # Rows of 3-bit codes in groups of 16 need not be whole words.
    assert Variant(bits=3, group_size=16).code_dtype == "uint8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 64, 1, 80, 0), "bits is 5: the Triton kernel knows 2, 3, 4, 6 and 8"),
        ((4, 24, 1, 80, 0), "block_size is 24: the Triton kernel takes multiples of 16"),
        ((4, 0, 1, 80, 0), "block_size is 0"),
        ((4, 64, 1, 80, 8), "rank is 8: the Triton kernel takes multiples of 16 up to 256"),
        ((4, 64, 1, 80, LARGEST_RANK + 16), "rank is 272"),
    ],
)
def test_what_no_kernel_takes_is_named(
    arguments: tuple[int, int, int, int, int], message: str
) -> None:
    bits, group_size, rows, capability, rank = arguments
    with pytest.raises(PluginError, match=message):
        tactics(bits, group_size, rows, capability, rank=rank)


def test_float32_activations_are_refused() -> None:
    with pytest.raises(PluginError, match=r"activations are float32: .* float16 or bfloat16"):
        Variant(bits=4, group_size=64, dtype="float32")


def test_capabilities_are_those_that_are_documented() -> None:
    assert CAPABILITIES == (80, 86, 87, 89, 90, 100, 120)
