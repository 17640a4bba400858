"""Perplexities of SmolLM2-135M that were measured once: eoracc's builds and its peers.

The figures are those of the tables in docs/results, all under the protocol of
:mod:`benchmarks.protocol`; a test compares the two. Peers are not run again: their rows are also
what :mod:`benchmarks.quality` prints next to its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["FILE", "MeasuredModel", "MeasuredRow", "Series", "read_measured"]

FILE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True, kw_only=True)
class MeasuredRow:
    """One row of a table in docs/results.

    Attributes:
      source: the page, relative to the repository's root.
      row: the label of the row in the page's table.
      bits_per_weight: of the compressed linears, with scales, zero points and factors.
      wiki: perplexity on Wikipedia.
      folder_bytes: of the folder, of a peer the bytes of its file; None where the folder was not
        kept and its bytes were not written down.
      label: short name next to the point in the plot; None for none.
    """

    source: str
    row: str
    bits_per_weight: float
    wiki: float
    folder_bytes: int | None = None
    label: str | None = None


@dataclass(frozen=True, kw_only=True)
class Series:
    """Rows of one system, which the plot draws in one colour.

    Attributes:
      name: for the legend.
      peer: whether another system made these models.
      rows: in the order of the table.
    """

    name: str
    peer: bool
    rows: tuple[MeasuredRow, ...]


@dataclass(frozen=True, kw_only=True)
class MeasuredModel:
    """All rows of one model.

    Attributes:
      model: its name.
      text: the evaluation text.
      linear_weights: number of weights of the compressed linears.
      original: the uncompressed model.
      series: eoracc's first.
    """

    model: str
    text: str
    linear_weights: int
    original: MeasuredRow
    series: tuple[Series, ...]


@cache
def read_measured() -> MeasuredModel:
    """The rows of ``measured_perplexity.json``."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    return MeasuredModel(
        model=content["model"],
        text=content["text"],
        linear_weights=content["linear_weights"],
        original=MeasuredRow(**content["original"]),
        series=tuple(
            Series(
                name=series["name"],
                peer=series["peer"],
                rows=tuple(MeasuredRow(**row) for row in series["rows"]),
            )
            for series in content["series"]
        ),
    )
