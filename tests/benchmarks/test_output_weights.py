from __future__ import annotations

import pytest

from benchmarks.output_weights import VARIANTS, Choice
from eoracc.passes.calibrate_outputs import CalibrateOutputs


def test_variants_say_how_tokens_count_and_what_compensates() -> None:
    assert Choice.parse("svd") == Choice("equal", "svd")
    assert Choice.parse("unit+eora") == Choice("unit", "eora")
    assert Choice.parse("unit+eora").survey is None
    assert Choice.parse("logits").survey == CalibrateOutputs()
    assert Choice.parse("covariance").survey == CalibrateOutputs(by="covariance")
    # The weights of tokens come from the same survey.
    assert Choice.parse("gradients+none").survey == CalibrateOutputs()
    for name in VARIANTS:
        Choice.parse(name)


@pytest.mark.parametrize("text", ["", "unit", "huge+eora", "eora+unit"])
def test_other_texts_are_no_variants(text: str) -> None:
    with pytest.raises(ValueError, match="is no variant: give one like "):
        Choice.parse(text)
