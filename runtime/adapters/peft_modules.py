"""Convert factors between linears of an artifact and modules of transformers, which PEFT uses.

Most of them correspond one to one. But some families store query, key and value, or gate and up, as
one module that the compiler splits, and ``pack_projections`` joins several modules into one linear.
Factors are converted likewise. Splitting gives every part the whole ``lora_a``. Joining puts ranks
side by side, each acting on the rows of its part, unless the parts share one ``lora_a``.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from eoracc.documents import Reader
from eoracc.errors import ArtifactError
from eoracc.plugins.operands.low_rank import LowRank, split_rows
from eoracc.runtime.artifact.genai_files import CONFIG_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["ModuleLayout", "linears_to_modules", "modules_to_linears", "read_layout"]

_READER = Reader(ArtifactError, "build the artifact again")
_PARTS = MappingProxyType(
    {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
)
_FACTORS = ("v", "u")
"""Roles of the two linears of a factorised weight."""
_STORED_WHOLE = MappingProxyType(
    {
        "glm": frozenset({"gate_up_proj"}),
        "glm4": frozenset({"gate_up_proj"}),
        "phi3": frozenset(_PARTS),
    }
)
"""By model type, the joined projections that transformers stores as one module."""


@dataclass(frozen=True)
class ModuleLayout:
    """How transformers stores a family's projections.

    Attributes:
      wholes: the joined projections that are one module.
      query_heads: heads of the query.
      key_heads: heads of the key, and of the value.
    """

    wholes: frozenset[str]
    query_heads: int
    key_heads: int

    def rows(self, whole: str, total: int) -> tuple[int, ...]:
        """Rows of each part of ``whole``, which has ``total`` rows."""
        shares = self._shares(whole)
        return tuple(total * share // sum(shares) for share in shares)

    def total(self, whole: str, role: str, rows: int) -> int:
        """Rows of ``whole``, whose part ``role`` has ``rows``."""
        shares = self._shares(whole)
        return rows * sum(shares) // shares[_PARTS[whole].index(role)]

    def _shares(self, whole: str) -> tuple[int, ...]:
        """Heads, not their size: that of the cache may be padded."""
        if whole == "gate_up_proj":
            return (1, 1)
        return (self.query_heads, self.key_heads, self.key_heads)


def read_layout(folder: Path, model_type: str) -> ModuleLayout:
    """Layout of the model that an artifact was built from.

    Args:
      folder: the artifact.
      model_type: of the checkpoint, as the manifest says.

    Raises:
      ArtifactError: genai_config.json is missing or damaged.
    """
    path = folder / CONFIG_FILE
    content = _READER.read_object(path)
    with _READER.refusing_form(path, "does not describe a decoder"):
        decoder = content["model"]["decoder"]
        return ModuleLayout(
            wholes=_STORED_WHOLE.get(model_type, frozenset()),
            query_heads=int(decoder["num_attention_heads"]),
            key_heads=int(decoder["num_key_value_heads"]),
        )


def linears_to_modules(factors: Mapping[str, LowRank], layout: ModuleLayout) -> dict[str, LowRank]:
    """Convert factors by linear of an artifact to factors by module of transformers.

    Raises:
      ArtifactError: a linear is a factor of a factorised weight.
    """
    converted: dict[str, LowRank] = {}
    joined: dict[str, dict[str, LowRank]] = defaultdict(dict)
    for name, own in factors.items():
        parent, role = _split_name(name)
        if role in _FACTORS:
            raise ArtifactError(
                f"'{name}' is a factor of the weight of '{parent}', which transformers has in one "
                "piece: such an adapter can be written as .onnx_adapter only"
            )
        if (whole := _whole_of(role)) in layout.wholes:
            joined[f"{parent}.{whole}"][role] = own
        elif role in _PARTS and role not in layout.wholes:
            parts = split_rows(own, layout.rows(role, len(own.lora_b)))
            names = [f"{parent}.{part}" for part in _PARTS[role]]
            converted |= dict(zip(names, parts, strict=True))
        else:
            converted[name] = own
    for name, roles in joined.items():
        _, whole = _split_name(name)
        role, own = next(iter(roles.items()))
        total = layout.total(whole, role, len(own.lora_b))
        converted[name] = _join(roles, whole, layout.rows(whole, total))
    return converted


def modules_to_linears(
    factors: Mapping[str, LowRank],
    linears: Mapping[str, tuple[int, int]],
    layout: ModuleLayout,
    *,
    place: str,
) -> dict[str, LowRank]:
    """Convert factors by module of transformers to factors by linear of an artifact.

    Args:
      factors: by module.
      linears: ``(out_features, in_features)`` of each linear with a slot.
      layout: of the model.
      place: path of the adapter, for errors.

    Raises:
      ArtifactError: a module has no slot, or its factors do not fit its weight.
    """
    converted: dict[str, LowRank] = {}
    joined: dict[str, dict[str, LowRank]] = defaultdict(dict)
    for name, own in factors.items():
        parent, role = _split_name(name)
        whole = f"{parent}.{_whole_of(role)}"
        parts = [f"{parent}.{part}" for part in _PARTS.get(role, ())]
        if name in linears:
            _check_shape(place, name, own, linears[name])
            converted[name] = own
        elif parts and set(parts) <= set(linears):
            rows = [linears[part][0] for part in parts]
            _check_shape(place, name, own, (sum(rows), linears[parts[0]][1]))
            converted |= dict(zip(parts, split_rows(own, rows), strict=True))
        elif whole in linears:
            total, columns = linears[whole]
            _, whole_role = _split_name(whole)
            rows_of = dict(zip(_PARTS[whole_role], layout.rows(whole_role, total), strict=True))
            _check_shape(place, name, own, (rows_of[role], columns))
            joined[whole][role] = own
        elif {f"{name}.v", f"{name}.u"} & set(linears):
            raise ArtifactError(
                f"{place}: has factors of '{name}', whose weight is factorized into two matrices "
                "here, so that no adapter of their product fits: leave it out of the targets"
            )
        else:
            raise ArtifactError(
                f"{place}: has factors of '{name}', which takes no adapter here: only compressed "
                "linears of decoder blocks do: leave it out of the targets"
            )
    for name, roles in joined.items():
        _, whole = _split_name(name)
        converted[name] = _join(roles, whole, layout.rows(whole, linears[name][0]))
    return converted


def _split_name(name: str) -> tuple[str, str]:
    parent, _, role = name.rpartition(".")
    return parent, role


def _whole_of(role: str) -> str:
    return next((whole for whole, parts in _PARTS.items() if role in parts), "")


def _check_shape(place: str, name: str, factors: LowRank, shape: tuple[int, int]) -> None:
    own = (factors.lora_b.shape[0], factors.lora_a.shape[1])
    if own != shape:
        raise ArtifactError(
            f"{place}: factors of '{name}' are for a weight {list(own)}, the artifact's is "
            f"{list(shape)}: they were trained for another model"
        )


def _join(parts: Mapping[str, LowRank], whole: str, rows: tuple[int, ...]) -> LowRank:
    """Join factors of parts, by role, into those of the whole; equal ``lora_a`` are stored once."""
    downs = [part.down() for part in parts.values()]
    if all(np.array_equal(down, downs[0]) for down in downs):
        columns = [slice(0, len(downs[0]))] * len(downs)
        lora_a = downs[0]
    else:
        edges = np.cumsum([0, *map(len, downs)])
        columns = list(map(slice, edges[:-1], edges[1:]))
        lora_a = np.concatenate(downs)
    lora_b = np.zeros((sum(rows), len(lora_a)), np.float32)
    starts = dict(zip(_PARTS[whole], np.cumsum([0, *rows]), strict=False))
    for (role, part), ranks in zip(parts.items(), columns, strict=True):
        start = starts[role]
        lora_b[start : start + len(part.lora_b), ranks] = part.up()
    return LowRank(lora_a=lora_a, lora_b=lora_b)
