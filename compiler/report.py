"""report.json: what a build made of the model, and the table that shows it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

    from eoracc.compiler.linears import Linear

__all__ = [
    "BuildReport",
    "FidelityReport",
    "FidelityRow",
    "LinearReport",
    "Report",
    "fidelity_table",
    "format_bytes",
    "linear_report",
    "report_lines",
]

_WORST = 5


@dataclass(frozen=True, kw_only=True)
class FidelityRow:
    """One variant of the model on held-out text.

    Attributes:
      name: ``original``, ``quantized``, or the compensation: ``svd``, ``eora``.
      perplexity: exp(negative log-likelihood per predicted token).
      kl: mean KL(original || variant) per token, in nats; 0 for the original.
      top1_agreement: share of tokens with the original's most likely next token.
      last_layer_error: relative error of what enters the head.
      bytes: of all parameters as they are stored, embeddings and head included.
      bits_per_weight: per weight of the linears that the build compresses; their codes, scales,
        zero points and factors all count.
    """

    name: str
    perplexity: float
    kl: float
    top1_agreement: float
    last_layer_error: float
    bytes: int
    bits_per_weight: float


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
      role: last part of the name.
      shape: ``(N, K)``.
      bits: per code; None where it is not compressed.
      group_size: columns that share a scale; None where it is not compressed.
      rank: of its correction; 0 for none.
      bytes: as stored.
      errors: relative output error after each pass, by the pass's name.
      notes: what else there is to say, a fallback for example.
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


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What the build took; the only part that differs between two builds of the same inputs.

    Attributes:
      wall_s: seconds on the clock.
      cpu_s: seconds of processor time, all threads.
      peak_memory_bytes: largest resident set, that of the process that checks parity included.
      phases: ``{name, wall_s, cpu_s}`` of each phase, in order.
    """

    wall_s: float
    cpu_s: float
    peak_memory_bytes: int
    phases: Sequence[Mapping[str, str | float]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The whole of report.json.

    Attributes:
      fidelity: the fidelity gate.
      parity: the parity gate as ``ParityReport.as_dict`` gives it; empty where it was turned off.
      linears: all linears in execution order.
      build: what the build took.
    """

    fidelity: FidelityReport
    parity: Mapping[str, Any]
    linears: Sequence[LinearReport]
    build: BuildReport

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Report:
        """Inverse of :meth:`as_dict`, JSON's lists allowed for tuples.

        Raises:
          KeyError, TypeError: a part is missing or unknown.
        """
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
        )


def linear_report(linear: Linear, *, stored_bytes: int | None = None) -> LinearReport:
    """Describe ``linear`` as it stands in the graph.

    Args:
      linear: compressed or not.
      stored_bytes: of an uncompressed weight; None takes float32.
    """
    weight, factors = linear.compressed, linear.factors
    if weight is None:
        plain = 4 * linear.in_features * linear.out_features
        size = plain if stored_bytes is None else stored_bytes
    else:
        size = weight.nbytes
    return LinearReport(
        name=linear.name,
        block=linear.block,
        role=linear.role,
        shape=(linear.out_features, linear.in_features),
        bits=None if weight is None else weight.bits,
        group_size=None if weight is None else weight.group_size,
        rank=0 if factors is None else factors.rank,
        bytes=size + (0 if factors is None else factors.nbytes),
        errors=dict(linear.errors),
        notes=list(linear.notes),
    )


def format_bytes(size: float) -> str:
    """``12.3 MB``, in powers of 1000.

    >>> format_bytes(12_345_678)
    '12.3 MB'
    >>> format_bytes(12)
    '12 B'
    """
    units = iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while size >= 1000 and unit != "GB":
        size, unit = size / 1000, next(units)
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def fidelity_table(rows: Sequence[FidelityRow]) -> RenderableType:
    """The table that ``eoracc build`` ends with."""
    from rich import box  # noqa: PLC0415 - `--json` does without
    from rich.table import Table  # noqa: PLC0415

    table = Table(
        title="fidelity on held-out text",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("model", no_wrap=True)
    for heading in ("perplexity", "KL", "top-1", "layer error", "parameters", "bits/weight"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.perplexity:.2f}",
            f"{row.kl:.4f}",
            f"{row.top1_agreement:.1%}",
            f"{row.last_layer_error:.4f}",
            format_bytes(row.bytes),
            f"{row.bits_per_weight:.2f}",
        )
    return table


def report_lines(report: Report) -> list[str]:
    """What stands under the table: parity, the worst linears, notes, limits, cost."""
    lines = [parity_line(report.parity)]
    compressed = [linear for linear in report.linears if linear.errors]
    worst = sorted(compressed, key=_last_error, reverse=True)[:_WORST]
    if worst:
        named = ", ".join(f"{linear.name} {_last_error(linear):.3f}" for linear in worst)
        lines.append(f"largest output errors: {named}")
    lines += [f"note: {linear.name}: {note}" for linear in report.linears for note in linear.notes]
    lines += [f"limit: {sentence}" for sentence in report.fidelity.exceeded]
    build = report.build
    lines.append(
        f"took {build.wall_s:.0f} s, {build.cpu_s:.0f} s of processor time, "
        f"{format_bytes(build.peak_memory_bytes)} of memory at most"
    )
    return lines


def parity_line(parity: Mapping[str, Any]) -> str:
    """One line on the parity gate."""
    if not parity:
        return "parity: not checked"
    outcome = "passed" if parity["passed"] else "FAILED"
    linears = max((one["tolerance_share"] for one in parity.get("linears", ())), default=0.0)
    cases = parity.get("logits", ())
    logits = max((case["max_error"] / case["tolerance"] for case in cases), default=0.0)
    return (
        f"parity: {outcome}, largest deviation {linears:.0%} of its tolerance per linear, "
        f"{logits:.0%} on logits ({len(cases)} cases)"
    )


def _last_error(linear: LinearReport) -> float:
    return list(linear.errors.values())[-1]
