"""Sections of model.yaml on the TensorRT targets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from eoracc.compiler.config.fields import Count, Offset, Section

__all__ = ["EngineConfig", "TensorRtConfig", "TensorRtRtxConfig"]


def _capability(value: object) -> object:
    """``8.0`` without quotes is a number to YAML."""
    return str(value) if isinstance(value, float) else value


def _ascending(sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    if sorted(sizes) != list(sizes):
        raise PydanticCustomError(
            "pass_range",
            "must be [smallest, usual, largest], in this order, not {sizes}",
            {"sizes": list(sizes)},
        )
    return sizes


def _unique(items: tuple[str, ...]) -> tuple[str, ...]:
    twice = next((item for item in items if items.count(item) > 1), None)
    if twice is not None:
        raise PydanticCustomError("pass_twice", "names '{item}' twice: keep one", {"item": twice})
    return items


CountRange = Annotated[tuple[Count, Count, Count], AfterValidator(_ascending)]
"""Smallest, usual and largest number, from 1."""

RankRange = Annotated[tuple[Offset, Offset, Offset], AfterValidator(_ascending)]
"""Smallest, usual and largest rank, from 0."""


class EngineConfig(Section):
    """Options of the engines of both TensorRT targets."""

    dtype: Literal["float16", "bfloat16"] = "float16"
    """Type in which activations, cache and low-rank factors are stored and multiplied."""
    batch: CountRange = (1, 1, 8)
    """Rows of a call: least, typical, most."""
    sequence: CountRange = (1, 128, 512)
    """Tokens of a prefill call: least, typical, most. Decoding has its own profile, for 1 token."""
    context_length: Annotated[Count, Field(ge=64)] = 2048
    """Most tokens of a row, including the cache. The parity gate needs 64."""
    logits: CountRange = (1, 1, 32)
    """Tokens of a prefill call for which logits are computed: least, typical, most."""
    rank: RankRange = (0, 16, 64)
    """Ranks of adapters, if ``adapter_type`` is not ``none``: lowest, typical, highest."""
    adapter_type: Literal["float16", "none"] = "none"
    """float16: the network takes adapters as inputs of 16 bits (of type ``dtype``); none builds a
    network without slots for adapters."""


class TensorRtRtxConfig(EngineConfig):
    """Options of the target ``tensorrt_rtx``: one engine for each compute capability."""

    compute_capabilities: Annotated[
        tuple[
            Annotated[
                Literal["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"], BeforeValidator(_capability)
            ],
            ...,
        ],
        Field(min_length=1),
        AfterValidator(_unique),
    ] = ("8.0", "8.6", "8.9", "12.0")
    """GPUs to build for, by NVIDIA's compute capability."""
    cache: Literal["concat", "in_place"] = "concat"
    """concat: a call reads the cache and writes a longer one; in_place: it writes its own tokens
    into the cache that it reads."""


class TensorRtConfig(EngineConfig):
    """Options of the target ``tensorrt``: a bundle that ``eoracc engine`` builds engines from."""

    compute_capabilities: Annotated[
        tuple[
            Annotated[
                Literal["8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "12.0"],
                BeforeValidator(_capability),
            ],
            ...,
        ],
        Field(min_length=1),
        AfterValidator(_unique),
    ] = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
    """GPUs that the plugin's kernels are compiled for, by NVIDIA's compute capability."""
