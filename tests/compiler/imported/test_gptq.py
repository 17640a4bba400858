from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from eoracc.compiler.imported.gptq import Gptq
from eoracc.compiler.imported.tensors import StoredTensors
from eoracc.errors import ModelError
from eoracc.plugins.operands.words import pack_words


def write(
    folder: Path,
    *,
    bits: int,
    zeros: NDArray[Any],
    stored_zeros: NDArray[np.int32],
    settings: dict[str, Any],
    g_idx: NDArray[np.int32] | None = None,
    rows: int = 16,
) -> tuple[Gptq, NDArray[np.float32]]:
    """A file of one module ``m`` of 64 columns and ``rows`` rows, with ``len(zeros)`` groups."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (64, rows)).astype(np.uint8)
    scales = rng.random(zeros.shape).astype(np.float16)
    tensors: dict[str, NDArray[Any]] = {
        "m.qweight": pack_words(codes, bits=bits, axis=0),
        "m.qzeros": stored_zeros,
        "m.scales": scales,
    }
    if g_idx is not None:
        tensors["m.g_idx"] = g_idx
    save_file(tensors, folder / "model.safetensors")
    groups = np.arange(64) * len(zeros) // 64 if g_idx is None else g_idx
    exact = (codes.astype(np.float64) - zeros[groups]) * scales.astype(np.float64)[groups]
    reader = Gptq(StoredTensors(folder, [folder / "model.safetensors"]), settings)
    return reader, exact.T.astype(np.float32)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_of_zero_survive_the_borrow_between_fields(tmp_path: Path, bits: int) -> None:
    """GPTQModel takes 1 of each field from the whole word, as v2 -> v1 conversion does."""
    zeros = np.random.default_rng(1).integers(0, 2**bits, (2, 16))
    zeros[:, ::3] = 0
    words = pack_words(zeros.astype(np.uint8), bits=bits, axis=1).view(np.uint32)
    stored = (words - np.uint32(sum(1 << at for at in range(0, 32, bits)))).view(np.int32)
    reader, exact = write(
        tmp_path, bits=bits, zeros=zeros, stored_zeros=stored, settings={"group_size": 32}
    )
    np.testing.assert_array_equal(reader.weight("m", 16, 64).weight.dequantize(), exact)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_version_two_stores_zero_points_as_they_are(tmp_path: Path, bits: int) -> None:
    zeros = np.random.default_rng(1).integers(0, 2**bits, (2, 32))
    stored = pack_words(zeros.astype(np.uint8), bits=bits, axis=1)
    settings = {"group_size": 32, "checkpoint_format": "gptq_v2"}
    reader, exact = write(
        tmp_path, bits=bits, zeros=zeros, stored_zeros=stored, settings=settings, rows=32
    )
    np.testing.assert_array_equal(reader.weight("m", 32, 64).weight.dequantize(), exact)


def test_act_order(tmp_path: Path) -> None:
    zeros = np.full((2, 16), 8)
    stored = pack_words((zeros - 1).astype(np.uint8), bits=4, axis=1)
    g_idx = np.random.default_rng(0).permutation(np.arange(64) // 32).astype(np.int32)
    reader, exact = write(
        tmp_path, bits=4, zeros=zeros, stored_zeros=stored, settings={}, g_idx=g_idx
    )
    held = reader.weight("m", 16, 64)
    assert "act-order" in held.dequantized
    np.testing.assert_array_equal(held.weight.dequantize(), exact)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    zeros = np.full((2, 16), 8)
    stored = pack_words((zeros - 1).astype(np.uint8), bits=4, axis=1)
    reader, _ = write(
        tmp_path, bits=4, zeros=zeros, stored_zeros=stored, settings={"group_size": 32}
    )
    with pytest.raises(ModelError, match="has 8 rows, which hold 100 codes of neither"):
        reader.weight("m", 16, 100)
    with pytest.raises(ModelError, match=r"m.qweight is I32 \[8, 16\], and integers of \[8, 24\]"):
        reader.weight("m", 24, 64)
    with pytest.raises(ModelError, match=r"has no tensor other\.qweight"):
        reader.weight("other", 16, 64)
    tensors = reader._tensors
    with pytest.raises(ModelError, match="packed in the format 'marlin'"):
        Gptq(tensors, {"checkpoint_format": "marlin"})
    with pytest.raises(ModelError, match="no group_size"):
        Gptq(tensors, {"group_size": "many"})


def test_groups_beyond_the_scales_are_refused(tmp_path: Path) -> None:
    zeros = np.full((2, 16), 8)
    stored = pack_words((zeros - 1).astype(np.uint8), bits=4, axis=1)
    reader, _ = write(
        tmp_path, bits=4, zeros=zeros, stored_zeros=stored, settings={},
        g_idx=np.arange(64, dtype=np.int32) // 32,
    )  # fmt: skip
    content = load_file(tmp_path / "model.safetensors")
    content["m.g_idx"] = content["m.g_idx"] + 1
    save_file(content, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="names groups beyond the 2 that have scales"):
        reader.weight("m", 16, 64)
