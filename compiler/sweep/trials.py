"""Try a sweep's passes with one option differing by decoder block, and measure what it costs.

A *course* says for every decoder block what one option of the passes is in it: ``ratio`` 0 in the
first ten and 0.4 in the others, say. What a sweep makes of a block depends on the blocks before it
only. So a trial takes up the forward pass where its course departs from one whose activations have
been kept, and goes on from there through the passes as a sweep would.

Nothing of it reaches the graph: trials compress copies of linears, each on a graph of its own.
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
from eoracc.passes.survey import Course, Errors
from eoracc.runtime.memory import release_memory

__all__ = ["Trials"]

_Linears = Mapping[str, Linear]


@dataclass(eq=False)
class _Point:
    """A forward pass that has come to a decoder block.

    Attributes:
      batches: through the compressed prefix.
      originals: through the original one; the very same list where nothing tells them apart.
    """

    batches: list[Batch]
    originals: list[Batch]


_Visit = Callable[[int, _Point], None]


@dataclass(eq=False)
class _Gone:
    """A course that has been gone to its end.

    Attributes:
      course: None for the model as it is.
      solved: what became of the linears of each block that was not left alone.
      errors: at the probes.
    """

    course: Course | None
    solved: dict[int, _Linears] = field(default_factory=dict)
    errors: Errors = field(default_factory=dict)


class Trials:
    """Tries courses on the calibration text.

    Errors are those of the original model's outputs. The output of a block is what the next block's
    first linears multiply, and that of the last block what the head does: both are taken after the
    norm that stands there.

    Memory: the activations of one sweep (two where ``calibrate`` asks for the original model's) and
    the compressed weights of the course that is kept. The original outputs of the probed blocks and
    the activations kept at the blocks of ``resume`` are in memory up to one gigabyte, and beyond in
    the survey's folder.

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
        """Prepare; the text is gone through when the first trial asks for it.

        Args:
          executor: cut from the model that the survey sees.
          passes: the layer passes that are tried.
          batches: makes the calibration windows, graph inputs set.
          option: what courses are about, an option's name.
          folder: for activations that do not fit in memory.
          probes: blocks whose outputs errors are measured at.
          resume: blocks before which activations of the course that was kept last are kept.

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
        self._resume = {self.blocks[0], *resume}
        self._store = ActivationStore(folder)
        # Of an earlier sweep's: the model that the survey finds is not the original one.
        self._is_compressed = any(
            one.whole is not None or one.compressed is not None for one in executor.linears
        )
        self._gone: _Gone | None = None

    def errors(self, course: Course, *, along: Course, frozen: bool = False) -> Errors:
        """What ``course`` costs at every probe.

        Args:
          course: what is tried.
          along: a course that this one and others depart from, maybe ``course`` itself. It is gone
            to its end once, and activations on the way are kept until another one is given.
          frozen: compress only the first block in which ``course`` departs from ``along``; those
            after it stay what ``along`` made of them. That saves solving them, and misses what
            they would make good.
        """
        gone = self._go(along)
        departs = self._departure(course, gone.course)
        if departs is None:
            return gone.errors
        found = _before(departs, gone.errors)
        fixed = {
            block: gone.solved.get(block, {})
            for block in self.blocks
            if block < departs or (frozen and block > departs)
        }
        self._walk(departs, course, fixed, self._measure(found))
        return found

    @property
    def compressed(self) -> _Linears:
        """By name, what became of linears along the course that was given last as ``along``."""
        solved = {} if self._gone is None else self._gone.solved
        return {name: one for linears in solved.values() for name, one in linears.items()}

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Delete what was written to the survey's folder."""
        self._store.clear()

    def _go(self, course: Course) -> _Gone:
        """Go ``course`` to its end and keep what others start from, unless that has been done."""
        before = self._gone or self._go_original()
        # Activations of the old course are written over on the way: it is gone from here on.
        self._gone = None
        departs = self._departure(course, before.course)
        if departs is not None:
            solved = {block: kept for block, kept in before.solved.items() if block < departs}
            fixed = {block: solved.get(block, {}) for block in self.blocks if block < departs}
            gone = _Gone(course, solved, _before(departs, before.errors))
            visit = self._measure(gone.errors)
            solved |= self._walk(departs, course, fixed, visit, keep=self._resume)
            before = gone
        self._gone = before
        return before

    def _go_original(self) -> _Gone:
        """Go through the model as it is found; keep the original one's outputs at the probes."""
        batches = self._batches()
        self._executor.start(batches)
        originals = _copied(batches) if self._is_compressed else batches
        self._keep(self.blocks[0], _Point(batches, originals))
        found: Errors = {}
        measure = self._measure(found)

        def visit(block: int, point: _Point) -> None:
            if block in self._probes:
                kept = [{"output": self._output(block, batch)} for batch in point.originals]
                self._store.put(_key("output", block), kept)
            measure(block, point)

        fixed: Mapping[int, _Linears] = {block: {} for block in self.blocks}
        self._walk(self.blocks[0], {}, fixed, visit, keep=self._resume, beside=self._is_compressed)
        if not self._matches_outputs:
            # Nobody asks for what the original model computes but the probes.
            for block in self._resume:
                self._store.drop(_key("originals", block))
        return _Gone(None, errors=found)

    def _walk(
        self,
        departs: int,
        course: Course,
        fixed: Mapping[int, _Linears],
        visit: _Visit,
        *,
        keep: Collection[int] = (),
        beside: bool = False,
    ) -> dict[int, _Linears]:
        """Go from the last point kept before the block ``departs`` to the last block.

        Args:
          departs: activations were kept along the same course up to there.
          course: the option by block.
          fixed: blocks that no pass runs on, with those of their linears that are not the model's.
          visit: called at the end of every block with its number and what has come there.
          keep: blocks before which activations are to be kept.
          beside: go through the original model too, though no pass asks for it.

        Returns:
          The linears of each block that passes have run on, where activations were kept.
        """
        start = max(block for block in self._resume if block <= departs)
        point = self._take_up(start)
        ahead = self.blocks[self.blocks.index(start) :]
        last = max((block for block in ahead if block not in fixed), default=start)
        solved: dict[int, _Linears] = {}
        for block in ahead:
            if block in keep:
                self._keep(block, point)
            if not beside and not (self._needs_originals and (keep or block <= last)):
                point.originals = point.batches
            elif point.originals is point.batches and not self._is_original(block, course, fixed):
                point.originals = _copied(point.batches)
            if self._is_original(block, course, fixed):
                self._step(block, point, {}, beside)
            elif block in fixed:
                self._step(block, point, fixed[block], beside)
            else:
                copies = {one.name: self._copy(one, course.get(block)) for one in self._in(block)}
                self._step(block, point, copies, beside, solve=True)
                if keep:
                    solved[block] = copies
            visit(block, point)
        release_memory()
        return solved

    def _is_original(self, block: int, course: Course, fixed: Mapping[int, _Linears]) -> bool:
        """Whether ``block`` computes what it does in the model as it is."""
        return not fixed[block] if block in fixed else self._is_left_alone(block, course)

    def _step(
        self, block: int, point: _Point, linears: _Linears, beside: bool, *, solve: bool = False
    ) -> None:
        """Go through ``block`` with ``linears`` in place of the model's of their names."""
        # What a sweep with 'through: original' takes for it is what an earlier sweep has left.
        original = original_weight if beside or self._matches_outputs else Linear.weight
        seen = point.originals if self._calibrate.through == "original" else point.batches
        matched = point.originals if self._matches_outputs else None

        def weight_of(linear: Linear) -> NDArray[np.float32]:
            return linears.get(linear.name, linear).effective_weight()

        for level in self._levels[block]:
            for group in self._executor.levels[level] if solve else ():
                self._solve(group, linears, seen, matched)
            self._executor.step(level, point.batches, weight_of)
            if point.originals is not point.batches:
                self._executor.step(level, point.originals, original)

    def _solve(
        self,
        group: LinearGroup,
        linears: _Linears,
        seen: Sequence[Batch],
        matched: Sequence[Batch] | None,
    ) -> None:
        """Run the passes on the copies of a group's linears."""
        on_trial = LinearGroup(tuple(linears[one.name] for one in group.linears))
        on_trial.activations = inputs_over(self._executor, group, seen)
        if matched is not None:
            on_trial.originals = inputs_over(self._executor, group, matched)
        on_trial.products = gram_products(self._executor.precision)
        for layer_pass in self._passes:
            layer_pass.requires(on_trial)
            with one_thread(layer_pass):
                layer_pass.call(on_trial)

    @property
    def _needs_originals(self) -> bool:
        return self._calibrate.through == "original" or self._matches_outputs

    @property
    def _matches_outputs(self) -> bool:
        return self._calibrate.match == "outputs"

    def _measure(self, found: Errors) -> _Visit:
        """What puts the errors at the probes into ``found``."""

        def visit(block: int, point: _Point) -> None:
            if block not in self._probes:
                return
            lost = whole = 0.0
            originals = self._store.batches(_key("output", block))
            for batch, kept in zip(point.batches, originals, strict=True):
                weights = batch.token_weights.astype(np.float64)
                original = kept["output"].astype(np.float64)
                delta = self._output(block, batch) - original
                lost += float(weights @ np.einsum("tk,tk->t", delta, delta))
                whole += float(weights @ np.einsum("tk,tk->t", original, original))
            found[block] = float(np.sqrt(lost / whole)) if whole > 0 else float(lost > 0)

        return visit

    def _output(self, block: int, batch: Batch) -> NDArray[np.float32]:
        reader = self._executor.levels[self._levels[block].stop][-1]
        return self._executor.inputs_of(reader, batch)

    def _in(self, block: int) -> Iterator[Linear]:
        """The linears that are computed in ``block``, some of no block maybe among them."""
        for level in self._levels[block]:
            for group in self._executor.levels[level]:
                yield from group.linears

    def _departure(self, course: Course, other: Course | None) -> int | None:
        """The first block in which two courses differ; None for none."""
        for block in self.blocks:
            if other is None:
                differs = not self._is_left_alone(block, course)
            else:
                differs = course.get(block) != other.get(block)
            if differs:
                return block
        return None

    def _is_left_alone(self, block: int, course: Course) -> bool:
        """Whether all that passes do in ``block`` is to factorise nothing of it."""
        changing = [one for one in self._passes if not isinstance(one, Calibrate)]
        if not all(isinstance(one, Factorization) for one in changing):
            return False
        copies = [self._copy(one, course.get(block)) for one in self._in(block)]
        return all(
            (options := layer_pass.options_for(one)) is None or options.ratio == 0
            for layer_pass in changing
            if isinstance(layer_pass, Factorization)
            for one in copies
        )

    def _copy(self, linear: Linear, value: float | None) -> Linear:
        """A copy of ``linear`` on a graph of its own, planned as a course has it."""
        weight = ir.Value(name=f"{linear.name}.weight", const_value=linear.source)
        shared = linear.input
        entry = ir.Value(name="x", shape=shared.shape, type=shared.type)
        node = ir.node("MatMul", [entry, weight], name=linear.name)
        ir.Graph([entry], node.outputs, nodes=[node], initializers=[weight], name=linear.name)
        plan = linear.plan if value is None else {**linear.plan, self._option: value}
        return replace(linear, node=node, plan=dict(plan), errors=dict(linear.errors), notes=[])

    def _keep(self, block: int, point: _Point) -> None:
        self._store.put(_key("batches", block), [batch.values for batch in point.batches])
        if point.originals is point.batches:
            self._store.drop(_key("originals", block))
        else:
            self._store.put(_key("originals", block), [one.values for one in point.originals])

    def _take_up(self, block: int) -> _Point:
        batches = self._read(_key("batches", block))
        originals = _key("originals", block)
        return _Point(batches, self._read(originals) if originals in self._store else batches)

    def _read(self, key: str) -> list[Batch]:
        # Masks and token weights are those of the text, whatever has become of its activations.
        return [
            replace(batch, values=values)
            for batch, values in zip(self._batches(), self._store.batches(key), strict=True)
        ]


def _levels_of_blocks(executor: Executor) -> dict[int, range]:
    """The executor's levels that each decoder block takes up, in order.

    What stands before the first block counts as part of it.
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


def _before(block: int, errors: Errors) -> Errors:
    """The errors at the probes that a departure in ``block`` does not reach."""
    return {probe: error for probe, error in errors.items() if probe < block}


def _copied(batches: Sequence[Batch]) -> list[Batch]:
    return [replace(batch, values=dict(batch.values)) for batch in batches]


def _key(kind: str, block: int) -> str:
    return f"{kind}-{block:04d}"
