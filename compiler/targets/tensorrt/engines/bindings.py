"""The inputs and outputs of a graph for TensorRT, and the calls that its engines are built for.

Every size that a call decides has a name in the lowered graph, the same one wherever it occurs
(docs/targets.md). Ranges are given by name here, once; TensorRT wants them by input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from eoracc.runtime.tensorrt.engine_set import Binding, Profile, Range

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from eoracc.compiler.config.tensorrt import EngineConfig
    from eoracc.compiler.targets.tensorrt.engines.task import ShapeRange

__all__ = ["bindings_of", "profile_shapes", "profiles_for"]


def bindings_of(graph: ir.Graph) -> tuple[Binding, ...]:
    """The inputs and outputs of a lowered graph, in its order.

    Raises:
      ValueError: one has no type or shape, or a dimension without a name.
    """
    inputs = [_binding(value, "input") for value in graph.inputs]
    return (*inputs, *(_binding(value, "output") for value in graph.outputs))


def _binding(value: ir.Value, mode: Literal["input", "output"]) -> Binding:
    if value.dtype is None or value.shape is None:
        raise ValueError(f"{mode} {value.name} has no type or no shape")
    sizes = [size if isinstance(size, int) else size.value for size in value.shape]
    if None in sizes:
        raise ValueError(f"{mode} {value.name} has a dimension without a name: {value.shape}")
    shape = tuple(size for size in sizes if size is not None)
    dtype = "float32" if value.dtype == ir.DataType.FLOAT else value.dtype.name.lower()
    return Binding(str(value.name), mode, dtype, shape)


def profiles_for(config: EngineConfig, bindings: Sequence[Binding]) -> tuple[Profile, ...]:
    """One optimization profile for decoding, one token a row, and one for prefill.

    A prefill call may stand on a cache of any length that leaves room in the context, so that a
    prompt's last tokens go in one call, too. A cache in place has its full length from the start:
    there ``total``, the places in use, is bounded by that.

    Args:
      config: ranges of model.yaml.
      bindings: of the graph; a profile has the dimensions that occur there.
    """
    used = {size for binding in bindings for size in binding.shape if isinstance(size, str)}
    longest = config.context_length
    decode = _dims(config, (1, 1, 1), (1, longest // 4, longest - 1), "past" in used)
    prefill = _dims(config, config.sequence, (0, 0, longest - 1), "past" in used)
    prefill["logits"] = config.logits
    return tuple(
        Profile(name, {key: dims[key] for key in dims if key in used})
        for name, dims in (("decode", decode), ("prefill", prefill))
    )


def _dims(config: EngineConfig, sequence: Range, past: Range, grows: bool) -> dict[str, Range]:
    low, usual, high = (old + new for old, new in zip(past, sequence, strict=True))
    return {
        "batch": config.batch,
        "sequence": sequence,
        "past": past,
        # At each of the three shapes the concatenated cache must be as long as the mask.
        "total": (low, usual, high if grows else config.context_length),
        "logits": (1, 1, 1),
        "rank": config.rank,
    }


def profile_shapes(bindings: Sequence[Binding], profile: Profile) -> Mapping[str, ShapeRange]:
    """A profile in TensorRT's form: the range of each input that has a dynamic dimension."""
    return {
        binding.name: (
            binding.resolve({name: sizes[0] for name, sizes in profile.dims.items()}),
            binding.resolve({name: sizes[1] for name, sizes in profile.dims.items()}),
            binding.resolve({name: sizes[2] for name, sizes in profile.dims.items()}),
        )
        for binding in bindings
        if binding.mode == "input" and any(isinstance(size, str) for size in binding.shape)
    }
