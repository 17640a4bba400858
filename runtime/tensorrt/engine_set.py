"""engines.json: the engines of a TensorRT target, with everything needed to run one.

The file is beside the engines, in the target's folder of the artifact::

    {"format": "eoracc engines", "schema": 1, "package": "tensorrt_rtx", "version": "1.7.1.116",
     "graph": "model.onnx", "dtype": "float16", "context_length": 2048,
     "cache": {"layout": "concat", "layers": 30},
     "adapter_type": "float16", "max_rank": 64,
     "profiles": [{"name": "decode", "dims": {"batch": [1, 1, 8], "past": [1, 512, 2047]}}, ...],
     "bindings": [{"name": "input_ids", "mode": "input", "dtype": "int64",
                   "shape": ["batch", "sequence"]}, ...],
     "engines": [{"compute_capability": "8.0", "file": "sm80.engine", "sha256": "...", "size": 1}]}

The shape of a binding is a list of numbers and names of dimensions. ``sequence`` is the number of
tokens of a call, ``past`` that of the tokens in the cache before it and ``total`` their sum;
``rank`` is that of an adapter, and ``capacity`` the size of a cache in place in tokens. A profile
gives for each name the smallest, usual and largest value that its engine was built for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from eoracc.errors import ArtifactError
from eoracc.runtime.artifact.versioned_json import check_versioned, is_file_name, read_versioned

__all__ = [
    "ENGINES_FILE",
    "Binding",
    "EngineFile",
    "EngineSet",
    "Profile",
    "Range",
    "parse_engine_set",
    "read_engine_set",
]

ENGINES_FILE = "engines.json"

_FORMAT = "eoracc engines"
_SCHEMA = 1
_FOREIGN = "does not describe the engines of an artifact"
_MODES = ("input", "output")
_LAYOUTS = ("concat", "in_place")
_ADAPTER_TYPES = ("none", "float16", "bfloat16")

Range = tuple[int, int, int]
"""Smallest, usual and largest size of a dimension."""


@dataclass(frozen=True)
class Binding:
    """One input or output of the engines.

    Attributes:
      name: of the tensor.
      mode: ``input`` or ``output``.
      dtype: ``int32``, ``int64``, ``bool``, ``float16``, ``bfloat16`` or ``float32``.
      shape: sizes, and names of dynamic dimensions.
    """

    name: str
    mode: Literal["input", "output"]
    dtype: str
    shape: tuple[int | str, ...]

    def resolve(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with the sizes of ``dims`` for the dynamic dimensions.

        >>> Binding("input_ids", "input", "int64", ("batch", "sequence", 4)).resolve(
        ...     {"batch": 2, "sequence": 3}
        ... )
        (2, 3, 4)
        """
        return tuple(dims[size] if isinstance(size, str) else size for size in self.shape)


@dataclass(frozen=True)
class Profile:
    """An optimization profile: the range of calls that it allows and is tuned for.

    Attributes:
      name: ``decode`` or ``prefill``.
      dims: smallest, usual and largest size by name of dimension.
    """

    name: str
    dims: Mapping[str, Range]

    def takes(self, dims: Mapping[str, int]) -> bool:
        """Whether the profile allows a call of these sizes.

        >>> decode = Profile("decode", {"batch": (1, 1, 8), "sequence": (1, 1, 1)})
        >>> decode.takes({"batch": 8, "sequence": 1}), decode.takes({"batch": 1, "sequence": 2})
        (True, False)
        """
        return all(low <= dims[name] <= high for name, (low, _, high) in self.dims.items())


@dataclass(frozen=True)
class EngineFile:
    """An engine of one compute capability.

    Attributes:
      compute_capability: of the GPUs that it runs on, for example ``8.6``.
      file: name of the file beside engines.json.
      sha256: of the content, hexadecimal.
      size: in bytes.
    """

    compute_capability: str
    file: str
    sha256: str
    size: int


@dataclass(frozen=True)
class EngineSet:
    """The engines of one target, which differ only by compute capability.

    Attributes:
      package: that built them and runs them, ``tensorrt_rtx`` or ``tensorrt``.
      version: of that package; an engine runs with no other.
      graph: the ONNX file beside engines.json that they were built from.
      dtype: of activations, cache and adapter factors, ``float16`` or ``bfloat16``.
      context_length: most tokens of a row, cache included.
      cache_layout: ``concat``: each call reads ``past_key_values.<i>.key|value`` and writes all of
        ``present.<i>.key|value``; ``in_place``: it writes its own tokens into the buffers it reads.
      cache_layers: number of decoder layers with a cache.
      adapter_type: ``float16`` or ``bfloat16`` if adapters are inputs, else ``none``.
      max_rank: largest rank of an adapter; 0 without adapters.
      profiles: in the order of their indices in the engine.
      bindings: all inputs and outputs, in the graph's order.
      engines: by compute capability, lowest first.
    """

    package: str
    version: str
    graph: str
    dtype: str
    context_length: int
    cache_layout: Literal["concat", "in_place"]
    cache_layers: int
    adapter_type: str
    max_rank: int
    profiles: tuple[Profile, ...]
    bindings: tuple[Binding, ...]
    engines: tuple[EngineFile, ...]

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """Compute capabilities that have an engine."""
        return tuple(engine.compute_capability for engine in self.engines)

    def binding(self, name: str) -> Binding:
        """The input or output called ``name``.

        Raises:
          KeyError: there is none.
        """
        for binding in self.bindings:
            if binding.name == name:
                return binding
        raise KeyError(name)

    def to_json(self) -> str:
        """The text of engines.json: equal sets give equal texts."""
        content = asdict(self)
        cache = {"layout": content.pop("cache_layout"), "layers": content.pop("cache_layers")}
        content = {"format": _FORMAT, "schema": _SCHEMA, **content, "cache": cache}
        # One line for each binding, profile and engine, as there are hundreds.
        parts = ",\n".join(f"  {json.dumps(key)}: {_lines(part)}" for key, part in content.items())
        return f"{{\n{parts}\n}}\n"


def read_engine_set(folder: Path) -> EngineSet:
    """Read engines.json, without looking at the engines.

    Args:
      folder: of the target, ``<artifact>/tensorrt_rtx``; the caller has verified the manifest.

    Raises:
      ArtifactError: the file is missing, damaged or newer than this eoracc, or names a file
        elsewhere.
    """
    path = folder / ENGINES_FILE
    content = read_versioned(
        path,
        file_format=_FORMAT,
        schema=_SCHEMA,
        missing=f"{path}: is missing: build the artifact again",
        foreign=_FOREIGN,
    )
    return _parse_beside(content, path)


def parse_engine_set(content: object, path: Path) -> EngineSet:
    """Parse ``content`` of the engines.json at ``path``.

    Raises:
      ArtifactError: the content is damaged or newer than this eoracc, or names a file elsewhere.
    """
    checked = check_versioned(content, path, file_format=_FORMAT, schema=_SCHEMA, foreign=_FOREIGN)
    return _parse_beside(checked, path)


def _parse_beside(content: Mapping[str, Any], path: Path) -> EngineSet:
    try:
        engines = _parse(content)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ArtifactError(f"{path}: lacks a part: build the artifact again") from None
    for name in (engines.graph, *(engine.file for engine in engines.engines)):
        if not is_file_name(name):
            raise ArtifactError(
                f"{path}: names '{name}', which is not beside it: do not trust this artifact"
            )
    return engines


def _lines(part: object) -> str:
    if not isinstance(part, list | tuple):
        return json.dumps(part, ensure_ascii=False)
    items = ",\n".join(f"    {json.dumps(item, ensure_ascii=False)}" for item in part)
    return f"[\n{items}\n  ]" if part else "[]"


def _parse(content: Mapping[str, Any]) -> EngineSet:
    cache = content["cache"]
    return EngineSet(
        package=_one_of(content["package"], ("tensorrt_rtx", "tensorrt")),
        version=str(content["version"]),
        graph=str(content["graph"]),
        dtype=_one_of(content["dtype"], ("float16", "bfloat16")),
        context_length=int(content["context_length"]),
        cache_layout=_one_of(cache["layout"], _LAYOUTS),
        cache_layers=int(cache["layers"]),
        adapter_type=_one_of(content["adapter_type"], _ADAPTER_TYPES),
        max_rank=int(content["max_rank"]),
        profiles=tuple(
            Profile(
                str(profile["name"]),
                {str(name): _range(size) for name, size in profile["dims"].items()},
            )
            for profile in content["profiles"]
        ),
        bindings=tuple(
            Binding(
                str(binding["name"]),
                _one_of(binding["mode"], _MODES),
                str(binding["dtype"]),
                tuple(size if isinstance(size, str) else int(size) for size in binding["shape"]),
            )
            for binding in content["bindings"]
        ),
        engines=tuple(
            EngineFile(
                str(engine["compute_capability"]),
                str(engine["file"]),
                str(engine["sha256"]),
                int(engine["size"]),
            )
            for engine in content["engines"]
        ),
    )


def _range(sizes: Sequence[int]) -> Range:
    low, usual, high = (int(size) for size in sizes)
    if not 0 <= low <= usual <= high:
        raise ValueError(sizes)
    return low, usual, high


def _one_of(value: object, known: Sequence[str]) -> Any:  # noqa: ANN401 - one of the literals
    if value not in known:
        raise ValueError(value)
    return value
