"""Cost of starting: load time and memory, measured in a process of its own.

The peak memory of a process never falls, and loaded libraries stay. So only a new process shows
what an artifact needs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from eoracc.documents import Reader
from eoracc.errors import BackendError
from eoracc.runtime.model import LoadOptions

__all__ = ["Start", "measure_start"]

_READER = Reader(BackendError, "run the benchmark again")
_PROCESS = "eoracc.runtime.bench.start_process"


@dataclass(frozen=True)
class Start:
    """Time and memory of a new process.

    Attributes:
      load_s: seconds that ``load`` took, with verification of the manifest.
      loaded_memory_bytes: memory of the process after loading.
      peak_memory_bytes: largest memory of the process, with a prompt and some decoding.
      device_memory_bytes: growth of the GPU memory in use by all processes, without the memory of
        CUDA itself; None without a GPU.
    """

    load_s: float
    loaded_memory_bytes: int
    peak_memory_bytes: int
    device_memory_bytes: int | None


def measure_start(
    folder: Path, *, prompt_tokens: int, new_tokens: int, **options: Unpack[LoadOptions]
) -> Start:
    """Load the artifact in a new process, and run a prompt and some decoding there.

    Args:
      folder: the artifact.
      prompt_tokens: length of the prompt.
      new_tokens: to decode.
      **options: of :func:`eoracc.runtime.load`.

    Raises:
      BackendError: the process failed; the text is its last line of error output.
    """
    numbers = (prompt_tokens, new_tokens)
    given = json.dumps(options, default=str)  # a path as its text
    done = subprocess.run(  # noqa: S603 - a module of this package
        [sys.executable, "-m", _PROCESS, str(folder), *map(str, numbers), given],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return Start(**_READER.parse(done.stdout, folder))
    except (BackendError, TypeError):
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"its process ended with code {done.returncode}"
        raise BackendError(f"{folder}: cannot be started on its own: {reason}") from None
