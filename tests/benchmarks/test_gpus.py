"""Occupancy and rooflines, from closed forms."""

from __future__ import annotations

import json

import pytest

from benchmarks.gpus import GPUS, LIMITS, Gpu, Product, bound, occupancy
from benchmarks.triton_kernels import LINEARS, MODEL, SHAPES, launches, products, rooflines
from eoracc.plugins.triton.tactics import CAPABILITIES, FEW_RANKS

UNIT = Gpu("unit", 80, bandwidth=1e9, flops=1e9, multiprocessors=108, clock=1e9 / 5120)
"""A byte, an operation, and a byte from the cache take a nanosecond each."""


def test_every_capability_has_limits_and_a_gpu() -> None:
    assert tuple(LIMITS) == CAPABILITIES
    assert tuple(gpu.capability for gpu in GPUS) == CAPABILITIES


@pytest.mark.parametrize(
    ("capability", "num_warps", "registers", "shared_bytes", "warps"),
    [
        (80, 4, 32, 0, 64),  # all that there are
        (80, 4, 64, 0, 32),  # 64 * 32 registers a warp, of 65536
        (80, 4, 65, 0, 28),  # 2304 a warp: 28 and a half
        (80, 4, 255, 0, 8),
        (80, 1, 32, 0, 32),  # blocks
        (86, 4, 32, 24 * 1024, 16),  # 100 KiB hold four blocks of 25
        (86, 4, 32, 24 * 1024 + 1, 12),
        (90, 8, 128, 47 * 1024, 16),  # registers, though shared memory is enough for 4 blocks
    ],
)
def test_occupancy_is_that_of_the_scarcest_resource(
    capability: int, num_warps: int, registers: int, shared_bytes: int, warps: int
) -> None:
    found = occupancy(
        capability, num_warps=num_warps, registers=registers, shared_bytes=shared_bytes
    )
    assert found == warps / LIMITS[capability].warps


def test_product_counts_operands_once() -> None:
    product = Product(rows=2, out_features=64, in_features=256, bits=4, group_size=128, rank=16)
    assert product.bytes == 64 * 128 + 64 * 2 * 2 + 16 * (64 + 256) * 2 + 2 * (64 + 256) * 2
    assert product.flops == 2 * 2 * (64 * 256 + 16 * (64 + 256))
    assert Product(2, 64, 256, 16).bytes == 64 * 256 * 2 + 2 * (64 + 256) * 2


def test_bound_is_the_busiest_resource() -> None:
    product = Product(rows=1, out_features=64, in_features=256, bits=4, rank=16)
    plain = bound(UNIT, product)
    assert plain.seconds == pytest.approx(product.flops * 1e-9)
    assert plain.by == "tensor cores"
    one = bound(UNIT, product, block_m=8, block_n=32)
    # Two programs read all of lora_a, and multiply 8 rows with it each.
    assert one.cache == pytest.approx(2 * 16 * 256 * 2 * 1e-9)
    assert one.tensor_cores == pytest.approx((product.flops + 15 * 2 * 16 * 256) * 1e-9)


def test_linears_are_those_of_the_model() -> None:
    shapes = json.loads(SHAPES.read_text(encoding="utf-8"))[MODEL]
    assert (
        tuple(products(1, 4, 64)) == LINEARS == tuple(name for name in shapes if name != "lm_head")
    )
    assert products(1, 4, 64)["gate_up"].out_features == 2 * 14336


def test_one_row_is_bound_by_memory_everywhere() -> None:
    for row in rooflines():
        if row["rows"] == 1:
            assert row["bound_by"] == "memory"
            assert row["seconds"] < row["float16_seconds"] / 3


def test_one_launch_costs_little_up_to_the_rank_where_tactics_put_it_first() -> None:
    for row in launches():
        ratio = row["one_launch_seconds"] / row["two_launches_seconds"]
        assert ratio >= 0.99
        if row["rank"] < FEW_RANKS:
            assert ratio < 1.5
