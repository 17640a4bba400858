"""Run a build's passes on a loaded model: surveys, sweeps over the blocks, changes of the graph.

The passes of model.yaml fall into stages. Consecutive layer passes are one stage, a sweep, until a
second ``calibrate``, which begins another: its statistics are those of the graph that the first one
left, whose factorised linears are two linears each. Every other pass is a stage of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eoracc import __version__
from eoracc.compiler.config.sections import BuildConfig
from eoracc.compiler.frontend.load import LoadedModel
from eoracc.compiler.imported.read import CompressedCheckpoint
from eoracc.compiler.observe.spans import span
from eoracc.compiler.progress import PassTimes, PhaseTime
from eoracc.compiler.stage_graphs import StageGraphs
from eoracc.compiler.sweep.backbone import Backbone
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.sweep.products import resolve_precision
from eoracc.compiler.sweep.resume import SweepState
from eoracc.compiler.sweep.run import Comparisons, run_sweep
from eoracc.compiler.sweep.survey import FolderBytes, Survey, calibration_batches
from eoracc.compiler.text.windows import Windows
from eoracc.errors import ConfigError
from eoracc.passes.base import LayerPass, ModelPass, Pass
from eoracc.passes.compensate.base import compensation_solver
from eoracc.passes.compression import Compression
from eoracc.passes.graph import spec
from eoracc.passes.graph.embeddings import find_embeddings
from eoracc.passes.graph.linears import find_again, find_linears
from eoracc.passes.overrides import Overridable
from eoracc.passes.progress import Progress
from eoracc.passes.quantize.embedding_tables import quantize_embedding_tables
from eoracc.passes.recipe import Recipe
from eoracc.passes.survey import SurveyPass
from eoracc.printable import quoted

__all__ = ["Compressed", "compress", "stage_key"]


@dataclass(eq=False)
class Compressed(Backbone):
    """The graph after its passes.

    Attributes:
      comparisons: factors that are scored and not shipped.
      surveys: the result of each survey, ``{"pass": name, ...}``, for the report.
      times: of the passes, in order; an interrupted build counts from where it resumed.
    """

    comparisons: Comparisons = field(default_factory=dict)
    surveys: list[dict[str, Any]] = field(default_factory=list)
    times: list[PhaseTime] = field(default_factory=list)


def compress(
    config: BuildConfig,
    loaded: LoadedModel,
    calibration: Windows | None,
    folder: Path,
    progress: Progress,
    *,
    held_out: Windows | None = None,
    graphs: StageGraphs | None = None,
    folder_bytes: FolderBytes | None = None,
    surveys: Path | None = None,
    imported: CompressedCheckpoint | None = None,
) -> Compressed:
    """Run the passes of ``config`` on ``loaded.model``, which they change in place.

    Args:
      config: its passes and ``verify.compare``.
      loaded: the model.
      calibration: the text that statistics are taken over; None where no pass asks for any.
      folder: where finished work is kept, for a build that is interrupted.
      progress: shown the phases of each stage.
      held_out: text on which factors must not do harm; None ships all factors.
      graphs: given the graph after each stage.
      folder_bytes: the bytes of the folder that a compressed graph will be written to; None where
        none is written.
      surveys: where the results of surveys are kept; None keeps them in ``folder``, too.
      imported: the compressed checkpoint that a pass takes over; None where none does.

    Raises:
      PassError: a pass cannot do what is asked of it.
      ConfigError: an override matches no linear.
    """
    model = loaded.model
    compressed = Compressed(model, find_linears(model), find_embeddings(model))
    if imported is not None:
        for linear in compressed.linears:
            linear.imported = imported.weights.get(linear.name)
    graphs, times = graphs or StageGraphs(), PassTimes()
    all_stages = config.recipe.stages()
    plans: list[dict[str, dict[str, Any]]] = []
    surveys = folder if surveys is None else surveys
    for position, members in enumerate(all_stages):
        key = stage_key(
            config,
            loaded,
            members,
            position,
            calibration,
            held_out,
            plans,
            imported=None if imported is None else imported.digest,
        )
        first = members[0]
        with span("+".join(item.name for item in members), "stage", position=position):
            if isinstance(first, SurveyPass):
                context = Survey(
                    model=model,
                    linears=compressed.linears,
                    embeddings=compressed.embeddings,
                    windows=calibration,
                    following=_next_sweep(all_stages[position + 1 :]),
                    checkpoint=loaded.folder,
                    trust_remote_code=loaded.trust_remote_code,
                    folder=surveys / str(position),
                    key=key,
                    progress=progress,
                    folder_bytes=folder_bytes,
                )
                with times.measure(first):
                    compressed.surveys.append({"pass": first.name, **first.survey(context)})
                plans.append(_plans(compressed))
            elif isinstance(first, ModelPass):
                with times.measure(first):
                    first.call(model)
                spec.check(model, spec.Stage.FRONTEND, after=first.name)
                compressed.linears = find_linears(model)
                graphs.keep(first.name, model)
            else:
                passes = [item for item in members if isinstance(item, LayerPass)]
                state = SweepState(folder / str(position), key)
                _sweep(
                    config,
                    compressed,
                    passes,
                    calibration,
                    state,
                    progress,
                    times,
                    held_out=held_out,
                )
                graphs.keep("+".join(item.name for item in passes), model)
    compressed.times = times.times()
    return compressed


def _plans(compressed: Compressed) -> dict[str, dict[str, Any]]:
    """What surveys have decided for each linear and table."""
    tables = {table.name: dict(table.plan) for table in compressed.embeddings if table.plan}
    linears = {linear.name: dict(linear.plan) for linear in compressed.linears if linear.plan}
    return linears | tables


def _next_sweep(following: Sequence[Sequence[Pass]]) -> list[LayerPass]:
    for members in following:
        if isinstance(members[0], LayerPass):
            return [item for item in members if isinstance(item, LayerPass)]
    return []


def _sweep(
    config: BuildConfig,
    compressed: Compressed,
    passes: Sequence[LayerPass],
    calibration: Windows | None,
    state: SweepState,
    progress: Progress,
    times: PassTimes,
    *,
    held_out: Windows | None,
) -> None:
    names = [table.name for table in compressed.embeddings]
    names += [name for linear in compressed.linears for name in linear.known_as]
    for item in passes:
        if isinstance(item, Overridable) and (unmatched := item.unmatched_overrides(names)):
            raise ConfigError(
                f"passes.{item.name}.overrides: no linear's name matches {quoted(unmatched[0])}: "
                f"names are like {quoted(compressed.linears[0].name)}"
            )
    calibrate = Recipe(passes).calibrate
    batches = [] if calibration is None or calibrate is None else calibration_batches(calibration)
    compressed.comparisons |= run_sweep(
        Executor(
            compressed.model,
            compressed.linears,
            precision="float32" if calibrate is None else resolve_precision(calibrate.precision),
        ),
        passes,
        batches,
        comparators={name: compensation_solver(name) for name in config.verify.compare},
        state=state,
        progress=progress,
        times=times,
        held_out=[] if held_out is None else calibration_batches(held_out),
    )
    for item in passes:
        if isinstance(item, Compression) and item.stores_codes:
            quantize_embedding_tables(item, compressed.embeddings, compressed.linears)
    spec.check(compressed.model, spec.Stage.COMPRESSED, after=passes[-1].name)
    if any(linear.factorized is not None for linear in compressed.linears):
        compressed.linears = find_again(compressed.model, compressed.linears)


def stage_key(
    config: BuildConfig,
    loaded: LoadedModel,
    members: Sequence[Pass],
    position: int,
    calibration: Windows | None,
    held_out: Windows | None = None,
    plans: Sequence[Mapping[str, Mapping[str, Any]]] = (),
    *,
    imported: str | None = None,
) -> str:
    """Digest of everything that a stage's result depends on.

    Args:
      config: the passes, and the methods that are compared.
      loaded: the model.
      members: the passes of the stage.
      position: of the stage among all.
      calibration: the text that statistics are taken over.
      held_out: text on which factors must not do harm.
      plans: what each earlier survey has decided, by the name of the linear or table. Some of it
        depends on more than the rest of the key: what fits a budget of the folder.
      imported: the digest of the compressed checkpoint that is taken over.
    """
    digest = hashlib.sha256(
        json.dumps(
            {
                "version": __version__,
                "model": loaded.digest,
                "passes": _lasting_options(config),
                "stage": [position, *(item.name for item in members)],
                "compare": config.verify.compare,
                "plans": plans,
                "imported": imported,
            }
        ).encode()
    )
    for windows in (calibration, held_out):
        if windows is None:
            continue
        digest.update(windows.input_ids.tobytes())
        digest.update(windows.attention_mask.tobytes())
        if windows.weights is not None:
            digest.update(windows.weights.tobytes())
    return digest.hexdigest()


def _lasting_options(config: BuildConfig) -> list[Any]:
    """The passes of ``config`` without the values of options that apply to kept surveys anew."""
    passes = config.resolved()["passes"]
    for item, entry in zip(config.passes, passes, strict=True):
        if isinstance(item, SurveyPass):
            options = entry[item.name]
            # Whether there is a budget of the folder decides what is surveyed.
            options |= {name: options[name] is not None for name in item.decided_anew}
    return list(passes)
