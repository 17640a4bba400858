"""Ways to store the parts of a node together, against all combinations of their options."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from eoracc.passes.plan.bundles import Bundle, alone, together
from eoracc.passes.plan.items import Item, Option
from eoracc.passes.solvers.allocation import Candidate

RANKS = (0, 8, 16)


def item(name: str, rng: np.random.Generator, *, widths: tuple[int, ...] = (2, 3, 4)) -> Item:
    """Bytes grow with bits and rank; distortions are any, so that some options are useless."""
    options = [
        Option(
            {"bits": bits, "rank": rank},
            Candidate(1000 * bits + 30 * rank + int(rng.integers(0, 300)), rng.exponential()),
        )
        for bits in widths
        for rank in RANKS
    ]
    return Item(name, 1000, options)


def block(rng: np.random.Generator, roles: str, **fields: tuple[int, ...]) -> list[Item]:
    return [item(f"model.layers.0.{role}", rng, **fields) for role in roles.split()]


def total(options: tuple[Option, ...]) -> Candidate:
    return Candidate(
        sum(option.candidate.nbytes for option in options),
        sum(option.candidate.distortion for option in options),
    )


@pytest.mark.parametrize("seed", range(5))
def test_ways_are_those_combinations_that_no_other_beats(seed: int) -> None:
    rng = np.random.default_rng(seed)
    items = block(rng, "attn.q_proj attn.k_proj attn.v_proj")
    (bundle,) = together(items)
    assert list(bundle.items) == items
    every = [
        options
        for options in product(*(one.options for one in items))
        if len({option.plan["bits"] for option in options}) == 1
    ]
    for way, candidate in zip(bundle.ways, bundle.candidates, strict=True):
        assert way in every
        assert candidate == pytest.approx(total(way))
    for options in every:
        nbytes, distortion = total(options)
        assert any(
            candidate.nbytes <= nbytes and candidate.distortion <= distortion + 1e-12
            for candidate in bundle.candidates
        )
    assert len(bundle.ways) < len(every)


def names(bundles: list[Bundle]) -> list[list[str]]:
    return sorted([one.name.rpartition(".")[2] for one in bundle.items] for bundle in bundles)


def test_only_parts_of_one_module_are_bundled() -> None:
    rng = np.random.default_rng(0)
    items = block(rng, "attn.q_proj attn.k_proj attn.v_proj attn.o_proj mlp.up_proj mlp.gate_proj")
    items += [item("model.layers.1.mlp.gate_proj", rng), item("lm_head", rng)]
    expected = [["gate_proj"], ["gate_proj", "up_proj"], ["lm_head"], ["o_proj"]]
    assert names(together(items)) == [*expected, ["q_proj", "k_proj", "v_proj"]]
    assert [list(bundle.items) for bundle in alone(items)] == [[one] for one in items]


def test_parts_without_a_width_in_common_are_chosen_alone() -> None:
    rng = np.random.default_rng(0)
    items = [*block(rng, "mlp.gate_proj", widths=(3,)), *block(rng, "mlp.up_proj", widths=(2, 4))]
    assert names(together(items)) == [["gate_proj"], ["up_proj"]]
    items = [*block(rng, "mlp.gate_proj", widths=(3,)), *block(rng, "mlp.up_proj", widths=(2, 3))]
    (bundle,) = together(items)
    assert {option.plan["bits"] for way in bundle.ways for option in way} == {3}
