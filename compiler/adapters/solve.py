"""Solve adapters: for each task, factors of what the backbone still gets wrong on its text.

One forward sweep over a task's text gives its adapter. At every group of linears the Gram of their
input is taken, the factors are solved in closed form, and the sweep goes on through backbone and
factors together: each layer is solved for the input that it will have once the adapter is in use.
The backbone is never changed, so tasks are independent of one another and of their order.
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
from eoracc.compiler.progress import Progress, cpu_seconds
from eoracc.compiler.sweep.backbone import Backbone
from eoracc.compiler.sweep.batch import WeightOf, make_batches
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.sweep.forward import ForwardPass, one_thread
from eoracc.compiler.sweep.products import resolve_precision
from eoracc.compiler.sweep.resume import AdapterState
from eoracc.compiler.text.windows import Settings, Windows, calibration_windows, evaluation_windows
from eoracc.errors import ConfigError
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.compensate.adapter import AdapterSolver
from eoracc.passes.graph.linears import Linear, LinearGroup
from eoracc.passes.statistics import MIN_TOKENS, require_gram
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.runtime.memory import release_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SolvedAdapter", "Task", "load_task", "solve_adapter"]

_BATCH = 4
"""Windows per batch, as in a build."""

_CALIBRATE = Calibrate()


@dataclass(frozen=True, eq=False)
class Task:
    """What an adapter is solved for.

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
        """Rank and type of the factors, linear by linear."""
        config = self.config
        return AdapterSolver(
            rank=config.rank, factor_type=config.factor_type, overrides=config.overrides
        )


@dataclass(frozen=True, eq=False)
class SolvedAdapter:
    """One task's factors.

    Attributes:
      task: what they are for.
      factors: by linear.
      errors: by linear, the relative output error over the task's text ``without`` the adapter and
        ``with`` it.
      notes: what else there is to say.
      cpu_s: seconds of processor time that solving took, since it was last resumed.
    """

    task: Task
    factors: Mapping[str, LowRank]
    errors: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...]
    cpu_s: float

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(factors.nbytes for factors in self.factors.values())

    def mean_error(self, which: str) -> float:
        """Mean over the linears of their error ``without`` or ``with`` the adapter; 0 of none."""
        found = [errors[which] for errors in self.errors.values()]
        return float(np.mean(found)) if found else 0.0


def load_task(
    name: str,
    config: AdapterConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config_dir: Path,
    settings: Settings | None = None,
) -> Task:
    """Read the texts of a task.

    Args:
      name: of the adapter.
      config: its section of model.yaml.
      tokenizer: the model's.
      config_dir: what relative paths are relative to.
      settings: names for messages; None for those of model.yaml.

    Raises:
      DataError: a text is missing, damaged, empty or too short.
    """
    names = settings or Settings(
        samples=f"adapters.{name}.samples",
        windows=f"adapters.{name}.verify.windows",
        offset=f"adapters.{name}.verify.offset_tokens",
    )
    return Task(
        name,
        config,
        calibration_windows(
            config, config.verify, tokenizer, config_dir=config_dir, settings=names
        ),
        evaluation_windows(config, config.verify, tokenizer, config_dir=config_dir, settings=names),
    )


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
      backbone: left as it is.
      task: what to solve for.
      work: where finished blocks are kept; an interrupted solve goes on from there.
      progress: shown one step per level of linears.
      calibrate: how the forward pass and the Gram are computed; ``through`` has no say here.
        With ``match: outputs`` an adapter gives back what the backbone lacks of the target.
      weight_of: what the adapter stands on: the backbone, unless the factors are to be compared
        with those of another one.
      label: of the phase that ``progress`` is shown.

    Raises:
      ConfigError: an override matches no linear that takes an adapter.
      PassError: a rank exceeds a weight's smaller side, or statistics are not finite.
    """
    begun = cpu_seconds()
    _check_overrides(task, backbone)
    if calibrate.tokens == "gradients":
        # Known of the backbone's text alone.
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
    found = _Found(weight_of)
    state = AdapterState(work, _key(backbone, task, calibrate, weight_of))
    forward = ForwardPass(executor, batches, found.weight, match=calibrate.match)
    begin = state.resume(found.factors, found.errors, forward.live)
    with progress.phase(f"{label} {task.name}", executor.head_level) as phase:
        for level in range(executor.head_level):
            if level < begin:
                phase.advance()
                continue
            if level == 0:
                forward.start()
            for group in executor.levels[level]:
                _solve_group(forward, group, task.solver, calibrate, found)
            forward.step(level)
            block = executor.levels[level][0].linears[0].block
            finished = level + 1
            ends = finished == executor.head_level
            if ends or executor.levels[finished][0].linears[0].block != block:
                release_weights()
                if ends or state.is_due:
                    # What lies before the head serves nobody once all factors are there.
                    live = [] if ends else forward.live
                    state.save(finished, found.factors, found.errors, live)
            phase.advance(f"block {block}")
    return SolvedAdapter(
        task, found.factors, found.errors, _notes(task, found), cpu_seconds() - begun
    )


@dataclass(eq=False)
class _Found:
    """What has been solved of an adapter so far.

    Attributes:
      backbone: the weight that a linear has without the adapter.
      factors: by linear.
      errors: by linear, see :class:`SolvedAdapter`.
    """

    backbone: WeightOf
    factors: dict[str, LowRank] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)

    def weight(self, linear: Linear) -> NDArray[np.float32]:
        """What ``linear`` multiplies with, the adapter included."""
        weight = self.backbone(linear)
        own = self.factors.get(linear.name)
        return weight if own is None else weight + own.product()


def _solve_group(
    forward: ForwardPass,
    group: LinearGroup,
    solver: AdapterSolver,
    calibrate: Calibrate,
    found: _Found,
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
            solved = options.solve(linear, found.backbone(linear), gram)
            found.factors[linear.name] = solved.factors
            found.errors[linear.name] = {
                "without": solved.error_without,
                "with": solved.error_with,
            }
    group.activations = group.originals = group.gram = None


def _notes(task: Task, found: _Found) -> tuple[str, ...]:
    # Windows have no token that reaches some linears and not others: one note says it for all.
    tokens = task.calibration.tokens
    if tokens >= MIN_TOKENS or not found.factors:
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
        if linear.block is not None and linear.compressed is not None
    ]
    for pattern in task.solver.unmatched_overrides(names):
        raise ConfigError(
            f"adapters.{task.name}.overrides: no linear that takes an adapter matches "
            f"{pattern!r}: " + (f"names are like {names[0]!r}" if names else "there are none")
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
