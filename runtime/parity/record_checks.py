"""Check that the arrays of a parity record fit one another, before a model is fed with them.

An artifact comes from somewhere, and its record with it. A mask that is not padded on the right or
a chunk beyond the text would end deep in ONNX Runtime.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from eoracc.errors import ArtifactError
from eoracc.printable import printable, quoted
from eoracc.runtime.parity.record import PARITY_FILE, ParityCase, ParityLinear, ParityRecord

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from numpy.typing import NDArray

    from eoracc.runtime.artifact.manifest import Manifest
    from eoracc.runtime.parity.sample import Sample

__all__ = ["check_record", "has_record", "read_record"]


def has_record(manifest: Manifest) -> bool:
    """Whether an artifact has a record of parity, of whichever target."""
    return any(PurePosixPath(name).name == PARITY_FILE for name in manifest.files)


def read_record(path: Path) -> ParityRecord:
    """The record in ``path``, checked.

    Raises:
      ArtifactError: the file is missing or damaged, or see :func:`check_record`.
    """
    record = ParityRecord.load(path)
    check_record(record, path)
    return record


def check_record(record: ParityRecord, path: Path) -> None:
    """Check types, shapes and values of a record.

    Args:
      record: as it was read.
      path: of its file, for errors.

    Raises:
      ArtifactError: an array is of another type or shape than :class:`ParityRecord` says, or a
        number is none that a build writes.
    """
    _require(
        _is_number(record.compression_effect, least=0),
        f"{path}: its compression_effect is {quoted(record.compression_effect)}",
    )
    # No case at all would pass.
    _require(bool(record.cases), f"{path}: it has no case")
    for width, array in record.inputs.items():
        _require(
            _is_array(array, np.float32, 2) and array.shape[1] == width,
            f"{path}: inputs of width {width} are {_form(array)}, not float32 [rows, {width}]",
        )
    rows = {len(array) for array in record.inputs.values()}
    for linear in record.linears:
        _check_linear(linear, f"{path}: linear {printable(linear.name)}", rows)
    for case in record.cases:
        _check_tokens(case, f"{path}: case {printable(case.name)}")
        _check_logits(case, f"{path}: case {printable(case.name)}")


def _check_linear(linear: ParityLinear, place: str, rows: Collection[int]) -> None:
    outputs = linear.outputs
    _require(
        _is_array(outputs, np.float32, 2) and outputs.size > 0 and len(outputs) in rows,
        f"{place}: its outputs are {_form(outputs)}, not float32 [rows, N] of the inputs' rows",
    )
    _check_sample(linear.kept, outputs.shape[1], place)
    for part, array in (("tolerance", linear.tolerance), ("rounding", linear.rounding)):
        if array is None:
            continue
        _require(
            _is_array(array, np.float32, 2) and array.shape == outputs.shape,
            f"{place}: its {part} is {_form(array)}, not float32 {list(outputs.shape)}",
        )
        _require(
            bool(np.isfinite(array).all() and (array >= 0).all()),
            f"{place}: its {part} holds a number below 0, NaN or Inf",
        )


def _check_sample(sample: Sample, count: int, place: str) -> None:
    """Check a sample of which a file has ``count`` values, before its places are listed."""
    numbers = (sample.size, sample.first, sample.step)
    _require(
        all(type(number) is int for number in numbers)
        and 0 <= sample.first < sample.step <= sample.size
        and sample.count == count,
        f"{place}: its sample {printable(list(numbers))} is not of {count} values",
    )


def _check_tokens(case: ParityCase, place: str) -> None:
    """Check what the model is fed with."""
    ids, mask, chunks = case.input_ids, case.attention_mask, case.chunks
    _require(
        _is_array(ids, np.int64, 2) and ids.size > 0,
        f"{place}: its input_ids are {_form(ids)}, not int64 [B, S]",
    )
    _require(
        _is_array(mask, np.int64, 2) and mask.shape == ids.shape,
        f"{place}: its attention_mask is {_form(mask)}, not int64 {list(ids.shape)}",
    )
    # Ones, then zeros, in every row.
    is_padded = np.isin(mask, (0, 1)).all() and (np.diff(mask, axis=1) <= 0).all()
    _require(
        bool(is_padded and mask[:, 0].all()),
        f"{place}: its attention_mask is not padded on the right",
    )
    _require(
        all(type(chunk) is int and chunk > 0 for chunk in chunks) and sum(chunks) == ids.shape[1],
        f"{place}: its chunks {printable(list(chunks))} do not add up to {ids.shape[1]} tokens",
    )


def _check_logits(case: ParityCase, place: str) -> None:
    """Check what the model's logits are compared with."""
    ids, logits = case.input_ids, case.logits
    _require(
        _is_array(logits, np.float32, 2) and logits.size > 0,
        f"{place}: its logits are {_form(logits)}, not float32 [P, V]",
    )
    _check_sample(case.kept, logits.shape[1], place)
    kept, vocabulary = len(logits), case.kept.size
    _require(_is_within(ids, vocabulary), f"{place}: its input_ids are not in 0..{vocabulary - 1}")
    for part, array, size in (
        ("rows", case.rows, ids.shape[0]),
        ("columns", case.columns, ids.shape[1]),
    ):
        _require(
            _is_array(array, np.int64, 1) and len(array) == kept and _is_within(array, size),
            f"{place}: its {part} are {_form(array)}, not int64 [{kept}] in 0..{size - 1}",
        )
    for part, value in (("tolerance", case.tolerance), ("rounding", case.rounding)):
        _require(_is_number(value, least=0), f"{place}: its {part} is {quoted(value)}")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ArtifactError(f"{otherwise}: this is no record of a build: build the artifact again")


def _is_array(array: NDArray[np.generic], dtype: type[np.generic], dimensions: int) -> bool:
    return array.dtype == dtype and array.ndim == dimensions


def _is_within(array: NDArray[np.int64], size: int) -> bool:
    return bool((array >= 0).all() and (array < size).all())


def _form(array: NDArray[np.generic]) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _is_number(value: object, *, least: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value < _MOST


_MOST = 1e300
"""Larger numbers, NaN and Inf are none that a build measures."""
