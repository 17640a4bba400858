"""Draws perplexity against size for eoracc and its peers, from measured rows.

    python -m benchmarks.plot_perplexity docs/perplexity_by_size.svg

Nothing is measured here: the rows are those of ``measured_perplexity.json``. The same rows give the
same bytes. A ``.png`` can be written as well.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measured_perplexity import FILE, MeasuredModel, read_measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw", "source_digest"]

_STYLES: tuple[Mapping[str, Any], ...] = (
    {"color": "#d55e00", "marker": "*", "markersize": 13, "linestyle": "-"},
    {"color": "#d55e00", "marker": "o"},
    {"color": "#d55e00", "marker": "o", "markerfacecolor": "white"},
    {"color": "#0072b2", "marker": "s"},
    {"color": "#009e73", "marker": "^"},
    {"color": "#cc79a7", "marker": "D", "markerfacecolor": "white"},
    {"color": "#cc79a7", "marker": "D"},
    {"color": "#000000", "marker": "v"},
)
"""One for each series. The colours are those of Okabe and Ito, which colour-blind readers can tell
apart; hollow markers of eoracc and GPTQModel are models without factors."""

_RC: Mapping[str, Any] = {
    "font.size": 9,
    "axes.spines.right": False,
    "svg.fonttype": "path",  # the layout does not depend on the reader's fonts
    "svg.hashsalt": "eoracc",  # identifiers inside the file are random otherwise
}

_BITS_TICKS = (3, 4, 5, 6, 7, 8, 10)
_PERPLEXITY_TICKS = (23, 24, 25, 26, 28, 30, 35, 40, 50, 60)
_MEGABYTES_TICKS = (40, 50, 60, 80, 100, 130)


def source_digest() -> str:
    """Identifies the rows that a plot was drawn from; the SVG's description contains it."""
    return hashlib.sha256(FILE.read_bytes()).hexdigest()


def draw(measured: MeasuredModel, file: Path) -> None:
    """Draw ``measured`` into ``file``.

    Args:
      measured: at most as many series as there are styles.
      file: ``.svg`` or ``.png``.

    Raises:
      OSError: the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {**mpl.rcParamsDefault, **_RC}  # independent of the user's matplotlibrc
    with mpl.rc_context(style):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        _plot_rows(axes, measured)
        _set_scales(axes, measured)
        axes.set_title(f"{measured.model}: lower left is better", fontsize=10)
        figure.savefig(file, dpi=150, metadata=_metadata(file))


def _plot_rows(axes: Axes, measured: MeasuredModel) -> None:
    count = len(measured.series)
    for index, (series, style) in enumerate(zip(measured.series, _STYLES, strict=False)):
        options = {"linestyle": "none", "markersize": 6, **style}
        rows = sorted(series.rows, key=lambda row: row.bits_per_weight)
        axes.plot(
            [row.bits_per_weight for row in rows],
            [row.wiki for row in rows],
            label=series.name,
            zorder=2 + count - index,  # the first series on top
            **options,
        )
        for row in rows:
            if row.label is not None:
                axes.annotate(
                    row.label,
                    (row.bits_per_weight, row.wiki),
                    textcoords="offset points",
                    xytext=(6, 4),
                    fontsize=7.5,
                    color=options["color"],
                )
    axes.axhline(measured.original.wiki, color="0.4", linewidth=0.8, zorder=1)
    axes.annotate(
        f"original, float32: {measured.original.wiki:.2f}",
        (1, measured.original.wiki),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        xytext=(0, -3),
        ha="right",
        va="top",
        color="0.4",
    )
    axes.legend(frameon=False, loc="upper right")


def _set_scales(axes: Axes, measured: MeasuredModel) -> None:
    """Logarithmic axes with few ticks; bits below, megabytes of the linears above."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    def label(value: float, _: int | None) -> str:
        return f"{value:g}"

    def to_megabytes(bits: Any) -> Any:
        return bits * megabytes_per_bit

    def to_bits(megabytes: Any) -> Any:
        return megabytes / megabytes_per_bit

    megabytes_per_bit = measured.linear_weights / 8e6
    axes.set(xscale="log", yscale="log")
    axes.set_ylim(bottom=measured.original.wiki * 0.945)
    above = axes.secondary_xaxis("top", functions=(to_megabytes, to_bits))
    for axis, ticks in (
        (axes.xaxis, _BITS_TICKS),
        (axes.yaxis, _PERPLEXITY_TICKS),
        (above.xaxis, _MEGABYTES_TICKS),
    ):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(FuncFormatter(label))
        axis.set_minor_locator(NullLocator())
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.set_xlabel("bits per weight of the linears, with scales, zero points and factors")
    above.set_xlabel("MB of the linears")
    axes.set_ylabel(f"perplexity on {measured.text}")


def _metadata(file: Path) -> dict[str, str | None]:
    if file.suffix.lower() == ".svg":
        return {"Date": None, "Description": f"drawn from {FILE.name}, sha256 {source_digest()}"}
    return {"Software": None}


def main() -> None:
    """Draw the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="FILE.svg or FILE.png")
    draw(read_measured(), parser.parse_args().file)


if __name__ == "__main__":
    main()
