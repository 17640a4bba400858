"""Repair the graphs that mobius leaves incomplete, so that they equal the eager model.

Each repair was found by comparing logits with the eager model on small random checkpoints, in which
every parameter matters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eoracc.compiler.frontend.repairs.limits import restore_clipping, restore_logit_cap
from eoracc.compiler.frontend.repairs.masks import restore_masks
from eoracc.compiler.frontend.repairs.names import restore_names
from eoracc.compiler.frontend.repairs.query_norms import add_query_norms
from eoracc.compiler.frontend.repairs.rope import restore_rope
from eoracc.compiler.frontend.repairs.rotary import restore_rotary_layout
from eoracc.compiler.frontend.repairs.scales import (
    restore_attention_scale,
    restore_embedding_scale,
)
from eoracc.compiler.frontend.repairs.tensors import restore_biases, restore_tie

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx_ir as ir
    import torch
    from transformers import PretrainedConfig

__all__ = ["repair"]


def repair(
    model: ir.Model,
    config: PretrainedConfig,
    *,
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Repair the graph that mobius built from ``folder``, so that it equals the eager model.

    Args:
      model: changed in place.
      config: of the checkpoint.
      folder: the checkpoint, for messages.
      tensors: of the checkpoint.

    Raises:
      ModelError: the checkpoint has tensors or options that the graph has no place for.
    """
    _strip_provenance(model)
    restore_names(model, config)
    restore_masks(model, config)
    restore_rotary_layout(model, config)
    add_query_norms(model, config, folder, tensors)
    restore_clipping(model, config)
    restore_logit_cap(model, config)
    restore_tie(model, config)
    restore_biases(model, config, folder, tensors)
    restore_embedding_scale(model, config)
    restore_attention_scale(model, config)
    restore_rope(model, config, folder)


def _strip_provenance(model: ir.Model) -> None:
    """Remove the tracer's notes on each node: 20 kB a block, and redundant with the names."""
    for node in model.graph:
        node.metadata_props.clear()
