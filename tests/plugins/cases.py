"""Products for the kernels: random operands, a float64 oracle, and a bound of the error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eoracc.plugins.operands.codes import TILE
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight
from tests.plugins.fused_op import random_factors, random_weight

Array = NDArray[Any]

FEW_ROWS = 8
"""At accuracy level 4, up to so many rows are few to every instruction set."""

_ROUNDING = {"float16": (2**-11, 2**-25), "bfloat16": (2**-8, 2**-134)}
"""Unit roundoff of each 16-bit type, and half of its smallest subnormal."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """Operands of one product, what it is in float64, and how far a kernel may be from that.

    Attributes:
      x: ``[M, K]``.
      weight: of all parts, one behind the other.
      factors: ``lora_a [P * R, K]``, part by part, and ``lora_b [N, R]``; each float or int8.
      bias: ``[N]``.
      norm_weight: ``float32 [K]``.
      residual: ``[M, width of y]``.
      parts: out features of each merged linear, none for one.
      ranks: of each part, stored without the zeros that ``factors`` have beyond it; none where all
        parts are stored with the rank of ``factors``.
      activation: key of ``ACTIVATIONS``.
      accuracy_level: 0 or 4.
      adapters: a bank of factors of one type, shaped as ``factors``; of any rank each.
      adapter_rank: of the bank, at least that of each adapter; a multiple of 16.
      adapter_index: the adapter of each row, or of each of as many runs of rows, negative for none.
    """

    x: Array
    weight: NBitsWeight
    factors: LowRank | None = None
    bias: Array | None = None
    norm_weight: NDArray[np.float32] | None = None
    norm_epsilon: float = 1e-5
    residual: Array | None = None
    parts: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()
    activation: str = ""
    accuracy_level: int = 0
    adapters: tuple[LowRank, ...] = ()
    adapter_rank: int = 0
    adapter_index: tuple[int, ...] = (0,)

    @property
    def rank(self) -> int:
        return 0 if self.factors is None else int(self.factors.lora_b.shape[1])

    @property
    def width(self) -> int:
        return self.weight.out_features // (2 if self.activation else 1)

    # The oracle and its error, both of the sums before bias, activation and residual, and of y.

    @cached_property
    def _normalized(self) -> NDArray[np.float64]:
        x = self.x.astype(np.float64)
        if self.norm_weight is None:
            return x
        square = np.mean(x**2, axis=-1, keepdims=True)
        root = np.sqrt(square + np.float64(np.float32(self.norm_epsilon)))
        return np.asarray(x / root * self.norm_weight, np.float64)

    def _terms(self) -> Iterator[tuple[NDArray[np.bool_], LowRank]]:
        """The low-rank terms, and the rows of x that each is for."""
        if self.rank:
            assert self.factors is not None
            yield np.ones(len(self.x), np.bool_), self.factors
        repeats = len(self.x) // max(1, len(self.adapter_index))
        users = np.repeat(np.array(self.adapter_index, np.int64), repeats)
        for adapter, factors in enumerate(self.adapters):
            yield users == adapter, factors

    def _sums(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Sums ``[M, N]`` and their bound.

        A float32 sum of n terms, in any order, is off by at most n unit roundoffs of the terms'
        magnitudes; a handful more cover dequantization and scales, and twice that the norm. An int8
        activation is off by half a step of its block. With few rows, float factors are multiplied
        with the float activations; with many, they may be with the int8 ones too.
        """
        x, w = self._normalized, dequantize(self.weight)
        unit = float(np.finfo(np.float32).eps) / 2
        int8 = self.accuracy_level == 4
        many = len(x) > FEW_ROWS
        steps = half_steps(x, _block(self.weight.group_size)) if int8 else np.zeros_like(x)
        length = (self.weight.in_features + 16) * (1 if self.norm_weight is None else 2)
        sums = x @ w.T
        magnitudes = (np.abs(x) + steps) @ np.abs(w).T
        error = steps @ np.abs(w).T
        for users, factors in self._terms():
            a, b = wide_factors(factors)
            rank = factors.lora_b.shape[1]
            length += rank + 16
            down = x[users] @ a.T
            down_magnitude = np.abs(x[users]) @ np.abs(a).T
            down_error = down_magnitude * (length * unit)
            if int8 and (many or factors.lora_a.dtype == np.int8):
                down_error = down_error + steps[users] @ np.abs(a).T
            first = 0
            for part, features in enumerate(self.parts or (self.weight.out_features,)):
                ranks = slice(part * rank, (part + 1) * rank)
                at = np.ix_(users, np.arange(first, first + features))
                up = b[first : first + features].T
                first += features
                off = down_error[:, ranks]
                if int8 and (many or factors.lora_b.dtype == np.int8):
                    off = off + half_steps(np.abs(down[:, ranks]) + off, 32)
                sums[at] += down[:, ranks] @ up
                magnitudes[at] += down_magnitude[:, ranks] @ np.abs(up)
                error[at] += off @ np.abs(up)
        if self.bias is not None:
            sums = sums + self.bias.astype(np.float64)
            magnitudes = magnitudes + np.abs(self.bias.astype(np.float64))
        return sums, error + magnitudes * (length * unit)

    @cached_property
    def _result(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        y, bound = self._sums()
        unit = float(np.finfo(np.float32).eps) / 2
        if self.activation:
            gate, value = np.split(y, 2, axis=-1)
            gate_bound, value_bound = np.split(bound, 2, axis=-1)
            active = activate(self.activation, gate)
            # No slope of either function is above 1.13; some ten roundings make it, and its
            # argument is off by a few units of itself.
            active_bound = 1.13 * gate_bound + (10 * np.abs(active) + 4 * np.abs(gate)) * unit
            y = active * value
            bound = (np.abs(active) + active_bound) * value_bound + active_bound * np.abs(value)
            bound = bound + np.abs(y) * unit
        if self.residual is not None:
            y = y + self.residual.astype(np.float64)
            bound = bound + (np.abs(y) + np.abs(self.residual.astype(np.float64))) * unit
        if self.x.dtype != np.float32:
            relative, absolute = _ROUNDING[self.x.dtype.name]
            bound = bound + (np.abs(y) + bound) * relative + absolute
        return y, bound

    @property
    def expected(self) -> NDArray[np.float64]:
        """``y`` in float64, ``[M, width]``."""
        return self._result[0]

    @property
    def bound(self) -> NDArray[np.float64]:
        """How far a kernel may be from :attr:`expected`."""
        return self._result[1]


def wide_factors(factors: LowRank) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What the factors stand for, ``[P * R, K]`` and ``[N, R]``."""
    a, b = factors.lora_a.astype(np.float64), factors.lora_b.astype(np.float64)
    if factors.lora_a_scale is not None:
        a = a * factors.lora_a_scale[:, None]
    if factors.lora_b_scale is not None:
        b = b * factors.lora_b_scale[:, None]
    return a, b


def random_case(
    rng: np.random.Generator,
    rows: int,
    shape: tuple[int, int],
    *,
    bits: int = 4,
    group_size: int = 32,
    zero_points: bool = True,
    rank: int | None = None,
    factor_types: tuple[str, str] = ("float16", "float16"),
    parts: tuple[int, ...] = (),
    activation: str = "",
    bias: bool = False,
    norm: bool = False,
    residual: bool = False,
    dtype: type[np.generic] = np.float32,
    scales: type[np.float16 | np.float32] = np.float16,
    accuracy_level: int = 0,
) -> Case:
    """Random operands for a weight of ``shape`` (out_features, in_features)."""
    out_features, in_features = shape
    weight = random_weight(
        rng, shape, bits=bits, group_size=group_size, zero_points=zero_points, scales=scales
    )
    width = out_features // (2 if activation else 1)
    case = Case(
        x=rng.standard_normal((rows, in_features)).astype(dtype),
        weight=weight,
        bias=rng.standard_normal(out_features).astype(dtype) if bias else None,
        norm_weight=rng.uniform(0.5, 1.5, in_features).astype(np.float32) if norm else None,
        residual=rng.standard_normal((rows, width)).astype(dtype) if residual else None,
        parts=parts,
        activation=activation,
        accuracy_level=accuracy_level,
    )
    if rank is None:
        return case
    return replace(case, factors=_random_low_rank(rng, shape, rank, len(parts), factor_types))


def with_ranks(case: Case, ranks: Sequence[int]) -> Case:
    """``case`` with a rank of its own for each part, the largest being that of the factors."""
    assert case.factors is not None
    assert case.rank == max(ranks)
    lora_a, lora_b = case.factors.lora_a.copy(), case.factors.lora_b.copy()
    first = 0
    for part, (features, rank) in enumerate(zip(case.parts, ranks, strict=True)):
        lora_a[part * case.rank + rank : (part + 1) * case.rank] = 0
        lora_b[first : first + features, rank:] = 0
        first += features
    factors = replace(case.factors, lora_a=lora_a, lora_b=lora_b)
    return replace(case, factors=factors, ranks=tuple(ranks))


def with_adapters(
    rng: np.random.Generator,
    case: Case,
    *,
    ranks: Sequence[int],
    index: Sequence[int],
    dtype: str = "int8",
    rank: int | None = None,
) -> Case:
    """``case`` with a bank of random adapters of these ranks; ``rank`` is that of the bank."""
    shape = (case.weight.out_features, case.weight.in_features)
    adapters = []
    for each in ranks:
        factors = _random_low_rank(rng, shape, each, len(case.parts), (dtype, dtype))
        if factors.lora_a.dtype != np.int8:  # float factors may have a weight
            weights = rng.uniform(0.5, 1.5, len(factors.lora_a)).astype(np.float32)
            factors = replace(factors, lora_a_scale=weights)
        adapters.append(factors)
    return replace(
        case,
        adapters=tuple(adapters),
        adapter_rank=-(-max(ranks) // TILE) * TILE if rank is None else rank,
        adapter_index=tuple(index),
    )


def _random_low_rank(
    rng: np.random.Generator,
    shape: tuple[int, int],
    rank: int,
    parts: int,
    types: tuple[str, str],
) -> LowRank:
    out_features, in_features = shape
    stacked = rank * max(1, parts)
    a: Array = random_factors(rng, (1, in_features), rank=stacked, dtype=np.float32).lora_a
    b: Array = random_factors(rng, (out_features, 1), rank=rank, dtype=np.float32).lora_b
    a, a_scale = _as_factor(a, types[0])
    b, b_scale = _as_factor(b, types[1])
    bits = 4 if "int4" in types else 8
    return LowRank(lora_a=a, lora_b=b, lora_a_scale=a_scale, lora_b_scale=b_scale, bits=bits)


def _as_factor(values: Array, dtype: str) -> tuple[Array, NDArray[np.float32] | None]:
    if not dtype.startswith("int"):
        return values.astype(dtype), None
    largest = np.float32({"int8": 127, "int4": 7}[dtype])
    scale = np.max(np.abs(values), axis=1, initial=1e-3) / largest
    return np.rint(values / scale[:, None]).astype(np.int8), scale.astype(np.float32)


def half_steps(x: NDArray[np.float64], block: int) -> NDArray[np.float64]:
    """Half a step of the int8 code that each element of ``x [M, K]`` is rounded to."""
    rows, columns = x.shape
    padded = np.zeros((rows, -(-columns // block) * block))
    padded[:, :columns] = np.abs(x)
    largest = padded.reshape(rows, padded.shape[1] // block, block).max(axis=-1)
    # The step itself is rounded to float32 a few times.
    half = largest / 127 / 2 * (1 + 2**-18)
    return np.repeat(half, block, axis=1)[:, :columns]


def activate(name: str, gate: NDArray[np.float64]) -> NDArray[np.float64]:
    """The activation in float64."""
    if name == "silu":
        result = gate / (1 + np.exp(-gate))
    else:
        result = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return np.asarray(result, np.float64)


def _block(group_size: int) -> int:
    return int(np.gcd(group_size, 32))


def dequantize(weight: NBitsWeight) -> NDArray[np.float64]:
    zeros = weight.zero_points
    if zeros is None:
        zeros = np.full(weight.scales.shape, 2 ** (weight.bits - 1), np.uint8)
    columns = slice(weight.in_features)
    zero_points = np.repeat(zeros.astype(np.float64), weight.group_size, axis=1)[:, columns]
    steps = np.repeat(weight.scales.astype(np.float64), weight.group_size, axis=1)[:, columns]
    return (weight.codes() - zero_points) * steps


def assert_case(actual: Array, case: Case) -> None:
    """Within the bound, which must itself be far below the signal."""
    expected, bound = case.expected, case.bound
    assert actual.shape == expected.shape
    if actual.size == 0:
        return
    signal = np.sqrt(np.mean(expected**2))
    error = np.abs(actual.astype(np.float64) - expected)
    excess = error - bound
    assert excess.max() <= 0, f"off by {error.max():.3g} at signal {signal:.3g}"
    if case.accuracy_level == 0:
        assert np.median(bound) < 3e-2 * signal
    elif error.size > 100:
        # The worst case of all roundings to int8 may be as large as the signal; but they are as
        # good as random, so that their sum is far below both.
        assert np.sqrt(np.mean(error**2)) < 0.03 * signal
