"""Build the graph of a checkpoint with mobius, from our configuration and tensors."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from eoracc.compiler.frontend.files import first_line
from eoracc.compiler.frontend.quiet import quiet
from eoracc.errors import ModelError
from eoracc.printable import quoted

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PretrainedConfig

__all__ = ["build_graph"]

_OUTPUT_BIAS_APART = frozenset({"glm", "glm4", "helium", "seed_oss"})
"""Model types whose attention_bias leaves the output projection alone."""


_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embeddings that mobius computes right but for single options."""


def build_graph(
    folder: Path, config: PretrainedConfig, tensors: dict[str, torch.Tensor]
) -> ir.Model:
    """The graph of a decoder, in float32, with weights that are read when they are used.

    mobius could read the folder itself. It refuses links that lead out of the folder, as those of
    the hub's cache do, and prefers other files than transformers.

    Args:
      folder: the checkpoint, for messages.
      config: its configuration.
      tensors: by the names of the checkpoint.

    Raises:
      ModelError: the architecture is not supported, or the tensors do not fit it.
    """
    try:
        with quiet():
            package = _build(config, tensors)
    except Exception as error:
        raise ModelError(
            f"{folder}: the graph of model_type {quoted(config.model_type)} cannot be built "
            f"({first_line(error)})"
        ) from error
    model: ir.Model | None = package.get("model") if len(package) == 1 else None
    if model is None or not {"input_ids", "logits", "present.0.key"} <= {
        str(value.name) for value in (*model.graph.inputs, *model.graph.outputs)
    }:
        raise ModelError(
            f"{folder}: this variant of model_type {quoted(config.model_type)} is not "
            "supported: its graph is no decoder with a key/value cache"
        )
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            raise ModelError(
                f"{folder}: the checkpoint has no tensor {name}, which its config asks for"
            )
    model.graph.name = config.model_type
    return model


def _build(config: PretrainedConfig, tensors: dict[str, torch.Tensor]) -> Any:  # noqa: ANN401 - untyped
    import mobius

    kind = config.model_type
    module_class = mobius.registry.get(kind)
    config_class = getattr(module_class, "config_class", mobius.ArchitectureConfig)
    if config_class is mobius.ArchitectureConfig:
        config_class = mobius.registry.get_config_class(kind) or config_class
    settings = dataclasses.replace(
        config_class.from_transformers(config, parent_config=config), dtype=ir.DataType.FLOAT
    )
    if settings.rope_type is not None:
        # Repairs put the right tables in place of those of a kind that mobius does not know.
        rope_type = settings.rope_type if settings.rope_type in _ROPE_TYPES else "default"
        scaling = settings.rope_scaling or {}
        settings = dataclasses.replace(
            settings,
            rope_type=rope_type,
            rope_scaling={name: value for name, value in scaling.items() if value is not None},
        )
    if kind == "cohere":
        # Its norms of queries and keys are added by a repair.
        settings = dataclasses.replace(settings, attn_qk_norm=False)
    if kind in _OUTPUT_BIAS_APART:
        # mobius reads attention_bias for all projections.
        bias = bool(getattr(config, "attention_out_bias", False))
        settings = dataclasses.replace(settings, attn_o_bias=bias)
    task = mobius.registry.get_task(kind) or getattr(
        module_class, "default_task", "text-generation"
    )
    module = module_class(settings)
    package = mobius.build_from_module(module, settings, task, execution_provider="onnx-standard")
    if hasattr(module, "preprocess_weights"):
        tensors = module.preprocess_weights(dict(tensors))
    package.apply_weights(tensors)
    return package
