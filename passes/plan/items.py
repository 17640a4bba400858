"""What one budget of bytes is spent on: linears and tables, each with its ways to be stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eoracc.passes.solvers.allocation import Candidate

__all__ = ["Item", "Option", "weights_of"]


@dataclass(frozen=True)
class Option:
    """One way to store an item.

    Attributes:
      plan: options of later passes that store it this way.
      candidate: bytes and distortion.
    """

    plan: Mapping[str, Any]
    candidate: Candidate


@dataclass(frozen=True)
class Item:
    """One linear or table and the ways to store it.

    Attributes:
      name: of the linear or table.
      weights: how many it has, ``N K``.
      options: at least one.
      table: whether it is an embedding or a head, whose weights no bits per weight count.
      shared_by: other names of the same weights, which take the same plan: those of the embeddings
        that a head is tied to.
    """

    name: str
    weights: int
    options: Sequence[Option]
    table: bool = False
    shared_by: Sequence[str] = ()

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Item:
        """The item that ``asdict`` turned into ``content``, which may have been through JSON."""
        options = [
            Option(option["plan"], Candidate(*option["candidate"])) for option in content["options"]
        ]
        return cls(
            content["name"],
            content["weights"],
            options,
            content["table"],
            tuple(content["shared_by"]),
        )

    @property
    def is_settled_table(self) -> bool:
        """Whether it is a table that can be stored in one way only."""
        return self.table and len(self.options) == 1

    @property
    def names(self) -> tuple[str, ...]:
        """All names that the plan is for."""
        return (self.name, *self.shared_by)


def weights_of(items: Iterable[Item]) -> int:
    """Weights of ``items`` together."""
    return sum(item.weights for item in items)
