"""What a survey sees: the whole model, the calibration text, and the passes that it steers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from eoracc.compiler.progress import Progress
from eoracc.compiler.sweep.executor import Batch, Executor, make_batches
from eoracc.compiler.sweep.products import Precision
from eoracc.compiler.sweep.run import ForwardPass, one_thread
from eoracc.compiler.text.windows import Windows
from eoracc.passes.base import LayerPass
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.graph.linears import Linear, LinearGroup, find_linears

__all__ = ["SurveyContext", "calibration_batches"]

_BATCH = 4
"""Calibration windows per batch: enough to fill the cores, few enough to stay in cache."""


def calibration_batches(windows: Windows) -> list[Batch]:
    """The windows of a calibration text in batches, graph inputs set."""
    return make_batches(
        windows.input_ids, windows.attention_mask, size=_BATCH, weights=windows.weights
    )


@dataclass(frozen=True, eq=False)
class SurveyContext:
    """One survey's view of a build.

    Attributes:
      model: the graph; a survey leaves it as it is.
      linears: of the graph, in execution order.
      windows: the calibration text; None where model.yaml gives none.
      following: the layer passes of the next sweep, in order.
      checkpoint: the original model as a Hugging Face folder.
      trust_remote_code: let transformers run code that the checkpoint brings.
      folder: where the survey may keep what took long; it lasts until the build succeeds.
      key: digest of all that the findings depend on.
      progress: shown a phase of the survey's own.
    """

    model: ir.Model
    linears: Sequence[Linear]
    windows: Windows | None
    following: Sequence[LayerPass]
    checkpoint: Path
    trust_remote_code: bool
    folder: Path
    key: str
    progress: Progress

    def batches(self) -> list[Batch]:
        """The calibration windows with graph inputs set, fresh on every call; empty for no text."""
        return [] if self.windows is None else calibration_batches(self.windows)

    def executor(self, *, precision: Precision = "float32") -> Executor:
        """A way to run a copy of the graph, whose linears may be compressed on trial.

        They know what those of the graph know: the weights that they are factors of, and what
        earlier surveys have found.

        Args:
          precision: of the forward pass.
        """
        copy = self.model.clone()
        known = {linear.name: linear for linear in self.linears}
        linears = find_linears(copy)
        for linear in linears:
            own = known[linear.name]
            linear.whole, linear.plan = own.whole, dict(own.plan)
            linear.output_gram, linear.token_weights = own.output_gram, own.token_weights
        return Executor(copy, linears, precision=precision)

    def walk(self, name: str, calibrate: Calibrate) -> Iterator[LinearGroup]:
        """Every group of linears of a copy of the graph, in execution order, with its Gram.

        Both are those of the original model: what the caller makes of a group's linears on trial is
        not what the forward pass goes on with.

        Args:
          name: of the phase that is shown.
          calibrate: takes the Grams, with its precision.
        """
        calibrate = replace(calibrate, through="original", match="weights")
        executor = self.executor(precision=calibrate.resolved_precision)
        forward = ForwardPass(executor, self.batches(), Linear.weight, match="weights")
        forward.start()
        with self.progress.phase(name, len(executor.levels)) as phase:
            for level, groups in enumerate(executor.levels):
                for group in groups:
                    forward.show(group)
                    calibrate.call(group)
                    with one_thread():
                        yield group
                    group.activations = group.gram = None
                if level < executor.head_level:
                    forward.step(level)
                phase.advance(groups[0].name)

    def each_group(
        self, name: str, calibrate: Calibrate, make: Callable[[LinearGroup], list[Any]]
    ) -> list[Any]:
        """What ``make`` finds of the groups of :meth:`walk`, one after another.

        Args:
          name: as for :meth:`walk`.
          calibrate: likewise.
          make: JSON-able findings of a group. One that an interrupted run has finished is not asked
            for again.
        """
        found: list[Any] = []
        for index, group in enumerate(self.walk(name, calibrate)):
            found += self.remember(f"{name}.{index}", partial(_as_found, make, group))["found"]
        return found

    def remember(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``make`` finds, JSON-able; of an earlier run where that was interrupted later on."""
        path = self.folder / f"{name}.json"
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["key"] == self.key:
                found: dict[str, Any] = kept["found"]
                return found
        found = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        begun = path.with_suffix(".partial")
        begun.write_text(json.dumps({"key": self.key, "found": found}), encoding="utf-8")
        begun.replace(path)
        return found


def _as_found(make: Callable[[LinearGroup], list[Any]], group: LinearGroup) -> dict[str, Any]:
    return {"found": make(group)}
