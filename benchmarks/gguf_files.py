"""Let llama.cpp quantize a model's GGUF file, with the importance matrix that it can use."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from benchmarks.protocol import Protocol, prepare
from eoracc.compiler.frontend.load import LoadedModel
from eoracc.compiler.sweep.survey import Survey
from eoracc.compiler.text.windows import Windows
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.graph.linears import Linear, find_linears
from eoracc.passes.progress import Progress

__all__ = ["FILES", "PeerFile", "importance", "make_files", "tensor_name"]

_ROLES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_MAKER = Path(__file__).with_name("peer_models.py")


@dataclass(frozen=True)
class PeerFile:
    """A file that llama.cpp makes.

    Attributes:
      kind: its type, as llama.cpp names it.
      importance: whether it is made with the importance matrix.
    """

    kind: str
    importance: bool

    @property
    def name(self) -> str:
        """Of the file, without its suffix."""
        return f"{self.kind}-importance" if self.importance else self.kind

    @property
    def label(self) -> str:
        """Name in a table."""
        return f"llama.cpp {self.kind}{', importance matrix' if self.importance else ''}"


FILES: dict[str, tuple[PeerFile, ...]] = {
    "smollm2": (
        PeerFile("Q4_K_M", importance=True),
        PeerFile("Q3_K_M", importance=False),
        PeerFile("Q3_K_S", importance=True),
    ),
    "gemma3": (
        PeerFile("Q4_K_S", importance=False),
        PeerFile("IQ4_NL", importance=True),
        PeerFile("Q3_K_M", importance=True),
        PeerFile("Q3_K_S", importance=True),
    ),
}
"""The files that ours are compared with at equal bytes, the largest first."""


def tensor_name(linear: Linear) -> str:
    """The name of the weight of a decoder block's linear in llama.cpp.

    Raises:
      KeyError: llama.cpp has no name for it.
    """
    return f"blk.{linear.block}.{_ROLES[linear.name.rpartition('.')[2]]}.weight"


def importance(
    loaded: LoadedModel, windows: Windows, folder: Path, progress: Progress
) -> dict[str, NDArray[np.float32]]:
    """Mean square of every input of every linear in a decoder block.

    Args:
      loaded: the original model.
      windows: text.
      folder: for temporary activations.
      progress: shown one phase.

    Returns:
      ``float32 [K]`` by llama.cpp's name of the weight.
    """
    context = Survey(
        model=loaded.model,
        linears=find_linears(loaded.model),
        windows=windows,
        following=(),
        checkpoint=loaded.folder,
        trust_remote_code=False,
        folder=folder,
        key="",
        progress=progress,
    )
    found = {}
    for group in context.walk("importance", Calibrate(tokens="equal")):
        assert group.gram is not None
        squares = np.diag(group.gram.matrix) / group.gram.tokens
        for linear in group.linears:
            if linear.block is not None:
                found[tensor_name(linear)] = squares.astype(np.float32)
    return found


def make_files(
    model: str,
    protocol: Protocol,
    python: Path,
    folder: Path,
    progress: Progress,
    files: Iterable[PeerFile],
) -> Iterator[tuple[PeerFile, Path]]:
    """Let llama.cpp quantize the checkpoint's GGUF file, one type after another.

    Args:
      model: a key of :data:`FILES`.
      protocol: of the model; its calibration windows give the importance matrix.
      python: the interpreter of a virtual environment with llama-cpp-python and safetensors.
      folder: for the files and the matrix.
      progress: shown the phases.
      files: what to make.

    Raises:
      SystemExit: llama.cpp cannot make a file.
    """
    _, source = prepare(model)
    matrix = folder / "importance.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        if file.importance and not matrix.exists():
            with tempfile.TemporaryDirectory() as work:
                found = importance(protocol.loaded, protocol.calibration, Path(work), progress)
            save_file(found, matrix)
        target = folder / f"{model}-{file.name}.gguf"
        command = [python, _MAKER, "gguf", source, target, file.kind]
        command += [matrix] if file.importance else []
        done = subprocess.run([*map(str, command)], check=False, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines() or [f"code {done.returncode}"]
            raise SystemExit(f"error: {python}: cannot make {file.name}: {said[-1]}")
        yield file, target
