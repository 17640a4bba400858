"""How much of a parity record is kept, by the bytes of the folder that it goes into.

Only ``eoracc verify`` reads the record, so it takes 1% of the folder at most, or 256 kB where that
is more. Outputs of linears come first: they tell which linear is wrong, and are all kept in most
folders (3 bytes an output, next to a weight of some hundred bytes a row). Logits have the rest, up
to one copy of each entry of the vocabulary: every token has another part of them, since what is
wrong before the head moves all logits of a token, and what is wrong in a row of the head moves that
entry for every token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from eoracc.compiler.targets.file_bytes import files_bytes
from eoracc.compiler.targets.parity_record import CALLS, LINEAR_ROWS
from eoracc.runtime.parity.linear_codes import decode, encode
from eoracc.runtime.parity.record import ParityCase, ParityLinear, ParityRecord
from eoracc.runtime.parity.sample import Sample

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from eoracc.passes.graph.linears import Linear

__all__ = ["fit_record", "most_record_bytes", "record_budget", "save_record"]

_LEAST = 256_000
_SHARE = 0.01

_OF_LINEARS = 0.9
"""Most of what is left for samples that outputs of linears may take."""

_LOGIT_BYTES = 4
_ENTRY_BYTES = 128
"""Of a linear's name, sample and scales, or of an array's name and place."""

_ROOM = 2_000
"""Bytes by which the header of a file may grow with the digits of samples and offsets."""


def record_budget(folder_bytes: int) -> int:
    """Most bytes of a record in a folder of ``folder_bytes``.

    >>> record_budget(90_000_000), record_budget(5_000_000)
    (900000, 256000)
    """
    return max(int(_SHARE * folder_bytes), _LEAST)


def most_record_bytes(linears: Sequence[Linear], vocabulary: int, folder_bytes: int) -> int:
    """A bound of what :func:`save_record` will write: the budget, or less for all values.

    Args:
      linears: of the compressed graph.
      vocabulary: logits of a token.
      folder_bytes: of the files that the record is about.
    """
    compressed = [linear for linear in linears if linear.quantized is not None]
    widths = {linear.in_features for linear in compressed}
    # In the wider code: two bytes of each output for each row of inputs, and one of bounds.
    outputs = (2 * LINEAR_ROWS + 1) * sum(linear.out_features for linear in compressed)
    tokens = sum(len(call.lengths) * max(call.lengths) for call in CALLS)
    logits = sum(len(call.lengths) * len(call.positions) for call in CALLS)
    arrays = 4 * LINEAR_ROWS * sum(widths) + outputs
    # Ids and mask are int64, and so are row and column of a token whose logits are kept.
    arrays += 16 * tokens + (16 + _LOGIT_BYTES * vocabulary) * logits
    entries = _ENTRY_BYTES * (len(widths) + len(compressed) + 8 * len(CALLS))
    return min(record_budget(folder_bytes), arrays + entries + _ROOM)


def save_record(record: ParityRecord, path: Path) -> None:
    """Write a record next to the files that it is about, with as many values as fit.

    Args:
      record: with all values.
      path: of the record; the other files of its folder are complete, and their bytes are the
        folder of :func:`record_budget`.
    """
    budget = record_budget(files_bytes(path.parent.iterdir()))
    path.write_bytes(fit_record(record, budget).encode())


def fit_record(record: ParityRecord, budget: int) -> ParityRecord:
    """Leave out values until the file of a record has ``budget`` bytes at most.

    Args:
      record: with all values.
      budget: in bytes, from :func:`record_budget`.

    Raises:
      AssertionError: inputs, tokens and names alone are more than that.
    """
    wide, narrow = (
        replace(record, linears=[_coded(linear, width) for linear in record.linears])
        for width in (2, 1)
    )
    of_cases = [(one.logits.shape[1], _LOGIT_BYTES * len(one.logits)) for one in record.cases]
    fixed = _ROOM + len(_sampled(wide, _ALL, _ALL).encode())
    is_small = fixed + _bytes(_of_linears(wide), 1) <= _OF_LINEARS * _LEAST
    record = wide if is_small else narrow
    of_linears = _of_linears(record)
    linear_step = _step(of_linears, _OF_LINEARS * (budget - fixed))
    spent = fixed + _bytes(of_linears, linear_step)
    one_copy = _bytes(of_cases, sum(len(one.logits) for one in record.cases))
    case_step = _step(of_cases, min(budget - spent, max(one_copy, _LEAST - spent)))
    fitted = _sampled(record, linear_step, case_step)
    size = len(fitted.encode())
    assert size <= budget, f"the record has {size} bytes where {budget} are allowed"  # noqa: S101 - by construction
    return fitted


_ALL = 1 << 62
"""A step beyond every row: of each, one value is left."""

_Rows = list[tuple[int, int]]
"""Values of a row, and the bytes that each of them takes in all rows."""


def _coded(linear: ParityLinear, width: Literal[1, 2]) -> ParityLinear:
    codes = encode(linear.outputs, linear.tolerance, linear.rounding, width=width)
    return ParityLinear(linear.name, *decode(codes), codes=codes)


def _of_linears(record: ParityRecord) -> _Rows:
    """The outputs of all linears; an output has its bytes in all rows, and one of bounds."""
    found = []
    for linear in record.linears:
        assert linear.codes is not None  # noqa: S101 - they were made above
        width, rows, size = linear.codes.outputs.shape
        found.append((size, width * rows + 1))
    return found


def _longest(rows: _Rows) -> int:
    return max((size for size, _ in rows), default=1)


def _bytes(rows: _Rows, step: int) -> int:
    return sum(each * Sample(size, step=min(step, size)).count for size, each in rows)


def _step(rows: _Rows, room: float) -> int:
    """The smallest step that takes ``room`` bytes at most."""
    step = max(1, int(_bytes(rows, 1) / max(room, 1)))
    while _bytes(rows, step) > room and step < _longest(rows):
        step += 1
    return step


def _sampled(record: ParityRecord, linear_step: int, case_step: int) -> ParityRecord:
    """A whole record with every so many-th output and logit."""
    linears = [
        _linear(linear, position, linear_step) for position, linear in enumerate(record.linears)
    ]
    cases, tokens = [], 0
    for case in record.cases:
        cases.append(_case(case, tokens, case_step))
        tokens += len(case.logits)
    return replace(record, linears=linears, cases=cases)


def _linear(linear: ParityLinear, position: int, step: int) -> ParityLinear:
    assert linear.codes is not None  # noqa: S101 - likewise
    sample = _sample(linear.outputs.shape[1], position, step)
    places = sample.places()
    codes = replace(
        linear.codes,
        outputs=linear.codes.outputs[..., places],
        levels=linear.codes.levels[places],
    )
    return ParityLinear(linear.name, *decode(codes), sample, codes)


def _case(case: ParityCase, tokens: int, step: int) -> ParityCase:
    sampled = replace(case, sample=_sample(case.logits.shape[1], tokens, step))
    return replace(sampled, logits=sampled.kept_logits(case.logits))


def _sample(size: int, position: int, step: int) -> Sample:
    step = min(step, size)
    return Sample(size, position % step, step)
