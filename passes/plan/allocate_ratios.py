"""Decide how much of each weight a factorisation removes, by the loss of its truncation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import scipy.linalg
from typing_extensions import override

from eoracc.errors import PassError
from eoracc.passes.base import register
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.factorize.base import Factorization
from eoracc.passes.recipe import Recipe
from eoracc.passes.solvers.factorization import factorized_rank
from eoracc.passes.solvers.factors import gram_root
from eoracc.passes.solvers.ratio_allocation import MAX_RATIO, ratios_by_energy, ratios_by_loss
from eoracc.passes.statistics import require_gram
from eoracc.passes.survey import SurveyPass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.passes.graph.linears import Linear
    from eoracc.passes.survey import SurveyContext

__all__ = ["AllocateRatios"]


@dataclass(frozen=True)
class _Weight:
    """One weight that a ratio is chosen for.

    Attributes:
      name: of its linear.
      role: its type.
      shape: ``m, n``.
      ratio: that it would lose without this survey.
      energies: squared singular values of ``W S``, largest first.
    """

    name: str
    role: str
    shape: tuple[int, int]
    ratio: float
    energies: NDArray[np.float64]

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def removed(self, ratio: float) -> int:
        """Parameters that ``ratio`` removes, at a whole rank."""
        rank = factorized_rank(*self.shape, ratio)
        return self.size - rank * sum(self.shape) if ratio > 0 else 0

    def loss(self, ratio: float) -> float:
        """The least output error at ``ratio``, ``||(W - W') X||_F``."""
        return float(np.sqrt(self.energies[factorized_rank(*self.shape, ratio) :].sum()))


@register
@dataclass(frozen=True, kw_only=True)
class AllocateRatios(SurveyPass):
    """Distribute the parameters that a factorising pass removes, by the loss of truncation.

    Uses the Grams of the original model. The total is that of the ratios of the factorising pass in
    the next sweep, or of the ratios that an earlier survey has planned. Linears whose ratio an
    override sets keep it and do not count in the total.

    Options:
      by: ``loss`` is SVD-LLM V2's rule (arXiv:2503.12340, algorithm 1): within each type of weight
        (all q_proj, all down_proj, ...), in proportion to ``1 / log ||(W - W') X||_F`` at the
        common ratio. ``energy`` leaves the least sum of relative squared output errors over all
        weights.
    """

    name: ClassVar[str] = "allocate_ratios"
    by: Literal["loss", "energy"] = "loss"

    @override
    def survey(self, context: SurveyContext) -> dict[str, Any]:
        found = context.remember(self.name, lambda: self._plan(context))
        linears = {linear.name: linear for linear in context.linears}
        for name, entry in found["linears"].items():
            linears[name].plan["ratio"] = entry["ratio"]
        return found

    @classmethod
    @override
    def summary(cls, found: Mapping[str, Any]) -> str:
        ratios = [entry["ratio"] for entry in found["linears"].values()]
        return (
            f"by {found['by']}, ratios from {min(ratios):.3g} to {max(ratios):.3g}, "
            f"{found['removed']:.1%} of the parameters in all"
        )

    def _plan(self, context: SurveyContext) -> dict[str, Any]:
        if context.windows is None:
            raise PassError(self.name, "has no text to go by: give 'calibration' in model.yaml")
        steered = Recipe(context.following).factorization
        if steered is None:
            raise PassError(self.name, "steers a factorising pass: put one after it")
        common = {
            linear.name: options.ratio
            for linear in context.linears
            if (options := steered.options_for(linear)) is not None
            and options.ratio > 0
            and _is_open(steered, linear)
        }
        beyond = next((name for name, ratio in common.items() if ratio > MAX_RATIO), None)
        if beyond is not None:
            raise PassError(
                beyond,
                f"'ratio' is {common[beyond]:g}, and {self.name!r} removes {MAX_RATIO:g} of a "
                "weight at most: lower it, or settle it with an override",
            )
        weights = self._weights(context, common)
        if not weights:
            raise PassError(
                self.name, f"has nothing to choose: {steered.name!r} leaves all linears as they are"
            )
        ratios = self._by_loss(weights) if self.by == "loss" else self._by_energy(weights)
        return {
            "by": self.by,
            "removed": sum(w.removed(ratios[w.name]) for w in weights)
            / sum(w.size for w in weights),
            "linears": {
                w.name: {"ratio": ratios[w.name], "loss": w.loss(w.ratio)} for w in weights
            },
        }

    def _weights(self, context: SurveyContext, common: dict[str, float]) -> list[_Weight]:
        calibrate = Recipe(context.following).calibrate or Calibrate()
        weights = []
        for group in context.walk(self.name, calibrate):
            ours = [linear for linear in group.linears if linear.name in common]
            if not ours:
                continue
            root = gram_root(require_gram(self.name, group).matrix)
            for linear in ours:
                weighted = linear.weight().astype(np.float64) @ root
                wide = weighted if len(weighted) <= weighted.shape[1] else weighted.T
                energies = scipy.linalg.eigvalsh(wide @ wide.T)[::-1].clip(min=0)
                shape = (linear.out_features, linear.in_features)
                ratio = common[linear.name]
                weights.append(_Weight(linear.name, linear.role, shape, ratio, energies))
        return weights

    @staticmethod
    def _by_loss(weights: Sequence[_Weight]) -> dict[str, float]:
        groups: dict[tuple[str, float], list[_Weight]] = {}
        for weight in weights:
            groups.setdefault((weight.role, weight.ratio), []).append(weight)
        return {
            member.name: chosen
            for (_, ratio), members in groups.items()
            for member, chosen in zip(
                members,
                ratios_by_loss([m.loss(ratio) for m in members], [m.size for m in members], ratio),
                strict=True,
            )
        }

    @staticmethod
    def _by_energy(weights: Sequence[_Weight]) -> dict[str, float]:
        total = sum(w.size * w.ratio for w in weights) / sum(w.size for w in weights)
        chosen = ratios_by_energy([w.energies for w in weights], [w.shape for w in weights], total)
        return {w.name: ratio for w, ratio in zip(weights, chosen, strict=True)}


def _is_open(steered: Factorization, linear: Linear) -> bool:
    """Whether a plan decides the ratio of ``linear``, and no override."""
    asked = object()
    options = steered.options_for(replace(linear, plan={**linear.plan, "ratio": asked}))
    return options is not None and options.ratio is asked
