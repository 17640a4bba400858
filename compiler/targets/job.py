"""The input and the result of a target's writer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eoracc.compiler.config.sections import BuildConfig
from eoracc.compiler.frontend.load import LoadedModel
from eoracc.compiler.stage_graphs import StageGraphs
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.sweep.pipeline import Compressed
from eoracc.compiler.targets.artifact import ArtifactWriter
from eoracc.compiler.text.windows import Windows
from eoracc.passes.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, Literal

    from eoracc.compiler.report.content import WarningReport
    from eoracc.plugins.adapters import AdapterSlots

__all__ = ["Emitted", "Job"]


@dataclass(frozen=True, eq=False)
class Job:
    """A compressed model to write for a target.

    Attributes:
      config: the whole model.yaml.
      loaded: the checkpoint.
      compressed: the graph after all passes. A target lowers a graph of its own that shares its
        tensors, and leaves this one as it is.
      original: the graph before any pass, for the parity record to show what compression changed.
      held_out: text for the parity record to take its prompts from.
      writer: collects the artifact's files.
      work: a folder for what takes long; it stays until the build has succeeded.
      progress: shown the phases.
      graphs: given the lowered graph.
    """

    config: BuildConfig
    loaded: LoadedModel
    compressed: Compressed
    original: Executor
    held_out: Windows
    writer: ArtifactWriter
    work: Path
    progress: Progress
    graphs: StageGraphs


@dataclass(frozen=True, eq=False)
class Emitted:
    """The result of writing a target.

    Attributes:
      slots: where its graph takes adapters; None where it takes none.
      report: of what was built, for report.json, in JSON's terms; empty where there is nothing to
        say beyond the files.
      warnings: where it is not what model.yaml asks for.
      accuracy_level: of its linears, where it has one.
    """

    slots: AdapterSlots | None
    report: Mapping[str, Any]
    warnings: Sequence[WarningReport] = ()
    accuracy_level: Literal[0, 4] | None = None
