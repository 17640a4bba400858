"""Score GGUF files that llama.cpp has quantized, with the protocol of benchmarks.quality.

    python -m benchmarks.gguf_peers --model gemma3 importance --samples 16 MATRIX.safetensors
    python benchmarks/peer_models.py gguf SOURCE.gguf TARGET.gguf Q3_K_M [MATRIX.safetensors]
    python -m benchmarks.gguf_peers --model gemma3 score --windows 4 TARGET.gguf ...

The first command computes the importance matrix of llama.cpp, the mean square of every input of a
linear, over the calibration windows of our own builds. The last command puts a file's dequantized
linears into the same float32 graph, with the embedding of the checkpoint, and scores them as
``benchmarks.quality`` scores ours: only these weights differ. llama.cpp itself also rounds
activations to eight bits. Bits are per weight of the decoder blocks' linears.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from benchmarks.protocol import MODELS, SAMPLES, WINDOWS, load_protocol
from eoracc.compiler.frontend.load import LoadedModel
from eoracc.compiler.progress import ConsoleProgress
from eoracc.compiler.report.fidelity import Scorer, Scores, Variant
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.sweep.survey import Survey
from eoracc.compiler.text.windows import Windows
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.graph.linears import Linear, find_linears
from eoracc.passes.progress import Progress

__all__ = ["GgufLinears", "importance", "read_linears", "tensor_name"]

_ROLES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_ROTATED = ("q_proj", "k_proj")
"""Linears whose rows have another order in files of Llama's architecture."""


@dataclass(frozen=True, eq=False)
class GgufLinears:
    """The linears of a GGUF file.

    Attributes:
      weights: dequantized, ``float32 [N, K]``, by their name in the graph.
      bits: per weight, all of them together.
    """

    weights: Mapping[str, NDArray[np.float32]]
    bits: float


def tensor_name(linear: Linear) -> str:
    """The name of the weight of a decoder block's linear in llama.cpp.

    Raises:
      KeyError: llama.cpp has no name for it.
    """
    return f"blk.{linear.block}.{_ROLES[linear.name.rpartition('.')[2]]}.weight"


def read_linears(path: Path, linears: list[Linear]) -> GgufLinears:
    """Dequantize the linears of decoder blocks.

    Args:
      path: a GGUF file of the model.
      linears: of its graph.

    Raises:
      KeyError: the file lacks one of them.
    """
    reader = GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture = reader.fields["general.architecture"].contents()
    weights, stored, count = {}, 0, 0
    for linear in linears:
        if linear.block is None:
            continue
        tensor = tensors[tensor_name(linear)]
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        role = linear.name.rpartition(".")[2]
        if architecture == "llama" and role in _ROTATED:
            field = "head_count" if role == "q_proj" else "head_count_kv"
            weight = _halves_apart(weight, reader.fields[f"llama.attention.{field}"].contents())
        weights[linear.name] = weight
        stored += int(tensor.n_bytes)
        count += weight.size
    return GgufLinears(weights, 8 * stored / count)


def _halves_apart(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Restore the rows of each head to two consecutive halves, the halves of the rotary embedding.

    >>> _halves_apart(np.array([[0.0], [2.0], [1.0], [3.0]], np.float32), 1).ravel().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    rows, columns = weight.shape
    return (
        weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


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


def main() -> None:
    """Compute the importance matrix, or score files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="gemma3")
    parser.add_argument("--checkpoint", type=Path, help="local checkpoint, to skip the download")
    steps = parser.add_subparsers(dest="step", required=True)
    take = steps.add_parser("importance")
    take.add_argument("matrix", type=Path)
    take.add_argument("--samples", type=int, default=SAMPLES, help="calibration windows")
    score = steps.add_parser("score")
    score.add_argument("files", type=Path, nargs="+")
    score.add_argument("--windows", type=int, default=WINDOWS, help="evaluation windows per text")
    options = parser.parse_args()
    progress = ConsoleProgress(Console(stderr=True))
    if options.step == "importance":
        protocol = load_protocol(
            options.model, checkpoint=options.checkpoint, samples=options.samples, windows=1
        )
        with tempfile.TemporaryDirectory() as work:
            found = importance(protocol.loaded, protocol.calibration, Path(work), progress)
        save_file(found, options.matrix)
    else:
        _score(options.model, options.checkpoint, options.files, options.windows)


def _score(model: str, checkpoint: Path | None, files: list[Path], windows: int) -> None:
    protocol = load_protocol(model, checkpoint=checkpoint, samples=1, windows=windows)
    executor = Executor(protocol.loaded.model)
    scorers = [Scorer(executor, text) for text in (protocol.wiki, protocol.c4)]
    table = Table(box=box.MARKDOWN)
    table.add_column("file", no_wrap=True)
    for heading in ("bits", "wiki", "c4", "KL", "top-1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for path in files:
        sys.stderr.write(f"{path.name}\n")
        read = read_linears(path, list(executor.linears))

        def weight_of(linear: Linear, read: GgufLinears = read) -> NDArray[np.float32]:
            return read.weights[linear.name] if linear.block is not None else linear.weight()

        wiki, c4 = (scorer.score(Variant(executor, weight_of)) for scorer in scorers)
        table.add_row(path.name, f"{read.bits:.2f}", *_cells(wiki, c4))
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


def _cells(wiki: Scores, c4: Scores) -> tuple[str, str, str, str]:
    return (
        f"{wiki.perplexity:.2f}",
        f"{c4.perplexity:.2f}",
        f"{wiki.kl:.4f}",
        f"{wiki.top1_agreement:.1%}",
    )


if __name__ == "__main__":
    main()
