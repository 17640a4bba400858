"""Record what a graph of a TensorRT target must compute, for the parity gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from eoracc.compiler.eager.model import load_eager
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.targets.parity_record import (
    CALLS,
    LazyWeights,
    compression_effect,
    parity_case,
)
from eoracc.compiler.targets.tensorrt.dequantize import rounded_product
from eoracc.compiler.targets.tensorrt.half_precision import round_to
from eoracc.compiler.text.windows import Windows
from eoracc.passes.graph.embeddings import Embedding
from eoracc.passes.graph.linears import Linear
from eoracc.passes.progress import Phase
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight
from eoracc.runtime.memory import release_memory
from eoracc.runtime.onnxruntime.graph_session import GraphSession
from eoracc.runtime.parity.record import ParityRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["GraphWeight", "record_graph_parity", "rounding_tolerance"]

_CASE_CHANCE = 1e-9

GraphWeight = Callable[[str, NBitsWeight, LowRank | None, ir.DataType], NDArray[np.float32]]
"""Computes the weight that a graph multiplies with, ``float32 [N, K]``, from the name of a linear,
its stored weight, its factors, and the graph's half-precision type."""


def record_graph_parity(
    linears: Sequence[Linear],
    embeddings: Sequence[Embedding],
    original: Executor,
    windows: Windows,
    *,
    graph: Path,
    dtype: ir.DataType,
    folder: Path,
    phase: Phase,
    weight_of: GraphWeight = rounded_product,
    trust_remote_code: bool = False,
) -> ParityRecord:
    """As :func:`~eoracc.compiler.targets.parity_record.record_parity`, for a half-precision graph.

    The eager model has the weights, tables and biases of the graph, rounded to its type, and
    computes in float32. So does the graph's twin (:mod:`eoracc.runtime.onnxruntime.float32_twin`)
    that it is compared with. A GPU rounds activations too: the further tolerance that it needs is
    measured on the twin with rounded activations (:func:`rounding_tolerance`).

    Args:
      linears: of the compressed graph.
      embeddings: its tables, compressed or not.
      original: the uncompressed graph, to show how far tolerances are below the effect of
        compression.
      windows: real text, to be cut into prompts.
      graph: the lowered graph's file, its weights beside it.
      dtype: its half-precision type.
      folder: the original checkpoint as a Hugging Face folder.
      phase: advanced once per way of calling the model.
      weight_of: computes the graph's weight for a compressed one.
      trust_remote_code: let transformers run code that the checkpoint brings.
    """
    weights = _rounded_weights(linears, embeddings, dtype, weight_of)
    model = load_eager(folder, weights, trust_remote_code=trust_remote_code)
    with torch.no_grad():
        _round_biases(model, dtype)
    exact = [parity_case(model, call, linears, windows, 0) for call in CALLS]
    del model
    release_memory()
    session = GraphSession.open(graph, rounded=True)
    cases = []
    for case in exact:
        logits = session.run_chunks(case.input_ids, case.attention_mask, case.chunks)
        rounding = rounding_tolerance(case.logits, logits[case.rows, case.columns])
        cases.append(replace(case, rounding=rounding))
        phase.advance(case.name)
    return ParityRecord(
        inputs={},
        linears=[],
        cases=cases,
        compression_effect=compression_effect(original, cases[0]),
    )


def rounding_tolerance(exact: NDArray[np.float32], rounded: NDArray[np.float32]) -> float:
    """Tolerance of the logits of one case to rounding as a GPU does it.

    A GPU rounds the same values to the same grid, though not bit for bit, so its error is another
    draw from the same distribution, and stays below ``sqrt(2 ln(2 n / p))`` standard deviations for
    all ``n`` logits of a case, ``p = 1e-9``. The standard deviation is that of the token whose
    logits moved most, twice, since the two draws need not be of one size.

    Args:
      exact: ``[tokens, V]``.
      rounded: of the twin with rounded activations.
    """
    moved = np.sqrt(np.mean((rounded.astype(np.float64) - exact) ** 2, axis=-1))
    return float(2 * math.sqrt(2 * math.log(2 * exact.size / _CASE_CHANCE)) * moved.max())


def _rounded_weights(
    linears: Sequence[Linear],
    embeddings: Sequence[Embedding],
    dtype: ir.DataType,
    weight_of: GraphWeight,
) -> LazyWeights:
    """All weights and tables, rounded as in a graph of type ``dtype``."""

    def linear_weight(linear: Linear) -> NDArray[np.float32]:
        if linear.quantized is None:
            weight = linear.backbone_weight()
            return round_to(weight, dtype, linear.name).astype(np.float32)
        return weight_of(linear.name, linear.quantized, linear.factors, dtype)

    def table_weight(table: Embedding) -> NDArray[np.float32]:
        if table.compressed is None:
            return round_to(table.weight(), dtype, table.name).astype(np.float32)
        return weight_of(table.name, table.compressed, None, dtype)

    return LazyWeights(
        {table.name: partial(table_weight, table) for table in embeddings}
        | {linear.name: partial(linear_weight, linear) for linear in linears}
    )


def _round_biases(model: PreTrainedModel, dtype: ir.DataType) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            rounded = round_to(module.bias.numpy(), dtype, f"{name}.bias").astype(np.float32)
            module.bias.copy_(torch.from_numpy(rounded))
