"""The allocator against all choices there are, and against what it promises of its optimum."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eoracc.passes.solvers.allocation import (
    Allocation,
    BudgetError,
    Candidate,
    allocate,
    least_bytes,
    tail_energies,
)

Items = list[list[Candidate]]

# Whole numbers: sums of distortions are then exact, and so is every comparison.
candidates = st.builds(Candidate, st.integers(0, 30), st.integers(0, 50).map(float))
instances = st.lists(st.lists(candidates, min_size=1, max_size=4), min_size=1, max_size=5)
budgets = st.integers(0, 150)


def best_by_trying_all(items: Items, budget: int) -> float:
    return min(
        sum(one.distortion for one in choice)
        for choice in product(*items)
        if sum(one.nbytes for one in choice) <= budget
    )


def best_by_dynamic_programming(items: Items, budget: int) -> float:
    """The least distortion for each number of bytes at most, item after item."""
    least = np.zeros(budget + 1)
    for candidates in items:
        grown = np.full(budget + 1, np.inf)
        for nbytes, distortion in candidates:
            if nbytes <= budget:
                reach = least[: budget + 1 - nbytes] + distortion
                grown[nbytes:] = np.minimum(grown[nbytes:], reach)
        least = grown
    return float(least[-1])


def check_promises(items: Items, budget: int, found: Allocation, optimum: float) -> None:
    taken = [items[i][at] for i, at in enumerate(found.chosen)]
    assert found.nbytes == sum(one.nbytes for one in taken) <= budget
    assert found.distortion == sum(one.distortion for one in taken)
    rounding = 1e-9 * (1 + abs(optimum))
    assert found.bound <= optimum + rounding
    assert optimum <= found.distortion
    # Within one item: the most that a single one can gain from its smallest candidate on.
    most = max(
        min(candidates).distortion - min(one.distortion for one in candidates)
        for candidates in items
    )
    assert found.distortion <= optimum + most + rounding


@given(items=instances, budget=budgets)
def test_is_within_one_item_of_the_best_of_all_choices(items: Items, budget: int) -> None:
    if budget < least_bytes(items):
        with pytest.raises(BudgetError):
            allocate(items, budget)
        return
    check_promises(items, budget, allocate(items, budget), best_by_trying_all(items, budget))


@given(items=instances, budget=budgets)
def test_is_optimal_for_the_bytes_of_every_step_of_the_hulls(items: Items, budget: int) -> None:
    """Where the relaxation needs no part of a step, its bound is reached."""
    if budget < least_bytes(items):
        return
    found = allocate(items, budget)
    again = allocate(items, found.nbytes)
    assert again.distortion <= found.distortion
    if again.bound == again.distortion:
        assert again.distortion == best_by_trying_all(items, found.nbytes)


def test_many_items_come_close_to_dynamic_programming() -> None:
    rng = np.random.default_rng(0)
    items = [
        [
            Candidate(int(size * bits) + rank * 12, scale * 4.0**-bits / (1 + rank))
            for bits in (2, 3, 4)
            for rank in (0, 1, 2, 4)
        ]
        for size, scale in zip(rng.integers(50, 200, 40), rng.lognormal(size=40), strict=True)
    ]
    for budget in (13_000, 16_000, 19_000):
        found = allocate(items, budget)
        optimum = best_by_dynamic_programming(items, budget)
        check_promises(items, budget, found, optimum)
        assert found.distortion <= 1.01 * optimum
        assert budget - found.nbytes < 12


def test_uniform_choices_at_the_same_bytes_are_never_better() -> None:
    items = [[Candidate(b, w * 4.0**-b) for b in (2, 3, 4)] for w in (1.0, 1.0, 64.0)]
    found = allocate(items, 9)
    assert found.chosen in {(0, 1, 2), (1, 0, 2)}
    assert found.distortion < sum(one[1].distortion for one in items)


def test_what_the_hulls_leave_is_spent_off_them() -> None:
    # The hull of the first goes straight to 10 bytes; 4 bytes still buy its middle candidate.
    items = [[Candidate(0, 10.0), Candidate(4, 7.0), Candidate(10, 0.0)]]
    assert allocate(items, 4) == Allocation((1,), 4, 7.0, 6.0)
    assert allocate(items, 9).chosen == (1,)
    assert allocate(items, 10).chosen == (2,)


def test_candidates_that_cost_more_and_give_nothing_are_left() -> None:
    items = [[Candidate(5, 1.0), Candidate(6, 1.0), Candidate(7, 2.0)]]
    assert allocate(items, 100) == Allocation((0,), 5, 1.0, 1.0)


def test_a_budget_below_the_smallest_names_both_figures() -> None:
    with pytest.raises(BudgetError, match="take 5 bytes, and the budget is 4"):
        allocate([[Candidate(2, 1.0)], [Candidate(3, 1.0)]], 4)


def test_tails_are_what_a_truncated_svd_leaves() -> None:
    matrix = np.random.default_rng(1).standard_normal((6, 9))
    u, singular, vt = np.linalg.svd(matrix, full_matrices=False)
    ranks = [0, 1, 4, 6, 20]
    left = [
        np.linalg.norm(matrix - (u[:, :rank] * singular[:rank]) @ vt[:rank]) ** 2 for rank in ranks
    ]
    tails = tail_energies(singular**2, float((matrix**2).sum()), ranks)
    np.testing.assert_allclose(tails, left, atol=1e-12 * tails[0])
    assert (tails >= 0).all()
