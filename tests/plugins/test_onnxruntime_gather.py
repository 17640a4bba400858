"""The native kernel of GatherNBits inside ONNX Runtime: rows of a table, and what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from eoracc.plugins.library import library_path
from eoracc.plugins.operands.codes import BITS
from eoracc.plugins.operands.weight import NBitsWeight
from tests.plugins.fused_op import fused_operands, one_node_model, open_session, random_weight

SHAPE = (50, 90)


def table_of(*, seed: int = 0, shape: tuple[int, int] = SHAPE, **options: Any) -> NBitsWeight:  # noqa: ANN401
    given = {"bits": 3, "group_size": 32, "zero_points": True} | options
    return random_weight(np.random.default_rng(seed), shape, **given)


def model_of(
    table: NBitsWeight,
    layout: int,
    *,
    graph_inputs: tuple[str, ...] = (),
    changes: Mapping[str, NDArray[Any] | None] = MappingProxyType({}),
    attributes: Mapping[str, int] = MappingProxyType({}),
    with_function: bool = False,
) -> bytes:
    """A model without a function, so that only the kernel can run it, unless it is to have one."""
    operands = fused_operands(table, layout=layout)
    own = {"K": table.in_features, "bits": table.bits, "block_size": table.group_size}
    return one_node_model(
        "GatherNBits",
        {**{name: operands[name] for name in ("B", "scales", "zero_points")}, **changes},
        {**own, "layout": layout, **attributes},
        dtype=np.int64,
        output_dtype=np.float32,
        graph_inputs=graph_inputs,
        with_function=with_function,
    )


def gather(model: bytes, indices: NDArray[np.int64], *, threads: int = 1) -> NDArray[np.float32]:
    session = open_session(model, library_path(), threads=threads)
    rows: NDArray[np.float32] = session.run(None, {"X": indices})[0]
    return rows


@pytest.mark.parametrize("columns", [1, 3, 37, 90])
@pytest.mark.parametrize("scales", [np.float16, np.float32])
@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layout", [0, 1])
def test_rows(
    layout: int, bits: int, zero_points: bool, scales: type[np.float16 | np.float32], columns: int
) -> None:
    """Each value is one exact difference and one rounding, as in NumPy."""
    table = table_of(
        shape=(50, columns), bits=bits, group_size=24, zero_points=zero_points, scales=scales
    )
    indices = np.random.default_rng(1).permutation(50).reshape(5, 10)
    rows = gather(model_of(table, layout), indices)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, table.dequantize()[indices])


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("shape", [(), (1,), (2, 0), (0,), (1, 2, 1, 2, 1, 1, 1, 2)])
def test_indices_of_any_shape(layout: int, shape: tuple[int, ...]) -> None:
    table = table_of()
    indices = np.asarray(np.random.default_rng(2).integers(0, 50, shape), np.int64)
    rows = gather(model_of(table, layout), indices)
    assert rows.shape == (*shape, 90)
    np.testing.assert_array_equal(rows, table.dequantize()[indices])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", [0, 1])
def test_many_indices(layout: int, threads: int) -> None:
    """Enough for several tasks, the last of them shorter."""
    table = table_of(shape=(300, 320))
    indices = np.random.default_rng(3).integers(0, 300, 1111)
    rows = gather(model_of(table, layout), indices, threads=threads)
    np.testing.assert_array_equal(rows, table.dequantize()[indices])


@pytest.mark.parametrize("layout", [0, 1])
def test_operands_may_change_between_runs(layout: int) -> None:
    one, other = table_of(seed=4), table_of(seed=5)
    names = ("B", "scales", "zero_points")
    session = open_session(model_of(one, layout, graph_inputs=names), library_path())
    indices = np.array([49, 0, 17], np.int64)
    operands = fused_operands(other, layout=layout)
    feeds = {"X": indices} | {name: operands[name] for name in names}
    np.testing.assert_array_equal(session.run(None, feeds)[0], other.dequantize()[indices])


def test_negative_indices_count_from_the_end() -> None:
    """Those of plain tables, as the function and ONNX's Gather have it."""
    table = table_of()
    indices = np.array([-1, -50, 3], np.int64)
    np.testing.assert_array_equal(gather(model_of(table, 0), indices), table.dequantize()[indices])


@pytest.mark.parametrize(
    ("layout", "index", "message"),
    [
        (0, 50, "indices must be at least -50 and below the 50 rows of B, not 50"),
        (0, -51, "indices must be at least -50 and below the 50 rows of B, not -51"),
        (0, 2**63 - 1, "indices must be at least -50"),
        (1, 64, "indices must be at least 0 and below the 64 rows of B, not 64"),
        (1, -1, "indices must be at least 0 and below the 64 rows of B, not -1"),
        (1, -(2**63), "indices must be at least 0"),
    ],
)
def test_indices_beyond_the_table_are_an_error(layout: int, index: int, message: str) -> None:
    model = model_of(table_of(), layout)
    with pytest.raises(Exception, match=f"GatherNBits: {message}"):
        gather(model, np.array([1, index, 2], np.int64))


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("layout", [0, 1])
def test_a_table_that_names_its_rows_takes_no_others(layout: int, library: bool) -> None:
    table = table_of()
    model = model_of(table, layout, attributes={"N": 50}, with_function=True)
    session = open_session(model, library_path() if library else None)
    indices = np.array([[-1, -50], [49, 3]])
    rows = session.run(None, {"X": indices})[0]
    np.testing.assert_array_equal(rows, table.dequantize()[indices])
    # The tiles have 64 rows.
    for index in (50, 63, 64, -51):
        with pytest.raises(Exception, match=r"indices must be at least -50|out of"):
            session.run(None, {"X": np.array([1, index])})


@pytest.mark.parametrize("layout", [0, 1])
def test_tables_with_fewer_rows_than_they_name_are_an_error(layout: int) -> None:
    model = model_of(table_of(), layout, attributes={"N": 65})
    with pytest.raises(Exception, match=r"GatherNBits: B must have N = 65 rows, not (50|64)"):
        gather(model, np.array([0]))


def test_padding_rows_of_tiles_are_zero() -> None:
    np.testing.assert_array_equal(gather(model_of(table_of(), 1), np.array([50, 63])), 0)


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (0, {"B": np.zeros((50, 3, 11), np.uint8)}, r"B must have the shape \[50, 3, 12\]"),
        (0, {"B": np.zeros((), np.uint8)}, r"B must have the shape \[0, 3, 12\]"),
        (1, {"B": np.zeros((4, 3, 64), np.uint8)}, r"B must have the shape \[4, 3, 192\]"),
        (1, {"B": np.zeros((3, 3, 192), np.uint8)}, r"scales must have the shape \[3, 3, 16\]"),
        (0, {"scales": np.zeros((50, 2), np.float16)}, r"scales must have the shape \[50, 3\]"),
        (0, {"scales": np.zeros((50, 3), np.float64)}, "scales must be float or float16"),
        (0, {"zero_points": np.zeros(150, np.uint8)}, r"zero_points must have the shape \[50, 3\]"),
        (1, {"zero_points": np.zeros((4, 3, 15), np.uint8)}, "zero_points must have the shape"),
    ],
)
def test_operands_that_do_not_fit_are_an_error(
    layout: int, changes: dict[str, NDArray[Any]], message: str
) -> None:
    model = model_of(table_of(), layout, changes=changes)
    with pytest.raises(Exception, match=f"GatherNBits: {message}"):
        gather(model, np.array([1], np.int64))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"K": 0}, "K must be positive"),
        ({"bits": 5}, "bits must be 2, 3, 4, 6 or 8, not 5"),
        ({"block_size": 12}, "block_size must be a positive multiple of 8, not 12"),
        ({"layout": 2}, "layout must be 0 or 1, not 2"),
    ],
)
def test_attributes_that_make_no_sense_are_an_error(
    attributes: dict[str, int], message: str
) -> None:
    with pytest.raises(Exception, match=f"GatherNBits: {message}"):
        open_session(model_of(table_of(), 0, attributes=attributes), library_path())
