"""The target ``tensorrt_rtx``: the graph and an engine for each compute capability."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any, Final

from eoracc.compiler.targets.job import Emitted, Job
from eoracc.compiler.targets.tensorrt.engine_graph import (
    EngineGraph,
    record_engine_graph,
    write_engine_graph,
)
from eoracc.compiler.targets.tensorrt.engines.bindings import profile_shapes
from eoracc.compiler.targets.tensorrt.engines.build import (
    BuiltEngine,
    build_engines,
    require_package,
)
from eoracc.compiler.targets.tensorrt.lower_rtx import lower
from eoracc.passes.graph import spec
from eoracc.runtime.artifact.manifest import BUILDER_LOG, describe_file
from eoracc.runtime.tensorrt.engine_set import ENGINES_FILE, EngineFile

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["emit", "require"]

_TARGET: Final = "tensorrt_rtx"


def require() -> None:
    """Check that TensorRT for RTX is installed.

    Raises:
      TargetError: it is not.
    """
    require_package(_TARGET)


def emit(job: Job) -> Emitted:
    """Write the graph, build its engines and describe them.

    Raises:
      PassError: the lowering cannot express the model.
      TargetError: TensorRT does not take the graph.
    """
    options = job.config.tensorrt_rtx
    lowered = lower(
        job.compressed.model,
        dtype=options.dtype,
        adapter_type="none" if options.adapter_type == "none" else options.dtype,
        positions=options.context_length,
        cache=options.cache,
        capacity=options.context_length if options.cache == "in_place" else None,
    )
    spec.check(lowered, spec.Stage.TENSORRT_RTX, after="the lowering")
    job.graphs.keep(_TARGET, lowered)
    graph = write_engine_graph(job, lowered, target=_TARGET, options=options)
    record_engine_graph(job, graph)
    built = build_engines(
        graph.path,
        package=_TARGET,
        compute_capabilities=options.compute_capabilities,
        profiles=[profile_shapes(graph.bindings, profile) for profile in graph.profiles],
        work=job.work / _TARGET,
        progress=job.progress,
    )
    _write_engines(graph, built)
    return Emitted(graph.slots, _report(graph, built))


def _write_engines(graph: EngineGraph, built: Sequence[BuiltEngine]) -> None:
    """Put engines, their description and the builder's log beside the graph."""
    folder = graph.path.parent
    engines = []
    for engine in built:
        path = folder / f"sm{engine.compute_capability.replace('.', '')}.engine"
        # The work folder keeps its copy, because a gate may still fail.
        try:
            os.link(engine.path, path)
        except OSError:
            shutil.copyfile(engine.path, path)
        entry = describe_file(path)
        engines.append(EngineFile(engine.compute_capability, path.name, entry.sha256, entry.size))
    description = graph.engine_set(
        package=_TARGET, version=built[0].summary["version"], engines=engines
    )
    (folder / ENGINES_FILE).write_text(description.to_json(), encoding="utf-8")
    with (folder / BUILDER_LOG).open("w", encoding="utf-8") as log:
        for engine in built:
            log.write(f"== compute capability {engine.compute_capability} ==\n")
            log.write(engine.log.read_text(encoding="utf-8"))


def _report(graph: EngineGraph, built: Sequence[BuiltEngine]) -> dict[str, Any]:
    """The report of the graph and of each engine."""
    return {
        "version": built[0].summary["version"],
        "graph_weight_bytes": graph.weight_bytes,
        "profiles": {profile.name: dict(profile.dims) for profile in graph.profiles},
        "engines": {
            engine.compute_capability: {
                key: value for key, value in engine.summary.items() if key != "version"
            }
            for engine in built
        },
    }
