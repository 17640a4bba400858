"""The passes of a build as one object."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from eoracc.passes.base import LayerPass, Pass
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.compensate.base import Compensation
from eoracc.passes.compression import Compression
from eoracc.passes.factorize.base import Factorization
from eoracc.passes.prune.pruning import Pruning
from eoracc.passes.quantize.quantization import Quantization
from eoracc.passes.survey import SurveyPass

__all__ = ["Recipe"]

_P = TypeVar("_P", bound=Pass)


@dataclass(frozen=True)
class Recipe:
    """Passes in the order in which they run: of a build, of one of its sweeps, of a method.

    Attributes:
      passes: in the order of model.yaml.
    """

    passes: Sequence[Pass]

    @property
    def calibrate(self) -> Calibrate | None:
        """The first pass that takes statistics."""
        return self._first(Calibrate)

    @property
    def last_calibrate(self) -> Calibrate | None:
        """The last pass that takes statistics."""
        return Recipe(self.passes[::-1]).calibrate

    @property
    def compression(self) -> Compression | None:
        """The pass that stores weights in fewer bytes."""
        return self._first(Compression)

    @property
    def stores_codes(self) -> bool:
        """Whether a pass stores weights in codes, which adapters build on."""
        return any(isinstance(item, Compression) and item.stores_codes for item in self.passes)

    @property
    def quantization(self) -> Quantization | None:
        """The pass that stores weights in few bits, with options that a survey may plan."""
        return self._first(Quantization)

    @property
    def pruning(self) -> Pruning | None:
        """The pass that sets weights to zero."""
        return self._first(Pruning)

    @property
    def compensations(self) -> tuple[Compensation, ...]:
        """The passes that add low-rank factors."""
        return tuple(item for item in self.passes if isinstance(item, Compensation))

    @property
    def factorization(self) -> Factorization | None:
        """The first pass that replaces weights by products."""
        return self._first(Factorization)

    @property
    def folder_limit(self) -> int | None:
        """The most bytes that the files of the artifact may take; None for any."""
        surveys = [item for item in self.passes if isinstance(item, SurveyPass)]
        limits = [survey.folder_limit for survey in surveys]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def reads_text(self) -> bool:
        """Whether a pass looks at the calibration text."""
        return any(isinstance(item, Calibrate | SurveyPass) for item in self.passes)

    def stages(self) -> list[tuple[Pass, ...]]:
        """Group the passes by what runs together.

        Consecutive layer passes are one stage, a sweep, until a second 'calibrate' begins another.
        Every other pass is a stage of its own.

        Returns:
          The passes in order, each stage with one pass at least.
        """
        stages: list[tuple[Pass, ...]] = []
        for item in self.passes:
            if stages and _continues(stages[-1], item):
                stages[-1] = (*stages[-1], item)
            else:
                stages.append((item,))
        return stages

    def problems(self) -> Iterator[tuple[tuple[int | str, ...], str]]:
        """Find passes that cannot run where they are.

        Yields:
          The path of the fault, ``(1, "calibrate", "match")``: the position and name of the pass,
          and the option if one is to blame; then what is wrong and the remedy.
        """
        for index, item in enumerate(self.passes):
            for path, problem in item.problems(self.passes[:index]):
                yield (index, item.name, *path), problem
        yield from self._unforeseen()
        yield from self._parted()

    def _unforeseen(self) -> Iterator[tuple[tuple[int | str, ...], str]]:
        """Find a sweep behind the one that a budget of the folder is spent on."""
        limited: SurveyPass | None = None
        sweeps = index = 0
        for members in self.stages():
            first = members[0]
            if isinstance(first, SurveyPass) and first.folder_limit is not None:
                limited, sweeps = first, 0
            elif isinstance(first, LayerPass):
                sweeps += 1
                if limited is not None and sweeps == 2:
                    problem = (
                        f"begins another sweep, whose bytes {limited.name!r} does not foresee in "
                        "its budget of the folder: keep one sweep after it, or give it another "
                        "budget"
                    )
                    yield (index, first.name), problem
            index += len(members)

    def _parted(self) -> Iterator[tuple[tuple[int | str, ...], str]]:
        """Find a quantizing pass that does not know, or knows too late, of what has been pruned."""
        pruning = self.pruning
        for index, item in enumerate(self.passes):
            if pruning is None or not isinstance(item, Quantization):
                continue
            between = self.passes[self.passes.index(pruning) + 1 : index]
            for other in between:
                if isinstance(other, Calibrate | Compensation):
                    problem = (
                        f"must follow {pruning.name!r} at once, to solve for codes and zeros "
                        f"together: take {other.name!r} between them away or move it"
                    )
                    yield (index, item.name), problem
                    break

    def _first(self, kind: type[_P]) -> _P | None:
        return next((item for item in self.passes if isinstance(item, kind)), None)


def _continues(stage: Sequence[Pass], item: Pass) -> bool:
    """Whether ``item`` runs in the same sweep as the passes of ``stage``."""
    if not (isinstance(item, LayerPass) and isinstance(stage[-1], LayerPass)):
        return False
    return not isinstance(item, Calibrate) or Recipe(stage).calibrate is None
