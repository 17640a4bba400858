"""How many decoder blocks must be compressed further for the whole model to meet a target.

A budget is one of two: a share of all weights that is to be removed, or average bits of the codes.
Every block in a set gains something towards it, and a set is enough once its gains add up to what
is needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

__all__ = ["BitsBudget", "BlockBudget", "Choice", "RatioBudget"]

_ROUNDING = 1e-9
"""Share of what is needed that sums of floats may be off by."""


@dataclass(frozen=True)
class Choice:
    """A set of blocks and what the option is in them.

    Attributes:
      blocks: in order.
      value: of the option; every other block keeps the budget's ``elsewhere``.
    """

    blocks: tuple[int, ...]
    value: float


class BlockBudget(ABC):
    """What has to be gained, and what each block gains.

    Attributes:
      option: the option of a pass that the chosen blocks differ in.
      elsewhere: what it is in every other block; None for what the pass says.
    """

    option: ClassVar[str]
    elsewhere: float | None

    @property
    @abstractmethod
    def blocks(self) -> Sequence[int]:
        """All decoder blocks, in order."""

    @property
    @abstractmethod
    def need(self) -> float:
        """What all blocks of a set have to gain together."""

    @abstractmethod
    def gain(self, block: int, value: float) -> float:
        """What ``block`` gains where the option is ``value`` in it."""

    @abstractmethod
    def settled(self, choice: Choice) -> Choice:
        """``choice`` with the value that just meets the target in its blocks."""

    @abstractmethod
    def shown(self, choice: Choice) -> dict[str, float]:
        """What the report says of the value of ``choice``."""

    def is_met(self, choice: Choice) -> bool:
        """Whether the blocks gain what is needed."""
        gained = sum(self.gain(block, choice.value) for block in choice.blocks)
        return gained >= self.need * (1 - _ROUNDING)

    def schedule(self, choice: Choice) -> dict[int, float]:
        """The option by block, without the blocks that keep the pass's own value."""
        elsewhere = {} if self.elsewhere is None else dict.fromkeys(self.blocks, self.elsewhere)
        return elsewhere | dict.fromkeys(choice.blocks, choice.value)


@dataclass(frozen=True)
class RatioBudget(BlockBudget):
    """Remove the share ``target`` of all weights, ``R_o``, by removing more from some blocks.

    Attributes:
      weights: number of weights of each block that a pass may factorise.
      target: ``R_o``.
    """

    option: ClassVar[str] = "ratio"
    elsewhere = 0.0
    weights: Mapping[int, int]
    target: float

    @property
    @override
    def blocks(self) -> Sequence[int]:
        return tuple(self.weights)

    @property
    @override
    def need(self) -> float:
        return self.target * sum(self.weights.values())

    @override
    def gain(self, block: int, value: float) -> float:
        return value * self.weights[block]

    @override
    def settled(self, choice: Choice) -> Choice:
        return Choice(choice.blocks, self.ratio_of(choice.blocks))

    @override
    def shown(self, choice: Choice) -> dict[str, float]:
        return {"ratio": choice.value} if choice.blocks else {}

    def ratio_of(self, blocks: Collection[int]) -> float:
        """``R_l = R_o P / P_S``, with ``P`` weights in all and ``P_S`` in ``blocks``.

        ``N R_o / k`` where all ``N`` blocks are of a size. From 1 on there is nothing left of them.

        >>> RatioBudget({0: 10, 1: 10, 2: 10, 3: 10}, 0.25).ratio_of([2, 3])
        0.5
        """
        return self.need / max(1, sum(self.weights[block] for block in blocks))

    def last(self, step: int) -> Iterator[Choice]:
        """The last ``k`` blocks for ``k = s, 2s, ...``, each at its ratio, even if that is above 1.

        >>> budget = RatioBudget({0: 10, 1: 10, 2: 10, 3: 10}, 0.25)
        >>> [(choice.blocks, choice.value) for choice in budget.last(2)]
        [((2, 3), 0.5), ((0, 1, 2, 3), 0.25)]
        """
        for k in range(step, len(self.blocks) + 1, step):
            yield self.settled(Choice(tuple(self.blocks[-k:]), 0.0))


@dataclass(frozen=True)
class BitsBudget(BlockBudget):
    """Bring the average bits of all codes down to ``target`` by lower bits in some blocks.

    Attributes:
      codes: by block, ``{bits: number of weights}`` as the pass would quantize them.
      target: average bits of a code, over weights; scales, zero points and factors do not count.
    """

    option: ClassVar[str] = "bits"
    elsewhere = None
    codes: Mapping[int, Mapping[int, int]]
    target: float

    @property
    @override
    def blocks(self) -> Sequence[int]:
        return tuple(self.codes)

    @property
    @override
    def need(self) -> float:
        return sum(
            (bits - self.target) * count
            for codes in self.codes.values()
            for bits, count in codes.items()
        )

    @override
    def gain(self, block: int, value: float) -> float:
        return sum((bits - value) * count for bits, count in self.codes[block].items())

    @override
    def settled(self, choice: Choice) -> Choice:
        return choice

    @override
    def shown(self, choice: Choice) -> dict[str, float]:
        own = {"bits": choice.value} if choice.blocks else {}
        return own | {"average_bits": self.average(choice)}

    def average(self, choice: Choice) -> float:
        """Average bits of a code with ``choice`` made.

        >>> budget = BitsBudget({0: {3: 10}, 1: {3: 10}}, 2.5)
        >>> budget.average(Choice((), 2)), budget.average(Choice((1,), 2))
        (3.0, 2.5)
        """
        total = sum(count for codes in self.codes.values() for count in codes.values())
        gained = sum(self.gain(block, choice.value) for block in choice.blocks)
        return self.target + (self.need - gained) / total

    def fewest_last(self, bits: int) -> Choice | None:
        """The fewest last blocks that meet the target at ``bits``; None where all do not.

        >>> BitsBudget({0: {3: 10}, 1: {3: 10}}, 2.75).fewest_last(2)
        Choice(blocks=(1,), value=2)
        """
        for k in range(1, len(self.blocks) + 1):
            choice = Choice(tuple(self.blocks[-k:]), bits)
            if self.is_met(choice):
                return choice
        return None
