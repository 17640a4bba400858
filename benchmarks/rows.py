"""The report of both benchmarks: one row for each comparison, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["Row", "compare", "show", "write_json"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Ours against one peer.

    Attributes:
      case: name of the case.
      ours_us: our median time in microseconds; None where ours could not run.
      peer: name of the peer.
      peer_us: its median time; None where the peer could not run.
      ratio: median over the rounds of our time over the peer's in the same round: below 1 is
        faster.
      bar: largest ratio that is accepted; None without a bar.
      holds: whether the ratio is within the bar; None without a bar or a ratio.
      ours_bandwidth: rate at which we read our weights, as a share of the read bandwidth.
      peer_bandwidth: the same of the peer.
      ours_bytes: weights read, in bytes: codes, scales, zero points and factors.
      peer_bytes: the peer's.
      note: remarks on the row.
    """

    case: str
    ours_us: float | None
    peer: str
    peer_us: float | None
    ratio: float | None
    bar: float | None
    holds: bool | None
    ours_bandwidth: float | None = None
    peer_bandwidth: float | None = None
    ours_bytes: int | None = None
    peer_bytes: int | None = None
    note: str = ""


def compare(
    case: str,
    peer: str,
    ours_s: Sequence[float],
    peer_s: Sequence[float],
    *,
    ours_bytes: int | None = None,
    peer_bytes: int | None = None,
    bandwidth: float | None = None,
    bar: float | None = None,
    no_more_bytes: bool = False,
    note: str = "",
) -> Row:
    """The row of two series that were measured in turn.

    Args:
      case: see :class:`Row`.
      peer: see :class:`Row`.
      ours_s: our times in seconds, one per round; empty where ours could not run.
      peer_s: the peer's times in the same rounds.
      ours_bytes: see :class:`Row`.
      peer_bytes: see :class:`Row`.
      bandwidth: read bandwidth of this machine, in bytes per second.
      bar: see :class:`Row`.
      no_more_bytes: the bar only holds if we read no more bytes than the peer.
      note: see :class:`Row`.

    Returns:
      The row.
    """
    ratio = None
    if len(ours_s) and len(peer_s):
        ratio = float(np.median(np.divide(ours_s, peer_s)))
    holds = None if ratio is None or bar is None else ratio <= bar
    if holds and no_more_bytes:
        assert ours_bytes is not None
        assert peer_bytes is not None
        holds = ours_bytes <= peer_bytes
    return Row(
        case=case,
        ours_us=_microseconds(ours_s),
        peer=peer,
        peer_us=_microseconds(peer_s),
        ratio=ratio,
        bar=bar,
        holds=holds,
        ours_bandwidth=_share(ours_bytes, ours_s, bandwidth),
        peer_bandwidth=_share(peer_bytes, peer_s, bandwidth),
        ours_bytes=ours_bytes,
        peer_bytes=peer_bytes,
        note=note,
    )


def _microseconds(taken: Sequence[float]) -> float | None:
    return float(np.median(taken)) * 1e6 if len(taken) else None


def _share(size: int | None, taken: Sequence[float], bandwidth: float | None) -> float | None:
    if size is None or bandwidth is None or not len(taken):
        return None
    return size / float(np.median(taken)) / bandwidth


def show(rows: Sequence[Row], setting: Mapping[str, Any], missing: Mapping[str, str]) -> None:
    """Print the setting, the table, and the systems that could not run."""
    console = Console(highlight=False, width=220)
    console.print(", ".join(f"{name} {value}" for name, value in setting.items()) + "\n")
    table = Table(box=box.MARKDOWN)
    for heading in ("case", "peer"):
        table.add_column(heading, no_wrap=True)
    headings = ("ours µs", "peer µs", "ratio", "bar", "holds", "ours bw", "peer bw", "bytes")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        more = None
        if row.ours_bytes is not None and row.peer_bytes:
            more = row.ours_bytes / row.peer_bytes
        table.add_row(
            row.case,
            row.peer + (f" ({row.note})" if row.note else ""),
            _text(row.ours_us, ",.0f"),
            _text(row.peer_us, ",.0f"),
            _text(row.ratio, ".2f"),
            _text(row.bar, ".2f", "≤ "),
            {None: "", True: "yes", False: "NO"}[row.holds],
            _text(row.ours_bandwidth, ".0%"),
            _text(row.peer_bandwidth, ".0%"),
            _text(more, ".2f"),
        )
    console.print(table)
    console.print(
        "ratio: median of ours / peer within a round, below 1 is faster. bw: share of the read "
        "bandwidth at which the weights are read. bytes: our weights / the peer's."
    )
    for name, reason in missing.items():
        console.print(f"not measured: {name}: {reason}")


def _text(value: float | None, form: str, prefix: str = "") -> str:
    return "" if value is None else prefix + format(value, form)


def write_json(
    path: Path, rows: Sequence[Row], setting: Mapping[str, Any], missing: Mapping[str, str]
) -> None:
    """Write ``{setting..., rows: [...], missing: {name: reason}}``."""
    content = {**setting, "rows": [asdict(row) for row in rows], "missing": dict(missing)}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
