"""Budgets for compressing some decoder blocks further, so that the whole model meets a target.

There are two kinds: a share of all weights to remove, and average bits of the codes. Every block of
a set contributes a gain, and the set meets the target once the sum of its gains reaches the need.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

__all__ = ["BitsBudget", "BlockBudget", "Choice", "RatioBudget"]

_ROUNDING = 1e-9
"""Relative rounding error that is allowed in a sum of gains."""


@dataclass(frozen=True)
class Choice:
    """A set of blocks and the value of the option in them.

    Attributes:
      blocks: in order.
      value: of the option; all other blocks have the budget's ``elsewhere``.
    """

    blocks: tuple[int, ...]
    value: float


class BlockBudget(ABC):
    """The gain that is needed, and the gain of each block.

    Attributes:
      option: the option of a pass in which the chosen blocks differ.
      elsewhere: its value in all other blocks; None for the pass's own value.
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
        """The gain that the blocks of a set need in total."""

    @abstractmethod
    def gain(self, block: int, value: float) -> float:
        """The gain of ``block`` with the option at ``value``."""

    @abstractmethod
    def settled(self, choice: Choice) -> Choice:
        """``choice`` with the value at which its blocks just meet the target."""

    @abstractmethod
    def shown(self, choice: Choice) -> dict[str, float]:
        """The entries of the report for the value of ``choice``."""

    def is_met(self, choice: Choice) -> bool:
        """Whether the gain of the blocks is enough."""
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

        ``N R_o / k`` where all ``N`` blocks have equal size. A ratio of 1 removes them whole.

        >>> RatioBudget({0: 10, 1: 10, 2: 10, 3: 10}, 0.25).ratio_of([2, 3])
        0.5
        """
        return self.need / max(1, sum(self.weights[block] for block in blocks))

    def last(self, step: int, *, whole: bool = False) -> Iterator[Choice]:
        """The last ``k`` blocks for ``k = s, 2s, ...``, each at its ratio, which may exceed 1.

        Args:
          step: ``s``, at least 1.
          whole: also all ``N`` blocks, which come last; ``k`` is below ``N`` otherwise.

        >>> budget = RatioBudget({0: 10, 1: 10, 2: 10, 3: 10}, 0.25)
        >>> [(choice.blocks, choice.value) for choice in budget.last(2)]
        [((2, 3), 0.5)]
        >>> [(choice.blocks, choice.value) for choice in budget.last(3, whole=True)]
        [((1, 2, 3), 0.3333333333333333), ((0, 1, 2, 3), 0.25)]
        """
        count = len(self.blocks)
        for k in (*range(step, count, step), *([count] if whole else [])):
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
        """The fewest last blocks that meet the target at ``bits``; None where no number does.

        >>> BitsBudget({0: {3: 10}, 1: {3: 10}}, 2.75).fewest_last(2)
        Choice(blocks=(1,), value=2)
        """
        for k in range(1, len(self.blocks) + 1):
            choice = Choice(tuple(self.blocks[-k:]), bits)
            if self.is_met(choice):
                return choice
        return None
