"""What must hold of the kernels whatever the shape: exactness, and independence of the threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eoracc.plugins.library import INSTRUCTION_SETS, library_path
from eoracc.plugins.operands.codes import BITS
from tests.plugins import native
from tests.plugins.cases import Case, random_case
from tests.plugins.fused_op import (
    fused_model,
    open_session,
    random_factors,
    random_int8_factors,
    random_weight,
)

FACTOR_TYPES = ("float16", "float32", "int8")


@st.composite
def cases(draw: st.DrawFn, max_rows: int = 24) -> Case:
    """Products of every kind; sizes lean to the edges of tiles, chunks and blocks."""
    edges = st.sampled_from([16, 32, 64, 128, 256])
    parts: tuple[int, ...] = ()
    activation = draw(st.sampled_from(["", "", "silu", "gelu_tanh"]))
    if activation:
        parts = (16 * draw(st.integers(1, 5)),) * 2
    elif draw(st.booleans()):
        parts = tuple(16 * n for n in draw(st.lists(st.integers(1, 3), min_size=2, max_size=4)))
    rank = draw(st.none() | st.integers(0, 70))
    if rank is not None and parts:
        rank = rank // 16 * 16
    return random_case(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        draw(st.integers(1, max_rows)),
        (sum(parts) or draw(edges | st.integers(1, 150)), draw(edges | st.integers(1, 400))),
        bits=draw(st.sampled_from(BITS)),
        group_size=draw(edges | st.integers(1, 50).map(lambda runs: 8 * runs)),
        zero_points=draw(st.booleans()),
        rank=rank,
        factor_types=(draw(st.sampled_from(FACTOR_TYPES)), draw(st.sampled_from(FACTOR_TYPES))),
        parts=parts,
        activation=activation,
        bias=draw(st.booleans()),
        norm=draw(st.booleans()),
        residual=draw(st.booleans()),
        dtype=draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16])),
        scales=np.float16 if draw(st.booleans()) else np.float32,
        accuracy_level=draw(st.sampled_from([0, 4])),
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(case=cases())
def test_every_instruction_set_is_within_the_bound(case: Case) -> None:
    for name in native.supported():
        actual = native.multiply(case, instruction_set=name)
        error = np.abs(actual.astype(np.float64) - case.expected)
        assert (error <= case.bound).all(), name


@settings(max_examples=30, deadline=None, derandomize=True)
@given(case=cases(max_rows=300))
def test_many_rows_are_within_the_bound(case: Case) -> None:
    for name in native.supported():
        actual = native.multiply(case, instruction_set=name)
        error = np.abs(actual.astype(np.float64) - case.expected)
        assert (error <= case.bound).all(), name


@pytest.mark.parametrize("rows", [1, 16, 130])
@pytest.mark.parametrize("level", [0, 4])
def test_threads_do_not_change_a_bit(rows: int, level: int) -> None:
    """The same tasks one after another, backwards, and on one to five threads."""
    case = random_case(
        np.random.default_rng(1),
        rows,
        (384, 520),
        rank=48,
        factor_types=("int8", "int8"),
        parts=(192, 192),
        activation="silu",
        norm=True,
        accuracy_level=level,
    )
    for name in native.supported():
        forwards = native.multiply(case, instruction_set=name)
        backwards = native.multiply(
            case, instruction_set=name, order=lambda count: list(reversed(range(count)))
        )
        np.testing.assert_array_equal(forwards, backwards, err_msg=name)
        for threads in (1, 2, 5):
            spread = _multiply_on_threads(case, name, threads)
            np.testing.assert_array_equal(forwards, spread, err_msg=name)


def _multiply_on_threads(case: Case, instruction_set: str, threads: int) -> NDArray[Any]:
    prepared = native.prepare(case)
    with ThreadPoolExecutor(threads) as pool:

        def run(_pool: int, count: int, task: Callable[[int, int], None], data: int) -> None:
            list(pool.map(lambda index: task(data, index), range(count)))

        lent = native.Threads(native.Run(run), None)
        isa = INSTRUCTION_SETS[instruction_set]
        assert native.call(prepared.matmul, isa, lent) == native.OK
    return prepared.y


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from(BITS),
    level=st.sampled_from([0, 4]),
    int8=st.booleans(),
    rows=st.sampled_from([1, 7, 40]),
    out_features=st.integers(1, 400),
    in_features=st.integers(1, 500),
    group_size=st.sampled_from([16, 32, 40, 128]),
    seed=st.integers(0, 2**32 - 1),
)
def test_layout_and_threads_of_the_session_do_not_change_a_bit(
    bits: int,
    level: int,
    int8: bool,
    rows: int,
    out_features: int,
    in_features: int,
    group_size: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    shape = (out_features, in_features)
    weight = random_weight(rng, shape, bits=bits, group_size=group_size, zero_points=True)
    factors = (random_int8_factors if int8 else random_factors)(rng, shape, rank=20)
    x = rng.standard_normal((rows, in_features), np.float32)
    results = []
    for layout in (0, 1):
        # Operands that a run may change are tiled in each run instead of once.
        for graph_inputs in ((), ("B", "scales", "lora_a", "lora_b")):
            model = fused_model(
                weight, factors, layout=layout, accuracy_level=level, graph_inputs=graph_inputs
            )
            for threads in (1, 2, 3):
                session = open_session(model, library_path(), threads=threads)
                results.append(session.run(None, {"X": x})[0])
    for result in results[1:]:
        np.testing.assert_array_equal(results[0], result)
