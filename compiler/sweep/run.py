"""Run consecutive layer passes over the graph in one forward sweep that can be resumed.

At every group of linears the passes run in order (calibrate, quantize, compensate), then the
forward pass goes on through the weights they left. One pass over the calibration text therefore
gives every layer statistics through the prefix as it really will be. Where outputs are to be
matched, the original model's forward pass goes beside it, level by level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from eoracc.compiler.progress import Progress
from eoracc.compiler.sweep.executor import Batch, Executor, WeightOf
from eoracc.compiler.sweep.resume import SweepCheckpoint
from eoracc.passes.base import LayerPass
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.graph.linears import Linear, LinearGroup
from eoracc.passes.solvers.factor_types import FactorType
from eoracc.passes.solvers.gram import Activations, Gram
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.runtime.memory import release_memory

__all__ = [
    "Comparator",
    "Comparisons",
    "ForwardPass",
    "inputs_over",
    "one_thread",
    "original_weight",
    "run_sweep",
]

_BLAS = ThreadpoolController()

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
    checkpoint: SweepCheckpoint,
    progress: Progress,
) -> Comparisons:
    """Apply ``passes`` to every group of linears, in execution order.

    Args:
      executor: cut from the graph that the passes change.
      passes: in the order of model.yaml.
      batches: the calibration windows; empty where no pass is ``calibrate``.
      comparators: further compensation solvers, run at the rank that each linear was given and
        stored in the same type.
      checkpoint: where finished blocks are kept; blocks that it holds are taken from it.
      progress: shown one step per group.

    Returns:
      The comparators' factors.
    """
    calibrate = next((p for p in passes if isinstance(p, Calibrate)), None)
    forward = None if calibrate is None else _forward(executor, calibrate, batches)
    live = [] if forward is None else forward.live
    comparisons: Comparisons = {name: {} for name in comparators}
    begin = checkpoint.resume(executor.linears, live, comparisons)
    with progress.phase("compress", len(executor.levels)) as phase:
        for level, groups in enumerate(executor.levels):
            if level < begin:
                phase.advance()
                continue
            if level == 0 and forward is not None:
                forward.start()
            for group in groups:
                if forward is not None:
                    forward.show(group)
                for linear in group.linears:
                    linear.output_norm = None  # of an earlier sweep's statistics
                for layer_pass in passes:
                    layer_pass.requires(group)
                    with one_thread(layer_pass):
                        layer_pass.call(group)
                with one_thread():
                    _compare(group, comparators, comparisons)
                group.activations = group.originals = group.gram = None
            if level < executor.head_level:
                if forward is not None:
                    forward.step(level)
                if _block(executor, level + 1) != _block(executor, level):
                    # Trimmed too: between activations that come and go, the heap fills with holes.
                    release_memory()
                    if checkpoint.is_due:
                        _save(checkpoint, level + 1, executor, live, comparisons)
            phase.advance(f"block {_block(executor, level)}")
    if begin < len(executor.levels):
        # Without activations: nothing goes on from the end but what comes after the sweep.
        _save(checkpoint, len(executor.levels), executor, [], comparisons)
    return comparisons


def _save(
    checkpoint: SweepCheckpoint,
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
    checkpoint.save(position, finished, live, comparisons)


class ForwardPass:
    """The forward pass over a text's windows, and the original model's where one is needed.

    Attributes:
      live: batches whose values make up the point that was reached.
    """

    def __init__(
        self,
        executor: Executor,
        batches: Sequence[Batch],
        weight_of: WeightOf,
        *,
        match: Literal["weights", "outputs"],
    ) -> None:
        """Set out from graph inputs.

        Args:
          executor: runs both.
          batches: the windows, graph inputs set.
          weight_of: what each linear multiplies with, asked once all of its group are solved.
          match: ``outputs`` has the original model run beside it.
        """
        self._executor = executor
        self._weight_of = weight_of
        self._batches = list(batches)
        self._originals = (
            [replace(batch, values=dict(batch.values)) for batch in batches]
            if match == "outputs"
            else []
        )
        self.live = [*self._batches, *self._originals]

    def start(self) -> None:
        """Compute what stands before the first linears."""
        self._executor.start(self._batches)
        # Nothing is compressed yet: the original holds the same, masks for the whole way included.
        for original, batch in zip(self._originals, self._batches, strict=False):
            original.values = dict(batch.values)

    def show(self, group: LinearGroup) -> None:
        """Let ``group`` see its input."""
        group.activations = inputs_over(self._executor, group, self._batches)
        if self._originals:
            group.originals = inputs_over(self._executor, group, self._originals)

    def step(self, level: int) -> None:
        """Compute the linears of ``level``, as they are now and as they were."""
        self._executor.step(level, self._batches, self._weight_of)
        if self._originals:
            self._executor.step(level, self._originals, original_weight)


def inputs_over(executor: Executor, group: LinearGroup, batches: Sequence[Batch]) -> Activations:
    """The input of ``group`` over ``batches``, batch by batch, at the level that they are at."""
    width = group.linears[0].in_features

    def activations() -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        for batch in batches:
            # Beyond lies what the original model computes past a factor.
            yield executor.inputs_of(group, batch)[:, :width], batch.token_weights

    return activations


def original_weight(linear: Linear) -> NDArray[np.float32]:
    """What the original model multiplies with where ``linear`` stands.

    It has ``W`` where an earlier sweep has put ``u v``: so that it goes on as it was, ``v`` hands
    ``W x`` on beside its own ``v x``, and ``u`` lets it pass.
    """
    whole = linear.whole
    if whole is None:
        return linear.weight()
    if linear.name == f"{whole.name}.v":
        return np.vstack([linear.weight(), whole.weight()])
    rows = linear.out_features
    return np.hstack(
        [np.zeros((rows, linear.in_features), np.float32), np.eye(rows, dtype=np.float32)]
    )


def one_thread(layer_pass: LayerPass | None = None) -> AbstractContextManager[object]:
    """Keep BLAS to one thread while a solver runs.

    Solvers factor matrices a thousand wide between short loops: a second thread would gain a fifth
    of the time and spend all of it waiting. Statistics are large products and take every thread.
    """
    if isinstance(layer_pass, Calibrate):
        return nullcontext()
    limit: AbstractContextManager[object] = _BLAS.limit(limits=1, user_api="blas")
    return limit


def _forward(executor: Executor, calibrate: Calibrate, batches: Sequence[Batch]) -> ForwardPass:
    weight_of = Linear.weight if calibrate.through == "original" else Linear.effective_weight
    return ForwardPass(executor, batches, weight_of, match=calibrate.match)


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
