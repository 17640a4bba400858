"""The ops of the ``eoracc`` domain: their names, inputs and attributes.

``MatMulNBitsLowRank`` is a compressed linear with what is fused to it, ``GatherNBits`` looks up
rows of a compressed table. ``MatMulLowRank`` is a linear of floats with low-rank factors; it has no
kernel, and every runtime inlines its function. docs/op.md has shapes and types. The native library
repeats the names of the inputs of its ops in C++; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum

from eoracc.plugins.operands.codes import BITS

__all__ = [
    "ACTIVATIONS",
    "ADAPTER_INDEX",
    "ADAPTER_OPERANDS",
    "ATTRIBUTES",
    "CHOICES",
    "DENSE_OP",
    "DOMAIN",
    "DOMAIN_VERSION",
    "FACTORS",
    "FUSED_OP",
    "GATHER_OP",
    "INPUTS",
    "REQUIRED",
    "TOGETHER",
    "DenseInput",
    "Input",
]

DOMAIN = "eoracc"

DOMAIN_VERSION = 1
"""Version of the ops, in a graph's imports. A library runs graphs of its version and older ones."""

FUSED_OP = "MatMulNBitsLowRank"
GATHER_OP = "GatherNBits"
DENSE_OP = "MatMulLowRank"


class Input(IntEnum):
    """Inputs of ``MatMulNBitsLowRank``: the value is the position, the name that of the op.

    ``GatherNBits`` has indices in place of ``X`` and the next three inputs in the same places.

    >>> Input.lora_a.name, INPUTS[FUSED_OP][Input.lora_a]
    ('lora_a', 'lora_a')
    """

    X = 0
    B = 1
    scales = 2
    zero_points = 3
    bias = 4
    lora_a = 5
    lora_b = 6
    lora_a_scale = 7
    lora_b_scale = 8
    norm_weight = 9
    residual = 10
    adapter_a = 11
    adapter_b = 12
    adapter_a_scale = 13
    adapter_b_scale = 14
    adapter_index = 15


class DenseInput(IntEnum):
    """Inputs of ``MatMulLowRank``; ``weight`` is ``[K, N]``, as a MatMul takes it."""

    X = 0
    weight = 1
    lora_a = 2
    lora_b = 3
    lora_a_scale = 4
    lora_b_scale = 5


INPUTS: Mapping[str, Sequence[str]] = {
    FUSED_OP: tuple(operand.name for operand in Input),
    GATHER_OP: ("indices", Input.B.name, Input.scales.name, Input.zero_points.name),
    DENSE_OP: tuple(operand.name for operand in DenseInput),
}
"""Names of each op's inputs, in order."""

REQUIRED = 3
"""Inputs that each op needs, from the first on."""

ATTRIBUTES: Mapping[str, Sequence[str]] = {
    FUSED_OP: (
        "K",
        "N",
        "bits",
        "block_size",
        "accuracy_level",
        "layout",
        "parts",
        "ranks",
        "activation",
        "norm_epsilon",
    ),
    GATHER_OP: ("K", "N", "bits", "block_size", "layout"),
    DENSE_OP: (),
}
"""Names of each op's attributes."""

ACTIVATIONS = ("silu", "gelu_tanh")
"""Values of the attribute ``activation``, aside from none."""

CHOICES: Mapping[str, Sequence[int | str]] = {
    "bits": BITS,
    "accuracy_level": (0, 4),
    "layout": (0, 1),
    "activation": ("", *ACTIVATIONS),
}
"""Values of the attributes that have a few each. Others may be those of a later library."""

FACTORS = (Input.lora_a, Input.lora_b, Input.lora_a_scale, Input.lora_b_scale)
"""Inputs that hold low-rank factors, the scales for integer factors only."""

ADAPTER_OPERANDS = (
    Input.adapter_a.name,
    Input.adapter_b.name,
    Input.adapter_a_scale.name,
    Input.adapter_b_scale.name,
)
"""Inputs that hold a bank of adapters; the last one for integer factors only."""

ADAPTER_INDEX = Input.adapter_index.name
"""Input, ``int32 [1]`` or ``[batch]``: the adapter of each row, below 0 for none."""

TOGETHER: Sequence[Sequence[str]] = (
    (Input.lora_a.name, Input.lora_b.name),
    (*ADAPTER_OPERANDS[:3], ADAPTER_INDEX),
)
"""Optional inputs of which a node has all or none."""
