"""Options that differ by linear: glob patterns on module names, in model.yaml.

::

    - quantize_gptq:
        bits: 3
        overrides:
          "*.down_proj": {bits: 4}
          "model.layers.0.*": {skip: true}
          lm_head: {bits: 8, group_size: 32}

The last pattern that matches a linear wins; one that matches a weight which has been factorised
holds for both of its factors, ``<name>.v`` and ``<name>.u``. Linears outside the decoder blocks
(``lm_head``) are left alone unless a pattern names them, which a bare ``*`` does not. What no
pattern settles, a survey may have planned (:attr:`eoracc.passes.graph.linears.Linear.plan`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator

if TYPE_CHECKING:
    from eoracc.passes.graph.embeddings import Embedding
    from eoracc.passes.graph.linears import Linear, LinearGroup

__all__ = ["Bits", "GroupSize", "Overridable", "Override", "QuantizeOverride"]

Bits = Literal[2, 3, 4, 8]
"""Width of a code."""


def _check_group_size(size: int) -> int:
    if size != -1 and (size % 8 or not 16 <= size <= 256):
        raise ValueError(
            f"{size} is no group size: give a multiple of 8 in 16..256, or -1 for whole rows"
        )
    return size


GroupSize = Annotated[int, AfterValidator(_check_group_size)]
"""Columns that share a scale; -1 stands for the whole row."""


@dataclass(frozen=True, kw_only=True)
class Override:
    """What differs for the linears that a pattern matches; None keeps the pass's own option."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    skip: bool = False


@dataclass(frozen=True, kw_only=True)
class QuantizeOverride(Override):
    """What a quantizing pass may do differently for some linears."""

    bits: Bits | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None
    clip_search: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Overridable:
    """Mixin for passes with an ``overrides`` option; subclasses give it its type."""

    not_planned: ClassVar[frozenset[str]] = frozenset()
    """Options that no survey steers, though a planned option of another pass has their name."""

    overrides: Mapping[str, Override]

    def unmatched_overrides(self, names: Iterable[str]) -> tuple[str, ...]:
        """Patterns that match none of ``names``, the linears of the model: spelling mistakes."""
        names = tuple(names)
        return tuple(
            pattern
            for pattern in self.overrides
            if not any(fnmatchcase(name, pattern) for name in names)
        )

    def options_for(self, linear: Linear | Embedding) -> Self | None:
        """The pass with the options that hold for ``linear``, or None where it is left out."""
        matching = [
            pattern
            for pattern in self.overrides
            if any(fnmatchcase(name, pattern) for name in linear.known_as)
        ]
        if linear.block is None and not any(pattern.strip("*") for pattern in matching):
            return None
        known = {option.name for option in fields(self)} - self.not_planned
        changes = {name: value for name, value in linear.plan.items() if name in known}
        if matching:
            chosen = self.overrides[matching[-1]]
            if chosen.skip:
                return None
            changes |= {
                option.name: value
                for option in fields(chosen)
                if option.name != "skip" and (value := getattr(chosen, option.name)) is not None
            }
        return replace(self, overrides={}, **changes)

    def partition(self, group: LinearGroup) -> list[tuple[Self, list[Linear]]]:
        """The members of ``group`` that are not left out, gathered by the options they share."""
        parts: list[tuple[Self, list[Linear]]] = []
        for linear in group.linears:
            options = self.options_for(linear)
            if options is None:
                continue
            for shared, members in parts:
                if shared == options:
                    members.append(linear)
                    break
            else:
                parts.append((options, [linear]))
        return parts
