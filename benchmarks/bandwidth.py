"""Measure the read bandwidth of this machine's memory, the upper limit of decoding speed.

    python benchmarks/bandwidth.py [--threads N]

Weights cannot be read faster than this. The buffer is larger than any last-level cache and uses
huge pages where the system has them (NumPy asks for them). That is the fastest memory: weights that
are mapped from a file use small pages and pay for address translation.
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
    """Reads a large buffer from memory with several threads."""

    def __init__(self, threads: int, mebibytes: int = MEBIBYTES) -> None:
        # Written once: the system maps all untouched pages to one page of zeros.
        self._parts = np.array_split(np.ones(mebibytes << 17, np.int64), threads)
        self._pool = ThreadPoolExecutor(threads)
        self.bytes_per_second()

    def bytes_per_second(self) -> float:
        """Read all of it once."""
        start = time.perf_counter()
        # A reduction is fast enough for memory, and NumPy releases the interpreter lock in it.
        for _ in self._pool.map(np.bitwise_or.reduce, self._parts):
            pass
        return sum(part.nbytes for part in self._parts) / (time.perf_counter() - start)


def main() -> None:
    """Print the median of several readings."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    reader = Reader(threads)
    median = float(np.median([reader.bytes_per_second() for _ in range(9)]))
    sys.stdout.write(f"{median / 1e9:.1f} GB/s with {threads} threads\n")


if __name__ == "__main__":
    main()
