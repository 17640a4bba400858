"""Solve adapters: for each task, factors of the backbone's remaining error on the task's text.

One forward sweep over a task's text gives its adapter. At every group of linears the sweep takes
the Gram of their input, solves the factors in closed form, and continues through backbone and
factors together: each layer is solved for its input when the adapter is in use. The backbone never
changes, so tasks are independent of one another and of their order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from eoracc import __version__
from eoracc.compiler.config.sections import AdapterConfig
from eoracc.compiler.observe.spans import cpu_seconds, span
from eoracc.compiler.sweep.backbone import Backbone
from eoracc.compiler.sweep.batch import WeightOf, make_batches
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.sweep.forward import ForwardPass, one_thread
from eoracc.compiler.sweep.products import resolve_precision
from eoracc.compiler.sweep.resume import AdapterState
from eoracc.compiler.text.limits import TokenLimits
from eoracc.compiler.text.windows import Settings, Windows, calibration_windows, evaluation_windows
from eoracc.errors import ConfigError
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.compensate.adapter import AdapterSolver
from eoracc.passes.graph.linears import Linear, LinearGroup
from eoracc.passes.progress import Progress
from eoracc.passes.statistics import MIN_TOKENS, require_gram
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.printable import quoted
from eoracc.runtime.memory import release_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SolvedAdapter", "Task", "load_task", "solve_adapter"]

_BATCH = 4
"""Windows per batch, as in a build."""

_CALIBRATE = Calibrate()


@dataclass(frozen=True, eq=False)
class Task:
    """The texts and options that an adapter is solved for.

    Attributes:
      name: of the adapter.
      config: its section of model.yaml.
      calibration: the text that statistics are taken over.
      held_out: the text that adapters are scored on.
    """

    name: str
    config: AdapterConfig
    calibration: Windows
    held_out: Windows

    @property
    def solver(self) -> AdapterSolver:
        """The solver, with the rank and type of each linear's factors."""
        config = self.config
        return AdapterSolver(
            rank=config.rank, factor_type=config.factor_type, overrides=config.overrides
        )


@dataclass(frozen=True, eq=False)
class SolvedAdapter:
    """One task's factors.

    Attributes:
      task: that they are solved for.
      factors: by linear.
      errors: by linear, the relative output error over the task's text ``without`` the adapter and
        ``with`` it.
      notes: for the report.
      cpu_s: seconds of processor time for solving, since the last resumption.
    """

    task: Task
    factors: Mapping[str, LowRank]
    errors: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...]
    cpu_s: float

    @property
    def nbytes(self) -> int:
        """Bytes of all factors in the tiles of their linears."""
        return sum(factors.input_bytes for factors in self.factors.values())

    def mean_error(self, which: str) -> float:
        """Mean error of the linears ``without`` or ``with`` the adapter; 0 if there are none."""
        errors = [errors[which] for errors in self.errors.values()]
        return float(np.mean(errors)) if errors else 0.0


def load_task(
    name: str,
    config: AdapterConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config_dir: Path,
    limits: TokenLimits,
    settings: Settings | None = None,
) -> Task:
    """Read the texts of a task.

    Args:
      name: of the adapter.
      config: its section of model.yaml.
      tokenizer: the model's.
      config_dir: the folder that relative paths are relative to.
      limits: of the model.
      settings: names for messages; None for those of model.yaml.

    Raises:
      ConfigError: windows are too long for the model.
      DataError: a text is missing, damaged, empty or too short.
    """
    names = settings or Settings(
        samples=f"adapters.{name}.samples",
        windows=f"adapters.{name}.verify.windows",
        offset=f"adapters.{name}.verify.offset_tokens",
        length=f"adapters.{name}.sequence_length",
        window_length=f"adapters.{name}.verify.window_length",
    )
    texts = [
        cut(
            config,
            config.verify,
            tokenizer,
            config_dir=config_dir,
            limits=limits,
            settings=names,
        )
        for cut in (calibration_windows, evaluation_windows)
    ]
    return Task(name, config, *texts)


def solve_adapter(
    backbone: Backbone,
    task: Task,
    *,
    work: Path,
    progress: Progress,
    calibrate: Calibrate = _CALIBRATE,
    weight_of: WeightOf = Linear.effective_weight,
    label: str = "adapter",
) -> SolvedAdapter:
    """Solve one adapter.

    Args:
      backbone: does not change.
      task: to solve for.
      work: folder for saved blocks, from which an interrupted solve resumes.
      progress: shown one step per level of linears.
      calibrate: options of the forward pass and the Gram; ``through`` is ignored. With ``match:
        outputs`` an adapter corrects the backbone towards the original outputs.
      weight_of: the weights below the adapter: the backbone's, or others for a comparison.
      label: of the phase.

    Raises:
      ConfigError: an override matches no linear that takes an adapter.
      PassError: a rank exceeds a weight's smaller side, or statistics are not finite.
    """
    begun = cpu_seconds()
    _check_overrides(task, backbone)
    if calibrate.tokens == "gradients":
        # Only the backbone's own text has gradients.
        calibrate = replace(calibrate, tokens="equal")
    calibration = task.calibration
    batches = make_batches(
        calibration.input_ids,
        calibration.attention_mask,
        size=_BATCH,
        weights=calibration.weights,
    )
    executor = Executor(
        backbone.model, backbone.linears, precision=resolve_precision(calibrate.precision)
    )
    solution = _Solution(weight_of)
    state = AdapterState(work, _key(backbone, task, calibrate, weight_of))
    forward = ForwardPass(executor, batches, solution.weight, match=calibrate.match)
    resumed = state.resume(solution.factors, solution.errors, forward.live)
    begin = resumed.position
    if not resumed.has_activations:
        forward.run(begin)
    with progress.phase(f"{label} {task.name}", executor.head_level) as phase:
        for level in range(executor.head_level):
            if level < begin:
                phase.skip()
                continue
            if level == 0:
                forward.start()
            for group in executor.levels[level]:
                with span("solve adapter", "pass", linears=group.name):
                    _solve_group(forward, group, task.solver, calibrate, solution)
            with span("forward", "forward", level=level):
                forward.step(level)
            block = executor.levels[level][0].linears[0].block
            finished = level + 1
            ends = finished == executor.head_level
            if ends or executor.levels[finished][0].linears[0].block != block:
                release_weights()
                if ends or state.interval.is_due:
                    # At the end nothing needs the activations any more.
                    live = [] if ends else forward.live
                    state.save(finished, solution.factors, solution.errors, live)
            phase.advance(f"block {block}")
    return SolvedAdapter(
        task, solution.factors, solution.errors, _notes(task, solution), cpu_seconds() - begun
    )


@dataclass(eq=False)
class _Solution:
    """The linears of an adapter that are solved so far.

    Attributes:
      backbone: gives the weight of a linear without the adapter.
      factors: by linear.
      errors: by linear, see :class:`SolvedAdapter`.
    """

    backbone: WeightOf
    factors: dict[str, LowRank] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)

    def weight(self, linear: Linear) -> NDArray[np.float32]:
        """The weight of ``linear`` with the adapter."""
        weight = self.backbone(linear)
        own = self.factors.get(linear.name)
        return weight if own is None else weight + own.product()


def _solve_group(
    forward: ForwardPass,
    group: LinearGroup,
    solver: AdapterSolver,
    calibrate: Calibrate,
    solution: _Solution,
) -> None:
    wanted = [
        (linear, options)
        for linear in group.linears
        if (options := solver.options_for(linear)) is not None
    ]
    if not wanted:
        return
    forward.show(group)
    calibrate.call(group)
    gram = require_gram("adapters", group)
    with one_thread():
        for linear, options in wanted:
            solved = options.solve(linear, solution.backbone(linear), gram)
            solution.factors[linear.name] = solved.factors
            solution.errors[linear.name] = {
                "without": solved.error_without,
                "with": solved.error_with,
            }
    group.forget_inputs()


def _notes(task: Task, solution: _Solution) -> tuple[str, ...]:
    # Every token of a window reaches all linears, so one note covers them.
    tokens = task.calibration.tokens
    if tokens >= MIN_TOKENS or not solution.factors:
        return ()
    note = (
        f"plain SVD of what the backbone lacks, for only {tokens} tokens of text were given "
        f"(EoRA asks for {MIN_TOKENS})."
    )
    return (note,)


def _check_overrides(task: Task, backbone: Backbone) -> None:
    names = [
        linear.name
        for linear in backbone.linears
        if linear.block is not None and linear.quantized is not None
    ]
    for pattern in task.solver.unmatched_overrides(names):
        raise ConfigError(
            f"adapters.{task.name}.overrides: no linear that takes an adapter matches "
            f"{quoted(pattern)}: "
            + (f"names are like {quoted(names[0])}" if names else "there are none")
        )


def _key(backbone: Backbone, task: Task, calibrate: Calibrate, weight_of: WeightOf) -> str:
    """Digest of everything that an adapter's factors depend on."""
    solver = TypeAdapter(AdapterSolver).dump_python(task.solver, mode="json")
    digest = hashlib.sha256(
        json.dumps(
            [__version__, solver, resolve_precision(calibrate.precision), calibrate.match]
        ).encode()
    )
    windows = task.calibration
    for array in (windows.input_ids, windows.attention_mask, windows.weights):
        if array is not None:
            digest.update(array.tobytes())
    for linear in backbone.linears:
        digest.update(linear.name.encode())
        if linear.compressed is not None:
            digest.update(weight_of(linear).tobytes())
    return digest.hexdigest()
