from __future__ import annotations

import pytest

from eoracc.passes.solvers.block_budget import BitsBudget, Choice, RatioBudget


def test_blocks_of_one_size_have_the_paper_s_ratio() -> None:
    """``R_l = N R_o / k``."""
    budget = RatioBudget(dict.fromkeys(range(30), 3_538_944), 0.2)
    choices = list(budget.last(4))
    assert [len(choice.blocks) for choice in choices] == [4, 8, 12, 16, 20, 24, 28]
    for choice in choices:
        k = len(choice.blocks)
        assert choice.blocks == tuple(range(30 - k, 30))
        assert choice.value == pytest.approx(30 * 0.2 / k, rel=1e-12)
        assert budget.is_met(choice)
        assert not budget.is_met(Choice(choice.blocks[1:], choice.value))


def test_unequal_blocks_remove_the_same_weights_in_all() -> None:
    weights = {0: 10, 1: 20, 2: 30, 3: 40}
    budget = RatioBudget(weights, 0.3)
    for choice in budget.last(1, whole=True):
        removed = sum(choice.value * weights[block] for block in choice.blocks)
        assert removed == pytest.approx(30, rel=1e-12)
    free = budget.settled(Choice((0, 2), 0.9))
    assert free == Choice((0, 2), 0.75)


def test_a_ratio_s_course_leaves_the_other_blocks_alone() -> None:
    budget = RatioBudget({0: 10, 1: 10, 2: 10}, 0.2)
    assert budget.schedule(Choice((1, 2), 0.3)) == {0: 0.0, 1: 0.3, 2: 0.3}


def test_blocks_without_weights_cannot_give_any() -> None:
    (last, both) = RatioBudget({0: 10, 1: 0}, 0.2).last(1, whole=True)
    assert last.value >= 1
    assert both.value == 0.2


def test_the_fewest_last_blocks_that_meet_the_average() -> None:
    codes = {0: {3: 100}, 1: {3: 100}, 2: {3: 50, 4: 50}, 3: {3: 100}}
    budget = BitsBudget(codes, 2.7)
    for low in (2, 3):
        choice = budget.fewest_last(low)
        if low == 3:
            assert choice is None
            continue
        assert choice == Choice((2, 3), 2)
        # By hand: 100 codes of 3 bits twice, and 200 of 2.
        assert budget.average(choice) == pytest.approx((2 * 300 + 200 * 2) / 400)
        assert budget.average(Choice(choice.blocks[1:], low)) > 2.7
    assert budget.average(Choice((), 0)) == pytest.approx((3 * 350 + 4 * 50) / 400)
    assert budget.schedule(Choice((2, 3), 2)) == {2: 2, 3: 2}


def test_an_average_of_exactly_the_target_is_enough() -> None:
    """Sums of floats may be off by rounding."""
    codes = {block: {3: 3_538_944} for block in range(30)}
    choice = BitsBudget(codes, 3 - 7 / 30).fewest_last(2)
    assert choice is not None
    assert len(choice.blocks) == 7
