"""Run a sweep's passes with one option varying by decoder block, and measure the output error.

A *schedule* gives the value of one option of the passes for every decoder block: ``ratio`` 0 in the
first ten and 0.4 in the others, say. The *trajectory* of a schedule is the forward pass through the
blocks that it compresses. It depends on the schedule of the blocks already passed only, so
trajectories of two schedules are equal up to the first block where the schedules differ. A trial
therefore starts at a *resume point*, activations saved before an earlier block, and continues from
there as a sweep would.

The graph stays as it is: trials compress copies of linears, each on a graph of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from eoracc.compiler.sweep.activation_store import ActivationStore
from eoracc.compiler.sweep.batch import Batch
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.sweep.forward import inputs_over, one_thread, original_weight
from eoracc.compiler.sweep.products import gram_products
from eoracc.errors import PassError
from eoracc.passes.base import LayerPass
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.factorize.base import Factorization
from eoracc.passes.graph.linears import Linear, LinearGroup
from eoracc.passes.recipe import Recipe
from eoracc.passes.survey import Errors, Schedule
from eoracc.runtime.memory import release_memory

__all__ = ["SweepTrials"]

_Linears = Mapping[str, Linear]
"""Copies of linears that passes have run on, by name; the model's own stand for all others."""


@dataclass(eq=False)
class _State:
    """The activations of a forward pass between two decoder blocks.

    Attributes:
      batches: through the compressed blocks so far.
      originals: through the original ones; the same list while both are equal or nobody needs them.
    """

    batches: list[Batch]
    originals: list[Batch]


_Visit = Callable[[int, _State], None]
"""Called with a block's number and the activations after it."""


@dataclass(eq=False)
class _Trajectory:
    """A schedule that has been run to the last block.

    Attributes:
      schedule: None for the model as it is.
      compressed: the compressed linears by block; blocks that passes leave alone are missing.
      errors: at the probes.
    """

    schedule: Schedule | None
    compressed: dict[int, _Linears] = field(default_factory=dict)
    errors: Errors = field(default_factory=dict)


class SweepTrials:
    """Runs schedules on the calibration text; implements :class:`~eoracc.passes.survey.Trials`.

    Errors are relative to the original model's outputs. The output of a block is the input of the
    next block's first linears, and that of the last block the input of the head: both are taken
    after the norm.

    Memory: the activations of one sweep (two where ``calibrate`` needs the original model's) and
    the compressed weights of the base's trajectory. The original outputs of the probed blocks and
    the activations of the resume points are in memory up to one gigabyte, and beyond in the
    survey's folder.

    Attributes:
      blocks: decoder blocks in order.
    """

    def __init__(
        self,
        executor: Executor,
        passes: Sequence[LayerPass],
        batches: Callable[[], list[Batch]],
        option: str,
        *,
        folder: Path,
        probes: Collection[int],
        resume: Iterable[int],
    ) -> None:
        """Prepare; the first trial runs the text through the model.

        Args:
          executor: cut from the model that the survey sees.
          passes: the layer passes that are tried.
          batches: makes the calibration windows, graph inputs set.
          option: name of the option that schedules give.
          folder: for activations that do not fit in memory.
          probes: blocks at whose outputs errors are measured.
          resume: blocks before which the base's activations are saved.

        Raises:
          PassError: the decoder blocks do not follow one another up to a head.
        """
        calibrate = Recipe(passes).calibrate
        self._calibrate = calibrate or Calibrate(precision="float32")  # as a sweep does without
        self._executor = executor
        self._passes = passes
        self._batches = batches
        self._option = option
        self._levels = _levels_of_blocks(self._executor)
        self.blocks = tuple(self._levels)
        self._probes = frozenset(probes)
        self._resume_blocks = {self.blocks[0], *resume}
        self._store = ActivationStore(folder)
        # By an earlier sweep: then the model that the survey sees is not the original one.
        self._is_compressed = any(
            linear.whole is not None or linear.compressed is not None for linear in executor.linears
        )
        self._base: _Trajectory | None = None

    def errors(self, schedule: Schedule, *, base: Schedule, frozen: bool = False) -> Errors:
        """The output errors of ``schedule`` at every probe.

        Args:
          schedule: the one to try.
          base: a schedule that has its first blocks in common with this one and others, maybe
            ``schedule`` itself. Its trajectory is run once and its resume points are kept until
            another base is given.
          frozen: compress only the first block in which ``schedule`` differs from ``base``; later
            blocks keep the base's weights. This saves solving them, and ignores how far they would
            compensate.
        """
        trajectory = self._follow(base)
        first = self._first_difference(schedule, trajectory.schedule)
        if first is None:
            return trajectory.errors
        errors = _errors_before(first, trajectory.errors)
        settled = {
            block: trajectory.compressed.get(block, {})
            for block in self.blocks
            if block < first or (frozen and block > first)
        }
        self._run(first, schedule, settled, self._measure_into(errors))
        return errors

    @property
    def compressed(self) -> _Linears:
        """The compressed linears of the last base, by name."""
        blocks = {} if self._base is None else self._base.compressed
        return {name: linear for linears in blocks.values() for name, linear in linears.items()}

    def __enter__(self) -> Self:
        """Delete what a killed run has left in the survey's folder."""
        self._store.clear()
        return self

    def __exit__(self, *_: object) -> None:
        """Delete the files in the survey's folder."""
        self._store.clear()

    # --- trajectories -----------------------------------------------------------------------------

    def _follow(self, schedule: Schedule) -> _Trajectory:
        """Make ``schedule`` the base: run it and save its resume points, unless it is the base."""
        last = self._base or self._follow_original()
        # Resume points of the last base are overwritten from here on.
        self._base = None
        first = self._first_difference(schedule, last.schedule)
        if first is None:
            self._base = last
            return last
        compressed = {block: kept for block, kept in last.compressed.items() if block < first}
        settled = {block: compressed.get(block, {}) for block in self.blocks if block < first}
        base = _Trajectory(schedule, compressed, _errors_before(first, last.errors))
        measure = self._measure_into(base.errors)
        base.compressed |= self._run(
            first, schedule, settled, measure, save_before=self._resume_blocks
        )
        self._base = base
        return base

    def _follow_original(self) -> _Trajectory:
        """Run the model as it is and save the original model's outputs at the probes."""
        batches = self._batches()
        self._executor.start(batches)
        originals = _copies(batches) if self._is_compressed else batches
        self._save(self.blocks[0], _State(batches, originals))
        trajectory = _Trajectory(None)
        measure = self._measure_into(trajectory.errors)

        def visit(block: int, state: _State) -> None:
            if block in self._probes:
                outputs = [{"output": self._output(block, batch)} for batch in state.originals]
                self._store.put(_key("output", block), outputs)
            measure(block, state)

        self._run(
            self.blocks[0],
            {},
            {block: {} for block in self.blocks},
            visit,
            save_before=self._resume_blocks,
            run_original=self._is_compressed,
        )
        if not self._matches_outputs:
            # Only the probes needed the original model's activations.
            for block in self._resume_blocks:
                self._store.drop(_key("originals", block))
        return trajectory

    def _run(
        self,
        first: int,
        schedule: Schedule,
        settled: Mapping[int, _Linears],
        visit: _Visit,
        *,
        save_before: Collection[int] = (),
        run_original: bool = False,
    ) -> dict[int, _Linears]:
        """Run from the last resume point up to the block ``first`` to the last block.

        Args:
          first: resume points up to this block belong to the schedule's trajectory.
          schedule: the option by block.
          settled: blocks that no pass runs on, with their compressed linears.
          visit: called after every block.
          save_before: blocks before which resume points are saved.
          run_original: run the original model too, even if no pass needs it.

        Returns:
          By block, the linears that passes have run on; empty unless ``save_before`` is given.
        """
        start = max(block for block in self._resume_blocks if block <= first)
        state = self._load(start)
        blocks = self.blocks[self.blocks.index(start) :]
        last_solved = max((block for block in blocks if block not in settled), default=start)
        compressed: dict[int, _Linears] = {}
        for block in blocks:
            if block in save_before:
                self._save(block, state)
            solve = block not in settled and not self._is_left_alone(block, schedule)
            linears = (
                {copy.name: copy for copy in self._copies(block, schedule)}
                if solve
                else settled.get(block, {})
            )
            needs_originals = self._needs_originals and (save_before or block <= last_solved)
            if not run_original and not needs_originals:
                state.originals = state.batches
            elif state.originals is state.batches and linears:
                state.originals = _copies(state.batches)  # this block begins to differ
            self._run_block(block, state, linears, solve=solve, run_original=run_original)
            if solve and save_before:
                compressed[block] = linears
            visit(block, state)
        release_memory()
        return compressed

    def _run_block(
        self, block: int, state: _State, linears: _Linears, *, solve: bool, run_original: bool
    ) -> None:
        """Run ``block`` with ``linears`` in place of the model's linears of the same names.

        Args:
          block: its number.
          state: the activations before the block; afterwards those after it.
          linears: may be empty.
          solve: run the passes on ``linears`` first, group by group.
          run_original: see :meth:`_run`.
        """
        # The 'through: original' of a sweep means the weights that an earlier sweep has left.
        weight_of_original = (
            original_weight if run_original or self._matches_outputs else Linear.weight
        )

        def weight_of(linear: Linear) -> NDArray[np.float32]:
            return linears.get(linear.name, linear).effective_weight()

        for level in self._levels[block]:
            if solve:
                for group in self._executor.levels[level]:
                    self._solve(group, linears, state)
            self._executor.step(level, state.batches, weight_of)
            if state.originals is not state.batches:
                self._executor.step(level, state.originals, weight_of_original)

    def _solve(self, group: LinearGroup, linears: _Linears, state: _State) -> None:
        """Run the passes on the copies of a group's linears."""
        copies = LinearGroup(tuple(linears[linear.name] for linear in group.linears))
        through_original = self._calibrate.through == "original"
        seen = state.originals if through_original else state.batches
        copies.activations = inputs_over(self._executor, group, seen)
        if self._matches_outputs:
            copies.originals = inputs_over(self._executor, group, state.originals)
        copies.products = gram_products(self._executor.precision)
        for layer_pass in self._passes:
            layer_pass.requires(copies)
            with one_thread(layer_pass):
                layer_pass.call(copies)

    @property
    def _needs_originals(self) -> bool:
        return self._calibrate.through == "original" or self._matches_outputs

    @property
    def _matches_outputs(self) -> bool:
        return self._calibrate.match == "outputs"

    # --- errors -----------------------------------------------------------------------------------

    def _measure_into(self, errors: Errors) -> _Visit:
        """A visitor that adds the error at each probe to ``errors``."""

        def visit(block: int, state: _State) -> None:
            if block not in self._probes:
                return
            lost = total = 0.0
            outputs = self._store.batches(_key("output", block))
            for batch, stored in zip(state.batches, outputs, strict=True):
                weights = batch.token_weights.astype(np.float64)
                original = stored["output"].astype(np.float64)
                delta = self._output(block, batch) - original
                lost += float(weights @ np.einsum("tk,tk->t", delta, delta))
                total += float(weights @ np.einsum("tk,tk->t", original, original))
            errors[block] = float(np.sqrt(lost / total)) if total > 0 else float(lost > 0)

        return visit

    def _output(self, block: int, batch: Batch) -> NDArray[np.float32]:
        reader = self._executor.levels[self._levels[block].stop][-1]
        return self._executor.inputs_of(reader, batch)

    # --- schedules --------------------------------------------------------------------------------

    def _first_difference(self, schedule: Schedule, other: Schedule | None) -> int | None:
        """The first block that two schedules compress differently; None if there is none."""
        for block in self.blocks:
            if other is None:
                differs = not self._is_left_alone(block, schedule)
            else:
                differs = schedule.get(block) != other.get(block)
            if differs:
                return block
        return None

    def _is_left_alone(self, block: int, schedule: Schedule) -> bool:
        """Whether the passes only factorise, and factorise no linear of ``block``."""
        changing = [item for item in self._passes if not isinstance(item, Calibrate)]
        if not all(isinstance(item, Factorization) for item in changing):
            return False
        copies = list(self._copies(block, schedule))
        return all(
            (options := layer_pass.options_for(copy)) is None or options.ratio == 0
            for layer_pass in changing
            if isinstance(layer_pass, Factorization)
            for copy in copies
        )

    def _copies(self, block: int, schedule: Schedule) -> Iterator[Linear]:
        """Copies of the linears computed in ``block``, planned by ``schedule``.

        Linears outside the decoder blocks may be among them.
        """
        for level in self._levels[block]:
            for group in self._executor.levels[level]:
                for linear in group.linears:
                    yield self._copy(linear, schedule.get(block))

    def _copy(self, linear: Linear, value: float | None) -> Linear:
        """A copy of ``linear`` on a graph of its own, with ``value`` planned for the option."""
        weight = ir.Value(name=f"{linear.name}.weight", const_value=linear.source)
        shared = linear.input
        entry = ir.Value(name="x", shape=shared.shape, type=shared.type)
        node = ir.node("MatMul", [entry, weight], name=linear.name)
        ir.Graph([entry], node.outputs, nodes=[node], initializers=[weight], name=linear.name)
        plan = linear.plan if value is None else {**linear.plan, self._option: value}
        record = replace(linear.record, errors=dict(linear.record.errors), notes=[])
        return replace(linear, node=node, plan=dict(plan), record=record)

    # --- resume points ----------------------------------------------------------------------------

    def _save(self, block: int, state: _State) -> None:
        """Save the resume point before ``block``."""
        self._store.put(_key("batches", block), [batch.values for batch in state.batches])
        if state.originals is state.batches:
            self._store.drop(_key("originals", block))
        else:
            self._store.put(_key("originals", block), [batch.values for batch in state.originals])

    def _load(self, block: int) -> _State:
        """The resume point before ``block``."""
        batches = self._read(_key("batches", block))
        originals = _key("originals", block)
        return _State(batches, self._read(originals) if originals in self._store else batches)

    def _read(self, key: str) -> list[Batch]:
        # Masks and token weights depend on the text alone, not on the schedule.
        return [
            replace(batch, values=values)
            for batch, values in zip(self._batches(), self._store.batches(key), strict=True)
        ]


def _levels_of_blocks(executor: Executor) -> dict[int, range]:
    """The executor's levels of each decoder block, in order.

    Levels before the first block count as part of it.
    """
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for level, groups in enumerate(executor.levels):
        for group in groups:
            for linear in group.linears:
                if linear.block is not None:
                    first.setdefault(linear.block, level)
                    last[linear.block] = level
    blocks = sorted(first)
    if not blocks:
        raise PassError("the model", "has no linear in a decoder block")
    ends = [*(first[block] for block in blocks[1:]), executor.head_level]
    for block, end in zip(blocks, ends, strict=True):
        if last[block] >= end:
            raise PassError(
                f"decoder block {block}",
                "does not end before the next one, or the head, begins: such a model cannot be "
                "tried block by block",
            )
    starts = [0, *ends[:-1]]
    return {b: range(start, end) for b, start, end in zip(blocks, starts, ends, strict=True)}


def _errors_before(block: int, errors: Errors) -> Errors:
    """The errors at probes before ``block``, which a change of ``block`` does not affect."""
    return {probe: error for probe, error in errors.items() if probe < block}


def _copies(batches: Sequence[Batch]) -> list[Batch]:
    return [replace(batch, values=dict(batch.values)) for batch in batches]


def _key(kind: str, block: int) -> str:
    return f"{kind}-{block:04d}"
