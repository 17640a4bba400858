"""The content of report.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

__all__ = [
    "AdapterParity",
    "AdapterReport",
    "AdaptersReport",
    "BuildReport",
    "CompensationReport",
    "FactorizedReport",
    "FidelityReport",
    "FidelityRow",
    "LinearReport",
    "Report",
    "WarningReport",
]


@dataclass(frozen=True, kw_only=True)
class FidelityRow:
    """One variant of the model on held-out text.

    Attributes:
      name: ``original``, the factorising pass (``erc_svd``), ``quantized``, or the compensation:
        ``svd``, ``eora``.
      perplexity: exp(negative log-likelihood per predicted token).
      kl: mean KL(original || variant) per token, in nats; 0 for the original.
      top1_agreement: share of tokens with the original's most likely next token.
      last_layer_error: relative error of what enters the head.
      bytes: of all parameters as they are stored, embeddings and head included.
      bits_per_weight: per weight that the original has in the linears of decoder blocks that the
        build compresses; their codes, scales, zero points and factors all count.
      folder_bytes: of what is shipped, all files of the artifact; of another variant, those of the
        same folder with its parameters instead. None in reports of older builds.
    """

    name: str
    perplexity: float
    kl: float
    top1_agreement: float
    last_layer_error: float
    bytes: int
    bits_per_weight: float
    folder_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class FidelityReport:
    """The fidelity gate.

    Attributes:
      rows: the original first, what is shipped last.
      windows: scored windows.
      window_length: tokens per window.
      limits: limits of model.yaml that were set.
      exceeded: one sentence per limit that was exceeded.
    """

    rows: Sequence[FidelityRow]
    windows: int
    window_length: int
    limits: Mapping[str, float] = field(default_factory=dict)
    exceeded: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class LinearReport:
    """One linear of the artifact.

    Attributes:
      name: as in the checkpoint.
      block: decoder block; None outside of one.
      role: last part of the name; ``q_proj.v`` and ``q_proj.u`` of the factors of a weight.
      shape: ``(N, K)``.
      bits: per code; None where it is stored in floats.
      group_size: columns that share a scale; None where it is stored in floats.
      rank: of its correction; 0 for none.
      bytes: as stored.
      errors: relative output error after each pass, by the pass's name.
      notes: what else there is to say, a fallback for example.
      factor_of: the weight that it is a factor of, by the name of its linear; None of none.
      sparsity: share of zeros in the weight that a pruning pass has left; None where none has.
    """

    name: str
    block: int | None
    role: str
    shape: tuple[int, int]
    bits: int | None
    group_size: int | None
    rank: int
    bytes: int
    errors: Mapping[str, float]
    notes: Sequence[str]
    factor_of: str | None = None
    sparsity: float | None = None


@dataclass(frozen=True, kw_only=True)
class FactorizedReport:
    """One weight that became a product of two, each a linear of the artifact.

    Attributes:
      name: of its linear, as in the checkpoint.
      block: decoder block.
      role: last part of the name.
      shape: ``(N, K)``, of the weight.
      rank: of the product.
      removed: share of the weight's parameters that the factors do without.
      errors: relative output error by the name of the factorising pass.
      notes: what else there is to say.
    """

    name: str
    block: int | None
    role: str
    shape: tuple[int, int]
    rank: int
    removed: float
    errors: Mapping[str, float]
    notes: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """One adapter that was solved.

    Attributes:
      rank: of its factors, unless an override says otherwise.
      factor_type: what they are stored in, likewise.
      linears: how many have factors.
      bytes: of all factors.
      tokens: of the text that it was solved on.
      error_without: relative output error of the linears over that text, mean, without the adapter.
      error_with: the same with it.
      cpu_s: seconds of processor time that solving took.
      notes: what else there is to say.
    """

    rank: int
    factor_type: str
    linears: int
    bytes: int
    tokens: int
    error_without: float
    error_with: float
    cpu_s: float
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class AdapterParity:
    """The artifact with one adapter against eager PyTorch with the same weights.

    Attributes:
      cases: figures as ``CaseParity`` has them.
      adapter_effect: largest change that the adapter makes to a logit of the first case.
    """

    cases: Sequence[Mapping[str, Any]]
    adapter_effect: float

    @property
    def passed(self) -> bool:
        """Whether every case did."""
        return all(case["passed"] for case in self.cases)

    @property
    def hiding_tolerance(self) -> float | None:
        """The native library's largest tolerance, in logits, where it hides the adapter.

        None where it is below the adapter's effect: a model without the adapter would not pass.
        """
        tolerances = [case["tolerance"] for case in self.cases if case["through"] == "library"]
        largest = max(tolerances, default=0.0)
        return largest if tolerances and largest >= self.adapter_effect else None


@dataclass(frozen=True, kw_only=True)
class CompensationReport:
    """One way of giving back what quantization took, on every task's text.

    Attributes:
      backbone_bytes: of all parameters of the backbone, its own factors included.
      adapter_bytes: of the adapters by name; empty for none.
      perplexity: by text, each with its own adapter where there is one.
    """

    backbone_bytes: int
    adapter_bytes: Mapping[str, int]
    perplexity: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class AdaptersReport:
    """What adapters are there, and what they do on the held-out texts, which are named like them.

    Attributes:
      perplexity: by text, then by adapter, ``none`` for the backbone alone.
      original: of the original model, by text.
      solved: by adapter.
      parity: by adapter; empty where parity was turned off.
      compensation: ``quantized``, ``shared``, ``per-task`` and ``both``, where
        ``verify.compare_adapters`` asks for it.
    """

    perplexity: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    original: Mapping[str, float] = field(default_factory=dict)
    solved: Mapping[str, AdapterReport] = field(default_factory=dict)
    parity: Mapping[str, AdapterParity] = field(default_factory=dict)
    compensation: Mapping[str, CompensationReport] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> AdaptersReport:
        """Inverse of ``asdict``."""
        return cls(
            **{
                **content,
                "solved": {name: AdapterReport(**one) for name, one in content["solved"].items()},
                "parity": {name: AdapterParity(**one) for name, one in content["parity"].items()},
                "compensation": {
                    name: CompensationReport(**one) for name, one in content["compensation"].items()
                },
            }
        )


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What the build took; the only part that differs between two builds of the same inputs.

    Attributes:
      wall_s: seconds on the clock.
      cpu_s: seconds of processor time, all threads.
      peak_memory_bytes: largest resident set, that of the process that checks parity included.
      phases: ``{name, wall_s, cpu_s}`` of each phase, in order.
      passes: the same of each pass, in order; an interrupted build counts from where it resumed.
      precisions: of the passes over the calibration text, ``float32`` or ``bfloat16``, each once;
        empty where no pass reads text, and in older reports.
    """

    wall_s: float
    cpu_s: float
    peak_memory_bytes: int
    phases: Sequence[Mapping[str, str | float]]
    passes: Sequence[Mapping[str, str | float]] = ()
    precisions: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class WarningReport:
    """Something that the user of the artifact should know.

    Attributes:
      code: kind of warning, ``few_tokens``.
      linear: that it is about; None of the build as a whole.
      message: a sentence.
      figures: numbers behind it, by name.
    """

    code: str
    linear: str | None
    message: str
    figures: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The whole of report.json.

    Attributes:
      fidelity: the fidelity gate.
      parity: the parity gate as ``ParityReport.as_dict`` gives it; empty where it was turned off.
      linears: all linears in execution order.
      build: what the build took.
      adapters: those that the artifact has, or had when they were scored.
      surveys: what each survey found, ``{"pass": name, ...}``, in order.
      factorized: the weights that became products of two, in execution order.
      targets: what each target built and how long that took, for those that build.
      chat: the chat templates, see :func:`eoracc.compiler.chat.ship.ship_chat`.
      tokenizer: notes on the tokenizer, and what unmodified onnxruntime-genai does with it.
      notes: what else there is to say about the model.
      warnings: of the build as a whole, then of linears in execution order.
      folder_bytes: of all files when the build ended, this report included; None in reports of
        older builds.
      folder_kinds: the same by :data:`~eoracc.compiler.report.folder.KINDS`.
    """

    fidelity: FidelityReport
    parity: Mapping[str, Any]
    linears: Sequence[LinearReport]
    build: BuildReport
    adapters: AdaptersReport = field(default_factory=AdaptersReport)
    surveys: Sequence[Mapping[str, Any]] = ()
    factorized: Sequence[FactorizedReport] = ()
    targets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    chat: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    warnings: Sequence[WarningReport] = ()
    folder_bytes: int | None = None
    folder_kinds: Mapping[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Report:
        """Inverse of :meth:`as_dict`, JSON's lists allowed for tuples.

        Raises:
          KeyError, TypeError, ValueError: a part is missing, unknown, or of another type.
        """
        # Strict, as the values are used as they are; as JSON, where an object may be a dataclass.
        _TYPES.validate_json(json.dumps(content), strict=True)
        fidelity = content["fidelity"]
        return cls(
            fidelity=FidelityReport(
                **{**fidelity, "rows": [FidelityRow(**row) for row in fidelity["rows"]]}
            ),
            parity=content["parity"],
            linears=[
                LinearReport(**{**linear, "shape": tuple(linear["shape"])})
                for linear in content["linears"]
            ],
            build=BuildReport(**content["build"]),
            # Older reports have no such parts.
            adapters=AdaptersReport.from_dict(content["adapters"])
            if "adapters" in content
            else AdaptersReport(),
            surveys=content.get("surveys", ()),
            factorized=[
                FactorizedReport(**{**entry, "shape": tuple(entry["shape"])})
                for entry in content.get("factorized", ())
            ],
            targets=content.get("targets", {}),
            chat=content.get("chat", {}),
            tokenizer=content.get("tokenizer", {}),
            notes=content.get("notes", ()),
            warnings=[WarningReport(**entry) for entry in content.get("warnings", ())],
            folder_bytes=content.get("folder_bytes"),
            folder_kinds=content.get("folder_kinds", {}),
        )


_TYPES = TypeAdapter(Report)
"""Checks the types of what is read; an artifact may come from anywhere."""
