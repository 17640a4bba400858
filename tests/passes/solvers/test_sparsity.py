from __future__ import annotations

import numpy as np
import pytest

from eoracc.passes.solvers.sparsity import Sparsity, keep_all_but


def scores(rows: int = 6, columns: int = 40) -> np.ndarray:
    return np.abs(np.random.default_rng(0).standard_normal((rows, columns)))


@pytest.mark.parametrize(("pattern", "kept", "run"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:2", 1, 2)])
def test_a_pattern_keeps_the_highest_of_every_run(pattern: str, kept: int, run: int) -> None:
    given = scores()
    mask = Sparsity.of_pattern(pattern).mask_of_weights(given)
    for row, of_row in zip(given, mask, strict=True):
        for start in range(0, len(row), run):
            ranked = sorted(range(start, start + run), key=lambda column: -row[column])
            assert set(np.flatnonzero(of_row[start : start + run]) + start) == set(ranked[:kept])


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 0.97, 0.999])
def test_a_share_removes_the_lowest_of_a_row_or_of_all(fraction: float) -> None:
    given = scores()
    of_rows = Sparsity(fraction=fraction).mask_of_rows(given)
    of_all = Sparsity(fraction=fraction).mask_of_weights(given)
    for row, of_row in zip(given, of_rows, strict=True):
        assert np.count_nonzero(~of_row) == int(fraction * len(row) + 1e-9)
        assert row[~of_row].max(initial=0) <= row[of_row].min()
    assert np.count_nonzero(~of_all) == int(fraction * given.size + 1e-9)
    assert given[~of_all].max(initial=0) <= given[of_all].min()


def test_counts_are_those_of_decimals() -> None:
    assert [Sparsity(fraction=0.29).removed(count) for count in (100, 10, 1)] == [29, 2, 0]


def test_of_equal_scores_the_first_are_removed() -> None:
    assert keep_all_but(np.zeros((2, 3)), 4).tolist() == [[False] * 3, [False, True, True]]
    assert Sparsity.of_pattern("2:4").mask_of_rows(np.zeros((1, 4))).tolist() == [
        [False, False, True, True]
    ]
