"""Time the compensation solver against a full SVD, and compare their remaining errors.

    python -m benchmarks.solvers [--json FILE] [--repeats N] [--rank R] [--threads N]
                                 [--shapes 576x576,4096x4096] [--spectra white,decaying]

Both get the same weighted error, ``delta L`` in float32, and return its top left singular vectors,
which are sufficient for the factors (:mod:`eoracc.passes.solvers.factors`). The full SVD is
torch.linalg.svd, optimal by Eckart and Young. The last column is the excess of our error over it.

The spectra are the two extremes of quantization errors. *white*: independent entries, the flattest
spectrum. *decaying*: the standard deviations of inputs span two decades, their Gram's eigenvalues
four.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from benchmarks.machine import machine_line
from eoracc.passes.solvers.singular import top_left_vectors

Float = NDArray[np.float32]

SHAPES = "576x576,1536x576,576x1536,2048x2048,4096x4096"
SPECTRA = {"white": 1.0, "decaying": 1e-2}
"""Standard deviation of the last input by name; that of the first is 1."""


@dataclass(frozen=True)
class Row:
    """One line of the table; seconds are the minimum of all repeats."""

    rows: int
    columns: int
    rank: int
    spectrum: str
    ours_seconds: float
    svd_seconds: float
    speedup: float
    relative_excess: float


def weighted_error(rows: int, columns: int, spectrum: str) -> Float:
    """An error weighted by its inputs, ``[rows, columns]``."""
    entries = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
    return entries * np.geomspace(1, SPECTRA[spectrum], columns, dtype=np.float32)


def full_svd(matrix: Float, rank: int, threads: int) -> Float:
    """Top left singular vectors ``[rows, rank]`` from the full decomposition."""
    import torch  # noqa: PLC0415 - slow to import

    torch.set_num_threads(threads)
    vectors: Float = torch.linalg.svd(torch.from_numpy(matrix), full_matrices=False)[0].numpy()
    return vectors[:, :rank]


def error_left(matrix: Float, vectors: NDArray[np.floating]) -> float:
    """``||X - U U^T X||_F``, summed in float64."""
    exact, basis = matrix.astype(np.float64), vectors.astype(np.float64)
    return float(np.linalg.norm(exact - basis @ (basis.T @ exact)))


def timed(
    solve: Callable[[], NDArray[np.floating]], repeats: int
) -> tuple[float, NDArray[np.floating]]:
    """Minimum time in seconds, and the vectors."""
    best, vectors = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        vectors = solve()
        best = min(best, time.perf_counter() - start)
    assert vectors is not None, "at least one repeat is needed"
    return best, vectors


def measure(
    rows: int, columns: int, spectrum: str, *, rank: int, threads: int, repeats: int
) -> Row:
    """Run both solvers on one matrix."""
    matrix = weighted_error(rows, columns, spectrum)
    fast, ours = timed(lambda: top_left_vectors(matrix, rank), repeats)
    slow, optimal = timed(lambda: full_svd(matrix, rank, threads), repeats)
    return Row(
        rows=rows,
        columns=columns,
        rank=rank,
        spectrum=spectrum,
        ours_seconds=fast,
        svd_seconds=slow,
        speedup=slow / fast,
        relative_excess=error_left(matrix, ours) / error_left(matrix, optimal) - 1,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shapes", default=SHAPES, help=f"ROWSxCOLUMNS, ... (default {SHAPES})")
    parser.add_argument("--spectra", default=",".join(SPECTRA))
    parser.add_argument("--threads", type=int, default=1, help="of both solvers; builds use one")
    options = parser.parse_args()
    shapes = [tuple(int(side) for side in shape.split("x")) for shape in options.shapes.split(",")]
    table = []
    print(f"{machine_line()}\n")
    print("| shape | rank | spectrum | ours ms | torch.linalg.svd ms | speedup | error above |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for rows, columns in shapes:
        for spectrum in options.spectra.split(","):
            with threadpool_limits(options.threads, user_api="blas"):
                row = measure(
                    rows,
                    columns,
                    spectrum,
                    rank=options.rank,
                    threads=options.threads,
                    repeats=options.repeats,
                )
            table.append(row)
            print(
                f"| {rows}x{columns} | {row.rank} | {spectrum} | {1e3 * row.ours_seconds:,.1f} "
                f"| {1e3 * row.svd_seconds:,.1f} | {row.speedup:.1f} "
                f"| {row.relative_excess:.0e} |",
                flush=True,
            )
    if options.json is not None:
        content = json.dumps([asdict(row) for row in table], indent=2)
        options.json.write_text(f"{content}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
