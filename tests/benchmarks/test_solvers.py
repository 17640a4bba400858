"""The benchmark of solvers: what it measures, on matrices that take no time."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks import solvers

if TYPE_CHECKING:
    from pathlib import Path


def test_the_error_left_is_that_of_the_projection() -> None:
    matrix = np.diag([3.0, 2.0, 1.0]).astype(np.float32)
    assert solvers.error_left(matrix, np.eye(3)[:, :1]) == pytest.approx(np.sqrt(5))
    assert solvers.error_left(matrix, solvers.full_svd(matrix, 2, 1)) == pytest.approx(1)


def test_a_decaying_spectrum_has_less_of_a_tail() -> None:
    shares = []
    for spectrum in solvers.SPECTRA:
        matrix = solvers.weighted_error(40, 60, spectrum)
        singular = np.linalg.svd(matrix, compute_uv=False)
        shares.append(np.linalg.norm(singular[8:]) / np.linalg.norm(singular))
    white, decaying = shares
    assert decaying < 0.95 * white


def test_tabulates_every_shape_and_spectrum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    arguments = ["--shapes", "48x64,64x48", "--rank", "8", "--repeats", "1", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["solvers", *arguments])
    solvers.main()
    rows = json.loads(path.read_text(encoding="utf-8"))
    found = [(row["rows"], row["columns"], row["spectrum"]) for row in rows]
    assert found == [(*shape, name) for shape in ((48, 64), (64, 48)) for name in solvers.SPECTRA]
    for row in rows:
        assert row["rank"] == 8
        assert row["speedup"] == row["svd_seconds"] / row["ours_seconds"]
        # Both are optimal up to float32 rounding of a norm.
        assert abs(row["relative_excess"]) < 64 * float(np.finfo(np.float32).eps)
    assert len(capsys.readouterr().out.splitlines()) == 4 + len(rows)
