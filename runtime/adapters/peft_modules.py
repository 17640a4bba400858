"""Names of linears in an artifact, and of modules in transformers, which PEFT goes by.

Mostly they are the same. But some families store query, key and value, or gate and up, as one
module that the compiler takes apart, and ``pack_projections`` makes one linear of what they store
as several modules. Factors follow: a whole that is taken apart leaves its ``lora_a`` to every part,
and parts that are joined have their ranks side by side, each acting on its own rows, unless they
share their ``lora_a``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from eoracc.errors import ArtifactError
from eoracc.plugins.operands.low_rank import LowRank, split_rows
from eoracc.runtime.artifact.genai_files import CONFIG_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["ModuleLayout", "linears_to_modules", "modules_to_linears", "read_layout"]

_PARTS = MappingProxyType(
    {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
)
_FACTORS = ("v", "u")
"""Roles of the two linears that a factorised weight is."""
_STORED_WHOLE = ("phi3",)
"""Families whose modules are the wholes."""


@dataclass(frozen=True)
class ModuleLayout:
    """How transformers stores a family's projections.

    Attributes:
      stores_whole: whether query, key and value, and gate and up, are one module each.
      query_rows: outputs of the query's projection.
      key_rows: outputs of the key's, and of the value's.
    """

    stores_whole: bool
    query_rows: int
    key_rows: int

    def rows(self, whole: str, total: int) -> tuple[int, ...]:
        """Rows of each part of ``whole``, which has ``total`` of them."""
        if whole == "gate_up_proj":
            return (total // 2, total // 2)
        return (self.query_rows, self.key_rows, self.key_rows)


def read_layout(folder: Path) -> ModuleLayout:
    """The layout of the model that an artifact was built from.

    Raises:
      ArtifactError: genai_config.json is missing or damaged.
    """
    path = folder / CONFIG_FILE
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        decoder = model["decoder"]
        size = int(decoder["head_size"])
        return ModuleLayout(
            stores_whole=model["type"] in _STORED_WHOLE,
            query_rows=size * int(decoder["num_attention_heads"]),
            key_rows=size * int(decoder["num_key_value_heads"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        raise ArtifactError(
            f"{path}: does not describe a decoder: build the artifact again"
        ) from None


def linears_to_modules(factors: Mapping[str, LowRank], layout: ModuleLayout) -> dict[str, LowRank]:
    """Factors by linear of an artifact as those by module of transformers.

    Raises:
      ArtifactError: a linear is itself a factor of a module's weight.
    """
    found: dict[str, LowRank] = {}
    joined: dict[str, dict[str, LowRank]] = defaultdict(dict)
    for name, one in factors.items():
        parent, role = _split_name(name)
        if role in _FACTORS:
            raise ArtifactError(
                f"'{name}' is a factor of the weight of '{parent}', which transformers has in one "
                "piece: such an adapter can be written as .onnx_adapter only"
            )
        if layout.stores_whole and (whole := _whole_of(role)):
            joined[f"{parent}.{whole}"][role] = one
        elif not layout.stores_whole and role in _PARTS:
            parts = split_rows(one, layout.rows(role, len(one.lora_b)))
            names = [f"{parent}.{part}" for part in _PARTS[role]]
            found |= dict(zip(names, parts, strict=True))
        else:
            found[name] = one
    for name, roles in joined.items():
        _, whole = _split_name(name)
        total = len(_PARTS[whole]) * len(next(iter(roles.values())).lora_b)
        found[name] = _join(roles, whole, layout.rows(whole, total))
    return found


def modules_to_linears(
    factors: Mapping[str, LowRank],
    linears: Mapping[str, tuple[int, int]],
    layout: ModuleLayout,
    *,
    place: str,
) -> dict[str, LowRank]:
    """Factors by module of transformers as those by linear of an artifact.

    Args:
      factors: by module.
      linears: ``(out_features, in_features)`` of all that take an adapter.
      layout: of the model.
      place: what an error names.

    Raises:
      ArtifactError: a module takes no adapter, or its factors do not fit its weight.
    """
    found: dict[str, LowRank] = {}
    joined: dict[str, dict[str, LowRank]] = defaultdict(dict)
    for name, one in factors.items():
        parent, role = _split_name(name)
        whole = f"{parent}.{_whole_of(role)}"
        parts = [f"{parent}.{part}" for part in _PARTS.get(role, ())]
        if name in linears:
            _check_shape(place, name, one, linears[name])
            found[name] = one
        elif parts and set(parts) <= set(linears):
            rows = [linears[part][0] for part in parts]
            _check_shape(place, name, one, (sum(rows), linears[parts[0]][1]))
            found |= dict(zip(parts, split_rows(one, rows), strict=True))
        elif whole in linears:
            total, columns = linears[whole]
            _, whole_role = _split_name(whole)
            rows_of = dict(zip(_PARTS[whole_role], layout.rows(whole_role, total), strict=True))
            _check_shape(place, name, one, (rows_of[role], columns))
            joined[whole][role] = one
        elif {f"{name}.v", f"{name}.u"} & set(linears):
            raise ArtifactError(
                f"{place}: has factors of '{name}', which is a product of two matrices here, and "
                "an adapter of it would be of neither: leave it out of the targets"
            )
        else:
            raise ArtifactError(
                f"{place}: has factors of '{name}', which takes no adapter here: only compressed "
                "linears of decoder blocks do: leave it out of the targets"
            )
    for name, roles in joined.items():
        _, whole = _split_name(name)
        found[name] = _join(roles, whole, layout.rows(whole, linears[name][0]))
    return found


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
    """Factors of some parts, by role, as those of their whole; one ``lora_a`` is shared."""
    downs = [one.down() for one in parts.values()]
    if all(np.array_equal(down, downs[0]) for down in downs):
        columns = [slice(0, len(downs[0]))] * len(downs)
        lora_a = downs[0]
    else:
        edges = np.cumsum([0, *map(len, downs)])
        columns = list(map(slice, edges[:-1], edges[1:]))
        lora_a = np.concatenate(downs)
    lora_b = np.zeros((sum(rows), len(lora_a)), np.float32)
    starts = dict(zip(_PARTS[whole], np.cumsum([0, *rows]), strict=False))
    for (role, one), ranks in zip(parts.items(), columns, strict=True):
        start = starts[role]
        lora_b[start : start + len(one.lora_b), ranks] = one.up()
    return LowRank(lora_a=lora_a, lora_b=lora_b)
