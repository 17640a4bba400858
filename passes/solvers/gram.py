"""The Gram matrix of a linear's input, accumulated so that the order of tokens does not matter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from eoracc.passes.solvers.factors import root_and_rank, top_of_gram
from eoracc.passes.solvers.gptq import Feedback, feedback

if TYPE_CHECKING:
    from eoracc.plugins.operands.dense import StoredWeight

__all__ = [
    "Activations",
    "AddCrossProducts",
    "AddOuterProducts",
    "Gram",
    "GramProducts",
    "GramSum",
    "HeldOut",
    "accumulate_cross",
    "accumulate_gram",
    "output_matching",
]

_BLOCK_TOKENS = 2048
"""Tokens per product."""
_SUM_TOKENS = 8192
"""Tokens whose products are summed in float32; those sums are added in float64."""

Activations = Callable[[], Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]]
"""Yields per batch the inputs ``float32 [tokens, K]`` and token weights ``float32 [tokens]``."""

AddOuterProducts = Callable[[NDArray[np.float32], NDArray[np.float32]], None]
"""``add(rows, total)`` adds ``rows.T @ rows`` to ``total [K, K]``, its lower triangle at least."""

AddCrossProducts = Callable[[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]], None]
"""``add(left, right, total)`` adds ``left.T @ right`` to ``total [K, K]``."""


@dataclass(frozen=True)
class GramProducts:
    """The products that a Gram sums, in another precision than NumPy's float32.

    Attributes:
      outer: adds ``rows.T @ rows``.
      cross: adds ``left.T @ right``.
    """

    outer: AddOuterProducts
    cross: AddCrossProducts


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The inputs of a linear over held-out tokens.

    Attributes:
      inputs: ``X~``, behind the compressed prefix, ``float32 [tokens, K]``.
      differences: ``X - X~``, with the inputs ``X`` of the original model, where its outputs are
        to be matched; None where ``W X~`` is to be.
    """

    inputs: NDArray[np.float32]
    differences: NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False)
class Gram:
    """``H = sum_t w_t x_t x_t^T`` over calibration tokens.

    Attributes:
      matrix: ``float64 [K, K]``, symmetric positive semidefinite, possibly singular.
      tokens: ``sum_t w_t``, the number of tokens that were not padding.
      lost: ``T - W_hat`` and ``(T - W_hat) L``, ``float32 [N, K]``, of the linears that share this
        input, by quantized weight; kept for the passes that follow
        (:func:`eoracc.passes.statistics.lost_output`).
      output_roots: of the Grams of those linears' outputs, by name; kept likewise
        (:func:`eoracc.passes.statistics.output_root`).
      matching: ``M``, ``float32 [K, K]``, which takes a weight ``W`` to the target ``W + W M``
        (:func:`output_matching`); None where the target is the weight itself.
      activations: the inputs that were summed, for other statistics; None if they are gone.
      held_out: inputs that were not summed, to check factors with; None where there are none.
    """

    matrix: NDArray[np.float64]
    tokens: float
    matching: NDArray[np.float32] | None = field(default=None, repr=False)
    activations: Activations | None = field(default=None, repr=False)
    held_out: HeldOut | None = field(default=None, repr=False)
    # Arrays, no LostOutput: that would hold the Gram, and a cycle would keep both in memory.
    lost: WeakKeyDictionary[StoredWeight, tuple[NDArray[np.float32], NDArray[np.float32]]] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False
    )
    output_roots: dict[str, NDArray[np.float32]] = field(
        default_factory=dict, init=False, repr=False
    )
    _tops: dict[int, Gram] = field(default_factory=dict, init=False, repr=False)
    _feedback: dict[tuple[float, bool, int], Feedback] = field(
        default_factory=dict, init=False, repr=False
    )

    @property
    def root(self) -> NDArray[np.float32]:
        """``L`` with ``H = L L^T``, ``float32 [K, K]``, which weighs errors by this Gram.

        Factored in float64. Against the root, products in float32 will do: unlike against the Gram
        itself, nothing cancels.
        """
        return self._root_and_rank[0]

    @property
    def rank(self) -> int | None:
        """Of the matrix, up to rounding; None before anything has asked for :attr:`root`."""
        return self._root_and_rank[1] if "_root_and_rank" in self.__dict__ else None

    @cached_property
    def _root_and_rank(self) -> tuple[NDArray[np.float32], int]:
        root, rank = root_and_rank(self.matrix)
        return root.astype(np.float32), rank

    @cached_property
    def eigenvalues(self) -> NDArray[np.float64]:
        """Of the matrix, ``float64 [K]``, the largest first; those below zero by rounding are 0."""
        return np.linalg.eigvalsh(self.matrix)[::-1].clip(min=0)

    def top(self, directions: int) -> Gram:
        """The part of this Gram on its top eigenspace (:func:`~.factors.top_of_gram`), made once.

        It has neither activations nor a target of its own.
        """
        if directions >= len(self.matrix):
            return self
        if directions not in self._tops:
            self._tops[directions] = Gram(top_of_gram(self.matrix, directions), self.tokens)
        return self._tops[directions]

    def target(self, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """The target of the compression of ``weight [N, K]``, ``float32 [N, K]``."""
        return weight if self.matching is None else weight + weight @ self.matching

    @cached_property
    def magnitudes(self) -> NDArray[np.float64]:
        """``mean |x_i|`` over the tokens that are not masked, ``[K]``.

        Raises:
          ValueError: the activations are gone.
        """
        if self.activations is None:
            raise ValueError("the activations that this Gram was summed over are gone")
        total = np.zeros(len(self.matrix))
        for inputs, weights in self.activations():
            total += weights @ np.abs(inputs)
        return total / self.tokens if self.tokens > 0 else total

    def feedback(self, *, damping: float = 0.01, act_order: bool = True, run: int = 1) -> Feedback:
        """The factors for rounding with error feedback in the metric of this Gram.

        Computed once for each set of options; see :func:`eoracc.passes.solvers.gptq.feedback`.
        """
        key = damping, act_order, run
        if key not in self._feedback:
            self._feedback[key] = feedback(
                self.matrix, damping=damping, act_order=act_order, run=run
            )
        return self._feedback[key]

    @property
    def factored(self) -> list[tuple[float, Feedback]]:
        """What :meth:`feedback` has computed so far, each with the damping that was asked for."""
        return [(damping, made) for (damping, *_), made in self._feedback.items()]


class GramSum:
    """The sum that :func:`accumulate_gram` makes, for callers that are handed rows one by one."""

    def __init__(self, width: int, *, add: AddOuterProducts | None = None) -> None:
        """Begin with nothing.

        Args:
          width: ``K``, of a row.
          add: how products are made; None makes them in float32.
        """
        self._sum = _Sum(width, add or _add_outer_products)
        self._tokens = 0.0

    def add(self, rows: NDArray[np.float32], weights: NDArray[np.float32]) -> None:
        """Add rows ``float32 [tokens, K]`` that count as ``weights``, ``float32 [tokens]``, say."""
        for block in _weighted_blocks(weights, rows):
            self._sum.add(*block)
        self._tokens += float(weights.sum(dtype=np.float64))

    def gram(self) -> Gram:
        """The sum of all that has been added."""
        return Gram(_mirrored(self._sum.total()), self._tokens)


def accumulate_gram(
    batches: Iterable[tuple[NDArray[np.float32], NDArray[np.float32]]],
    in_features: int,
    *,
    add: AddOuterProducts | None = None,
) -> Gram:
    """Sum the weighted outer products of all tokens.

    The sum is over tokens, never over batches: batch size, order and sharding change it by
    rounding only. (Implementations that keep a running mean weight recent batches more.)

    Args:
      batches: inputs ``float32 [tokens, K]`` with token weights ``float32 [tokens]``; weight 0
        masks padding.
      in_features: ``K``.
      add: how products are made; None makes them in float32.
    """
    total = GramSum(in_features, add=add)
    for inputs, weights in batches:
        total.add(inputs, weights)
    return total.gram()


def accumulate_cross(
    pairs: Iterable[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]],
    in_features: int,
    *,
    add: AddCrossProducts | None = None,
) -> NDArray[np.float64]:
    """Sum ``w_t d_t x_t^T`` over all tokens, in the way of :func:`accumulate_gram`.

    Args:
      pairs: ``d`` and ``x``, ``float32 [tokens, K]`` each, with token weights ``float32
        [tokens]``; weight 0 masks padding.
      in_features: ``K``.
      add: how products are made; None makes them in float32.

    Returns:
      ``float64 [K, K]``, not symmetric.
    """
    total = _Sum(in_features, add or _add_cross_products)
    for left, right, weights in pairs:
        for block in _weighted_blocks(weights, left, right):
            total.add(*block)
    return total.total()


def output_matching(
    gram: NDArray[np.float64], cross: NDArray[np.float64], *, damping: float = 0.01
) -> NDArray[np.float32] | None:
    """What takes a weight to the one that matches the original's outputs.

    A linear with the weight ``W`` saw ``X`` in the original model and sees ``X~`` behind a
    compressed prefix. Of all weights ``W + W M`` the ridge solution

        ``M = (X - X~) X~^T (X~ X~^T + damping * mean diagonal * I)^-1``

    brings ``(W + W M) X~`` nearest to ``W X``; the ridge holds it to ``W`` in directions that few
    tokens take.

    Args:
      gram: ``X~ X~^T``, ``float64 [K, K]``, symmetric positive semidefinite, may be singular.
      cross: ``(X - X~) X~^T``, ``float64 [K, K]``.
      damping: fraction of the mean diagonal added to the diagonal, above 0.

    Returns:
      ``M``, ``float32 [K, K]``; None where it is zero.

    >>> x = np.array([[1.0, 0.0], [0.0, 2.0]])  # the prefix has halved what the second holds
    >>> seen = x / np.array([[1.0], [2.0]])
    >>> output_matching(seen @ seen.T, (x - seen) @ seen.T, damping=1e-9).round(3).tolist()
    [[0.0, 0.0], [0.0, 1.0]]
    """
    if not cross.any():
        return None
    damped = gram + damping * np.trace(gram) / len(gram) * np.eye(len(gram))
    # M (gram + ridge) = cross, and what stands at its right is symmetric.
    solved = scipy.linalg.solve(damped, cross.T, assume_a="pos", overwrite_a=True)
    return np.ascontiguousarray(solved.T, dtype=np.float32)


class _Sum:
    """A sum of products, in float32 over some thousand tokens, in float64 beyond."""

    def __init__(self, width: int, add: Callable[..., None]) -> None:
        self._matrix = np.zeros((width, width))
        self._partial = np.zeros((width, width), np.float32)
        self._pending = 0
        self._add = add

    def add(self, *block: NDArray[np.float32]) -> None:
        """Add what ``add`` makes of a block."""
        if self._pending + len(block[0]) > _SUM_TOKENS:
            self._flush()
        # Values that are not finite are for the caller to find, in the result.
        with np.errstate(over="ignore", invalid="ignore"):
            self._add(*block, self._partial)
        self._pending += len(block[0])

    def total(self) -> NDArray[np.float64]:
        self._flush()
        return self._matrix

    def _flush(self) -> None:
        self._matrix += self._partial
        self._partial[:] = 0
        self._pending = 0


def _weighted_blocks(
    weights: NDArray[np.float32], *arrays: NDArray[np.float32]
) -> Iterator[tuple[NDArray[np.float32], ...]]:
    """The rows that count of each array, each times the root of its weight."""
    kept = weights > 0
    if not kept.all():
        arrays, weights = tuple(array[kept] for array in arrays), weights[kept]
    uniform = bool((weights == 1).all())
    for start in range(0, len(weights), _BLOCK_TOKENS):
        rows = slice(start, start + _BLOCK_TOKENS)
        blocks = tuple(array[rows] for array in arrays)
        if not uniform:
            roots = np.sqrt(weights[rows, None])
            blocks = tuple(block * roots for block in blocks)
        yield blocks


def _add_outer_products(rows: NDArray[np.float32], total: NDArray[np.float32]) -> None:
    # x.T @ x of one array is a symmetric rank-k update in BLAS: half the arithmetic.
    total += rows.T @ rows


def _add_cross_products(
    left: NDArray[np.float32], right: NDArray[np.float32], total: NDArray[np.float32]
) -> None:
    total += left.T @ right


def _mirrored(lower: NDArray[np.float64]) -> NDArray[np.float64]:
    """The symmetric matrix of which ``lower`` holds the lower triangle."""
    upper = np.triu_indices(len(lower), 1)
    lower[upper] = lower.T[upper]
    return lower
