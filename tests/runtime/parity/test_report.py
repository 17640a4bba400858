from __future__ import annotations

import numpy as np
import pytest

from eoracc.runtime.parity.record import ParityCase
from eoracc.runtime.parity.report import (
    CaseParity,
    LinearParity,
    ParityReport,
    compare_logits,
)


def case(logits: list[float]) -> ParityCase:
    """One row of two tokens, of which the second is kept."""
    return ParityCase(
        name="prefill",
        input_ids=np.array([[3, 5]]),
        attention_mask=np.array([[1, 1]]),
        chunks=(2,),
        rows=np.array([0]),
        columns=np.array([1]),
        logits=np.array([logits], np.float32),
        tolerance=0.25,
    )


@pytest.mark.parametrize(
    ("logits", "error", "passed"),
    [
        ([1.0, 2.0], 0.0, True),
        ([1.25, 2.0], 0.25, True),
        ([1.0, 1.5], 0.5, False),
        ([1.0, np.nan], np.nan, False),
        ([1.0, np.inf], np.inf, False),
    ],
)
def test_logits_pass_within_the_tolerance(logits: list[float], error: float, passed: bool) -> None:
    # The first token is not kept: any value passes there.
    computed = np.array([[[np.nan, 9.0], logits]], np.float32)
    compared = compare_logits(case([1.0, 2.0]), computed, through="library", tolerance=0.25)
    np.testing.assert_equal(compared.max_error, error)
    assert (compared.through, compared.name) == ("library", "prefill")
    assert (compared.tolerance, compared.passed) == (0.25, passed)


def test_report_survives_json() -> None:
    report = ParityReport(
        passed=False,
        linears=(LinearParity("function", 14, "q_proj", 0.5, passed=True),),
        logits=(CaseParity("library", "prefill", 0.5, 0.25, passed=False),),
        compression_effect=3.0,
    )
    assert ParityReport.from_dict(report.as_dict()) == report
