"""Targets: from the compressed graph to what an artifact runs on.

One module a target, with a function ``require`` that says before anything is loaded what this
machine lacks, and a function ``emit`` that lowers the graph and writes it. ``onnxruntime`` writes
at the artifact's root, every other target into a folder of its own name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eoracc.compiler.targets.job import Emitted, Job, Target
from eoracc.compiler.targets.onnxruntime import emit as onnxruntime
from eoracc.compiler.targets.tensorrt import bundle as tensorrt
from eoracc.compiler.targets.tensorrt import rtx as tensorrt_rtx

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eoracc.compiler.config.sections import TargetName

__all__ = ["TARGETS", "Emitted", "Job", "Target"]

TARGETS: Mapping[TargetName, Target] = {
    "onnxruntime": Target(onnxruntime.require, onnxruntime.emit),
    "tensorrt_rtx": Target(tensorrt_rtx.require, tensorrt_rtx.emit),
    "tensorrt": Target(tensorrt.require, tensorrt.emit),
}
"""By the name that model.yaml has for it."""
