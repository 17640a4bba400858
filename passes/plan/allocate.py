"""Decide bits and rank of every linear, and bits of tables, together under one budget of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field, replace
from itertools import count, product
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from eoracc.errors import ConfigError, PassError
from eoracc.passes.base import register
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.compensate.base import Compensation, Rank
from eoracc.passes.plan.bundles import alone, together
from eoracc.passes.plan.items import Item, Option, weights_of
from eoracc.passes.plan.tables import Tables
from eoracc.passes.prune.pruning import Pruning
from eoracc.passes.quantize.quantization import Bits, EmbeddingBits, GroupSize, Quantization
from eoracc.passes.recipe import Recipe
from eoracc.passes.sizes import Size
from eoracc.passes.solvers.allocation import (
    BudgetError,
    Candidate,
    allocate,
    least_bytes,
    tail_energies,
)
from eoracc.passes.solvers.factor_types import FactorType, factor_bytes
from eoracc.passes.solvers.singular import top_left_vectors
from eoracc.passes.statistics import lost_output, output_root, require_gram
from eoracc.passes.survey import SurveyPass

if TYPE_CHECKING:
    from eoracc.passes.graph.linears import Linear, LinearGroup
    from eoracc.passes.survey import SurveyContext

__all__ = ["Allocate"]


_MARGIN_BYTES = 4096
"""To which the bytes of a graph are settled."""

_SPARE = 1 / 2000
"""Share of a folder's budget that may be left over."""

_STEPS = 8
"""Choices at most that are measured for a smaller share than that."""


class _OverspentError(Exception):
    """A budget is not enough for the items that share it."""

    def __init__(self, items: Sequence[Item], budget: int, least: int) -> None:
        super().__init__(items, budget, least)
        self.items, self.budget, self.least = items, budget, least


@register
@dataclass(frozen=True, kw_only=True)
class Allocate(SurveyPass):
    """Choose bits and rank of every linear so that a budget of bytes leaves least distortion.

    With ``size``, the budget is that of the whole folder, and the bits of embedding and head are
    chosen with the rest.

    Comes before the sweep that it plans. One pass through the original model quantizes every linear
    at each width, by the quantizing pass of that sweep and its options. One decomposition of each
    error then gives the error that every rank would leave. Overrides of those passes hold here too:
    a width, a rank, or a linear that is skipped.

    Options:
      bits_per_weight: the budget of all linears that are quantized; codes, scales, zero points and
        factors count.
      bytes: the same budget in bytes.
      size: a budget of all files of the artifact, ``90MB``; give one of the three.
      embedding_widths: bits of embedding and head to choose from under ``size``. Without gradients
        to weigh their errors by, those of ``calibrate_outputs: {by: logits}``, they keep the
        ``embedding_bits`` of the quantizing pass.
      widths: bits of codes to choose from; a single width allocates rank alone.
      group_sizes: columns that share a scale, to choose from; empty keeps the group size of the
        quantizing pass.
      ranks: ranks to choose from; ``[0]`` allocates bits alone.
      factor_type: type of the factors; null takes that of the compensating pass.
      scope: ``global`` spends one budget on all linears, ``per_layer`` the same bits per weight on
        each linear; tables whose bits are settled have theirs, which come off the budget first.
      share_bits: give q, k and v of a block the same bits, and gate and up too, each with a rank of
        its own. The target merges them into one node then, which decodes faster. Under
        ``per_layer`` each linear has a budget of its own, and bits too.
      distortion: how errors are weighed. ``outputs``: ``tr(G dE H dE^T)``, with the Gram ``G`` of
        ``calibrate_outputs``, which must come before. ``relative``: the share of the linear's
        output, ``tr(dE H dE^T) / tr(W H W^T)``; ``absolute``: the same without the denominator.
        These two ignore the rest of the model.
    """

    name: ClassVar[str] = "allocate"
    precedes = (Quantization,)
    decided_anew = ("bits_per_weight", "bytes", "size", "scope", "share_bits")

    bits_per_weight: Annotated[float, Field(gt=0)] | None = None
    bytes: Annotated[int, Field(ge=1)] | None = None
    size: Size | None = None
    embedding_widths: Annotated[tuple[EmbeddingBits, ...], Field(min_length=1)] = (3, 4, 6, 8)
    widths: Annotated[tuple[Bits, ...], Field(min_length=1)] = (2, 3, 4)
    group_sizes: tuple[GroupSize, ...] = ()
    ranks: Annotated[tuple[Rank, ...], Field(min_length=1)] = (0, 8, 16, 32, 64)
    factor_type: FactorType | None = None
    scope: Literal["global", "per_layer"] = "global"
    share_bits: bool = True
    distortion: Literal["outputs", "relative", "absolute"] = "outputs"

    def __post_init__(self) -> None:
        """Check that there is one budget.

        Raises:
          ConfigError: there is none, or there are several.
        """
        if sum(given is not None for given in (self.bits_per_weight, self.bytes, self.size)) != 1:
            raise ConfigError(
                "needs one budget: give either 'size' or 'bits_per_weight' or 'bytes'"
            )

    @property
    @override
    def folder_limit(self) -> int | None:
        return self.size

    @override
    def survey(self, context: SurveyContext) -> dict[str, Any]:
        quantizer, compensation = self._steered(context)
        found = context.remember(self.name, lambda: self._tried(context, quantizer, compensation))
        items = [Item.from_dict(item) for item in found["items"]]
        if not items:
            raise PassError(
                self.name, f"has nothing to choose: {quantizer.name!r} leaves all linears out"
            )
        # Chosen anew in a resumed build: other files of the folder may have changed.
        plan = self._chosen(items, context)
        plans = _plans(items, plan.chosen)
        for linear in context.linears:
            linear.plan.update(plans.get(linear.name, {}))
        for table in context.embeddings:
            table.plan.update(plans.get(table.name, {}))
        return {"weighed_by": self.distortion, **plan.found}

    @classmethod
    @override
    def summary(cls, found: Mapping[str, Any]) -> str:
        text = (
            f"{found['bits_per_weight']:.3f} bits per weight leave a distortion of "
            f"{found['distortion']:.4g}, {found['least_possible']:.4g} at least"
        )
        others = ", ".join(
            f"{entry['distortion']:.4g} with {name}"
            for name, entry in found["alternatives"].items()
        )
        return f"{text}; {others}" if others else text

    def _tried(
        self, context: SurveyContext, quantizer: Quantization, compensation: Compensation | None
    ) -> dict[str, Any]:
        """All items with their options."""
        outputs = {linear.name for linear in context.linears if linear.output_gram is not None}
        if self.distortion == "outputs" and not outputs:
            raise PassError(
                self.name,
                "has nothing to weigh outputs by: put 'calibrate_outputs' before it, "
                "or take another 'distortion'",
            )
        weighed = outputs if self.distortion == "outputs" else set()
        trial = _Trial(self, Recipe(context.following).pruning, quantizer, compensation, weighed)
        if context.windows is None:
            raise PassError(self.name, "has no text to go by: give 'calibration' in model.yaml")
        calibrate = Recipe(context.following).calibrate or Calibrate()
        # Errors of different linears compare where every token counts by its own size alone.
        plain = replace(calibrate, tokens="equal")
        tables = (
            None
            if self.size is None
            else Tables.of(
                self.name,
                self.embedding_widths if self.distortion == "outputs" else (),
                quantizer,
                context,
            )
        )

        def make(group: LinearGroup) -> list[Any]:
            if group.linears[0].block is None:
                if tables is not None:
                    return [asdict(item) for item in tables.of_heads(group)]
                # A budget of linears includes a head only where an override names it.
                named = tuple(linear for linear in group.linears if quantizer.names(linear))
                group = replace(group, linears=named)
            return [asdict(item) for item in trial.items(group)]

        entries = context.each_group(self.name, plain, make)
        if tables is not None:
            entries += [asdict(item) for item in tables.of_embeddings()]
        return {"items": entries}

    def _steered(self, context: SurveyContext) -> tuple[Quantization, Compensation | None]:
        """The passes of the next sweep that follow the plan."""
        recipe = Recipe(context.following)
        quantizer, compensations = recipe.quantization, recipe.compensations
        if quantizer is None:
            raise PassError(self.name, "steers a quantize pass: put one after it")
        if not compensations and any(self.ranks):
            raise PassError(
                self.name,
                f"chooses ranks, {list(self.ranks)}, for a compensating pass: put one after it, "
                "or set 'ranks: [0]'",
            )
        if len(compensations) > 1:
            names = " and ".join(repr(item.name) for item in compensations)
            raise PassError(self.name, f"chooses ranks for one compensating pass, not {names}")
        return quantizer, compensations[0] if compensations else None

    def _chosen(self, items: Sequence[Item], context: SurveyContext) -> _Choice:
        """The choice for ``items`` and its alternatives, with bytes and distortion of each."""
        budget, other = self._budget(items), 0
        try:
            if self.size is None:
                chosen, bound = self._allocate(items, budget)
            else:
                chosen, bound, other = self._fitted(items, context)
                budget -= other
        except _OverspentError as error:
            raise PassError(
                self.name if self.scope == "global" else error.items[0].name,
                self._overspent(error),
            ) from None
        found = {
            "scope": self.scope,
            "budget_bytes": budget,
            **_summary(items, chosen),
            "least_possible": bound,
            "alternatives": self._alternatives(items, budget),
            "linears": {
                item.name: {
                    "plan": dict(option.plan),
                    "bytes": option.candidate.nbytes,
                    "distortion": option.candidate.distortion,
                }
                for item, option in zip(items, chosen, strict=True)
            },
        }
        if self.size is not None:
            found["size"] = {"budget_bytes": self.size, "other_bytes": other}
        return _Choice(chosen, found)

    def _budget(self, items: Sequence[Item]) -> int:
        if self.size is not None:
            return self.size
        if self.bytes is not None:
            return self.bytes
        assert self.bits_per_weight is not None  # noqa: S101 - __post_init__ has checked
        return int(weights_of(items) * self.bits_per_weight / 8)

    def _overspent(self, error: _OverspentError) -> str:
        """Why ``error`` came, and the way out."""
        if self.size is None:
            bits = 8 * error.least / weights_of(error.items)
            takes = f"{error.budget} bytes are not enough for what takes least, {error.least}, or "
            takes += f"{bits:.3f} bits per weight"
        else:
            left = f"{max(error.budget, 0):,}"
            left = f"{left} of them" if self.scope == "global" else f"a share of {left}"
            takes = (
                f"a folder of {self.size:,} bytes leaves {left} for what takes {error.least:,} at "
                "least"
            )
        return f"{takes}: raise the budget, or allow smaller widths, larger groups or rank 0"

    def _fitted(
        self, items: Sequence[Item], context: SurveyContext
    ) -> tuple[list[Option], float, int]:
        """The options chosen such that the folder fits, their bound, and bytes of all else.

        What the rest of the folder takes depends a little on the choice: nodes with factors have
        more inputs than others. So a share is set aside for it, and the choice made with it is
        measured; the share is raised until the folder fits, then halved towards the last that did
        not. Of the choices that fit, the one of least distortion is taken.

        Raises:
          _OverspentError: the budget is too small.
        """
        assert self.size is not None  # noqa: S101 - the caller has checked
        smallest = [min(item.options, key=lambda option: option.candidate) for item in items]
        rest = overspent = aside = context.other_bytes(_plans(items, smallest))
        fits, bound = 0, 0.0
        best: _Fitted | None = None
        for step in count():
            try:
                chosen, bound = self._allocate(items, self.size - aside)
            except _OverspentError:
                if not step:
                    raise
                # More is set aside than the smallest choice leaves, which fits: it did at first.
                return smallest, bound, rest
            other = context.other_bytes(_plans(items, chosen))
            spare = self.size - other - _bytes(chosen)
            if spare >= 0:
                fits = aside
                found = _Fitted(_distortion(chosen), spare, (chosen, bound, other))
                best = found if best is None else min(best, found)
            else:
                overspent = aside
            if best is None:
                # A margin that grows: the search ends.
                aside = max(aside, other) + step * _MARGIN_BYTES
                continue
            is_close = best.spare <= self.size * _SPARE or fits - overspent <= _MARGIN_BYTES
            if is_close or step >= _STEPS:
                return best.choice
            aside = (overspent + fits) // 2
        raise AssertionError

    def _allocate(self, items: Sequence[Item], budget: int) -> tuple[list[Option], float]:
        """The options chosen, and a bound below which no choice of this scope gets.

        Raises:
          _OverspentError: the budget is too small.
        """
        chosen: dict[str, Option] = {}
        bound = 0.0
        for part, share in self._shares(items, budget):
            bundles = (together if self.share_bits else alone)(part)
            candidates = [bundle.candidates for bundle in bundles]
            try:
                allocation = allocate(candidates, share)
            except BudgetError:
                raise _OverspentError(part, share, least_bytes(candidates)) from None
            for bundle, at in zip(bundles, allocation.chosen, strict=True):
                for item, option in zip(bundle.items, bundle.ways[at], strict=True):
                    chosen[item.name] = option
            bound += allocation.bound
        return [chosen[item.name] for item in items], bound

    def _shares(self, items: Sequence[Item], budget: int) -> Iterator[tuple[Sequence[Item], int]]:
        """The items that share a budget, and its bytes.

        Per layer, equal bits per weight are those that tables of settled bits leave to all others.
        """
        if self.scope == "global":
            yield items, budget
            return
        settled = [item for item in items if item.is_settled_table]
        left = budget - _bytes(item.options[0] for item in settled)
        weights = weights_of(items) - weights_of(settled)
        for item in items:
            if item.is_settled_table:
                yield [item], item.options[0].candidate.nbytes
            else:
                yield [item], left * item.weights // weights

    def _alternatives(self, items: Sequence[Item], budget: int) -> dict[str, dict[str, Any]]:
        """The distortion of the same bytes spent on bits alone, and on rank at one width alone."""
        if not any(self.ranks):
            return {}
        ways: dict[str, tuple[str, int]] = {"bits alone": ("rank", 0)}
        if len(self.widths) > 1:
            ways |= {f"rank alone, {bits} bits": ("bits", bits) for bits in self.widths}
        alternatives = {}
        for name, (key, value) in ways.items():
            narrowed = [
                # A linear whose option an override sets has no other.
                item
                if item.table
                else replace(
                    item, options=[o for o in item.options if o.plan[key] == value] or item.options
                )
                for item in items
            ]
            try:
                alternatives[name] = _summary(narrowed, self._allocate(narrowed, budget)[0])
            except _OverspentError:
                continue
        return alternatives


@dataclass(frozen=True)
class _Trial:
    """Compresses linears in every way that the settings allow."""

    settings: Allocate
    pruning: Pruning | None
    quantizer: Quantization
    compensation: Compensation | None
    outputs: AbstractSet[str]

    def items(self, group: LinearGroup) -> list[Item]:
        """The ways to compress the linears of ``group`` that the quantizing pass does not skip.

        Args:
          group: of the original model, with its Gram.
        """
        found: dict[str, dict[tuple[int, int], list[Option]]] = {}
        if self.pruning is not None:
            self.pruning.requires(group)
            self.pruning.call(group)
        for bits, group_size in product(self.settings.widths, self.settings.group_sizes or (None,)):
            for linear in group.linears:
                linear.plan["bits"] = bits
                if group_size is not None:
                    linear.plan["group_size"] = group_size
            self.quantizer.call(group)
            for linear in group.linears:
                weight = linear.quantized
                if weight is None:
                    continue
                known = found.setdefault(linear.name, {})
                key = (weight.bits, weight.group_size)
                if key not in known:  # an override may have set it to a known one
                    known[key] = self._options(linear, group)
        if self.settings.distortion == "outputs":
            for name, known in found.items():
                if name not in self.outputs and sum(map(len, known.values())) > 1:
                    raise PassError(
                        name,
                        "has no Gram of its outputs to compare it with others by: settle its bits, "
                        f"group size and rank by overrides, or give {self.settings.name!r} another "
                        "'distortion'",
                    )
        shapes = {linear.name: linear.in_features * linear.out_features for linear in group.linears}
        return [
            Item(name, shapes[name], [option for options in known.values() for option in options])
            for name, known in found.items()
        ]

    def _options(self, linear: Linear, group: LinearGroup) -> list[Option]:
        """The ways to compensate the linear, as it is quantized now, by rank."""
        weight = linear.quantized
        assert weight is not None  # noqa: S101 - the caller has checked
        gram = require_gram(self.settings.name, group)
        error = lost_output(linear, gram).weighted
        root = output_root(linear, gram) if linear.name in self.outputs else None
        if root is not None:
            error = root @ error
        ranks = self._ranks(linear)
        total = float(np.vdot(error, error))
        basis = top_left_vectors(error, max(ranks))
        energies = np.square(basis.T @ error).sum(axis=1)
        scale = 1.0
        if self.settings.distortion == "relative":
            scale = 0.0 if not linear.record.output_norm else linear.record.output_norm**-2
        tails = tail_energies(energies, total, list(ranks)) * scale
        shape = linear.out_features, linear.in_features
        plan = {key: linear.plan[key] for key in ("bits", "group_size") if key in linear.plan}
        return [
            Option(
                plan | {"bits": weight.bits, "rank": rank} | more,
                Candidate(weight.nbytes + factor_bytes(*shape, rank, kind), float(tail)),
            )
            for (rank, (kind, more)), tail in zip(ranks.items(), tails, strict=True)
        ]

    def _ranks(self, linear: Linear) -> dict[int, tuple[FactorType, dict[str, Any]]]:
        """Ranks to choose from, with the type of the factors and its entry in the plan."""
        if self.compensation is None:
            return {0: ("float16", {})}
        asked = self.settings.factor_type
        more = {} if asked is None else {"factor_type": asked}
        found: dict[int, tuple[FactorType, dict[str, Any]]] = {}
        for rank in self.settings.ranks:
            linear.plan.update({"rank": rank, **more})
            options = self.compensation.options_for(linear)
            del linear.plan["rank"]
            if options is None:
                return {0: ("float16", {})}
            if options.rank <= min(linear.out_features, linear.in_features):
                found[options.rank] = (options.factor_type, more)
        return found or {0: ("float16", {})}


@dataclass(frozen=True, order=True)
class _Fitted:
    """A choice whose folder fits, with the distortion and the bytes that it leaves over."""

    distortion: float
    spare: int
    choice: tuple[list[Option], float, int] = field(compare=False)


@dataclass(frozen=True)
class _Choice:
    """The options chosen, and what the report says of them."""

    chosen: Sequence[Option]
    found: dict[str, Any]


def _plans(items: Sequence[Item], chosen: Sequence[Option]) -> dict[str, Mapping[str, Any]]:
    """The plan of each option by all names that it is for."""
    return {
        name: option.plan for item, option in zip(items, chosen, strict=True) for name in item.names
    }


def _bytes(chosen: Iterable[Option]) -> int:
    return sum(option.candidate.nbytes for option in chosen)


def _distortion(chosen: Iterable[Option]) -> float:
    return float(sum(option.candidate.distortion for option in chosen))


def _summary(items: Sequence[Item], chosen: Sequence[Option]) -> dict[str, Any]:
    linear_bytes = _bytes(
        option for item, option in zip(items, chosen, strict=True) if not item.table
    )
    weights = weights_of(item for item in items if not item.table)
    return {
        "bytes": _bytes(chosen),
        "bits_per_weight": 8 * linear_bytes / max(weights, 1),
        "distortion": _distortion(chosen),
    }
