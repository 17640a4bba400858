"""The new process of :mod:`eoracc.runtime.bench.start`.

    python -m eoracc.runtime.bench.start_process ARTIFACT PROMPT_TOKENS NEW_TOKENS LOAD_OPTIONS

The options of :func:`eoracc.runtime.load` are a JSON object. Prints one, or an error text on
standard error.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from eoracc.documents import Reader
from eoracc.errors import BackendError
from eoracc.failure import end_process
from eoracc.runtime.bench import workloads
from eoracc.runtime.bench.start import Start
from eoracc.runtime.memory import peak_bytes, resident_bytes
from eoracc.runtime.model import load

if TYPE_CHECKING:
    from eoracc.runtime.model import LoadOptions

__all__ = ["start"]

_READER = Reader(BackendError, "run the benchmark again")


def start(
    folder: Path, prompt_tokens: int, new_tokens: int, **options: Unpack[LoadOptions]
) -> Start:
    """Load the artifact, run a prompt and some decoding, and measure time and memory.

    Raises:
      EoraccError: the artifact cannot be loaded or run.
    """
    began = time.perf_counter()
    model = load(folder, **options)  # also imports the backend
    load_s = time.perf_counter() - began
    held = resident_bytes()
    prompt = workloads.prompt_tokens(model, prompt_tokens)
    workloads.decode_tokens_per_s(model, prompt, new_tokens, None)
    return Start(load_s, held, peak_bytes(), model.device_bytes())


if __name__ == "__main__":
    try:
        given = _READER.parse(sys.argv[4], "LOAD_OPTIONS")
        measured = start(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), **given)
        sys.stdout.write(json.dumps(asdict(measured)))
    except BaseException as error:  # noqa: BLE001 - panics of Rust libraries are no Exception
        sys.exit(end_process(error, prefix=""))
