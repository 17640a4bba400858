from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from eoracc.compiler.compare.methods import find_methods, with_options
from eoracc.compiler.compare.plan import BudgetProblem, fit
from eoracc.compiler.compare.planned_bytes import planned_bytes, rank_limit
from eoracc.passes.compensate.base import Compensation
from eoracc.passes.compensate.eora import Eora
from eoracc.passes.compensate.svd import Svd
from eoracc.passes.factorize.base import Factorization
from eoracc.passes.factorize.svd_llm import SvdLlm
from eoracc.passes.graph.linears import Linear
from eoracc.passes.plan.allocate import Allocate
from eoracc.passes.solvers.factorization import factorized_rank
from tests.compare_methods import QUANTIZE, config, method

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eoracc.compiler.compare.methods import Method
    from eoracc.compiler.compare.plan import Fit
    from eoracc.passes.base import Pass

SHAPES = {"self_attn.q_proj": (48, 40), "self_attn.k_proj": (16, 40), "mlp.down_proj": (40, 88)}


def linears() -> list[Linear]:
    """Two blocks and a head, of no graph: plans go by shapes and names."""
    shapes = {
        f"model.layers.{block}.{name}": shape for block in (0, 1) for name, shape in SHAPES.items()
    } | {"lm_head": (100, 40)}
    return [
        Linear(
            name=name,
            node=None,  # type: ignore[arg-type]
            in_features=columns,
            out_features=rows,
            source=None,
            transposed=False,
        )
        for name, (rows, columns) in shapes.items()
    ]


def blocks() -> list[Linear]:
    return [linear for linear in linears() if linear.block is not None]


def no_folder(passes: Sequence[Pass]) -> int:
    raise AssertionError(passes)


def spend(method: Method, budget: str) -> Fit:
    return fit(method, budget, blocks(), no_folder)


def by_hand(rank: int, shape: tuple[int, int], kind: str) -> int:
    """Bytes of a 3-bit weight in groups of 16, and of its factors, in tiles.

    A group has a float16 scale and half a byte of zero point.
    """
    rows, columns = up(shape[0], 16), shape[1]
    weight = rows * up(columns, 32) * 3 // 8 + rows * -(-columns // 16) * 5 // 2
    if not rank:
        return weight
    down = up(rank, 16)
    if kind == "float16":
        return weight + 2 * (down * columns + rows * rank)
    bits, chunk = (8, 4) if kind == "int8" else (4, 8)
    values = down * up(columns, chunk) + rows * up(rank, chunk)
    return weight + values * bits // 8 + 2 * (down + rows)


def up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@pytest.mark.parametrize("kind", ["float16", "int8", "int4"])
def test_the_largest_rank_that_fits(kind: str) -> None:
    passes = ("calibrate", QUANTIZE, {"eora": {"factor_type": kind}})
    weights = sum(rows * columns for rows, columns in SHAPES.values())
    for bits in (6.3, 9, 14, 60):
        found = spend(method("eora", *passes), str(bits))
        rank = found.rank
        assert rank is not None
        last = found.passes[-1]
        assert isinstance(last, Eora)
        assert last.rank == rank

        def taken(rank: int) -> int:
            return sum(by_hand(rank, shape, kind) for shape in SHAPES.values())

        assert planned_bytes(found.passes, blocks()) == 2 * taken(rank)
        assert 8 * taken(rank) <= bits * weights
        assert rank == 16 or 8 * taken(rank + 1) > bits * weights


def test_no_rank_exceeds_the_smaller_side_unless_overridden() -> None:
    # k_proj has 16 rows; with a rank of its own, or left out, the next smallest side is 40.
    assert spend(method("eora"), "60").rank == 16
    for override in ({"rank": 2}, {"skip": True}):
        passes = ("calibrate", QUANTIZE, {"eora": {"overrides": {"*.k_proj": override}}})
        found = method("eora", *passes)
        assert rank_limit(found.passes, blocks()) == 40
        assert spend(found, "60").rank == 40


@pytest.mark.parametrize("kind", ["int4", "float16"])
def test_of_several_compensations_the_budget_decides_the_last(kind: str) -> None:
    svd, eora = {"svd": {"rank": 3, "factor_type": kind}}, {"eora": {"factor_type": kind}}
    passes = ["calibrate", QUANTIZE, svd, eora]
    sequence = method("sequence", compare={"methods": {"sequence": passes}})
    weights = sum(2 * rows * columns for rows, columns in SHAPES.values())

    def taken(rank: int) -> int:
        return 2 * sum(by_hand(3 + rank, shape, kind) for shape in SHAPES.values())

    for bits in (14, 16, 20):
        found = spend(sequence, str(bits))
        *_, first, last = found.passes
        assert isinstance(first, Svd)
        assert isinstance(last, Eora)
        assert (first.rank, last.rank) == (3, found.rank)
        assert planned_bytes(found.passes, blocks()) == taken(last.rank)
        fitting = [rank for rank in range(14) if 8 * taken(rank) <= bits * weights]
        assert found.rank == max(fitting)
    assert spend(sequence, "60").rank == 13  # k_proj has 16 rows
    least = 8 * taken(0) / weights
    with pytest.raises(
        BudgetProblem,
        match=rf"take {least:.2f} bits per weight with the factors before the last compensation$",
    ):
        spend(sequence, f"{least - 0.01:.4f}")


def test_factors_rounded_by_a_later_pass_count_as_they_are_stored() -> None:
    passes = ("calibrate", QUANTIZE, "eora", {"quantize_factors": {"bits": 4}})
    alike = ("calibrate", QUANTIZE, {"eora": {"factor_type": "int4"}})
    for budget in ("11", "13"):
        found, other = (spend(method("eora", *p), budget) for p in (passes, alike))
        assert found.rank == other.rank


def test_ratios() -> None:
    found = spend(method("svd_llm"), "30%")
    assert found.ratio == 0.3
    last = found.passes[-1]
    assert isinstance(last, SvdLlm)
    assert last.ratio == 0.3
    weights = sum(rows * columns for rows, columns in SHAPES.values())
    expected = sum(2 * factorized_rank(*s, 0.3) * sum(s) for s in SHAPES.values())
    assert planned_bytes(found.passes, blocks()) == 2 * expected <= 2 * 2 * weights * 0.7


def test_the_smallest_ratio_whose_quantized_factors_fit() -> None:
    compare = {
        "methods": {
            "mine": ["calibrate", "svd_llm", "calibrate", QUANTIZE, {"eora": {"rank": 2}}],
            "bare": ["calibrate", "svd_llm", "calibrate", QUANTIZE],
        }
    }
    mine, bare = find_methods(config(compare=compare), ["mine", "bare"])
    weights = sum(one.out_features * one.in_features for one in blocks())
    found = spend(bare, "5")
    assert found.ratio is not None

    def taken(ratio: float) -> float:
        passes = tuple(
            replace(item, ratio=ratio) if isinstance(item, SvdLlm) else item for item in bare.passes
        )
        return 8 * planned_bytes(passes, blocks()) / weights

    assert taken(found.ratio) <= 5 < taken(found.ratio - 0.001)
    # The factorisation of this one stays as it is: the compensation takes the budget.
    found = spend(mine, "12")
    assert found.ratio is None
    assert found.rank is not None
    assert found.rank > 0


def test_passes_that_spend_a_budget_themselves() -> None:
    compare = {
        "methods": {
            "allocated": [{"allocate": {"bits_per_weight": 9}}, "calibrate", QUANTIZE, "eora"],
            "last": [{"select_last_k": {"ratio": 0.5}}, "calibrate", "erc_svd"],
            "average": [{"select_last_k": {"average_bits": 3}}, "calibrate", QUANTIZE],
        }
    }
    allocated, last, average = find_methods(config(compare=compare), list(compare["methods"]))
    first = spend(allocated, "3.5").passes[0]
    assert isinstance(first, Allocate)
    assert (first.bits_per_weight, first.bytes) == (3.5, None)
    found = spend(last, "20%")
    assert found.ratio == 0.2
    assert [getattr(item, "ratio", None) for item in found.passes] == [0.2, None, 0.2]
    assert not average.takes_budget


@pytest.mark.parametrize(
    ("name", "budget", "problem"),
    [
        ("eora", "5", r"^the quantized weights take 5\.87 bits per weight without factors$"),
        ("svd_llm", "16", r"^it leaves nothing to remove: weights take 16 bits as they are$"),
        ("svd_llm", "0.1", r"^the smallest factors take \d\.\d\d bits per weight$"),
    ],
)
def test_budgets_that_cannot_be_kept(name: str, budget: str, problem: str) -> None:
    with pytest.raises(BudgetProblem, match=problem):
        spend(method(name), budget)


def folder(passes: Sequence[Pass]) -> int:
    """Bytes of a folder with all linears, the head included, and something else."""
    return 5_000 + planned_bytes(passes, linears())


def test_a_budget_of_the_folder_is_spent_on_rank() -> None:
    eora = method("eora", "calibrate", QUANTIZE, {"eora": {"factor_type": "int4"}})
    for size in ("20kB", "21kB", "22kB"):
        found = fit(eora, size, blocks(), folder)
        assert found.rank is not None
        at = [folder(with_options(found.passes, Compensation, rank=rank)) for rank in range(17)]
        # The largest of all that fit, by trying each.
        limit = 1000 * int(size.removesuffix("kB"))
        assert found.rank == max(rank for rank in range(17) if at[rank] <= limit)
        assert folder(found.passes) == at[found.rank]
    assert fit(eora, "1GB", blocks(), folder).rank == 16
    with pytest.raises(BudgetProblem, match=rf"^the folder takes {at[0]:,} bytes without factors$"):
        fit(eora, f"{at[0] - 1}B", blocks(), folder)
    assert fit(eora, f"{at[0]}B", blocks(), folder).rank == 0


def test_a_budget_of_the_folder_is_spent_on_a_ratio() -> None:
    svd = method("svd_llm")
    found = fit(svd, "30kB", blocks(), folder)
    assert found.ratio is not None
    assert folder(found.passes) <= 30_000
    less = with_options(found.passes, Factorization, ratio=found.ratio - 0.001)
    assert folder(less) > 30_000
    with pytest.raises(BudgetProblem, match=r"^the folder takes [\d,]+ bytes with the smallest"):
        fit(svd, "5kB", blocks(), folder)


def test_allocate_gets_a_budget_of_the_folder() -> None:
    passes = [{"allocate": {"bits_per_weight": 9}}, "calibrate", QUANTIZE, "eora"]
    (allocated,) = find_methods(config(compare={"methods": {"mine": passes}}), ["mine"])
    first = fit(allocated, "90MB", blocks(), no_folder).passes[0]
    assert isinstance(first, Allocate)
    assert (first.bits_per_weight, first.bytes, first.size) == (None, None, 90_000_000)


def test_a_head_that_is_quantized_counts() -> None:
    quantize = {"bits": 3, "embedding_bits": 8, "embedding_group_size": 16}
    passes = ("calibrate", {"quantize_gptq": quantize})
    head = linears()[-1:]
    found = method("none", *passes)
    assert planned_bytes(found.passes, head) == 112 * (40 + 3 * (2 + 1))
    plain = method("none", "calibrate", {"quantize_gptq": {"embedding_bits": None}})
    assert planned_bytes(plain.passes, head) == 2 * 100 * 40
