"""What :mod:`benchmarks.quality` builds: settings, which a text describes, and named recipes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["COMPENSATIONS", "RECIPES", "Recipe", "Setting"]

COMPENSATIONS = {
    "activation_scaled": "activation-scaled SVD",
    "eora": "EoRA",
    "lqer": "L2QER",
    "svd": "SVD",
}


_PLAIN_TABLES = {"embedding_bits": None}
"""Embedding and head as they are: published tables count the linears of decoder blocks only."""


@dataclass(frozen=True)
class Setting:
    """A compression: ``<bits>g<group>|row[-<compensation><rank>[-<type>]][-outputs][-equal]``."""

    bits: int
    group_size: int
    compensation: str | None = None
    rank: int = 0
    factor_type: str = "float16"
    match: str = "weights"
    tokens: str = "unit"

    @classmethod
    def parse(cls, text: str) -> Setting:
        """The setting with the name ``text``.

        Raises:
          ValueError: no setting has that name.
        """
        match = re.fullmatch(
            r"([2348])(?:g(\d+)|row)(?:-([a-z_]+)(\d+)(?:-(int[48]))?)?(?:-(outputs))?(?:-(equal))?",
            text,
        )
        if match is None or match[3] not in (None, *COMPENSATIONS):
            raise ValueError(f"{text!r} is no setting: give one like 3g64 or 4row-eora32")
        bits, group, compensation, rank, factor_type, target, tokens = match.groups()
        return cls(
            int(bits),
            int(group or -1),
            compensation,
            int(rank or 0),
            factor_type or "float16",
            target or "weights",
            tokens or "unit",
        )

    @property
    def label(self) -> str:
        """Name in the table."""
        group = "whole row" if self.group_size == -1 else f"group {self.group_size}"
        added = (
            f" + {COMPENSATIONS[self.compensation]} rank {self.rank}" if self.compensation else ""
        )
        if self.factor_type != "float16":
            added += f" {self.factor_type}"
        if self.match == "outputs":
            added += ", outputs matched"
        if self.tokens == "equal":
            added += ", tokens as they are"
        return f"eoracc {self.bits}-bit {group}, GPTQ{added}"

    def passes(self) -> list[Any]:
        """The list of passes for model.yaml."""
        found: list[Any] = [
            {"calibrate": {"match": self.match, "tokens": self.tokens}},
            {
                "quantize_gptq": {
                    "bits": self.bits,
                    "group_size": self.group_size,
                    **_PLAIN_TABLES,
                }
            },
        ]
        if self.compensation is not None:
            options = {"rank": self.rank, "factor_type": self.factor_type}
            found.append({self.compensation: options})
        return found


@dataclass(frozen=True)
class Recipe:
    """A list of passes, for compressions that the name of a setting cannot express.

    Attributes:
      label: name in the table.
      passes_: the passes.
      compensation: the name of the row in the report that is shipped; None for ``quantized``.
      rank: of the compensation, where it is the same for all linears.
      folder_limit_bytes: the most that the folder of the build may take, with all that a default
        build puts there; None without a limit.
    """

    label: str
    passes_: tuple[Any, ...]
    compensation: str | None = None
    rank: int = 0
    folder_limit_bytes: int | None = None

    def passes(self) -> list[Any]:
        """The list of passes for model.yaml."""
        return list(self.passes_)


_ENDS = (0, 1, 2, 3, 4, 5, 24, 25, 26, 27, 28, 29)
"""Blocks of SmolLM2-135M whose error affects the logits most."""

_GEMMA_ENDS = (0, 1, 2, 15, 16, 17)
"""The same for Gemma-3-270M, by analogy."""

_CALIBRATE = {"calibrate": {"match": "outputs"}}


_WIDTHS = (2, 3, 4, 8)
_RANKS = (0, 8, 16, 32, 64, 96)


def _allocated_passes(
    budget: dict[str, Any], quantize: dict[str, Any], widths: Sequence[int] = _WIDTHS
) -> tuple[Any, ...]:
    """Bits and rank of every linear under one budget, with EoRA.

    The groups differ from those of 32 in which the checkpoints were quantized: 192 columns divide
    both widths of SmolLM2-135M, 128 all widths of Gemma-3-270M.
    """
    return (
        {"calibrate_outputs": {}},
        {"allocate": {**budget, "widths": list(widths), "ranks": list(_RANKS)}},
        _CALIBRATE,
        {"quantize_gptq": quantize},
        {"eora": {}},
    )


def _allocated(bits: float, group_size: int) -> Recipe:
    """Bits and rank of every linear for bits per weight of the linears."""
    quantize = {"group_size": group_size, **_PLAIN_TABLES}
    return Recipe(
        f"eoracc bits and rank allocated, group {group_size}, + EoRA int4",
        _allocated_passes({"bits_per_weight": bits}, quantize),
        "eora",
    )


def _folder(megabytes: float, *, group_size: int) -> Recipe:
    """The best model whose folder takes at most ``megabytes``.

    Args:
      megabytes: size of a file of llama.cpp, or a size below all of them.
      group_size: divides the rows of the linears, and those of the embedding.
    """
    quantize = {"group_size": group_size, "embedding_group_size": group_size}
    return Recipe(
        f"eoracc folder of at most {megabytes:g} MB",
        _allocated_passes({"size": f"{megabytes:g}MB"}, quantize, (2, 3, 4, 6, 8)),
        "eora",
        folder_limit_bytes=round(megabytes * 1e6),
    )


def _tables(bits: int, group_size: int | str = "auto") -> Recipe:
    """Embedding and head compressed, and nothing else."""
    quantize = {
        "embedding_bits": bits,
        "embedding_group_size": group_size,
        "overrides": {"*.layers.*": {"skip": True}},
    }
    return Recipe(
        f"eoracc embedding and head in {bits} bits, group {group_size}",
        ("calibrate", {"quantize_gptq": quantize}),
    )


RECIPES: dict[str, Recipe] = {
    "mixed-3.6": Recipe(
        "eoracc 3-bit group 64, v 8-bit, k 4-bit",
        (
            _CALIBRATE,
            {
                "quantize_gptq": {
                    **_PLAIN_TABLES,
                    "bits": 3,
                    "group_size": 64,
                    "overrides": {"*.v_proj": {"bits": 8}, "*.k_proj": {"bits": 4}},
                }
            },
        ),
    ),
    "mixed-4.25": Recipe(
        "eoracc 4-bit group 192, v 8-bit",
        (
            _CALIBRATE,
            {
                "quantize_gptq": {
                    **_PLAIN_TABLES,
                    "bits": 4,
                    "group_size": 192,
                    "overrides": {"*.v_proj": {"bits": 8}},
                }
            },
        ),
    ),
    "mixed-5.5": Recipe(
        "eoracc 4-bit group 192, k, v and 12 blocks' down 8-bit + CALDERA rank 72 int4",
        (
            {"calibrate_outputs": {}},
            _CALIBRATE,
            {
                "quantize_gptq": {
                    **_PLAIN_TABLES,
                    "bits": 4,
                    "group_size": 192,
                    "overrides": {
                        "*.[kv]_proj": {"bits": 8},
                        **{f"*.layers.{block}.*.down_proj": {"bits": 8} for block in _ENDS},
                    },
                }
            },
            {
                "caldera": {
                    "rank": 72,
                    "factor_type": "int4",
                    "overrides": {
                        "*.[kv]_proj": {"skip": True},
                        **{f"*.layers.{block}.*.down_proj": {"skip": True} for block in _ENDS},
                    },
                }
            },
        ),
        "caldera",
        72,
    ),
    "gemma3-4.3": Recipe(
        "eoracc 4-bit group 128, v 8-bit",
        (
            _CALIBRATE,
            {
                "quantize_gptq": {
                    **_PLAIN_TABLES,
                    "bits": 4,
                    "group_size": 128,
                    "overrides": {"*.v_proj": {"bits": 8}},
                }
            },
        ),
    ),
    "gemma3-5.5": Recipe(
        "eoracc 4-bit group 128, k, v and 6 blocks' down 8-bit + EoRA rank 96 int4",
        (
            _CALIBRATE,
            {
                "quantize_gptq": {
                    **_PLAIN_TABLES,
                    "bits": 4,
                    "group_size": 128,
                    "overrides": {
                        "*.[kv]_proj": {"bits": 8},
                        **{f"*.layers.{block}.*.down_proj": {"bits": 8} for block in _GEMMA_ENDS},
                    },
                }
            },
            {
                "eora": {
                    "rank": 96,
                    "factor_type": "int4",
                    "overrides": {
                        "*.[kv]_proj": {"skip": True},
                        **{
                            f"*.layers.{block}.*.down_proj": {"skip": True} for block in _GEMMA_ENDS
                        },
                    },
                }
            },
        ),
        "eora",
        96,
    ),
    "allocated-3.6": _allocated(3.6, 192),
    "allocated-4.25": _allocated(4.25, 192),
    "allocated-5.5": _allocated(5.5, 192),
    "gemma3-allocated-3.55": _allocated(3.55, 128),
    "gemma3-allocated-4.3": _allocated(4.3, 128),
    "gemma3-allocated-5.5": _allocated(5.5, 128),
    "tables-3": _tables(3, 64),
    "tables-4": _tables(4, 64),
    "tables-4-wide": _tables(4),
    "tables-6": _tables(6),
    "tables-8": _tables(8),
    "folder-105": _folder(105.5, group_size=192),
    "folder-93": _folder(93.5, group_size=192),
    "folder-88": _folder(88.2, group_size=192),
    "folder-80": _folder(80.0, group_size=192),
    "gemma3-folder-249": _folder(249.8, group_size=128),
    "gemma3-folder-241": _folder(241.9, group_size=128),
    "gemma3-folder-236": _folder(236.7, group_size=128),
    "gemma3-folder-180": _folder(180.0, group_size=128),
}
"""Mixtures of widths for a size in bits per weight of the linears, embedding and head alone, and
models for a size of the folder in MB. The sizes of folders are those of files of llama.cpp: Q4_K_M,
Q3_K_M and Q3_K_S of SmolLM2-135M; of Gemma-3-270M Q4_K_S, IQ4_NL and Q3_K_M, which have the same
size, and Q3_K_S. llama.cpp has no type that takes 80 or 180 MB of them: it keeps tables in Q8_0."""
