"""The curve of k and the places for fewer bits, on a small random model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.last_k import Bench, curve, lower_bits
from eoracc.compiler.frontend.load import load
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.text.windows import Windows
from tests.tiny_models import VOCABULARY, tiny_model


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    loaded = load(str(tiny_model("smollm", folder / "model")), work=folder / "work")
    rng = np.random.default_rng(0)

    def windows(count: int) -> Windows:
        ids = rng.integers(0, VOCABULARY, (count, 24))
        return Windows(ids, np.ones_like(ids))

    return Bench(loaded, windows(6), {"wiki": windows(2), "c4": windows(2)}, SilentProgress())


def test_every_candidate_is_scored(bench: Bench, tmp_path: Path) -> None:
    rows = list(curve(bench, 0.4, 1, tmp_path))
    assert [(row["k"], row["R_l"]) for row in rows] == [(1, pytest.approx(0.8)), (2, 0.4)]
    # The error is the one that the survey went by.
    least = min(rows, key=lambda row: row["error"])
    assert [row["chosen"] for row in rows] == [row is least for row in rows]
    assert rows[0]["wiki"] != rows[1]["wiki"]
    assert np.isfinite([[row["wiki"], row["c4"]] for row in rows]).all()


def test_every_place_for_fewer_bits_is_scored(bench: Bench, tmp_path: Path) -> None:
    rows = list(lower_bits(bench, 2.5, 1, tmp_path))
    assert [row["set"] for row in rows] == ["last", "free", "first", "gate and up of all"]
    assert [row.get("blocks") for row in rows] == [[1], rows[1]["blocks"], [0], None]
    assert len(rows[1]["blocks"]) == 1
    by_blocks = {tuple(row["blocks"]): row["error"] for row in rows[:3]}
    assert by_blocks.keys() == {(0,), (1,)}
    assert by_blocks[0,] != by_blocks[1,]
