"""How fast this machine reads memory: the limit that decoding is held against.

    python benchmarks/bandwidth.py [--threads N]

Weights cannot be read faster than this. The buffer is larger than any last-level cache and lies in
huge pages where the system has them (NumPy asks for them), which is the fastest memory there is:
weights that are mapped from a file lie in small pages and pay for the translation.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

__all__ = ["Reader"]

MEBIBYTES = 1024


class Reader:
    """Reads a large buffer from memory with some threads."""

    def __init__(self, threads: int, mebibytes: int = MEBIBYTES) -> None:
        # Written once: untouched pages would all be the one page of zeros.
        self._parts = np.array_split(np.ones(mebibytes << 17, np.int64), threads)
        self._pool = ThreadPoolExecutor(threads)
        self.bytes_per_second()

    def bytes_per_second(self) -> float:
        """Read all of it once."""
        start = time.perf_counter()
        # A reduction keeps up with memory, and NumPy lets go of the interpreter lock for it.
        for _ in self._pool.map(np.bitwise_or.reduce, self._parts):
            pass
        return sum(part.nbytes for part in self._parts) / (time.perf_counter() - start)


def main() -> None:
    """Print the median of some readings."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    reader = Reader(threads)
    median = float(np.median([reader.bytes_per_second() for _ in range(9)]))
    sys.stdout.write(f"{median / 1e9:.1f} GB/s with {threads} threads\n")


if __name__ == "__main__":
    main()
