"""Surveys: passes that plan, and what the compiler lets them ask for.

A survey sees the whole model and the calibration text before the sweep that it steers. The
compiler implements :class:`SurveyContext`; nothing here knows how.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from eoracc.passes.base import LayerPass, Pass
from eoracc.passes.calibrate import AskedPrecision, Calibrate
from eoracc.passes.graph.embeddings import Embedding
from eoracc.passes.graph.linears import Linear, LinearGroup
from eoracc.passes.progress import Progress

__all__ = [
    "CalibrationWindows",
    "Errors",
    "Schedule",
    "SurveyContext",
    "SurveyPass",
    "Trials",
]

Schedule = Mapping[int, float]
"""The value of one option by decoder block; missing blocks keep the passes' own value."""

Errors = dict[int, float]
"""Relative error of the output, by decoder block: ``||Y - Y~||_F / ||Y||_F`` over the tokens."""


class CalibrationWindows(Protocol):
    """The calibration text."""

    @property
    def tokens(self) -> int:
        """Tokens, padding left out."""

    def counts(self, vocabulary: int) -> NDArray[np.float64]:
        """How often each token occurs, by weight, padding left out: ``[vocabulary]``."""


class Trials(Protocol):
    """Runs the passes of the next sweep on copies, with one option varying by decoder block."""

    def errors(self, schedule: Schedule, *, base: Schedule, frozen: bool = False) -> Errors:
        """The output errors of ``schedule`` at the probes.

        Args:
          schedule: the option by decoder block.
          base: a schedule that has its first blocks in common with this one, maybe ``schedule``
            itself. Its activations are kept until another base is given.
          frozen: compress only the first block in which ``schedule`` differs from ``base``; later
            blocks keep the base's weights.
        """


class SurveyContext(Protocol):
    """One survey's view of a build.

    Attributes:
      linears: of the graph, in execution order.
      embeddings: of the graph, likewise.
      windows: the calibration text; None where model.yaml gives none.
      following: the layer passes of the next sweep, in order.
      folder: where the survey may keep results that took long; it lasts until the build succeeds.
      progress: shown a phase of the survey's own.
    """

    @property
    def linears(self) -> Sequence[Linear]: ...  # noqa: D102 - see above

    @property
    def embeddings(self) -> Sequence[Embedding]: ...  # noqa: D102

    @property
    def windows(self) -> CalibrationWindows | None: ...  # noqa: D102

    @property
    def following(self) -> Sequence[LayerPass]: ...  # noqa: D102

    @property
    def folder(self) -> Path: ...  # noqa: D102

    @property
    def progress(self) -> Progress: ...  # noqa: D102

    def other_bytes(self, plans: Mapping[str, Mapping[str, Any]]) -> int:
        """Bytes of the folder that the build will write, beside what ``plans`` decide.

        Graph, tokenizer, library, records, padding, and linears and tables without a plan. The
        records, which depend on the results, count with a bound.

        Args:
          plans: options by the names of linears and embeddings. Their weights and factors, as they
            are stored in tiles, do not count.

        Raises:
          ConfigError: no folder is written.
        """

    def walk(self, name: str, calibrate: Calibrate) -> Iterator[LinearGroup]:
        """Every group of linears of a copy of the graph, in execution order, with its Gram.

        Linears and Grams are those of the original model. The forward pass ignores whatever the
        caller does to a group's linears.

        Args:
          name: of the phase that is shown.
          calibrate: takes the Grams, with its precision.
        """

    def each_group(
        self, name: str, calibrate: Calibrate, make: Callable[[LinearGroup], list[Any]]
    ) -> list[Any]:
        """Concatenate what ``make`` returns for each group of :meth:`walk`.

        Args:
          name: as for :meth:`walk`.
          calibrate: likewise.
          make: JSON-able results of a group. An interrupted survey resumes after the last group.
        """

    def remember(
        self, name: str, make: Callable[[], dict[str, Any]], *, files: str = ""
    ) -> dict[str, Any]:
        """The result of ``make``, cached in :attr:`folder` across interrupted builds.

        Args:
          name: of the result.
          make: computes it; JSON must be able to hold it.
          files: a folder in :attr:`folder` whose .safetensors files, which ``make`` writes, belong
            to the result: it is computed again where one of them is damaged.
        """

    def write_arrays(self, name: str, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """Write ``name.safetensors`` in :attr:`folder`, inside of :meth:`remember`."""

    def trials(
        self, option: str, *, probes: Collection[int], resume: Iterable[int]
    ) -> AbstractContextManager[Trials]:
        """Prepare trials of schedules of ``option``.

        Args:
          option: name of an option of the passes in :attr:`following`.
          probes: decoder blocks at whose outputs errors are measured.
          resume: decoder blocks before which the activations of the base are saved.

        Raises:
          PassError: the decoder blocks do not follow one another up to a head.
        """

    def output_gradients(
        self,
        names: Sequence[str],
        *,
        folder: Path,
        labels: Literal["model", "text"],
        draws: int,
        seed: int,
        precision: AskedPrecision,
        embedding: str | None = None,
    ) -> None:
        """Write ``folder/NAME.safetensors`` for each linear of the original model in ``names``.

        Each file has ``output_gram``, the Gram of the gradients of the model's predictions at the
        linear's output (``float32 [N, N]``), and ``token_weights``, the squared norms of these
        gradients (``float32 [tokens]``, padding included).

        Args:
          names: modules of the original model.
          folder: is created.
          labels: whose next token a gradient is of: drawn from the model, or the text's own.
          draws: labels drawn for each token.
          seed: of the draws.
          precision: of the forward and backward passes.
          embedding: a name for the same of what enters the first decoder block; None for none.
        """


class SurveyPass(Pass):
    """A pass that looks at the whole model and the calibration text, and changes no weight.

    Its results steer later passes: options of single linears through
    :attr:`~eoracc.passes.graph.linears.Linear.plan`, or weights of output errors.
    """

    decided_anew: ClassVar[tuple[str, ...]] = ()
    """Options that apply to what the survey has kept: other values need no new survey. What they
    decide must be in the plans, which the sweeps that follow depend on."""

    @property
    def folder_limit(self) -> int | None:
        """The most bytes that the files of the artifact may take; None for any."""
        return None

    @abstractmethod
    def survey(self, context: SurveyContext) -> dict[str, Any]:
        """Look, and put the results on the linears.

        Returns:
          The JSON-able entry of report.json.
        """

    @classmethod
    def summary(cls, found: Mapping[str, Any]) -> str:
        """One or two clauses for the console on the result of :meth:`survey`; empty for nothing."""
        del found
        return ""
