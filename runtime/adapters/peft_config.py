"""``adapter_config.json`` of PEFT: whether a LoRA is a plain one, and how its factors are scaled.

PEFT multiplies ``lora_B lora_A`` by ``lora_alpha / r``, where regular expressions may give modules
a rank and an alpha of their own. The expressions come from whoever made the adapter, so they are
matched by RE2, in time linear in the module's name; its syntax has no look-around and no
back-references, which PEFT's own files do not use either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import re2

from eoracc.documents import Reader
from eoracc.errors import ArtifactError
from eoracc.printable import printable, quoted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["PEFT_CONFIG", "PeftConfig"]

PEFT_CONFIG = "adapter_config.json"

_READER = Reader(ArtifactError, "save the adapter with PEFT", constants=True)

_PLAIN = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
"""Options that leave an adapter a plain sum, or that have a check of their own."""

_REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": "it acts from some token of the text on (aLoRA)",
    "fan_in_fan_out": "its factors are those of transposed weights",
    "layer_replication": "it repeats layers of the model",
    "lora_bias": "it adds biases",
    "modules_to_save": "it replaces whole modules, which belong to the backbone",
    "target_parameters": "it is for parameters that are no linear's weight",
    "trainable_token_indices": "it replaces embeddings, which belong to the backbone",
    "use_dora": "it scales the weights themselves (DoRA)",
    "use_qalora": "it pools its inputs (QALoRA)",
}
"""Options that make an adapter more than low-rank factors, with the reason."""

_CHANGES_WEIGHTS = ("corda", "loftq", "lora_ga", "olora", "pissa")
"""Initializations that subtract the adapter's first state from the model's weights."""

_MOST_RANK = 1 << 16
"""Of a module; the largest hidden sizes of models are smaller."""

_MOST_PATTERNS = 1 << 13
"""Of a config: a large model has some thousand modules."""

_LONGEST_PATTERN = 1 << 10
"""Characters; the name of a module has some dozens."""

_PATTERN_BYTES = 1 << 20
"""Memory of a compiled pattern, which bounds the time of a match too."""


@dataclass(frozen=True)
class PeftConfig:
    """What a plain LoRA's factors are scaled by.

    Attributes:
      rank: of modules without a pattern.
      alpha: likewise.
      uses_root: whether alpha is divided by the root of the rank (rsLoRA).
      ranks: compiled patterns with the rank of the modules that match; the first match counts.
      alphas: likewise.
    """

    rank: int
    alpha: float
    uses_root: bool
    ranks: Sequence[tuple[Any, int]]
    alphas: Sequence[tuple[Any, float]]

    @classmethod
    def read(cls, path: Path) -> PeftConfig:
        """Read an ``adapter_config.json``.

        Raises:
          ArtifactError: it is missing or damaged, the adapter is more than a plain LoRA, or a value
            or a pattern cannot be used.
        """
        config = _read_object(path)
        _refuse_other_kinds(path, config)
        uses_root = config.get("use_rslora") or False
        if not isinstance(uses_root, bool):
            raise ArtifactError(f"{path}: 'use_rslora' is no true or false: save it with PEFT")
        return cls(
            rank=_rank(path, "r", config.get("r")),
            alpha=_alpha(path, "lora_alpha", config.get("lora_alpha")),
            uses_root=uses_root,
            ranks=[
                (_compile(path, "rank_pattern", pattern), _rank(path, "rank_pattern", value))
                for pattern, value in _patterns(path, "rank_pattern", config)
            ],
            alphas=[
                (_compile(path, "alpha_pattern", pattern), _alpha(path, "alpha_pattern", value))
                for pattern, value in _patterns(path, "alpha_pattern", config)
            ],
        )

    def rank_of(self, module: str) -> int:
        """Rank of the factors of ``module``."""
        return next((rank for pattern, rank in self.ranks if pattern.match(module)), self.rank)

    def factor_of(self, module: str) -> float:
        """The factor that PEFT multiplies ``lora_B lora_A`` of ``module`` by."""
        alpha = next((own for pattern, own in self.alphas if pattern.match(module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.uses_root else rank)


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ArtifactError(f"{path}: is missing: give a folder that PEFT has saved an adapter to")
    return _READER.read_object(path)


def _refuse_other_kinds(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse an adapter that is no plain sum ``W + B A``."""
    if (kind := config.get("peft_type")) != "LORA":
        raise ArtifactError(
            f"{path}: is a PEFT adapter of type {printable(kind)}: only LORA is known"
        )
    if (bias := config.get("bias", "none")) != "none":
        raise ArtifactError(f"{path}: 'bias' is {quoted(bias)}: it replaces biases")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_WEIGHTS):
        raise ArtifactError(
            f"{path}: 'init_lora_weights' is '{printable(start)}': it is for weights that its "
            "training has changed: save it with PEFT's path_initial_model_for_weight_conversion"
        )
    for key, value in config.items():
        if value and key not in _PLAIN:
            reason = _REFUSED.get(key, "that kind of LoRA is not known")
            raise ArtifactError(f"{path}: '{printable(key)}' is set: {reason}")


def _rank(path: Path, field: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= _MOST_RANK:
        raise ArtifactError(
            f"{path}: '{field}' is {quoted(value)} where a rank of 1 to {_MOST_RANK:,} "
            "must be: save it with PEFT"
        )
    return value


def _alpha(path: Path, field: str, value: object) -> float:
    # Compared before it is converted: whole numbers of JSON have no limit.
    if type(value) not in (int, float) or not -1e30 < value < 1e30:  # type: ignore[operator]
        raise ArtifactError(
            f"{path}: '{field}' is {quoted(value)} where a finite number must be: save it with PEFT"
        )
    return float(value)  # type: ignore[arg-type]


def _patterns(path: Path, field: str, config: Mapping[str, Any]) -> list[tuple[str, object]]:
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise ArtifactError(f"{path}: '{field}' is no object of patterns: save it with PEFT")
    if len(patterns) > _MOST_PATTERNS:
        raise ArtifactError(
            f"{path}: '{field}' has {len(patterns):,} patterns, {_MOST_PATTERNS:,} are allowed: "
            "merge those of equal values"
        )
    return list(patterns.items())


def _compile(path: Path, field: str, pattern: str) -> Any:  # noqa: ANN401 - re2 has no types
    """A pattern as PEFT applies it: to the end of a name, from its beginning or after a dot."""
    options = re2.Options()
    options.max_mem = _PATTERN_BYTES
    options.log_errors = False
    try:
        if len(pattern) > _LONGEST_PATTERN:
            raise ValueError(f"it has {len(pattern):,} characters of {_LONGEST_PATTERN:,}")
        return re2.compile(rf"(.*\.)?({pattern})$", options)
    except (re2.error, ValueError) as error:
        cause = error.args[0].decode() if isinstance(error, re2.error) else str(error)
        raise ArtifactError(
            f"{path}: pattern '{printable(pattern)}' of '{field}' cannot be matched in linear time "
            f"({printable(cause)}): use a module's name, or an expression of RE2"
        ) from None
