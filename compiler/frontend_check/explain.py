"""Say in one sentence where a graph differs from the eager model, and which fields bear on it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from eoracc.compiler.frontend.rope_parameters import rope_sections
from eoracc.compiler.frontend_check.calls import Call
from eoracc.printable import quoted

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PretrainedConfig

    from eoracc.passes.graph.linears import Linear

__all__ = ["Difference", "Part", "explain", "part_of"]

Part = Literal["embedding or first norm", "attention", "norm", "MLP", "head"]
"""What lies between one linear and the next."""

_FIELDS: Mapping[Part, Sequence[str]] = MappingProxyType(
    {
        "embedding or first norm": (
            "embedding_multiplier",
            "scale_embedding",
            "rms_norm_eps",
            "layer_norm_eps",
        ),
        "attention": (
            "attn_logit_softcapping",
            "query_pre_attn_scalar",
            "attention_multiplier",
            "sliding_window",
            "no_rope_layers",
            "layer_types",
            "use_qk_norm",
            "clip_qkv",
        ),
        "norm": (
            "residual_multiplier",
            "norm_type",
            "layer_norm_eps",
            "layer_norm_epsilon",
            "rms_norm_eps",
            "norm_eps",
        ),
        "MLP": ("hidden_act", "hidden_activation", "activation_function", "mlp_bias"),
        "head": (
            "final_logit_softcapping",
            "logit_scale",
            "logits_scaling",
            "tie_word_embeddings",
        ),
    }
)
"""Fields of config.json that decide how a part computes."""

_POSITIONAL = frozenset({"sliding_window", "layer_types"})
"""Those that matter only from some position on, besides the rotary embedding's."""

_NEUTRAL: Collection[object] = (None, False, 0, 1, (), [], {})
"""Values that leave a field without effect."""

_NAMED = 4
"""Fields that a message names at most."""

_NORMS = frozenset({"RMSNormalization", "LayerNormalization", "ReduceMean"})


@dataclass(frozen=True, eq=False)
class Difference:
    """The first value of a graph that differs from the eager model's.

    Attributes:
      value: of the graph.
      linear: that reads it; None for the logits.
      part: of the model that computes it.
      calls: in which it differs.
      everywhere: whether these are all calls.
      error: the largest, relative.
      tolerance: of it.
    """

    value: ir.Value
    linear: Linear | None
    part: Part
    calls: Sequence[Call]
    everywhere: bool
    error: float
    tolerance: float


def explain(difference: Difference, config: PretrainedConfig) -> str:
    """One sentence, without the name of the checkpoint.

    Args:
      difference: the first one.
      config: of the model.
    """
    node = difference.value.producer()
    name = difference.value.name if node is None else node.name
    linear = difference.linear
    block = ""
    if linear is not None:
        block = " before the head" if linear.block is None else f" of block {linear.block}"
    calls = (
        "in every call"
        if difference.everywhere
        else f"in {' and in '.join(call.name for call in difference.calls)}"
    )
    fields = _fields(difference, config)
    cause = f", which config.json sets by {', '.join(fields)}" if fields else ""
    return (
        f"the graph of model_type {quoted(config.model_type)} does not compute what "
        "transformers does: "
        f"the first difference is in the {difference.part}{block}{cause} (node {name} is off by "
        f"{difference.error:.2g} of its size {calls}, rounding explains "
        f"{difference.tolerance:.0e}): this variant is not supported, see docs/families.md"
    )


def part_of(value: ir.Value, linear: Linear | None, linears: Collection[ir.Node]) -> Part:
    """The part of a model that computes a value from the outputs of linears.

    Args:
      value: of the graph.
      linear: that reads it; None for the logits.
      linears: the nodes of all linears.
    """
    if linear is None:
        return "head"
    nodes: set[ir.Node] = set()
    pending, passes_linear = [value], False
    while pending:
        node = pending.pop().producer()
        if node is None or node in nodes:
            continue
        if node in linears:
            passes_linear = True
            continue
        nodes.add(node)
        pending += [operand for operand in node.inputs if operand is not None]
    kinds = {node.op_type for node in nodes}
    if not passes_linear:
        return "embedding or first norm"
    if "Attention" in kinds:
        return "attention"
    return "norm" if kinds & _NORMS else "MLP"


def _fields(difference: Difference, config: PretrainedConfig) -> list[str]:
    """Names and values of fields that decide how the part computes, and are not neutral."""
    only_late = not difference.everywhere and all(call.past for call in difference.calls)
    names = [
        name
        for name in _FIELDS[difference.part]
        if not only_late or name in _POSITIONAL or difference.part != "attention"
    ]
    found = _rope_fields(config) if difference.part == "attention" else []
    for name in names:
        value = getattr(config, name, None)
        if value not in _NEUTRAL:
            shown = f" {quoted(value)}" if isinstance(value, int | float | str) else ""
            found.append(f"{name}{shown}")
    return found[:_NAMED]


def _rope_fields(config: PretrainedConfig) -> list[str]:
    """The rotary embedding's type and options, where it is not the plain one."""
    found: dict[str, None] = {}
    for section in rope_sections(config):
        kind = section.get("rope_type", "default")
        options = [name for name in section if name not in ("rope_type", "rope_theta")]
        if kind != "default" or section.get("partial_rotary_factor", 1) != 1:
            found[f"rope_parameters ({kind}: {', '.join(options)})"] = None
    return list(found)
