"""Refuse models that the engines of model.yaml cannot be built of, before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eoracc.compiler.config.sections import engine_sections
from eoracc.compiler.targets.tensorrt.engine_graph import check_contexts
from eoracc.compiler.targets.tensorrt.explicit_attention import check_attention, head_size
from eoracc.errors import TargetError

if TYPE_CHECKING:
    from eoracc.compiler.config.sections import BuildConfig
    from eoracc.compiler.frontend.load import LoadedModel

__all__ = ["check_model"]

_RTX = "tensorrt_rtx"
_RTX_HEADS = range(8, 257)
"""Head sizes for which TensorRT for RTX 1.7 has attention kernels."""


def check_model(config: BuildConfig, loaded: LoadedModel) -> None:
    """Check that TensorRT takes the attention and the positions of a model.

    Args:
      config: decides which engines are built, if any.
      loaded: the model.

    Raises:
      ConfigError: a ``context_length`` is longer than the model's.
      PassError: an attention is of a kind that TensorRT does not have.
      TargetError: its heads have no kernel.
    """
    check_contexts(config, loaded)
    sections = engine_sections(config)
    if not sections:
        return
    graph = loaded.model.graph
    check_attention(graph)
    for node in graph:
        if _RTX not in sections or node.op_type != "Attention":
            continue
        size = head_size(node)
        if size not in _RTX_HEADS:
            raise TargetError(
                f"{_RTX}: has no attention for heads of {size} elements, as the model has, but for "
                f"{_RTX_HEADS.start} to {_RTX_HEADS.stop - 1}: take it out of 'targets'"
            )
