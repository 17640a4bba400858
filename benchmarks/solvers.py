"""Time EoRA's closed form against the full SVD of the weighted error, and compare what they leave.

    python benchmarks/solvers.py [--json FILE] [--repeats N] [--shapes 576x1536,2048x2048]

Both are given the same square root of the Gram. The SVD is how the optimum is usually computed
(Eckart-Young); the figure in the last column is by how much the closed form's error exceeds it.
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

from eoracc.passes.factors import eora_factors, gram_root, weighted_norm

Float = NDArray[np.float64]

SHAPES = "576x1536,2048x2048,4096x4096"


@dataclass(frozen=True)
class Row:
    """One line of the table; seconds are the best of all repeats."""

    rows: int
    columns: int
    rank: int
    eora_seconds: float
    svd_seconds: float
    speedup: float
    relative_excess: float


def problem(rows: int, columns: int) -> tuple[Float, Float]:
    """A quantization-like error and a Gram whose eigenvalues span four decades."""
    rng = np.random.default_rng(0)
    delta = rng.standard_normal((rows, columns))
    inputs = rng.standard_normal((2 * columns, columns)) * np.geomspace(1, 1e-2, columns)
    rotation = np.linalg.qr(rng.standard_normal((columns, columns)))[0]
    inputs = inputs @ rotation
    return delta, inputs.T @ inputs


def svd_of_weighted(delta: Float, root: Float, rank: int) -> tuple[Float, Float]:
    """The optimum from a full SVD: B = U_r, A = U_r^T delta."""
    basis = np.linalg.svd(delta @ root, full_matrices=False)[0][:, :rank]
    return basis, basis.T @ delta


def timed(solve: Callable[[], tuple[Float, Float]], repeats: int) -> tuple[float, Float]:
    """Best time in seconds and the product B A."""
    best, product = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        b, a = solve()
        best = min(best, time.perf_counter() - start)
        product = b @ a
    assert product is not None, "at least one repeat is needed"
    return best, product


def measure(rows: int, columns: int, *, rank: int, repeats: int) -> Row:
    """Run both solvers on one shape."""
    delta, gram = problem(rows, columns)
    root = gram_root(gram)
    fast, closed = timed(lambda: eora_factors(delta, gram, rank, weighted=delta @ root), repeats)
    slow, optimum = timed(lambda: svd_of_weighted(delta, root, rank), repeats)
    least = weighted_norm(delta - optimum, gram)
    return Row(
        rows=rows,
        columns=columns,
        rank=rank,
        eora_seconds=fast,
        svd_seconds=slow,
        speedup=slow / fast,
        relative_excess=weighted_norm(delta - closed, gram) / least - 1,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shapes", default=SHAPES, help=f"ROWSxCOLUMNS, ... (default {SHAPES})")
    options = parser.parse_args()
    table = []
    print(f"{'shape':>12} {'rank':>5} {'eora s':>8} {'svd s':>8} {'speedup':>8} {'excess':>9}")
    for shape in options.shapes.split(","):
        rows, columns = (int(side) for side in shape.split("x"))
        row = measure(rows, columns, rank=options.rank, repeats=options.repeats)
        table.append(row)
        print(
            f"{shape:>12} {row.rank:>5} {row.eora_seconds:>8.3f} {row.svd_seconds:>8.3f} "
            f"{row.speedup:>7.1f}x {row.relative_excess:>9.1e}",
            flush=True,
        )
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in table], indent=2) + "\n")


if __name__ == "__main__":
    main()
