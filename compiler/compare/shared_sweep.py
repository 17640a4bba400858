"""One sweep for several contenders that share their statistics.

With ``calibrate: {through: original}`` the input of a linear does not depend on the compression of
earlier linears. So contenders with the same calibration can share one forward pass: every Gram is
taken once, and passes that several contenders begin with, a quantization say, are solved once. The
results are saved as the state of each contender's own sweep, which then resumes at its end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eoracc.compiler.config.sections import BuildConfig
from eoracc.compiler.frontend.load import LoadedModel
from eoracc.compiler.kept.files import keeping
from eoracc.compiler.observe.spans import cpu_seconds
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.sweep.forward import ForwardPass, one_thread
from eoracc.compiler.sweep.pipeline import stage_key
from eoracc.compiler.sweep.products import resolve_precision
from eoracc.compiler.sweep.resume import SweepState, saved_spent_s
from eoracc.compiler.sweep.survey import calibration_batches
from eoracc.compiler.text.windows import Windows
from eoracc.errors import PassError
from eoracc.passes.base import LayerPass, ModelPass, Pass
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.graph.linears import (
    Factorized,
    Linear,
    LinearGroup,
    Pruner,
    Quantizer,
    find_linears,
)
from eoracc.passes.graph.record import LinearRecord
from eoracc.passes.progress import Progress
from eoracc.plugins.operands.dense import StoredWeight
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.runtime.memory import release_memory

__all__ = ["Sharing", "seconds_spent", "sweep_together"]


@dataclass(frozen=True)
class Sharing:
    """A contender that may share its first sweep.

    Attributes:
      config: the build of the contender.
      folder: where that build saves its sweeps.
    """

    config: BuildConfig
    folder: Path


def sweep_together(
    contenders: Sequence[Sharing],
    loaded: LoadedModel,
    calibration: Windows | None,
    folder: Path,
    progress: Progress,
) -> float:
    """Run the first sweep of those ``contenders`` that can share one.

    A contender whose passes fail is left out: its own sweep will raise the error.

    Args:
      contenders: their folders get the results.
      loaded: the model; its graph stays as it is.
      calibration: the text.
      folder: for the state of the shared forward pass, to resume an interrupted run.
      progress: shown a phase.

    Returns:
      Seconds of processor time that all contenders share.
    """
    if calibration is None:
        return 0.0
    groups: dict[str, list[_Plan]] = {}
    for contender in contenders:
        plan = _plan(contender, loaded, calibration)
        if plan is not None:
            groups.setdefault(plan.key, []).append(plan)
    return sum(
        _sweep(plans, loaded, calibration, folder, progress)
        for plans in groups.values()
        if len(plans) > 1
    )


def seconds_spent(folder: Path) -> float:
    """Seconds of processor time that a shared sweep spent on one contender's own passes.

    Args:
      folder: where the contender saves its sweeps, which are complete.
    """
    stages = sorted(path for path in folder.glob("*") if path.name.isdigit())
    return sum(saved_spent_s(stage) for stage in stages)


@dataclass(frozen=True)
class _Plan:
    """The first sweep of a contender.

    Attributes:
      common: passes up to and including ``calibrate``, equal for all that share the sweep.
      own: the layer passes after it.
      key: digest of everything that the forward pass depends on.
      state: saves the contender's results while the shared sweep runs.
      done: where the contender's own sweep looks for its state; ``state`` moves there at the end.
      folder: of the contender.
    """

    common: tuple[Pass, ...]
    own: tuple[LayerPass, ...]
    key: str
    state: SweepState
    done: Path
    folder: Path


def _plan(contender: Sharing, loaded: LoadedModel, calibration: Windows) -> _Plan | None:
    """The first sweep of ``contender``; None if it cannot be shared."""
    config = contender.config
    all_stages = config.recipe.stages()
    changes: list[Pass] = []
    for position, members in enumerate(all_stages):
        first = members[0]
        if isinstance(first, ModelPass):
            changes.append(first)
            continue
        if not isinstance(first, Calibrate) or first.through != "original":
            return None
        common = (*changes, first)
        done = contender.folder / str(position)
        if done.exists():
            return None  # finished or begun by an earlier run
        alone = config.model_copy(update={"passes": common})
        return _Plan(
            common=common,
            own=tuple(item for item in members[1:] if isinstance(item, LayerPass)),
            key=stage_key(alone, loaded, common, position, calibration),
            # In another folder until all is done: it has no activations to resume a part from.
            state=SweepState(
                contender.folder / "shared",
                stage_key(config, loaded, members, position, calibration),
            ),
            done=done,
            folder=contender.folder,
        )
    return None


def _sweep(
    plans: Sequence[_Plan],
    loaded: LoadedModel,
    calibration: Windows,
    folder: Path,
    progress: Progress,
) -> float:
    begun_s = cpu_seconds()
    *changes, calibrate = plans[0].common
    assert isinstance(calibrate, Calibrate)  # noqa: S101 - _plan() ends with it
    model = loaded.model.clone()
    for item in changes:
        assert isinstance(item, ModelPass)  # noqa: S101 - _plan() takes no others
        item.call(model)
    executor = Executor(model, precision=resolve_precision(calibrate.precision))
    runs = [_Run(plan, find_linears(model.clone())) for plan in plans]
    shared = Counter(key for run in runs for key in run.prefixes)
    forward, forward_state, begin = _prepare(executor, calibration, folder, runs, plans[0].key)
    with progress.phase("shared sweep", len(executor.levels)) as phase:
        for level, groups in enumerate(executor.levels):
            if level < begin:
                phase.skip()
                continue
            if level == 0:
                forward.start()
            for group in groups if any(run.finished <= level for run in runs) else ():
                forward.show(group)
                calibrate.requires(group)
                calibrate.call(group)
                known: dict[str, list[_Result]] = {}
                runs = [
                    run for run in runs if run.finished > level or run.apply(group, known, shared)
                ]
                group.forget_inputs()
            phase.advance(groups[0].name)
            if level == executor.head_level:
                break
            forward.step(level)
            if _block(executor, level + 1) != _block(executor, level):
                release_memory()
                if forward_state.interval.is_due:
                    with forward_state.interval.saving():
                        for run in runs:
                            run.save(executor, level + 1)
                        # Last, so that no contender is behind the saved forward pass.
                        forward_state.save(level + 1, [], forward.live, {})
    for run in runs:
        run.plan.state.spent_s = run.seconds
        run.save(executor, len(executor.levels))
        with keeping(run.plan.done):
            run.plan.state.folder.replace(run.plan.done)
    forward_state.discard()
    return cpu_seconds() - begun_s - sum(run.seconds for run in runs)


def _prepare(
    executor: Executor, calibration: Windows, folder: Path, runs: Sequence[_Run], key: str
) -> tuple[ForwardPass, SweepState, int]:
    """The forward pass, its saved state, and the level that it begins with."""

    def new_forward() -> ForwardPass:
        batches = calibration_batches(calibration)
        return ForwardPass(executor, batches, Linear.weight, match="weights")

    state = SweepState(folder, key)
    forward = new_forward()
    resumed = state.resume([], forward.live, {})
    # A contender that the interrupted run did not have, or whose results are damaged, needs earlier
    # statistics.
    if not resumed.has_activations or resumed.position > min(run.finished for run in runs):
        state.discard()
        return new_forward(), state, 0
    return forward, state, resumed.position


class _Run:
    """One contender in the shared sweep.

    Attributes:
      plan: its first sweep.
      prefixes: for each of its own passes, a key of all passes up to and including it.
      finished: number of levels that are saved, by an earlier run at first.
      seconds: of processor time of its own passes.
    """

    def __init__(self, plan: _Plan, linears: Sequence[Linear]) -> None:
        self.plan = plan
        self.prefixes = [repr(plan.own[: n + 1]) for n in range(len(plan.own))]
        self.seconds = 0.0
        self._linears = {linear.name: linear for linear in linears}
        self.finished = plan.state.resume(linears, [], {}).position

    def apply(
        self, shown: LinearGroup, known: dict[str, list[_Result]], shared: Mapping[str, int]
    ) -> bool:
        """Run the contender's passes on its own linears of a group.

        Args:
          shown: the group, with its Gram.
          known: results of the group by prefix, for prefixes that several contenders have; added
            to.
          shared: number of contenders by prefix.

        Returns:
          Whether the passes succeeded.
        """
        begun_s = cpu_seconds()
        linears = [self._linears[linear.name] for linear in shown.linears]
        group = LinearGroup(tuple(linears), shown.activations, None, shown.gram)
        done = max((n + 1 for n, key in enumerate(self.prefixes) if key in known), default=0)
        if done:
            for result, linear in zip(known[self.prefixes[done - 1]], linears, strict=True):
                result.copy_to(linear)
        try:
            for key, item in zip(self.prefixes[done:], self.plan.own[done:], strict=True):
                item.requires(group)
                with one_thread(item):
                    item.call(group)
                if shared[key] > 1:
                    known[key] = [_Result.of(linear) for linear in linears]
        except PassError:
            return False
        self.seconds += cpu_seconds() - begun_s
        return True

    def save(self, executor: Executor, position: int) -> None:
        """Save the first ``position`` levels."""
        if position <= self.finished:
            return
        linears = [
            self._linears[linear.name]
            for groups in executor.levels[:position]
            for group in groups
            for linear in group.linears
        ]
        self.plan.state.save(position, linears, [], {})
        self.finished = position


@dataclass(frozen=True, eq=False)
class _Result:
    """The result of passes on one linear, to copy to the same linear of another contender."""

    compressed: StoredWeight | None
    quantizer: Quantizer | None
    pruner: Pruner | None
    factors: LowRank | None
    factorized: Factorized | None
    record: LinearRecord

    @classmethod
    def of(cls, linear: Linear) -> _Result:
        """The present result of ``linear``."""
        return cls(
            linear.compressed,
            linear.quantizer,
            linear.pruner,
            linear.factors,
            linear.factorized,
            linear.record.copy(),
        )

    def copy_to(self, linear: Linear) -> None:
        """Give ``linear``, which no pass has changed yet, the same result."""
        if self.factorized is not None:
            linear.factorize(self.factorized.u, self.factorized.v)
        if self.compressed is not None:
            linear.quantize(self.compressed)
        if self.factors is not None:
            linear.compensate(self.factors)
        linear.quantizer = self.quantizer
        linear.pruner = self.pruner
        linear.record.sparsity = self.record.sparsity
        linear.record.output_norm = self.record.output_norm
        linear.record.errors.update(self.record.errors)
        linear.record.notes.extend(self.record.notes)
        linear.record.warnings = list(self.record.warnings)


def _block(executor: Executor, level: int) -> int | None:
    return executor.levels[level][0].linears[0].block
