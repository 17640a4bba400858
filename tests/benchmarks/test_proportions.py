from __future__ import annotations

import numpy as np
import pytest

from benchmarks.proportions import compare_paired, wilson_interval


@pytest.mark.parametrize(("correct", "count"), [(0, 1), (1, 1), (3, 10), (127, 500), (500, 500)])
def test_wilson_interval_is_where_the_score_test_rejects(correct: int, count: int) -> None:
    from scipy import stats

    interval = wilson_interval(correct, count)
    expected = stats.binomtest(correct, count).proportion_ci(0.95, method="wilson")
    # A dozen operations on values near 1.
    tolerance = 16 * np.finfo(float).eps
    assert interval.low == pytest.approx(expected.low, abs=tolerance)
    assert interval.high == pytest.approx(expected.high, abs=tolerance)
    assert 0 <= interval.low < interval.high <= 1


@pytest.mark.parametrize(("correct", "count"), [(0, 0), (-1, 5), (6, 5)])
def test_no_share_is_an_error(correct: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"there is no share of {correct} in {count}"):
        wilson_interval(correct, count)


def answers(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Which questions two models answer, from how many of each kind there are."""
    counts = (both, first, second, neither)
    return (
        np.repeat([True, True, False, False], counts),
        np.repeat([True, False, True, False], counts),
    )


def test_mcnemar_only_looks_at_questions_on_which_the_models_differ() -> None:
    from scipy import stats

    found = compare_paired(*answers(30, 9, 2, 59))
    assert (found.gained, found.lost) == (2, 9)
    assert found.difference == pytest.approx(-0.07)
    assert found.p_value == pytest.approx(stats.binomtest(2, 11, 0.5).pvalue)
    assert compare_paired(*answers(0, 9, 2, 0)).p_value == found.p_value


@pytest.mark.parametrize("split", [(0, 0), (3, 3)])
def test_no_difference_is_no_evidence(split: tuple[int, int]) -> None:
    found = compare_paired(*answers(5, *split, 5))
    assert found.difference == 0
    assert found.p_value == 1
    assert found.interval.low <= 0 <= found.interval.high


def test_bootstrap_interval_is_that_of_the_mean_difference() -> None:
    count, lost, gained = 400, 60, 20
    first, second = answers(200, lost, gained, 120)
    found = compare_paired(first, second)
    # By the central limit theorem; the interval of 10,000 draws is itself uncertain by 2%, and
    # moves in steps of one question.
    difference = (gained - lost) / count
    deviation = np.sqrt(((gained + lost) / count - difference**2) / count)
    tolerance = 0.1 * deviation + 1 / count
    assert found.interval.low == pytest.approx(difference - 1.96 * deviation, abs=tolerance)
    assert found.interval.high == pytest.approx(difference + 1.96 * deviation, abs=tolerance)
    assert tolerance < 0.25 * deviation
    assert compare_paired(first, second) == found
