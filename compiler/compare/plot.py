"""The plot of ``eoracc compare``: perplexity and KL against bytes, a line a method."""

from __future__ import annotations

import math
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eoracc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

    from eoracc.compiler.compare.result import Comparison, Figures

__all__ = ["check_plot", "draw"]

_SUFFIXES = (".svg", ".png")

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Okabe and Ito's, which the colour-blind tell apart; yellow left out, which paper swallows."""

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p")
"""As many as no multiple of the colours: a pair of both repeats after 77 methods."""

_LINES: Mapping[str, str] = {"compensation": "-", "factorization": "--"}
"""By family; points and recipes are dotted."""

_SENSELESS = 30
"""Times the original's perplexity: what is beyond has no scale that the others are legible on."""

_STYLE: Mapping[str, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text as text: it can be searched, and takes less room
    "svg.hashsalt": "eoracc",  # names inside the file, which are random otherwise
}


def check_plot(file: Path) -> None:
    """Refuse a plot before any work is done for it.

    Raises:
      ConfigError: the file is of another kind, or matplotlib is not installed.
    """
    if file.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"{file}: a plot is drawn as {' or '.join(_SUFFIXES)}: name it so")
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: pip install 'eoracc[plot]'"
        )


def draw(comparison: Comparison, file: Path) -> None:
    """Draw ``comparison`` into ``file``; the same rows give the same bytes.

    Both panels have the bytes of the compressed linears below and bits per weight above. Where
    some perplexities are more than thirty times the original's, their markers are hollow and stand
    at the upper edge.

    Args:
      comparison: at least one row has figures.
      file: its suffix says what it becomes, ``.svg`` or ``.png``.

    Raises:
      OSError: the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    series = _series(comparison)
    original = comparison.original
    style: Any = {**mpl.rcParamsDefault, **_STYLE}  # whatever the user's matplotlibrc says
    with mpl.rc_context(style):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        perplexity, kl = figure.subplots(1, 2)
        bits_per_byte = 16 / original.linear_bytes
        limit = _SENSELESS * original.perplexity
        _panel(perplexity, series, "perplexity", bits_per_byte=bits_per_byte, limit=limit)
        _panel(kl, series, "kl", bits_per_byte=bits_per_byte)
        perplexity.set_ylabel("perplexity on held-out text")
        kl.set_ylabel("KL from the original, nats per token")
        perplexity.axhline(original.perplexity, color="0.4", linewidth=0.8)
        perplexity.annotate(
            f"original {original.perplexity:.2f}",
            (1, original.perplexity),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            xytext=(0, -2),
            ha="right",
            va="top",
            color="0.4",
        )
        legend = figure.legend(
            perplexity.get_lines()[: len(series)],
            # matplotlib leaves out what begins with an underscore.
            [f" {method}" if method.startswith("_") else method for method, _ in series],
            loc="outside right center",
            frameon=False,
            title="method",
        )
        for text in legend.get_texts():
            text.set_parse_math(False)  # a dollar sign in a name is one
        metadata = {"Date": None} if file.suffix.lower() == ".svg" else {"Software": None}
        figure.savefig(file, dpi=150, metadata=metadata)


def _series(comparison: Comparison) -> dict[tuple[str, str], list[Figures]]:
    """Figures by method and family, from the fewest bytes on."""
    series: dict[tuple[str, str], list[Figures]] = {}
    for row in comparison.rows:
        if row.figures is not None:
            series.setdefault((row.method, row.family), []).append(row.figures)
    for figures in series.values():
        figures.sort(key=lambda point: point.linear_bytes)
    return series


def _panel(
    axes: Axes,
    series: Mapping[tuple[str, str], Sequence[Figures]],
    name: str,
    *,
    bits_per_byte: float,
    limit: float = math.inf,
) -> None:
    """One figure of every method against the bytes of the compressed linears."""
    everything = [point for figures in series.values() for point in figures]
    values = [getattr(point, name) for point in everything]
    if min(values) > limit:
        limit = math.inf
    styles = list(islice(zip(cycle(_COLOURS), cycle(_MARKERS), strict=False), len(series)))
    for ((_, family), figures), (colour, marker) in zip(series.items(), styles, strict=True):
        axes.plot(
            [point.linear_bytes / 1e6 for point in figures],
            [min(getattr(point, name), limit) for point in figures],
            color=colour,
            marker=marker,
            markersize=5,
            linestyle=_LINES.get(family, ":"),
        )
    for figures, (colour, marker) in zip(series.values(), styles, strict=True):
        beyond = [point.linear_bytes / 1e6 for point in figures if getattr(point, name) > limit]
        if beyond:
            axes.plot(
                beyond,
                [limit] * len(beyond),
                color=colour,
                marker=marker,
                markersize=5,
                markerfacecolor="white",
                linestyle="none",
            )
    if max(values) > limit:
        axes.annotate(
            f"hollow: above {limit:.0f}",
            (1, 1),
            xycoords="axes fraction",
            textcoords="offset points",
            xytext=(0, -2),
            ha="right",
            va="top",
            color="0.4",
        )
    axes.margins(y=0.08)
    sizes = [point.linear_bytes for point in everything]
    _scale(axes, "x", sizes)
    _scale(axes, "y", [min(value, limit) for value in values])
    axes.set_xlabel("MB of the compressed linears")

    def to_bits(megabytes: Any) -> Any:  # noqa: ANN401 - arrays of matplotlib's
        return megabytes * 1e6 * bits_per_byte

    def to_megabytes(bits: Any) -> Any:  # noqa: ANN401
        return bits / bits_per_byte / 1e6

    bits = axes.secondary_xaxis("top", functions=(to_bits, to_megabytes))
    bits.set_xlabel("bits per weight")
    if axes.get_xscale() == "log":
        _few_ticks(bits.xaxis, sizes)


def _scale(axes: Axes, which: Literal["x", "y"], values: Sequence[float]) -> None:
    """A logarithmic axis where ``values`` differ by more than a factor of three."""
    if min(values) > 0 and max(values) > 3 * min(values):
        axes.set(**{f"{which}scale": "log"})
        _few_ticks(axes.xaxis if which == "x" else axes.yaxis, values)


def _few_ticks(axis: Axis, values: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    # Over many decades powers of ten alone have room.
    subs = (1, 1.5, 2, 3, 5, 7) if max(values) < 100 * min(values) else (1,)
    axis.set_major_locator(LogLocator(base=10, subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
