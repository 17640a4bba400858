"""Record what the compressed model computes in eager PyTorch, for the parity gate.

The record goes into the artifact, so that parity can be checked again on a machine that has neither
PyTorch nor the original model (:mod:`eoracc.runtime.parity.check`). It holds seeded inputs of each
linear with their outputs, and logits of the whole model for every way of calling it.

Tolerances are derived, never chosen. The error of a float32 sum of ``n`` products, in any order, is
at most ``n u sum |x_i w_i|`` (Higham, *Accuracy and Stability*, section 3.1), ``u = 2^-24``: this
bounds each element of a linear's output. Through the network, errors add up along the residual
stream with random signs: a linear of depth K adds ``sqrt(K) u`` relative to its output, and the
error of the logits may be the sum of those times their largest magnitude. The two factors of a
weight are two linears, of depths K and r. Where activations are rounded to int8, what the native
library may differ by in addition is recorded beside it
(:mod:`eoracc.compiler.eager.int8_activations`); model-local functions never round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import override

from eoracc.compiler.eager.int8_activations import (
    ROUNDING_DRAWS,
    factor_tolerance,
    random_rounding,
    representable_inputs,
    rounding_bound,
)
from eoracc.compiler.eager.model import load_eager, reference_logits, replace_weights
from eoracc.compiler.sweep.batch import make_batches
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.text.windows import Windows
from eoracc.passes.graph.embeddings import Embedding
from eoracc.passes.graph.linears import Linear
from eoracc.passes.progress import Phase
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.runtime.memory import release_memory
from eoracc.runtime.parity.record import ParityCase, ParityLinear, ParityRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "CALLS",
    "LINEAR_ROWS",
    "PARITY_STEPS",
    "AdapterCases",
    "Call",
    "LazyWeights",
    "adapter_cases",
    "compression_effect",
    "logits_tolerance",
    "parity_case",
    "record_parity",
    "rounding_excess",
    "without_rounding",
]

_UNIT_ROUNDOFF = 2.0**-24
LINEAR_ROWS = 2
"""Inputs of each linear."""
_NO_ADAPTER: Mapping[str, LowRank] = MappingProxyType({})
_SEED = 0


@dataclass(frozen=True)
class Call:
    """One way of calling a decoder.

    Attributes:
      name: for the report.
      lengths: valid tokens per row; shorter rows are padded on the right.
      chunks: lengths of the calls, one after another through the cache.
      positions: tokens whose logits are kept, per row; negative ones count from the row's end.
    """

    name: str
    lengths: tuple[int, ...]
    chunks: tuple[int, ...]
    positions: tuple[int, ...]


CALLS = (
    Call("prefill", (64,), (64,), (0, 21, -1)),
    # One cache for all its chunks. There are few: model-local functions make the same calls, and
    # need seconds for each.
    Call("decode and chunk on cache", (50,), (32, 1, 1, 16), (31, 32, 33, -16, -1)),
    Call("batch of unequal lengths", (48, 31, 17), (48,), (-1,)),
)

_ADAPTER_CALLS = 2
"""How many of them are made with each adapter: rows of a batch are what all of them share."""

PARITY_STEPS = len(CALLS)
"""How often :func:`record_parity` advances its phase."""


def record_parity(
    linears: Sequence[Linear],
    embeddings: Sequence[Embedding],
    original: Executor,
    windows: Windows,
    *,
    folder: Path,
    phase: Phase,
    accuracy_level: int = 0,
    trust_remote_code: bool = False,
) -> ParityRecord:
    """Run the compressed model eagerly and keep what the artifact must reproduce.

    Args:
      linears: of the compressed graph.
      embeddings: its tables, compressed or not.
      original: the uncompressed graph, to show how far tolerances are below the effect of
        compression.
      windows: real text, to be cut into prompts.
      folder: the original checkpoint as a Hugging Face folder.
      phase: advanced once per way of calling the model.
      accuracy_level: of the artifact's linears; 4 rounds activations to int8.
      trust_remote_code: let transformers run code that the checkpoint brings.
    """
    compressed = [linear for linear in linears if linear.quantized is not None]
    rng = np.random.default_rng(_SEED)
    inputs = {
        width: representable_inputs(rng, LINEAR_ROWS, width)
        for width in sorted({linear.in_features for linear in compressed})
    }
    records = [_linear(linear, inputs[linear.in_features], accuracy_level) for linear in compressed]
    release_memory()
    weights = _compressed_weights(linears, embeddings)
    model = load_eager(folder, weights, trust_remote_code=trust_remote_code)
    cases = []
    for call in CALLS:
        cases.append(parity_case(model, call, linears, windows, accuracy_level))
        phase.advance(call.name)
    del model
    release_memory()
    return ParityRecord(
        inputs=inputs,
        linears=records,
        cases=cases,
        compression_effect=compression_effect(original, cases[0]),
    )


def rounding_excess(record: ParityRecord) -> ParityCase | None:
    """The case whose tolerance for rounded activations hides compression; None if there is none.

    A tolerance that is not below the effect of compression would let a model pass that computes
    with other weights.
    """
    rounded = [case for case in record.cases if case.rounding]
    worst = max(rounded, key=lambda case: case.tolerance + case.rounding, default=None)
    hides = worst and worst.tolerance + worst.rounding >= record.compression_effect
    return worst if hides else None


def without_rounding(record: ParityRecord) -> ParityRecord:
    """``record`` for the same model with float activations (``accuracy_level`` 0)."""
    return replace(
        record,
        linears=[replace(linear, rounding=None) for linear in record.linears],
        cases=[replace(case, rounding=0.0) for case in record.cases],
    )


@dataclass(frozen=True, eq=False)
class AdapterCases:
    """What the artifact with one adapter must reproduce.

    Attributes:
      calls: for the native library; the first of them also for the model-local functions.
      effect: largest change that the adapter makes to a logit of the first call.
    """

    calls: Sequence[ParityCase]
    effect: float


def adapter_cases(
    linears: Sequence[Linear],
    embeddings: Sequence[Embedding],
    adapters: Mapping[str, tuple[Mapping[str, LowRank], Windows]],
    *,
    folder: Path,
    phase: Phase,
    accuracy_level: int = 0,
    trust_remote_code: bool = False,
) -> dict[str, AdapterCases]:
    """Run the compressed model eagerly with each adapter's factors in its weights.

    Args:
      linears: of the backbone.
      embeddings: its tables, compressed or not.
      adapters: factors by linear, and text to be cut into prompts, by the adapter's name.
      folder: the original checkpoint as a Hugging Face folder.
      phase: advanced once per adapter.
      accuracy_level: of the artifact's linears; 4 rounds activations to int8.
      trust_remote_code: let transformers run code that the checkpoint brings.

    Returns:
      By adapter, what the artifact with that adapter must reproduce.
    """
    model = load_eager(
        folder, _compressed_weights(linears, embeddings), trust_remote_code=trust_remote_code
    )
    found: dict[str, AdapterCases] = {}
    for name, (factors, windows) in adapters.items():
        adapted = [linear for linear in linears if linear.name in factors]
        replace_weights(model, _compressed_weights(adapted, (), factors))
        calls = [
            parity_case(model, call, linears, windows, accuracy_level, factors)
            for call in CALLS[:_ADAPTER_CALLS]
        ]
        replace_weights(model, _compressed_weights(adapted, ()))
        without = parity_case(model, CALLS[0], linears, windows, 0)
        effect = float(np.abs(calls[0].logits - without.logits).max())
        found[name] = AdapterCases(calls, effect)
        phase.advance(name)
    return found


def logits_tolerance(
    linears: Sequence[Linear],
    logits: NDArray[np.float32],
    adapter: Mapping[str, LowRank] = _NO_ADAPTER,
) -> float:
    """Tolerance of float32 logits (see the module's docstring), in logits.

    Args:
      linears: of the backbone.
      logits: of the eager model.
      adapter: factors on top of it, by linear.
    """
    depths = [
        linear.in_features
        + _rank(linear)
        + (adapter[linear.name].rank if linear.name in adapter else 0)
        for linear in linears
    ]
    return float(_UNIT_ROUNDOFF * np.sqrt(depths).sum() * np.abs(logits).max())


def _rank(linear: Linear) -> int:
    return 0 if linear.factors is None else linear.factors.rank


def _linear(linear: Linear, inputs: NDArray[np.float32], accuracy_level: int) -> ParityLinear:
    x = torch.from_numpy(inputs).double()
    backbone = torch.from_numpy(linear.backbone_weight()).double()
    outputs = torch.nn.functional.linear(x, backbone)
    magnitude = torch.nn.functional.linear(x.abs(), backbone.abs())
    if linear.factors is not None:
        a = torch.from_numpy(linear.factors.down()).double()
        b = torch.from_numpy(linear.factors.up()).double()
        outputs += x @ a.T @ b.T
        magnitude += x.abs() @ a.abs().T @ b.abs().T
    # + 3: dequantization rounds twice, the sum of backbone and correction once; + 2: so do the
    # scales of int8 factors.
    is_int8 = linear.factors is not None and linear.factors.lora_a.dtype == np.int8
    length = linear.in_features + _rank(linear) + 3 + 2 * is_int8
    return ParityLinear(
        name=linear.name,
        outputs=outputs.float().numpy(),
        tolerance=(length * _UNIT_ROUNDOFF * magnitude).float().numpy(),
        rounding=factor_tolerance(linear, inputs) if accuracy_level else None,
    )


def _weight_with(linear: Linear, adapter: LowRank | None) -> NDArray[np.float32]:
    weight = linear.effective_weight()
    return weight if adapter is None else weight + adapter.product()


class LazyWeights(Mapping[str, NDArray[np.float32]]):
    """Weights by module name, each made when it is asked for."""

    def __init__(self, made: Mapping[str, Callable[[], NDArray[np.float32]]]) -> None:
        self._made = made

    @override
    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self._made[name]()

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    @override
    def __len__(self) -> int:
        return len(self._made)


def _compressed_weights(
    linears: Sequence[Linear],
    embeddings: Sequence[Embedding],
    adapter: Mapping[str, LowRank] = _NO_ADAPTER,
) -> LazyWeights:
    """Weights and tables that passes have changed."""
    changed = {
        linear.name: partial(_weight_with, linear, adapter.get(linear.name))
        for linear in linears
        if linear.compressed is not None or linear.whole is not None
    }
    tables = {
        embedding.name: embedding.compressed.dequantize
        for embedding in embeddings
        if embedding.compressed is not None
    }
    return LazyWeights(changed | tables)


def parity_case(
    model: PreTrainedModel,
    call: Call,
    linears: Sequence[Linear],
    windows: Windows,
    accuracy_level: int,
    adapter: Mapping[str, LowRank] = _NO_ADAPTER,
) -> ParityCase:
    """The logits of an eager model for one way of calling it, with their tolerance.

    Args:
      model: with the compressed weights, and those of ``adapter``.
      call: the way of calling it.
      linears: of the backbone.
      windows: real text, to be cut into prompts.
      accuracy_level: of the artifact's linears; 4 rounds activations to int8.
      adapter: factors by linear.
    """
    text = windows.input_ids.reshape(-1)[windows.attention_mask.reshape(-1).astype(bool)]
    ids, mask = _prompts(text, call.lengths)
    logits = reference_logits(model, ids, mask, chunks=call.chunks)
    rows, columns = _kept(call)
    kept = logits[rows, columns]
    tolerance = logits_tolerance(linears, kept, adapter)
    rounding = 0.0
    if accuracy_level:
        generator = torch.Generator().manual_seed(_SEED)
        with random_rounding(model, linears, generator, adapter):
            draws = [
                reference_logits(model, ids, mask, chunks=call.chunks)[rows, columns]
                for _ in range(ROUNDING_DRAWS)
            ]
        rounding = rounding_bound(np.stack(draws) - kept)
    return ParityCase(
        name=call.name,
        input_ids=ids,
        attention_mask=mask,
        chunks=call.chunks,
        rows=rows,
        columns=columns,
        logits=kept,
        tolerance=tolerance,
        rounding=rounding,
    )


def _prompts(
    text: NDArray[np.int64], lengths: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    ids = np.zeros((len(lengths), max(lengths)), np.int64)
    mask = np.zeros_like(ids)
    start = 0
    for row, length in enumerate(lengths):
        # Short texts wrap around: parity asks for real tokens, not for many different ones.
        ids[row, :length] = text[np.arange(start, start + length) % len(text)]
        mask[row, :length] = 1
        start += length
    return ids, mask


def _kept(call: Call) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    pairs = [
        (row, position % length)
        for row, length in enumerate(call.lengths)
        for position in call.positions
    ]
    rows, columns = zip(*pairs, strict=True)
    return np.array(rows), np.array(columns)


def compression_effect(original: Executor, case: ParityCase) -> float:
    """The largest change of a logit from the uncompressed graph to the logits of ``case``."""
    (batch,) = make_batches(case.input_ids, case.attention_mask, size=len(case.input_ids))
    original.run_to_head([batch], Linear.weight)
    hidden = original.head_input(batch)[case.rows, case.columns]
    logits = original.logits(hidden[None], original.linears[-1].weight())[0]
    return float(np.abs(case.logits - logits).max())
