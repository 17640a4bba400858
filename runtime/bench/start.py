"""What it takes to start: load time and memory, measured in a process of its own.

A process's peak of memory never falls, and what has been loaded is there: only a new process can
say what an artifact needs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from eoracc.errors import BackendError
from eoracc.runtime.backends import Backend

__all__ = ["Start", "measure_start"]

_PROCESS = "eoracc.runtime.bench.start_process"


@dataclass(frozen=True)
class Start:
    """What a new process needed.

    Attributes:
      load_s: from the call of ``load`` until it returned; the manifest was verified meanwhile.
      loaded_memory_bytes: held after loading.
      peak_memory_bytes: the most it held, a prompt and some decoding included.
      device_memory_bytes: of the GPU that all processes together held more after that than before,
        CUDA's own share left out; None without a GPU.
    """

    load_s: float
    loaded_memory_bytes: int
    peak_memory_bytes: int
    device_memory_bytes: int | None


def measure_start(
    folder: Path, *, threads: int, prompt_tokens: int, new_tokens: int, backend: Backend
) -> Start:
    """Load the artifact in a new process, and run a prompt and some decoding there.

    Raises:
      EoraccError: what went wrong there.
    """
    numbers = (threads, prompt_tokens, new_tokens)
    done = subprocess.run(  # noqa: S603 - a module of this package
        [sys.executable, "-m", _PROCESS, str(folder), backend, *map(str, numbers)],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return Start(**json.loads(done.stdout))
    except (ValueError, TypeError):
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"its process ended with code {done.returncode}"
        raise BackendError(f"{folder}: cannot be started on its own: {reason}") from None
