"""Options that differ by linear: glob patterns on module names, in model.yaml.

::

    - quantize_gptq:
        bits: 3
        overrides:
          "*.down_proj": {bits: 4}
          "model.layers.0.*": {skip: true}
          lm_head: {bits: 8, group_size: 32}

The last pattern that matches a linear wins. A pattern that matches a factorised weight matches its
two factors as well, ``<name>.v`` and ``<name>.u``. Embedding tables and linears outside the decoder
blocks (``lm_head``) are left alone unless a pattern names them, which a bare ``*`` does not, or the
pass has options of their own for them (:meth:`Overridable.outside`). Options that no pattern sets
may come from a survey (:attr:`eoracc.passes.graph.linears.Linear.plan`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Self

if TYPE_CHECKING:
    from eoracc.passes.graph.embeddings import Embedding
    from eoracc.passes.graph.linears import Linear, LinearGroup

__all__ = ["Overridable", "Override"]


@dataclass(frozen=True, kw_only=True)
class Override:
    """Options for the linears that a pattern matches; None keeps the option of the pass."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    skip: bool = False


@dataclass(frozen=True, kw_only=True)
class Overridable:
    """Mixin for passes with an ``overrides`` option; subclasses give it its type.

    Options:
      overrides: other options, or ``skip: true``, for linears by name pattern; the last match wins.
    """

    not_planned: ClassVar[frozenset[str]] = frozenset()
    """Options that no survey sets, although it may set an option of that name of other passes."""

    overrides: Mapping[str, Override] = field(default_factory=dict)

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
        matching = self._matching(linear)
        options: Self | None = self
        if linear.block is None:
            options = self.outside(linear)
            if not self.names(linear):
                matching = []
            elif options is None:
                options = self
        if options is None:
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
        return replace(options, overrides={}, **changes)

    def outside(self, linear: Linear | Embedding) -> Self | None:
        """The pass with its options for what lies outside the decoder blocks.

        None, which is the default, leaves ``linear`` alone unless a pattern names it.
        """
        del linear
        return None

    def names(self, linear: Linear | Embedding) -> bool:
        """Whether a pattern names ``linear``, which a bare ``*`` does not."""
        return any(pattern.strip("*") for pattern in self._matching(linear))

    def _matching(self, linear: Linear | Embedding) -> list[str]:
        return [
            pattern
            for pattern in self.overrides
            if any(fnmatchcase(name, pattern) for name in linear.known_as)
        ]

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
