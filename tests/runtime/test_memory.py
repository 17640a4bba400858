"""Memory is given back, and never what somebody has written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save_file

from eoracc.runtime.memory import peak_bytes, release_memory, resident_bytes

if TYPE_CHECKING:
    from pathlib import Path

_SIZE = 8 << 20


def _mapped(path: Path) -> np.memmap:
    save_file({"weight": np.arange(_SIZE, dtype=np.uint8)}, path)
    return np.memmap(path, np.uint8, mode="c")


def test_pages_of_a_mapped_checkpoint_are_let_go_and_read_again(tmp_path: Path) -> None:
    weights = _mapped(tmp_path / "model.safetensors")
    total = int(weights.sum(dtype=np.int64))
    release_memory()
    before = resident_bytes()
    assert int(weights.sum(dtype=np.int64)) == total
    assert resident_bytes() - before > _SIZE // 2
    release_memory()
    assert resident_bytes() - before < _SIZE // 2
    assert int(weights.sum(dtype=np.int64)) == total


def test_what_was_written_to_a_private_mapping_stays(tmp_path: Path) -> None:
    weights = _mapped(tmp_path / "model.safetensors")
    weights[4096:8192] = 7
    release_memory()
    assert (weights[4096:8192] == 7).all()


def test_peak_is_at_least_what_is_resident() -> None:
    assert peak_bytes() >= resident_bytes() > 0
