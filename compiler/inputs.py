"""Everything that a build reads: the checkpoint, its tokenizer, and all texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eoracc.compiler.adapters.solve import Task, load_task
from eoracc.compiler.chat.ship import ChatTemplates
from eoracc.compiler.config.sections import BuildConfig
from eoracc.compiler.frontend.load import LoadedModel, load
from eoracc.compiler.frontend_check.check import check_frontend
from eoracc.compiler.imported.read import CompressedCheckpoint, read_compressed
from eoracc.compiler.observe.spans import warn
from eoracc.compiler.report.content import WarningReport
from eoracc.compiler.report.texts import text_warnings
from eoracc.compiler.targets.tensorrt.check_model import check_model
from eoracc.compiler.targets.tokens import ShippedTokenizer, ship_tokenizer
from eoracc.compiler.text.sources import read_documents
from eoracc.compiler.text.windows import (
    Windows,
    calibration_windows,
    checking_window,
    evaluation_windows,
)
from eoracc.passes.graph import spec
from eoracc.passes.progress import Progress
from eoracc.runtime.memory import release_memory

__all__ = ["Inputs", "read_inputs"]


@dataclass(frozen=True, eq=False)
class Inputs:
    """Everything that a build reads.

    Attributes:
      loaded: the checkpoint.
      imported: the compressed checkpoint that is taken over; None where there is none.
      chat: its chat templates.
      tokenizer: as it is shipped.
      held_out: text for fidelity and parity.
      calibration: text for statistics; None where no pass takes any.
      checking: held-out text that factors are checked on; None where there is none.
      tasks: the adapters of model.yaml with their texts.
      warnings: on the texts.
    """

    loaded: LoadedModel
    imported: CompressedCheckpoint | None
    chat: ChatTemplates
    tokenizer: ShippedTokenizer
    held_out: Windows
    calibration: Windows | None
    checking: Windows | None
    tasks: list[Task]
    warnings: list[WarningReport]


def read_inputs(
    config: BuildConfig, config_dir: Path, work: Path, artifact: Path, progress: Progress
) -> Inputs:
    """Read the checkpoint, check its graph, write its tokenizer, and read all texts.

    Args:
      config: of the build.
      config_dir: what its relative paths are relative to.
      work: folder for a converted checkpoint.
      artifact: folder that the tokenizer is written to.
      progress: shown the phases.

    Raises:
      EoraccError: bad input, in one sentence.
    """
    with progress.phase("load", 1) as phase:
        loaded = load(
            config.model_source(config_dir), work=work, trust_remote_code=config.trust_remote_code
        )
        phase.advance()
    check_model(config, loaded)
    source = config.compressed_source(config_dir)
    imported = None if source is None else read_compressed(source, loaded, work=work / "compressed")
    spec.check(loaded.model, spec.Stage.FRONTEND, after="the frontend")
    check_frontend(loaded, progress)
    tokenizer, limits = loaded.tokenizer(), loaded.limits()
    held_out = evaluation_windows(
        config.calibration, config.verify, tokenizer, config_dir=config_dir, limits=limits
    )
    shipped = ship_tokenizer(
        loaded,
        tokenizer,
        artifact,
        held_out=read_documents(
            config.verify.held_out_text(config.calibration),
            tokenizer,
            config_dir,
            split_text=False,
            separator="",
        ),
    )
    calibration = (
        calibration_windows(
            config.calibration, config.verify, tokenizer, config_dir=config_dir, limits=limits
        )
        if config.calibration is not None and config.recipe.reads_text
        else None
    )
    warnings = text_warnings(calibration, held_out)
    for warning in warnings:
        warn(warning.code, warning.message, warning.linear, warning.figures)
    checking = (
        None
        if calibration is None
        else checking_window(
            config.calibration, config.verify, tokenizer, config_dir=config_dir, limits=limits
        )
    )
    tasks = [
        load_task(name, adapter, tokenizer, config_dir=config_dir, limits=limits)
        for name, adapter in config.adapters.items()
    ]
    release_memory()
    return Inputs(
        loaded=loaded,
        imported=imported,
        chat=ChatTemplates.of(tokenizer),
        tokenizer=shipped,
        held_out=held_out,
        calibration=calibration,
        checking=checking,
        tasks=tasks,
        warnings=warnings,
    )
