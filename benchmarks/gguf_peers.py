"""Make GGUF files with llama.cpp and score them with the protocol of benchmarks.quality.

    python -m benchmarks.gguf_peers --model smollm2 make VENV FOLDER [--only Q3_K_M ...]
    python -m benchmarks.gguf_peers --model smollm2 score FOLDER/*.gguf [--checkpoint-embedding]
    python -m benchmarks.gguf_peers --model smollm2 importance MATRIX.safetensors

``make`` lets the llama-cpp-python of the virtual environment VENV quantize the checkpoint's GGUF
file into the types of :data:`FILES`. Those with an importance matrix get the mean square of every
input of a linear over the calibration windows of our own builds; ``importance`` writes it alone.
``score`` puts the dequantized weights of a file into the same float32 graph: its linears, its
embedding and its head, so that the row is the file. ``--checkpoint-embedding`` leaves the embedding
and the head as the checkpoint has them. llama.cpp itself also rounds activations to eight bits.
Bits are per weight of the decoder blocks' linears, MB are those of the whole file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from benchmarks.gguf_files import FILES, importance, make_files, tensor_name
from benchmarks.machine import machine_line
from benchmarks.protocol import MODELS, SAMPLES, WINDOWS, load_protocol
from eoracc.compiler.progress import ConsoleProgress
from eoracc.compiler.report.fidelity import Scorer, Scores, Variant
from eoracc.compiler.sweep.executor import Executor
from eoracc.passes.graph.embeddings import find_embeddings
from eoracc.passes.graph.linears import Linear

__all__ = ["GgufModel", "PeerRow", "read_model", "score_file"]

_ROTATED = ("q_proj", "k_proj")
"""Linears whose rows have another order in files of Llama's architecture."""


@dataclass(frozen=True, eq=False)
class GgufModel:
    """The weights of a GGUF file.

    Attributes:
      weights: of the linears, the head included, dequantized, ``float32 [N, K]``, by their name in
        the graph.
      embedding: dequantized, ``float32 [vocabulary, width]``.
      bits_per_weight: of the linears of decoder blocks, all of them together.
      file_bytes: of the whole file.
    """

    weights: Mapping[str, NDArray[np.float32]]
    embedding: NDArray[np.float32]
    bits_per_weight: float
    file_bytes: int


@dataclass(frozen=True, kw_only=True)
class PeerRow:
    """What one file scores.

    Attributes:
      bits_per_weight: of the linears of decoder blocks.
      file_bytes: of the whole file.
      wiki: on Wikipedia.
      c4: on C4.
    """

    bits_per_weight: float
    file_bytes: int
    wiki: Scores
    c4: Scores


def read_model(path: Path, linears: Iterable[Linear]) -> GgufModel:
    """Dequantize the linears, the embedding and the head.

    A file without a tensor for the head multiplies with its embedding there.

    Args:
      path: a GGUF file of the model.
      linears: of its graph.

    Raises:
      KeyError: the file lacks one of them.
    """
    reader = GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture = reader.fields["general.architecture"].contents()
    embedding = _dequantized(tensors["token_embd.weight"])
    weights, stored, count = {}, 0, 0
    for linear in linears:
        if linear.block is None:
            head = tensors.get("output.weight")
            weights[linear.name] = embedding if head is None else _dequantized(head)
            continue
        tensor = tensors[tensor_name(linear)]
        weight = _dequantized(tensor)
        role = linear.name.rpartition(".")[2]
        if architecture == "llama" and role in _ROTATED:
            field = "head_count" if role == "q_proj" else "head_count_kv"
            weight = _halves_apart(weight, reader.fields[f"llama.attention.{field}"].contents())
        weights[linear.name] = weight
        stored += int(tensor.n_bytes)
        count += weight.size
    return GgufModel(weights, embedding, 8 * stored / count, path.stat().st_size)


def _dequantized(tensor: ReaderTensor) -> NDArray[np.float32]:
    return dequantize(tensor.data, tensor.tensor_type).astype(np.float32)


def _halves_apart(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Restore the rows of each head to two consecutive halves, the halves of the rotary embedding.

    >>> _halves_apart(np.array([[0.0], [2.0], [1.0], [3.0]], np.float32), 1).ravel().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    rows, columns = weight.shape
    return (
        weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def score_file(
    path: Path,
    original: Executor,
    model: ir.Model,
    scorers: tuple[Scorer, Scorer],
    *,
    checkpoint_embedding: bool = False,
) -> PeerRow:
    """Score the weights of a GGUF file.

    Args:
      path: the file.
      original: the uncompressed graph.
      model: its model; it is not changed.
      scorers: of Wikipedia and of C4.
      checkpoint_embedding: keep the embedding and the head of the checkpoint.
    """
    read = read_model(path, original.linears)
    executor = original if checkpoint_embedding else Executor(_with_embedding(model, read))

    def weight_of(linear: Linear) -> NDArray[np.float32]:
        if checkpoint_embedding and linear.block is None:
            return linear.weight()
        return read.weights[linear.name]

    wiki, c4 = (scorer.score(Variant(executor, weight_of)) for scorer in scorers)
    return PeerRow(
        bits_per_weight=read.bits_per_weight, file_bytes=read.file_bytes, wiki=wiki, c4=c4
    )


def _with_embedding(model: ir.Model, read: GgufModel) -> ir.Model:
    """A copy of ``model`` with the embedding of the file."""
    copy = model.clone()
    (table,) = find_embeddings(copy)
    name = f"{table.name}.weight"
    value = copy.graph.initializers[name]
    if tuple(table.source.shape.numpy()) != read.embedding.shape:
        raise SystemExit(f"error: {name}: the file has another shape, {read.embedding.shape}")
    value.const_value = ir.tensor(read.embedding, name=name)
    return copy


def main() -> None:
    """Make files, compute the importance matrix, or score files."""
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
    score.add_argument(
        "--checkpoint-embedding",
        action="store_true",
        help="keep the embedding and the head of the checkpoint",
    )
    make = steps.add_parser("make")
    make.add_argument("venv", type=Path, help="a virtual environment with llama-cpp-python")
    make.add_argument("folder", type=Path)
    make.add_argument("--only", nargs="+", metavar="TYPE", help="default: those of FILES")
    make.add_argument("--samples", type=int, default=SAMPLES, help="calibration windows")
    options = parser.parse_args()
    if options.step == "score":
        _score(options)
        return
    progress = ConsoleProgress(Console(stderr=True))
    protocol = load_protocol(
        options.model, checkpoint=options.checkpoint, samples=options.samples, windows=1
    )
    if options.step == "make":
        files = [f for f in FILES[options.model] if options.only is None or f.kind in options.only]
        python = options.venv / "bin" / "python"
        made = make_files(options.model, protocol, python, options.folder, progress, files)
        for file, path in made:
            print(f"{path}: {file.label}, {path.stat().st_size:,} bytes", flush=True)
    else:
        with tempfile.TemporaryDirectory() as work:
            found = importance(protocol.loaded, protocol.calibration, Path(work), progress)
        save_file(found, options.matrix)


def _score(options: argparse.Namespace) -> None:
    protocol = load_protocol(
        options.model, checkpoint=options.checkpoint, samples=1, windows=options.windows
    )
    executor = Executor(protocol.loaded.model.clone())
    scorers = Scorer(executor, protocol.wiki), Scorer(executor, protocol.c4)
    table = Table(box=box.MARKDOWN)
    table.add_column("file", no_wrap=True)
    for heading in ("MB", "bits", "wiki", "c4", "KL", "top-1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for path in options.files:
        sys.stderr.write(f"{path.name}\n")
        row = score_file(
            path,
            executor,
            protocol.loaded.model,
            scorers,
            checkpoint_embedding=options.checkpoint_embedding,
        )
        sizes = f"{row.file_bytes / 1e6:.1f}", f"{row.bits_per_weight:.2f}"
        table.add_row(path.name, *sizes, *_cells(row.wiki, row.c4))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    scored = "linears" if options.checkpoint_embedding else "linears, embedding and head"
    console.print(
        f"{options.model}, {options.windows} windows a text, the {scored} of each file, "
        f"{machine_line()}\n",
        soft_wrap=True,
    )
    console.print(table)


def _cells(wiki: Scores, c4: Scores) -> tuple[str, str, str, str]:
    return (
        f"{wiki.perplexity:.2f}",
        f"{c4.perplexity:.2f}",
        f"{wiki.kl:.4f}",
        f"{wiki.top1_agreement:.1%}",
    )


if __name__ == "__main__":
    main()
