"""Linears that a target merges into one node, and the ways to store them so that it can."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eoracc.passes.graph.names import PARTS
from eoracc.passes.plan.items import Item, Option
from eoracc.passes.solvers.allocation import Candidate

__all__ = ["Bundle", "alone", "together"]

_Way = tuple[Option, ...]


@dataclass(frozen=True)
class Bundle:
    """Items whose options are chosen together.

    Attributes:
      items: one, or the parts of a node.
      ways: an option of each item, in their order.
    """

    items: Sequence[Item]
    ways: Sequence[_Way]

    @property
    def candidates(self) -> list[Candidate]:
        """Bytes and distortion of each way."""
        return [_sum(way) for way in self.ways]


def alone(items: Sequence[Item]) -> list[Bundle]:
    """A bundle for each item."""
    return [Bundle([item], [(option,) for option in item.options]) for item in items]


def together(items: Sequence[Item]) -> list[Bundle]:
    """A bundle for all parts of a node, q, k and v or gate and up, and for each other item.

    A node has one width of codes and one width of groups; each part has a rank of its own. Parts
    that have none in common, because overrides settle them, are bundles of their own.
    """
    modules: dict[str, dict[str, Item]] = defaultdict(dict)
    for item in items:
        parent, _, role = item.name.rpartition(".")
        modules[parent][role] = item
    found: list[Bundle] = []
    bundled: set[str] = set()
    for members in modules.values():
        for roles in PARTS.values():
            parts = [members[role] for role in roles if role in members]
            ways = _common_ways(parts) if len(parts) == len(roles) else []
            if ways:
                found.append(Bundle(parts, ways))
                bundled |= {part.name for part in parts}
    return found + alone([item for item in items if item.name not in bundled])


def _common_ways(parts: Sequence[Item]) -> list[_Way]:
    by_form = [_by_form(part) for part in parts]
    common = [form for form in by_form[0] if all(form in options for options in by_form)]
    return [way for form in common for way in _best_ways([options[form] for options in by_form])]


def _by_form(item: Item) -> dict[tuple[Any, ...], list[Option]]:
    """The options by what all parts of a node have in common."""
    found: dict[tuple[Any, ...], list[Option]] = defaultdict(list)
    for option in item.options:
        found[option.plan.get("bits"), option.plan.get("group_size")].append(option)
    return found


def _best_ways(parts: Sequence[Sequence[Option]]) -> list[_Way]:
    """The ways that no other beats: fewer bytes leave more distortion. Ordered by bytes."""
    best: list[_Way] = [()]
    for options in parts:
        ways = [(*way, option) for way in best for option in options]
        best, least = [], float("inf")
        for way in sorted(ways, key=_sum):
            distortion = _sum(way).distortion
            if distortion < least:
                best.append(way)
                least = distortion
    return best


def _sum(way: _Way) -> Candidate:
    candidates = [option.candidate for option in way]
    return Candidate(
        sum(candidate.nbytes for candidate in candidates),
        sum(candidate.distortion for candidate in candidates),
    )
