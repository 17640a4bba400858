"""The target ``tensorrt``: a bundle from which ``eoracc engine`` builds an engine on the GPU."""

from __future__ import annotations

import shutil
from importlib import util
from pathlib import Path
from typing import Final

from eoracc.compiler.targets.artifact import MODEL_FILE
from eoracc.compiler.targets.job import Emitted, Job
from eoracc.compiler.targets.tensorrt.engine_graph import record_engine_graph, write_engine_graph
from eoracc.compiler.targets.tensorrt.engines.bundle import BUNDLE_FILE, bundle_json
from eoracc.compiler.targets.tensorrt.lower_bundle import half_product, kernel_cases, lower
from eoracc.compiler.targets.weights_file import DATA_FILE
from eoracc.errors import TargetError
from eoracc.passes.graph import spec
from eoracc.plugins.tensorrt import plugin
from eoracc.plugins.tensorrt.kernels import count_kernel_sets, write_kernels

__all__ = ["emit", "require"]

_TARGET: Final = "tensorrt"


def require() -> None:
    """Check that Triton is installed, which compiles the kernels; TensorRT is not needed here.

    Raises:
      TargetError: it is not.
    """
    if util.find_spec("triton") is None:
        raise TargetError(
            "triton is not installed, which compiles the plugin's kernels: "
            "pip install 'eoracc[triton]'"
        )


def emit(job: Job) -> Emitted:
    """Write the graph, the plugin, its kernels and the description of the engines.

    Raises:
      PassError: the lowering cannot express the model, or no kernel computes a linear.
    """
    options = job.config.tensorrt
    lowered = lower(
        job.compressed.model,
        dtype=options.dtype,
        adapter_type="none" if options.adapter_type == "none" else options.dtype,
        positions=options.context_length,
    )
    spec.check(lowered, spec.Stage.TENSORRT, after="the lowering")
    job.graphs.keep(_TARGET, lowered)
    cases = kernel_cases(lowered)
    graph = write_engine_graph(job, lowered, target=_TARGET, options=options)
    record_engine_graph(job, graph, weight_of=half_product)
    folder = graph.path.parent
    capabilities = options.compute_capabilities
    decoded = {options.batch[1], options.batch[2]}
    with job.progress.phase("kernels", count_kernel_sets(cases, capabilities)) as phase:
        kernels = write_kernels(
            folder,
            cases,
            compute_capabilities=capabilities,
            rows=[*sorted(decoded), options.batch[1] * options.sequence[1]],
            advance=phase.advance,
        )
    source = Path(plugin.__file__)
    shutil.copyfile(source, folder / source.name)
    described = graph.engine_set(package=_TARGET, version="", engines=[])
    files = [source.name, *kernels, MODEL_FILE]
    files += [DATA_FILE] if (folder / DATA_FILE).exists() else []
    text = bundle_json(folder, described, capabilities, files)
    (folder / BUNDLE_FILE).write_text(text, encoding="utf-8")
    report = {
        "graph_weight_bytes": graph.weight_bytes,
        "profiles": {profile.name: dict(profile.dims) for profile in graph.profiles},
        "kernels": len(kernels) - 1,
        "compute_capabilities": list(capabilities),
    }
    return Emitted(graph.slots, report)
