from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from benchmarks import kernels
from benchmarks.bandwidth import Reader
from benchmarks.kernels import Contender, Linear, layer_suites, recipe, write_model
from eoracc.plugins.library import library_path

SMALL = Linear("small", (48, 16), 96)
COPIES = 1  # Those after the first are shifted, each layout in its own way.


def contender(system: str, bits: int, rank: int = 0, factors: str = "int8") -> Contender:
    return Contender(system, bits, rank, factors)  # type: ignore[arg-type]


def outputs(who: Contender, x: NDArray[np.float32], folder: Path) -> list[NDArray[np.float32]]:
    folder.mkdir()
    path = write_model(recipe(who, SMALL), SMALL, COPIES, folder)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(library_path()))
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    results: list[NDArray[np.float32]] = session.run(None, {"X": x})
    return results


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_both_systems_multiply_with_the_same_weight(bits: int, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((3, SMALL.in_features), np.float32)
    ours = outputs(contender("eoracc", bits), x, tmp_path / "ours")
    peer = outputs(contender("MatMulNBits", bits), x, tmp_path / "peer")
    assert len(ours) == len(peer) == COPIES
    weight = kernels._slab(np.random.default_rng(0), contender("eoracc", bits), SMALL.in_features)
    weights = np.abs(weight.dequantize()[: SMALL.out_features])
    # Each rounds X to int8, by half a step of 1/127 of the largest element of a block at most.
    step = np.abs(x).max(axis=1, keepdims=True) / 127
    tolerance = 2 * 0.5 * step * weights.sum(axis=1) * (1 + 1e-3)
    for mine, theirs in zip(ours, peer, strict=True):
        assert np.all(np.abs(mine - theirs) <= tolerance)
        assert np.median(tolerance) < 0.4 * np.median(np.abs(theirs))


@pytest.mark.parametrize("factors", ["int8", "float32"])
def test_low_rank_term_of_a_peer_is_part_of_its_graph(factors: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((2, SMALL.in_features), np.float32)
    plain = outputs(contender("MatMulNBits", 4), x, tmp_path / "plain")
    added = outputs(contender("MatMulNBits", 4, 16, factors), x, tmp_path / "added")
    assert added[0].shape == plain[0].shape
    assert np.abs(added[0] - plain[0]).max() > 0


def test_merged_parts_have_factors_of_their_own() -> None:
    made = recipe(contender("eoracc", 4, rank=24), SMALL)
    assert made.steps[0].attributes["parts"] == SMALL.parts
    # 24 is padded to 32, so that each part's rows of lora_a are whole tiles.
    assert made.operands["lora_a"].shape == (2 * 32 // 16, 96 // 4, 64)
    assert made.operands["lora_b"].shape == (64 // 16, 32 // 4, 64)
    assert made.operands["lora_a_scale"].shape == (64,)
    assert made.operands["lora_b_scale"].shape == (64,)


@pytest.mark.parametrize("adapter_type", ["int8", "int4", "float16"])
def test_rows_take_turns_to_use_the_adapters(adapter_type: str, tmp_path: Path) -> None:
    def ran(folder: str, rank: int | None, index: list[int]) -> NDArray[np.float32]:
        who = replace(
            contender("eoracc", 3),
            adapter_rank=rank,
            adapter_type=adapter_type,  # type: ignore[arg-type]
        )
        (tmp_path / folder).mkdir()
        path = write_model(recipe(who, SMALL), SMALL, COPIES, tmp_path / folder)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.register_custom_ops_library(str(library_path()))
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        x = np.random.default_rng(0).standard_normal((1, SMALL.in_features), np.float32)
        feeds = {"X": np.repeat(x, len(index), axis=0)}
        if rank is not None:
            feeds["adapter_index"] = np.array(index, np.int32)
        (y,) = session.run(None, feeds)
        return np.asarray(y)

    bare = ran("bare", None, [0, 0, 0])
    np.testing.assert_array_equal(ran("empty", 0, [0, 1, 2]), bare)
    first, second, again = ran("full", 16, [0, 1, 0])
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 0
    assert np.abs(first - bare[0]).max() > 0


def test_bytes_count_the_adapters_that_rows_use() -> None:
    made = recipe(replace(contender("eoracc", 4), adapter_rank=16), SMALL)
    backbone = 64 * 96 // 2 + 64 * 3 * 2
    one = 32 * 96 + 64 * 16 + 4 * (32 + 64) + 1  # and a quarter of the index
    assert made.bytes_read(1) == backbone + one
    assert made.bytes_read(8) == made.nbytes == backbone + 4 * one


def test_bytes_count_scales_and_factors() -> None:
    backbone = 64 * 96 // 2 + 64 * 3 * 2
    assert recipe(contender("eoracc", 4), SMALL).nbytes == backbone
    factors = (32 * 96 + 64 * 16) + 4 * (32 + 64)
    assert recipe(contender("eoracc", 4, rank=16), SMALL).nbytes == backbone + factors


def test_bars_are_those_of_the_work_they_name() -> None:
    limits = {
        (suite.from_memory, rows, bar.ours.label, bar.peer.label if bar.peer else None): bar.limit
        for suite in kernels.SQUARE_BARS
        for rows, bars in suite.bars.items()
        for bar in bars
        if bar.limit is not None
    }
    four, two = "MatMulNBits 4-bit", "MatMulNBits 2-bit"
    assert limits == {
        (True, 1, "4-bit + rank 128 int8", four): 1.05,
        (False, 1, "4-bit + rank 128 int8", four): 1.05,
        (True, 1, "4-bit + rank 16 int8", four): 1.02,
        (False, 1, "4-bit + rank 16 int8", four): 1.02,
        (True, 1, "3-bit", four): 0.80,
        (True, 1, "2-bit", four): 0.60,
        (True, 1, "4-bit", None): pytest.approx(1 / 0.85),
        (False, 128, "2-bit", two): pytest.approx(1 / 3),
        (False, 128, "4-bit", four): 1.0,
    }


def test_every_linear_of_every_model_is_there() -> None:
    found = {suite.linear.name: suite.linear for suite in layer_suites()}
    assert len(found) == 4 * 5
    assert found["Llama-3-8B gate_up"].out_features == 2 * 14336
    assert found["Llama-3-70B down"].in_features == 28672
    # Parts are whole tiles, as the op wants them.
    assert all(part % 16 == 0 for linear in found.values() for part in linear.parts)


def test_reader_reads_all_of_its_buffer() -> None:
    reader = Reader(threads=2, mebibytes=1)
    assert sum(part.nbytes for part in reader._parts) == 1 << 20
    assert reader.bytes_per_second() > 0


def test_weights_from_memory_outgrow_the_last_cache(tmp_path: Path) -> None:
    for index, size in enumerate(("48K", "2048K", "491520K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert 8 * kernels.memory_bytes(8, tmp_path) == pytest.approx(2.5 * (491520 << 10))
    assert kernels.memory_bytes(8, tmp_path / "none") == 96 << 20
