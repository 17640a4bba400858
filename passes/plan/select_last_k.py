"""Choose the decoder blocks that are compressed, the last k or a free set, by their cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from eoracc.errors import ConfigError, PassError
from eoracc.passes.base import register
from eoracc.passes.factorize.base import Factorization
from eoracc.passes.quantize.quantization import Bits, Quantization
from eoracc.passes.recipe import Recipe
from eoracc.passes.solvers.block_budget import BitsBudget, BlockBudget, Choice, RatioBudget
from eoracc.passes.survey import SurveyPass

if TYPE_CHECKING:
    from eoracc.passes.graph.linears import Linear
    from eoracc.passes.survey import SurveyContext, Trials

__all__ = ["SelectLastK"]

_BARE = str.maketrans("", "", "[]")

Steered = Factorization | Quantization


@register
@dataclass(frozen=True, kw_only=True)
class SelectLastK(SurveyPass):
    """Choose the decoder blocks that are factorised, or take fewer bits, by the output error.

    Errors of early blocks grow as they pass through all later blocks. At the same total it may
    therefore cost less to compress the last ``k`` blocks more and leave the others alone (ERC-SVD,
    arXiv:2505.20112, Algorithm 3). Every candidate is tried with the passes of the next sweep on
    the calibration text. The plan is the candidate with the least
    ``E = sum_b w_b ||Y_b - Y~_b|| / ||Y_b||``, over the outputs ``Y_b`` of the probed blocks.
    Linears that an override of the planned pass sets or skips do not count in the total.

    Options:
      ratio: share ``R_o`` of all weights that the factorising pass removes: it removes
        ``R_l = R_o P / P_k`` of each of the last ``k`` blocks, which hold ``P_k`` of ``P`` weights
        (``N R_o / k`` for ``N`` blocks of one size), for every ``k`` with ``R_l < 1``.
      step: candidates are ``k = step, 2 step, ...`` below ``N``; a free set grows by this number of
        blocks.
      all_blocks: whether all ``N`` blocks at ``ratio`` are a candidate too. In the paper they are
        none: ``k <= N - 1`` (eq. 9).
      average_bits: instead of ``ratio``, the average bits of the codes of the quantizing pass, over
        weights; scales, zero points and factors do not count. The fewest blocks that meet it get
        the lower bits.
      low_bits: the lower bits, or several to choose from, each with the ``k`` that it needs.
      blocks: ``last`` takes the last ``k``. ``free`` then also grows a free set at the value of
        each candidate: it adds the blocks that cost least until the total is met. Of all sets the
        one with the least error is taken.
      probes: weights ``w_b`` by decoder block; negative numbers count from the end. The default is
        the last block alone.
    """

    name: ClassVar[str] = "select_last_k"
    repeats = True  # one for each sweep

    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    step: Annotated[int, Field(ge=1)] = 4
    all_blocks: bool = False
    average_bits: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    low_bits: Bits | Annotated[tuple[Bits, ...], Field(min_length=1)] = 2
    blocks: Literal["last", "free"] = "last"
    probes: Mapping[int, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        """Check that there is one target, and no option of the other.

        Raises:
          ConfigError: there is none, there are two, or ``all_blocks`` has no ratio to go by.
        """
        if (self.ratio is None) == (self.average_bits is None):
            raise ConfigError(
                f"{self.name!r} needs one target: give either 'ratio' or 'average_bits'"
            )
        if self.all_blocks and self.ratio is None:
            raise ConfigError(
                f"{self.name!r} takes 'all_blocks' with 'ratio' alone: leave it out, since "
                "'average_bits' determines how many blocks there are"
            )

    @override
    def survey(self, context: SurveyContext) -> dict[str, Any]:
        if context.windows is None:
            raise PassError(self.name, "has no text to go by: give 'calibration' in model.yaml")
        steered = self._steered(context)
        budget = self._budget(context, steered)
        candidates, refused = self._candidates(budget)
        probes = self._probed(budget.blocks)
        with context.trials(
            budget.option,
            probes=list(probes),
            resume=budget.blocks if self.blocks == "free" else [c.blocks[0] for c in candidates],
        ) as trials:
            search = _Search(context, budget, trials, probes)
            nothing, tried = search.each_of(candidates)
            found: dict[str, Any] = {"curve": [item.shown() for item in (nothing, *tried)]}
            if refused:
                found["infeasible"] = [
                    {"k": len(choice.blocks), "ratio": choice.value} for choice in refused
                ]
            if self.blocks == "free":
                grown, found["free"] = search.free(candidates, self.step)
                tried = [*tried, *grown]
        best = min(tried, key=lambda item: item.error)  # the first of equals
        schedule = budget.schedule(best.choice)
        for linear in context.linears:
            if linear.block is None or not _obeys(steered, linear, budget.option):
                continue
            if linear.block in schedule:
                linear.plan[budget.option] = schedule[linear.block]
        return {"chosen": best.shown(), **found}

    @classmethod
    @override
    def summary(cls, found: Mapping[str, Any]) -> str:
        chosen, tried = found["chosen"], found["curve"][1:]
        blocks = chosen["blocks"]
        last = blocks == list(range(blocks[0], blocks[0] + len(blocks)))
        which = (
            f"blocks {blocks[0]} to {blocks[-1]}" if last else f"blocks {blocks}".translate(_BARE)
        )
        value = f"ratio {chosen['ratio']:.3g}" if "ratio" in chosen else f"{chosen['bits']} bits"
        others = ", ".join(f"{entry['error']:.4f} for k = {entry['k']}" for entry in tried)
        return f"{which} at {value}, output error {chosen['error']:.4f}; {others}"

    def _steered(self, context: SurveyContext) -> Steered:
        """The pass of the next sweep that follows the plan."""
        recipe = Recipe(context.following)
        steered = recipe.quantization if self.ratio is None else recipe.factorization
        if steered is not None:
            return steered
        field_name, example = (
            ("ratio", "'erc_svd'")
            if self.ratio is not None
            else ("average_bits", "'quantize_gptq'")
        )
        raise PassError(
            self.name,
            f"{field_name} steers a pass of the sweep after it, and there is none that it could: "
            f"put {example} below it, without another sweep in between",
        )

    def _budget(self, context: SurveyContext, steered: Steered) -> BlockBudget:
        option = "bits" if self.ratio is None else "ratio"
        ours = [
            linear
            for linear in context.linears
            if linear.block is not None and _obeys(steered, linear, option)
        ]
        if not ours:
            raise PassError(
                self.name,
                f"overrides of {steered.name!r} settle every linear: there is nothing to choose",
            )
        blocks = sorted({linear.block for linear in context.linears if linear.block is not None})
        if self.ratio is not None:
            weights = dict.fromkeys(blocks, 0)
            for linear in ours:
                weights[linear.block] += linear.in_features * linear.out_features  # type: ignore[index]
            return RatioBudget(weights, self.ratio)
        assert self.average_bits is not None  # noqa: S101 - __post_init__ has checked
        codes: dict[int, dict[int, int]] = {block: {} for block in blocks}
        for linear in ours:
            options = steered.options_for(linear)
            bits = options.bits  # type: ignore[union-attr]
            mine = codes[linear.block]  # type: ignore[index]
            mine[bits] = mine.get(bits, 0) + linear.in_features * linear.out_features
        return BitsBudget(codes, self.average_bits)

    def _candidates(self, budget: BlockBudget) -> tuple[list[Choice], list[Choice]]:
        """Choices to try, and choices that cannot meet the budget."""
        if isinstance(budget, RatioBudget):
            everyone = list(budget.last(self.step, whole=self.all_blocks))
            feasible = [choice for choice in everyone if choice.value < 1]
            if not feasible:
                # With all blocks there always is a candidate.
                count = len(budget.blocks)
                raise PassError(
                    self.name,
                    f"step: no k of {self.step}, {2 * self.step}, ... up to {count - 1} blocks "
                    f"can give {budget.target:g} of all weights: k must be above "
                    f"{count * budget.target:.1f}; take a smaller step or ratio, or "
                    "'all_blocks: true'",
                )
            return feasible, [choice for choice in everyone if choice.value >= 1]
        assert isinstance(budget, BitsBudget)  # noqa: S101 - there are two
        if budget.need <= 0:
            own = budget.average(Choice((), 0))
            raise PassError(
                self.name,
                f"average_bits: codes have {own:.4g} bits on average, not more than "
                f"{budget.target:g}: ask for less, or give the quantizing pass more bits",
            )
        lows = self.low_bits if isinstance(self.low_bits, tuple) else (self.low_bits,)
        choices = []
        for low in lows:
            choice = budget.fewest_last(low)
            if choice is None:
                raise PassError(
                    self.name,
                    f"low_bits: with {low} bits in all blocks codes still have more than "
                    f"{budget.target:g} on average: take lower bits or a higher average",
                )
            choices.append(choice)
        return choices, []

    def _probed(self, blocks: Sequence[int]) -> dict[int, float]:
        if not self.probes:
            return {blocks[-1]: 1.0}
        weights: dict[int, float] = {}
        for place, weight in self.probes.items():
            block = blocks[place] if -len(blocks) <= place < 0 else place
            if block not in blocks:
                raise PassError(
                    self.name,
                    f"probes: there is no decoder block {place}: give one of {blocks[0]}.."
                    f"{blocks[-1]}, or -1 for the last",
                )
            weights[block] = weights.get(block, 0.0) + weight
        return weights


@dataclass(frozen=True)
class _Tried:
    """A choice and its cost.

    Attributes:
      choice: blocks and value.
      shown_value: the value for the report.
      errors: at the probes, by decoder block.
      error: their weighted sum.
    """

    choice: Choice
    shown_value: Mapping[str, float]
    errors: Mapping[str, float]
    error: float

    def shown(self) -> dict[str, Any]:
        """For the report."""
        return {
            "k": len(self.choice.blocks),
            "blocks": list(self.choice.blocks),
            **self.shown_value,
            "error": self.error,
            "errors": dict(self.errors),
        }


@dataclass(frozen=True)
class _Search:
    """Tries choices, and caches the errors of each."""

    context: SurveyContext
    budget: BlockBudget
    trials: Trials
    probes: Mapping[int, float]

    def each_of(self, candidates: Sequence[Choice]) -> tuple[_Tried, list[_Tried]]:
        """Try all candidates.

        Returns:
          The model without any chosen block, and the candidates in their order.
        """
        base = Choice((), 0.0)
        nothing = self._try("base", base, base=base)
        tried: list[_Tried] = []
        with self.context.progress.phase("last k", len(candidates)) as phase:
            for choice in candidates:
                name = f"last-{len(choice.blocks)}-{self.budget.option}-{choice.value:.6g}"
                tried.append(self._try(name, choice, base=base))
                phase.advance(f"k = {len(choice.blocks)}: error {tried[-1].error:.4f}")
        return nothing, tried

    def free(
        self, candidates: Sequence[Choice], step: int
    ) -> tuple[list[_Tried], list[dict[str, Any]]]:
        """Grow a free set at the value of each candidate.

        The value that is best for the last blocks need not be best for other ones. A value that
        takes all blocks to meet the target has no other set.

        Returns:
          The sets that meet the target; and each round for the report: the value at which the set
          is grown, the cost of each block, the blocks added, and the error.
        """
        sets: list[_Tried] = []
        rounds: list[dict[str, Any]] = []
        for choice in candidates:
            if self._has_another_set(choice.value):
                whole, own = self._grow(choice.value, step)
                sets.append(whole)
                rounds += own
        return sets, rounds

    def _has_another_set(self, value: float) -> bool:
        """Whether fewer than all blocks can meet the target at ``value``."""
        blocks = self.budget.blocks
        return any(
            self.budget.is_met(Choice(tuple(other for other in blocks if other != block), value))
            for block in blocks
        )

    def _grow(self, value: float, step: int) -> tuple[_Tried, list[dict[str, Any]]]:
        """The free set at ``value``, and the rounds in which it grew."""
        kept = Choice((), value)
        rounds: list[dict[str, Any]] = []
        while True:
            name = f"free-{value:.6g}-{len(rounds) + 1}"
            costs = self._costs(kept, name)
            grown = kept
            added: list[int] = []
            for block in sorted(costs, key=costs.__getitem__):
                if len(added) == step or self.budget.is_met(grown):
                    break
                added.append(block)
                grown = replace(grown, blocks=tuple(sorted((*grown.blocks, block))))
            whole = self.budget.is_met(grown)
            kept = self.budget.settled(grown) if whole else grown
            tried = self._try(name, kept, base=kept)
            shown_costs = {str(block): costs[block] for block in sorted(costs)}
            rounds.append(
                {"grown_at": value, "added": added, "costs": shown_costs, **tried.shown()}
            )
            if whole:
                return tried, rounds

    def _costs(self, kept: Choice, name: str) -> dict[int, float]:
        """The error with each further block added, while later blocks stay as they are."""
        left = [
            block
            for block in self.budget.blocks
            if block not in kept.blocks and self.budget.gain(block, kept.value) > 0
        ]
        costs = {}
        with self.context.progress.phase(name.replace("-", " "), len(left)) as phase:
            for block in left:
                choice = replace(kept, blocks=tuple(sorted((*kept.blocks, block))))
                tried = self._try(f"{name}-{block}", choice, base=kept, frozen=True)
                costs[block] = tried.error
                phase.advance(f"block {block}: error {tried.error:.4f}")
        return costs

    def _try(self, name: str, choice: Choice, *, base: Choice, frozen: bool = False) -> _Tried:
        def make() -> dict[str, Any]:
            errors = self.trials.errors(
                self.budget.schedule(choice), base=self.budget.schedule(base), frozen=frozen
            )
            return {str(block): errors[block] for block in sorted(errors)}

        errors = self.context.remember(name, make)
        error = sum(weight * errors[str(block)] for block, weight in self.probes.items())
        return _Tried(choice, self.budget.shown(choice), errors, error)


def _obeys(layer_pass: Steered, linear: Linear, option: str) -> bool:
    """Whether a plan reaches ``linear``: no override of the pass skips it or sets ``option``."""
    planned = object()
    options = layer_pass.options_for(replace(linear, plan={**linear.plan, option: planned}))
    return options is not None and getattr(options, option) is planned
