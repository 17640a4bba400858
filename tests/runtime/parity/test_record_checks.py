"""A parity record whose arrays do not fit one another is refused before a model is fed with it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eoracc.errors import ArtifactError
from eoracc.runtime.parity.record import ParityCase, ParityLinear, ParityRecord
from eoracc.runtime.parity.record_checks import check_record
from eoracc.runtime.parity.sample import Sample

PATH = Path("parity.safetensors")
VOCABULARY = 9


def sound() -> ParityRecord:
    """Two rows of five and three tokens; three of their logits are kept."""
    rng = np.random.default_rng(0)
    case = ParityCase(
        name="batch",
        input_ids=rng.integers(0, VOCABULARY, (2, 5)),
        attention_mask=np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        chunks=(4, 1),
        rows=np.array([0, 0, 1]),
        columns=np.array([0, 4, 2]),
        logits=rng.standard_normal((3, VOCABULARY)).astype(np.float32),
        tolerance=1e-4,
    )
    outputs = rng.standard_normal((4, 6)).astype(np.float32)
    return ParityRecord(
        inputs={7: rng.standard_normal((4, 7)).astype(np.float32)},
        linears=[ParityLinear("q_proj", outputs, np.full_like(outputs, 1e-5))],
        cases=[case],
        compression_effect=0.5,
    )


def test_sound_record() -> None:
    check_record(sound(), PATH)
    check_record(replace(sound(), inputs={}, linears=[]), PATH)


@pytest.mark.parametrize(
    ("part", "value", "problem"),
    [
        ("input_ids", np.zeros((2, 5), np.int32), "its input_ids are int32 [2, 5], not int64"),
        ("input_ids", np.zeros(5, np.int64), "its input_ids are int64 [5], not int64 [B, S]"),
        ("input_ids", np.zeros((0, 5), np.int64), "its input_ids are int64 [0, 5]"),
        ("input_ids", np.full((2, 5), VOCABULARY), "its input_ids are not in 0..8"),
        ("input_ids", np.full((2, 5), -1), "its input_ids are not in 0..8"),
        ("attention_mask", np.ones((2, 4), np.int64), "attention_mask is int64 [2, 4], not int64"),
        ("attention_mask", np.full((2, 5), 2), "its attention_mask is not padded on the right"),
        ("attention_mask", np.zeros((2, 5), np.int64), "is not padded on the right"),
        (
            "attention_mask",
            np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0]]),
            "its attention_mask is not padded on the right",
        ),
        ("chunks", (4, 2), "its chunks [4, 2] do not add up to 5 tokens"),
        ("chunks", (6, -1), "its chunks [6, -1] do not add up to 5 tokens"),
        ("chunks", (2.5, 2.5), "its chunks [2.5, 2.5] do not add up"),
        ("chunks", ("a",), "its chunks ['a'] do not add up"),
        ("rows", np.array([0, 0, 2]), "its rows are int64 [3], not int64 [3] in 0..1"),
        ("rows", np.array([0, 0]), "its rows are int64 [2], not int64 [3] in 0..1"),
        ("columns", np.array([0, -1, 2]), "its columns are int64 [3], not int64 [3] in 0..4"),
        ("columns", np.array([0.0, 1, 2]), "its columns are float64 [3]"),
        ("logits", np.zeros((3, 9)), "its logits are float64 [3, 9], not float32 [P, V]"),
        ("sample", Sample(9, 0, 2), "its sample [9, 0, 2] is not of 9 values"),
        ("sample", Sample(9, 1, 1), "its sample [9, 1, 1] is not of 9 values"),
        ("sample", Sample(9, -1, 1), "its sample [9, -1, 1] is not of 9 values"),
        ("sample", Sample(1 << 60, 0, 1), "is not of 9 values"),
        ("sample", Sample(9.0, 0, 1), "its sample [9.0, 0, 1] is not of 9 values"),  # type: ignore[arg-type]
        ("logits", np.zeros((0, 9), np.float32), "its logits are float32 [0, 9]"),
        ("tolerance", math.nan, "its tolerance is nan"),
        ("tolerance", "1", "its tolerance is '1'"),
        ("tolerance", True, "its tolerance is True"),
        ("rounding", -1.0, "its rounding is -1.0"),
        ("rounding", 10**400, "its rounding is 1000"),
    ],
)
def test_case_that_does_not_fit(part: str, value: Any, problem: str) -> None:  # noqa: ANN401
    record = sound()
    with pytest.raises(ArtifactError) as refusal:
        check_record(replace(record, cases=[replace(record.cases[0], **{part: value})]), PATH)
    assert problem in str(refusal.value)
    assert str(refusal.value).startswith("parity.safetensors: case batch: ")


@pytest.mark.parametrize(
    ("part", "value", "problem"),
    [
        ("outputs", np.zeros((3, 6), np.float32), "its outputs are float32 [3, 6], not float32 ["),
        ("outputs", np.zeros((4, 6), np.float16), "its outputs are float16 [4, 6]"),
        ("tolerance", np.zeros((4, 5), np.float32), "its tolerance is float32 [4, 5], not float32"),
        ("sample", Sample(6, 0, 2), "its sample [6, 0, 2] is not of 6 values"),
        ("sample", Sample(6, True, 2), "its sample [6, True, 2] is not of 6 values"),
        ("tolerance", np.full((4, 6), np.nan, np.float32), "holds a number below 0, NaN or Inf"),
        ("tolerance", np.full((4, 6), -1, np.float32), "holds a number below 0, NaN or Inf"),
    ],
)
def test_linear_that_does_not_fit(part: str, value: Any, problem: str) -> None:  # noqa: ANN401
    record = sound()
    with pytest.raises(ArtifactError) as refusal:
        check_record(replace(record, linears=[replace(record.linears[0], **{part: value})]), PATH)
    assert problem in str(refusal.value)


@pytest.mark.parametrize(
    ("part", "value", "problem"),
    [
        ("inputs", {7: np.zeros((4, 8), np.float32)}, "inputs of width 7 are float32 [4, 8]"),
        ("cases", [], "it has no case"),
        ("compression_effect", None, "its compression_effect is None"),
    ],
)
def test_record_that_does_not_fit(part: str, value: Any, problem: str) -> None:  # noqa: ANN401
    with pytest.raises(ArtifactError) as refusal:
        check_record(replace(sound(), **{part: value}), PATH)
    assert problem in str(refusal.value)
