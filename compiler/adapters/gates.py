"""What adapters are worth, and whether the artifact computes them: figures for the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eoracc.compiler.adapters.scores import Factors, perplexities
from eoracc.compiler.adapters.solve import SolvedAdapter
from eoracc.compiler.report.content import (
    AdapterParity,
    AdapterReport,
    AdaptersReport,
    CompensationReport,
    WarningReport,
)
from eoracc.compiler.sweep.backbone import Backbone
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.targets.parity_record import AdapterCases, adapter_cases
from eoracc.passes.graph.linears import Linear
from eoracc.passes.progress import Progress
from eoracc.plugins.adapters import AdapterSlots, pack_adapter
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.runtime.parity.check import check_cases

__all__ = [
    "ADAPTER_UNPROVEN",
    "NONE",
    "adapter_details",
    "adapter_warnings",
    "check_adapters",
    "compare_compensations",
    "record_adapters",
    "refuse_adapters",
    "score_adapters",
]

NONE = "none"
"""Name of the backbone without an adapter, in tables."""

ADAPTER_UNPROVEN = "adapter_unproven"
"""Code of the warnings of :func:`adapter_warnings`."""

Operands = Mapping[str, NDArray[np.generic]]


def score_adapters(
    original: Executor, backbone: Backbone, solved: Sequence[SolvedAdapter], *, progress: Progress
) -> AdaptersReport:
    """Score every adapter, and none, on the held-out text of every task.

    Args:
      original: the graph before any pass.
      backbone: what the adapters stand on.
      solved: the adapters; each brings a text of its name.
      progress: shown one step per text.
    """
    texts = {adapter.task.name: adapter.task.held_out for adapter in solved}
    variants: dict[str, Factors] = {NONE: {}}
    variants |= {adapter.task.name: adapter.factors for adapter in solved}
    perplexity = perplexities(
        Executor(backbone.model, backbone.linears),
        Linear.effective_weight,
        texts,
        dict.fromkeys(texts, variants),
        progress=progress,
    )
    before = perplexities(
        original,
        Linear.weight,
        texts,
        {text: {NONE: {}} for text in texts},
        progress=progress,
        phase="score original",
    )
    return AdaptersReport(
        perplexity=perplexity,
        original={text: figures[NONE] for text, figures in before.items()},
        solved={adapter.task.name: _adapter_report(adapter) for adapter in solved},
    )


def _adapter_report(solved: SolvedAdapter) -> AdapterReport:
    return AdapterReport(
        rank=solved.task.config.rank,
        factor_type=solved.task.config.factor_type,
        linears=len(solved.factors),
        bytes=solved.nbytes,
        tokens=solved.task.calibration.tokens,
        error_without=solved.mean_error("without"),
        error_with=solved.mean_error("with"),
        cpu_s=solved.cpu_s,
        notes=solved.notes,
    )


def compare_compensations(
    report: AdaptersReport,
    backbone: Backbone,
    solved: Sequence[SolvedAdapter],
    alone: Sequence[SolvedAdapter],
    *,
    progress: Progress,
) -> AdaptersReport:
    """Add a comparison of the shared compensation, adapters alone, and both, on each text.

    Args:
      report: with the scores of ``solved``, which are those of ``shared`` and of ``both``.
      backbone: with its compensation.
      solved: on top of it.
      alone: adapters of the same tasks on top of the quantized weights.
      progress: shown one step per text.
    """
    executor = Executor(backbone.model, backbone.linears)
    bare = perplexities(
        executor,
        Linear.backbone_weight,
        {adapter.task.name: adapter.task.held_out for adapter in alone},
        {adapter.task.name: {NONE: {}, adapter.task.name: adapter.factors} for adapter in alone},
        progress=progress,
        phase="score bare",
    )
    shared_bytes = executor.parameter_bytes
    carried = sum(
        linear.factors.nbytes for linear in backbone.linears if linear.factors is not None
    )

    def row(
        size: int,
        adapters: Sequence[SolvedAdapter],
        perplexity: Mapping[str, Mapping[str, float]],
    ) -> CompensationReport:
        return CompensationReport(
            backbone_bytes=size,
            adapter_bytes={adapter.task.name: adapter.nbytes for adapter in adapters},
            perplexity={
                text: figures[text if adapters else NONE] for text, figures in perplexity.items()
            },
        )

    return replace(
        report,
        compensation={
            "quantized": row(shared_bytes - carried, (), bare),
            "shared": row(shared_bytes, (), report.perplexity),
            "per-task": row(shared_bytes - carried, alone, bare),
            "both": row(shared_bytes, solved, report.perplexity),
        },
    )


def adapter_details(solved: SolvedAdapter, report: AdaptersReport) -> dict[str, Any]:
    """The description of an adapter: its source and its scores.

    Nothing of it depends on the machine's speed: equal inputs give equal bytes.
    """
    name = solved.task.name
    own = report.solved[name]
    texts = [text.text for text in solved.task.config.texts()]
    return {
        "from": f"EoRA on {own.tokens} tokens of {', '.join(texts)}",
        "config": solved.task.config.model_dump(mode="json"),
        "tokens": own.tokens,
        "rank": own.rank,
        "factor_type": own.factor_type,
        "perplexity": {
            key: report.perplexity[name][key]
            for key in (NONE, name)
            if key in report.perplexity.get(name, {})
        },
        "output_error": {"without": own.error_without, "with": own.error_with},
        "notes": list(own.notes),
    }


# --- parity ---------------------------------------------------------------------------------------


def record_adapters(
    backbone: Backbone,
    solved: Sequence[SolvedAdapter],
    *,
    folder: Path,
    accuracy_level: int,
    trust_remote_code: bool,
    progress: Progress,
) -> dict[str, AdapterCases]:
    """Run the model with each adapter in eager PyTorch.

    Args:
      backbone: what they stand on.
      solved: the adapters.
      folder: the original checkpoint as a Hugging Face folder.
      accuracy_level: of the artifact's linears.
      trust_remote_code: let transformers run code that the checkpoint brings.
      progress: shown one step per adapter.
    """
    with progress.phase("record adapters", len(solved)) as phase:
        return adapter_cases(
            backbone.linears,
            backbone.embeddings,
            {adapter.task.name: (adapter.factors, adapter.task.held_out) for adapter in solved},
            folder=folder,
            phase=phase,
            accuracy_level=accuracy_level,
            trust_remote_code=trust_remote_code,
        )


def check_adapters(
    folder: Path,
    slots: AdapterSlots,
    factors: Mapping[str, Mapping[str, LowRank]],
    cases: Mapping[str, AdapterCases],
    *,
    library: Path | bool = True,
    progress: Progress,
) -> dict[str, AdapterParity]:
    """Compare the artifact with each adapter to PyTorch.

    The native library makes every call, the model-local functions the first one of each adapter:
    they read the same operands, and take many times as long. They also compute in float32 whatever
    the accuracy level, so that theirs is the comparison that shows an operand out of place.

    Args:
      folder: with the artifact's model.
      slots: where it takes adapters.
      factors: by adapter, then by linear.
      cases: by adapter.
      library: the native library; True for the installed one.
      progress: shown one step per adapter and implementation.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    with progress.phase("parity of adapters", 2 * len(cases)) as phase:
        for native in (library, False):
            calls = [
                (name, case)
                for name, own in cases.items()
                for case in (own.calls if native else own.calls[:1])
            ]
            packed: dict[str, Operands] = {
                name: pack_adapter(slots, factors[name]) for name in cases
            }
            outcomes = check_cases(
                folder,
                [case for _, case in calls],
                library=native,
                operands=(packed[name] for name, _ in calls),
            )
            for (name, _), outcome in zip(calls, outcomes, strict=True):
                found[name].append(asdict(outcome))
            for name in cases:
                phase.advance(name)
    return {
        name: AdapterParity(cases=found[name], adapter_effect=own.effect)
        for name, own in cases.items()
    }


def refuse_adapters(parity: Mapping[str, AdapterParity]) -> Iterator[str]:
    """One sentence for each adapter that the artifact computes wrongly."""
    for name, adapter in parity.items():
        if not adapter.passed:
            worst = max(case["max_error"] / case["tolerance"] for case in adapter.cases)
            yield (
                f"adapter '{name}': its logits are off by {worst:.1f} times the tolerance against "
                "PyTorch"
            )


def adapter_warnings(parity: Mapping[str, AdapterParity]) -> list[WarningReport]:
    """A warning for each adapter that the native library's tolerance hides."""
    return [
        WarningReport(
            code=ADAPTER_UNPROVEN,
            linear=None,
            message=f"adapter '{name}': the native library may differ by {tolerance:.3g} in a "
            f"logit, and the adapter changes one by {adapter.adapter_effect:.3g}, so that its "
            "parity proves nothing: that of the model-local functions does, and so does a build "
            "with 'accuracy_level: 0'",
            figures={"bound": tolerance, "adapter_effect": adapter.adapter_effect},
        )
        for name, adapter in parity.items()
        if (tolerance := adapter.hiding_tolerance) is not None
    ]
