"""The choice for a folder's size against every choice there is."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

from eoracc.errors import PassError
from eoracc.passes.plan.allocate import _MARGIN_BYTES, _SPARE, Allocate
from eoracc.passes.plan.items import Item, Option
from eoracc.passes.solvers.allocation import Candidate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from eoracc.passes.survey import SurveyContext

_NODE = 9_000
"""Bytes of the graph that an item with factors adds."""


class _Folder:
    """A context that knows the rest of a folder, of which a part depends on the choice."""

    def other_bytes(self, plans: Mapping[str, Mapping[str, Any]]) -> int:
        return 1_000_000 + sum(_NODE for plan in plans.values() if plan["rank"])


def items_of(rng: np.random.Generator) -> list[Item]:
    """Six items of two widths, with and without factors; more bytes leave less distortion."""
    found = []
    for at in range(6):
        sizes = np.sort(rng.integers(20_000, 200_000, 4))
        losses = np.sort(rng.exponential(1.0, 4))[::-1]
        plans = [{"bits": bits, "rank": rank} for bits in (2, 3) for rank in (0, 8)]
        options = [
            Option(plan, Candidate(int(size), float(loss)))
            for plan, size, loss in zip(plans, sizes, losses, strict=True)
        ]
        found.append(Item(f"item{at}", 1000, options))
    return found


def total(items: Sequence[Item], chosen: Sequence[Option]) -> int:
    plans = {item.name: option.plan for item, option in zip(items, chosen, strict=True)}
    return _Folder().other_bytes(plans) + sum(option.candidate.nbytes for option in chosen)


def loss(chosen: Sequence[Option]) -> float:
    return sum(option.candidate.distortion for option in chosen)


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_that_fits_is_better_by_more_than_a_step(seed: int) -> None:
    rng = np.random.default_rng(seed)
    items = items_of(rng)
    every = list(product(*(item.options for item in items)))
    least, most = (f(total(items, one) for one in every) for f in (min, max))
    steps = [
        before.candidate.distortion - after.candidate.distortion
        for item in items
        for before, after in product(item.options, item.options)
    ]
    for share in (0.3, 0.6, 0.9, 1.0):
        size = int(least + share * (most - least))
        context = cast("SurveyContext", _Folder())
        chosen, _, other = Allocate(size=size)._fitted(items, context)
        assert other + sum(option.candidate.nbytes for option in chosen) == total(items, chosen)
        assert total(items, chosen) <= size
        best = min(loss(one) for one in every if total(items, one) <= size)
        assert best <= loss(chosen) <= best + max(steps)
        # The bytes are spent: no better option of a single item fits with room for more than the
        # search leaves over.
        for at, item in enumerate(items):
            for option in item.options:
                if option.candidate.distortion < chosen[at].candidate.distortion:
                    upgraded = [*chosen[:at], option, *chosen[at + 1 :]]
                    assert total(items, upgraded) > size - size * _SPARE - _MARGIN_BYTES
        if share == 1.0:
            assert loss(chosen) == best


@pytest.mark.parametrize("fitting", [0, 1, 3, 5, 6])
def test_what_is_set_aside_for_the_graph_is_what_the_choice_takes(fitting: int) -> None:
    """Six equal items: setting aside too much, as the first choice that fits does, drops some."""
    plain, better = 20_000, 30_000
    options = [
        Option({"bits": 2, "rank": 0}, Candidate(plain, 1.0)),
        Option({"bits": 2, "rank": 8}, Candidate(better, 0.5)),
    ]
    items = [Item(f"item{at}", 1000, options) for at in range(6)]
    size = 1_000_000 + 6 * plain + fitting * (better - plain + _NODE)
    chosen, _, _ = Allocate(size=size)._fitted(items, cast("SurveyContext", _Folder()))
    assert sum(option.plan["rank"] > 0 for option in chosen) == fitting
    assert total(items, chosen) == size


def test_a_budget_that_only_the_smallest_choice_meets_has_it() -> None:
    """An item's factors fit what is left, and their node does not."""
    options = [
        Option({"bits": 2, "rank": 0}, Candidate(20_000, 1.0)),
        Option({"bits": 2, "rank": 8}, Candidate(25_000, 0.5)),
    ]
    items = [Item(f"item{at}", 1000, options) for at in range(6)]
    context = cast("SurveyContext", _Folder())
    chosen, bound, other = Allocate(size=1_127_000)._fitted(items, context)
    assert [option.plan["rank"] for option in chosen] == [0] * 6
    assert other == 1_000_000
    assert bound <= loss(chosen)


def test_per_layer_divides_what_tables_of_settled_bits_leave() -> None:
    """Equal bits of all weights would be less than such a table takes."""
    linears = [
        Item(
            name,
            weights,
            [
                Option({"bits": n, "rank": 0}, Candidate(weights * n // 8, 9.0 - n))
                for n in (2, 3, 4)
            ],
        )
        for name, weights in (("small", 80_000), ("large", 240_000))
    ]
    table = [Option({"bits": 6, "rank": 0}, Candidate(480_000, 0.0))]
    items = [linears[0], Item("table", 640_000, table, table=True), linears[1]]
    context = cast("SurveyContext", _Folder())
    size = 1_000_000 + 480_000 + 3 * 320_000 // 8
    assert 8 * (size - 1_000_000) < 6 * 960_000
    settings = Allocate(size=size, scope="per_layer")
    chosen, _, other = settings._fitted(items, context)
    assert [option.plan["bits"] for option in chosen] == [3, 6, 3]
    assert other + sum(option.candidate.nbytes for option in chosen) == size
    # A table that has a choice shares in the division.
    wide = replace(
        items[1], options=[*table, Option({"bits": 3, "rank": 0}, Candidate(240_000, 1.0))]
    )
    chosen, *_ = settings._fitted([linears[0], wide, linears[1]], context)
    assert [option.plan["bits"] for option in chosen] == [4, 3, 4]


def test_a_share_that_is_too_small_is_told() -> None:
    table = Item("table", 640_000, [Option({"bits": 6, "rank": 0}, Candidate(480_000, 0.0))], True)
    linear = Item("small", 80_000, [Option({"bits": 2, "rank": 0}, Candidate(20_000, 1.0))])
    settings = Allocate(size=1_490_000, scope="per_layer")
    with pytest.raises(PassError) as told:
        settings._chosen([table, linear], cast("SurveyContext", _Folder()))
    assert str(told.value).startswith(
        "small: a folder of 1,490,000 bytes leaves a share of 10,000 for what takes 20,000 "
        "at least: raise the budget"
    )
