"""What it takes to start: load time and memory, measured in a process of its own.

    python -m eoracc.runtime.bench.start ARTIFACT THREADS PROMPT_TOKENS NEW_TOKENS

A process's peak of memory never falls, and what has been imported is there: only a new process can
say what an artifact needs. This file prints one JSON object, or a sentence on standard error.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from eoracc import EoraccError
from eoracc.runtime.errors import BackendError

__all__ = ["Start", "measure_start"]


@dataclass(frozen=True)
class Start:
    """What a new process needed.

    Attributes:
      load_s: from the call of ``load`` until it returned; the manifest was verified meanwhile.
      loaded_memory_bytes: held after loading.
      peak_memory_bytes: the most it held, a prompt and some decoding included.
    """

    load_s: float
    loaded_memory_bytes: int
    peak_memory_bytes: int


def measure_start(folder: Path, *, threads: int, prompt_tokens: int, new_tokens: int) -> Start:
    """Load the artifact in a new process, and run a prompt and some decoding there.

    Raises:
      EoraccError: what went wrong there.
    """
    numbers = (threads, prompt_tokens, new_tokens)
    done = subprocess.run(  # noqa: S603 - this very module
        [sys.executable, "-m", __spec__.name, str(folder), *map(str, numbers)],
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


def _start(folder: Path, threads: int, prompt_tokens: int, new_tokens: int) -> Start:
    # The first imports of ONNX Runtime count as loading: whoever starts anew pays for them.
    began = time.perf_counter()
    from eoracc.runtime import load  # noqa: PLC0415

    model = load(folder, threads=threads)
    load_s = time.perf_counter() - began
    from eoracc.runtime.bench import workloads  # noqa: PLC0415
    from eoracc.runtime.memory import peak_bytes, resident_bytes  # noqa: PLC0415

    held = resident_bytes()
    prompt = workloads.prompt_tokens(model, prompt_tokens)
    workloads.decode_tokens_per_s(model, prompt, new_tokens, None)
    return Start(load_s, held, peak_bytes())


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(asdict(_start(Path(sys.argv[1]), *map(int, sys.argv[2:])))))
    except EoraccError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
