"""The survey on SmolLM2-135M: two candidates, one of them against an ordinary sweep."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from eoracc.compiler.frontend.load import load
from eoracc.compiler.progress import PassTimes, SilentProgress
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.sweep.resume import SweepState
from eoracc.compiler.sweep.run import run_sweep
from eoracc.compiler.sweep.survey import Survey, calibration_batches
from eoracc.compiler.text.windows import Windows
from eoracc.passes.graph.linears import Linear, find_linears
from eoracc.passes.plan.select_last_k import SelectLastK
from eoracc.passes.quantize.quantization import QuantizeOverride
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

pytestmark = pytest.mark.real

TEXT = "The committee shall report to the people once a year what has been done with their money. "


def head_input(executor: Executor, windows: Windows) -> NDArray[np.float64]:
    batches = calibration_batches(windows)
    executor.run_to_head(batches, Linear.effective_weight)
    return np.concatenate([executor.head_input(batch) for batch in batches]).astype(np.float64)


def test_finds_the_last_blocks_of_a_real_model(smollm2_folder: Path, tmp_path: Path) -> None:
    loaded = load(str(smollm2_folder), work=tmp_path)
    ids = np.array(loaded.tokenizer()(TEXT * 4)["input_ids"])[None, :64]
    windows = Windows(ids, np.ones_like(ids))
    quantize = QuantizeRtn(bits=4, group_size=64)
    context = Survey(
        model=loaded.model,
        linears=find_linears(loaded.model),
        windows=windows,
        following=[quantize],
        checkpoint=smollm2_folder,
        trust_remote_code=False,
        folder=tmp_path / "survey",
        key="key",
        progress=SilentProgress(),
    )
    found = SelectLastK(average_bits=3, low_bits=(2, 3), step=15).survey(context)
    candidates = found["curve"][1:]
    assert {(one["k"], one["bits"]) for one in candidates} == {(15, 2), (30, 3)}
    best = min(candidates, key=lambda one: one["error"])
    assert found["chosen"] == best
    for linear in context.linears:
        expected = best["bits"] if linear.block in best["blocks"] else 4
        assert linear.plan == ({} if linear.block is None else {"bits": expected})

    original = head_input(Executor(loaded.model), windows)
    low = {f"model.layers.{block}.*": QuantizeOverride(bits=2) for block in range(15, 30)}
    executor = Executor(loaded.model)
    run_sweep(
        executor,
        [replace(quantize, overrides=low)],
        calibration_batches(windows),
        comparators={},
        state=SweepState(tmp_path / "sweep", "key"),
        progress=SilentProgress(),
        times=PassTimes(),
    )
    difference = head_input(executor, windows) - original
    error = np.linalg.norm(difference) / np.linalg.norm(original)
    (half,) = (one for one in candidates if one["k"] == 15)
    # 30 blocks of 7 linears, of 1536 columns at most; rounding of sums grows like their root.
    assert half["error"] == pytest.approx(error, rel=210 * np.sqrt(1536) * 2.0**-24)
