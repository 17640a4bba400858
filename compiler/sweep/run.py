"""Run consecutive layer passes over the graph in one forward sweep that can be resumed.

At every group of linears the passes run in order (calibrate, quantize, compensate), then the
forward pass goes on through the weights they left. One pass over the calibration text therefore
gives every layer statistics through the prefix as it really will be. Where outputs are to be
matched, the original model's forward pass goes beside it, level by level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from eoracc.compiler.observe.spans import span, warn
from eoracc.compiler.progress import PassTimes
from eoracc.compiler.sweep.batch import Batch
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.sweep.forward import ForwardPass, one_thread
from eoracc.compiler.sweep.resume import SweepState
from eoracc.passes.base import LayerPass
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.gram_warnings import warn_of_gram
from eoracc.passes.graph import spec
from eoracc.passes.graph.linears import Linear, LinearGroup
from eoracc.passes.held_out import call_checked
from eoracc.passes.progress import Progress
from eoracc.passes.recipe import Recipe
from eoracc.passes.solvers.factor_types import FactorType
from eoracc.passes.solvers.gram import Gram
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.runtime.memory import release_memory

__all__ = [
    "Comparator",
    "Comparisons",
    "run_sweep",
]

Comparator = Callable[[Linear, Gram | None, int, FactorType], LowRank]
"""Solves for factors of a given rank and type without touching the graph."""

Comparisons = dict[str, dict[str, LowRank]]
"""Factors that are scored but not shipped: by comparator, then by linear name."""


def run_sweep(
    executor: Executor,
    passes: Sequence[LayerPass],
    batches: list[Batch],
    *,
    comparators: Mapping[str, Comparator],
    state: SweepState,
    progress: Progress,
    times: PassTimes,
    held_out: Sequence[Batch] = (),
) -> Comparisons:
    """Apply ``passes`` to every group of linears, in execution order.

    Args:
      executor: cut from the graph that the passes change.
      passes: in the order of model.yaml.
      batches: the calibration windows; empty where no pass is ``calibrate``.
      comparators: further compensation solvers, run at the rank that each linear was given and
        stored in the same type.
      state: saves finished blocks; the blocks that it has already are restored from it.
      progress: shown one step per group.
      times: given the time of each pass.
      held_out: windows on which factors must not do harm (:mod:`eoracc.passes.held_out`); empty
        checks none.

    Returns:
      The comparators' factors.

    Raises:
      PassError: a pass cannot run on a group, or leaves nodes that the stage does not allow.
    """
    calibrate = Recipe(passes).calibrate
    forward = None if calibrate is None else _forward(executor, calibrate, batches, held_out)
    live = [] if forward is None else forward.live
    comparisons: Comparisons = {name: {} for name in comparators}
    begin = _resume(state, executor, forward, comparisons)
    with progress.phase("compress", len(executor.levels)) as phase:
        for level, groups in enumerate(executor.levels):
            if level < begin:
                phase.skip()
                continue
            if level == 0 and forward is not None:
                forward.start()
            for group in groups:
                if forward is not None:
                    forward.show(group)
                _run_passes(group, passes, times)
                with one_thread():
                    _compare(group, comparators, comparisons)
                group.forget_inputs()
            if level < executor.head_level:
                if forward is not None:
                    with span("forward", "forward", level=level):
                        forward.step(level)
                if _block(executor, level + 1) != _block(executor, level):
                    # Trimmed too: between activations that come and go, the heap fills with holes.
                    release_memory()
                    if state.interval.is_due:
                        _save(state, level + 1, executor, live, comparisons)
            phase.advance(f"block {_block(executor, level)}")
    if begin < len(executor.levels):
        # Without activations: nothing goes on from the end but what comes after the sweep.
        _save(state, len(executor.levels), executor, [], comparisons)
    return comparisons


def _resume(
    state: SweepState,
    executor: Executor,
    forward: ForwardPass | None,
    comparisons: Comparisons,
) -> int:
    """Restore what is saved; the number of finished levels."""
    live = [] if forward is None else forward.live
    resumed = state.resume(executor.linears, live, comparisons)
    if forward is not None and not resumed.has_activations:
        forward.run(resumed.position)
    return resumed.position


def _run_passes(group: LinearGroup, passes: Sequence[LayerPass], times: PassTimes) -> None:
    """Run all passes on one group, and tell of the warnings that come of it."""
    for linear in group.linears:
        linear.record.output_norm = None  # from the statistics of an earlier sweep
    for layer_pass in passes:
        layer_pass.requires(group)
        with one_thread(layer_pass), times.measure(layer_pass, group.name):
            call_checked(layer_pass, group)
        spec.check_linears(group.linears, spec.Stage.COMPRESSED, after=layer_pass.name)
    warn_of_gram(group)
    for linear in group.linears:
        for warning in linear.record.warnings:
            warn(warning.code, warning.message, linear.name, warning.figures)


def _save(
    state: SweepState,
    position: int,
    executor: Executor,
    live: Sequence[Batch],
    comparisons: Comparisons,
) -> None:
    # What lies ahead may be compressed too, by an earlier sweep: this one has not been there yet.
    finished = [
        linear
        for groups in executor.levels[:position]
        for group in groups
        for linear in group.linears
    ]
    state.save(position, finished, live, comparisons)


def _forward(
    executor: Executor, calibrate: Calibrate, batches: Sequence[Batch], held_out: Sequence[Batch]
) -> ForwardPass:
    weight_of = Linear.weight if calibrate.through == "original" else Linear.effective_weight
    return ForwardPass(executor, batches, weight_of, match=calibrate.match, held_out=held_out)


def _compare(
    group: LinearGroup, comparators: Mapping[str, Comparator], comparisons: Comparisons
) -> None:
    for name, solve in comparators.items():
        for linear in group.linears:
            shipped = linear.factors
            if shipped is not None:
                # The passes of a sweep store factors in no other type.
                factor_type = cast("FactorType", shipped.factor_type)
                comparisons[name][linear.name] = solve(
                    linear, group.gram, shipped.rank, factor_type
                )


def _block(executor: Executor, level: int) -> int | None:
    return executor.levels[level][0].linears[0].block
