"""The result of ``eoracc compare``: one row for each method and budget, with its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from eoracc.compiler.compare.methods import Family

__all__ = ["Comparison", "Figures", "Original", "Row", "Through"]

Through = Literal["original", "compressed", "both"]
"""The weights that statistics are taken through."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of one contender.

    Attributes:
      perplexity: on held-out text.
      perplexity_ood: on text of another kind; None without ``compare.ood``.
      kl: mean KL(original || contender) per token of the held-out text, in nats.
      kl_ood: the same on the text of another kind.
      top1_agreement: share of held-out tokens with the original's most likely next token.
      bytes: of all parameters, as an artifact stores them.
      folder_bytes: of the artifact that a build would write, with a bound for its records.
      linear_bytes: of the compressed linears; values that are not quantized count two bytes, while
        an artifact stores four.
      bits_per_weight: ``linear_bytes`` in bits per weight of those linears.
      seconds: of processor time for the passes, without work shared by several rows.
      wall_s: seconds of wall-clock time for the passes.
    """

    perplexity: float
    perplexity_ood: float | None
    kl: float
    kl_ood: float | None
    top1_agreement: float
    bytes: int
    folder_bytes: int
    linear_bytes: int
    bits_per_weight: float
    seconds: float
    wall_s: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one budget.

    Attributes:
      method: its name.
      family: its kind.
      budget: as it was given; None for a method that takes none.
      rank: of the compensation, where the budget decided it.
      ratio: share of parameters removed, where the budget decided it.
      passes: all of them with their options, in the form of model.yaml.
      skipped: the reason why there are no figures; None where there are.
      figures: None where the row is skipped.
    """

    method: str
    family: Family
    budget: str | None
    rank: int | None = None
    ratio: float | None = None
    passes: Sequence[Any] = ()
    skipped: str | None = None
    figures: Figures | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON form with the figures on the same level; those of a skipped row are null."""
        content = asdict(self)
        figures = content.pop("figures") or dict.fromkeys(Figures.__dataclass_fields__)
        return {**content, **figures}


@dataclass(frozen=True, kw_only=True)
class Original:
    """The figures of the model before compression.

    Attributes:
      perplexity: on held-out text.
      perplexity_ood: on text of another kind.
      bytes: of all parameters, as an artifact stores them.
      linear_bytes: of the linears that the contenders compress, two bytes a weight.
    """

    perplexity: float
    perplexity_ood: float | None
    bytes: int
    linear_bytes: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All rows.

    Attributes:
      model: the value of model.yaml.
      digest: of the checkpoint.
      through: the weights that statistics were taken through: ``original``, one sweep for all, or
        each contender's own ``compressed`` prefix, a sweep each.
      calibration_tokens: number of tokens of the calibration text.
      windows: number of held-out windows.
      window_length: in tokens.
      shared_s: processor seconds of sweeps that several rows share.
      original: figures before compression.
      rows: in the order of methods, then budgets.
    """

    model: str
    digest: str
    through: Through
    calibration_tokens: int
    windows: int
    window_length: int
    shared_s: float
    original: Original
    rows: Sequence[Row]

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "rows": [row.as_dict() for row in self.rows]}
