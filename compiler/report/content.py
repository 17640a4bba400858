"""report.json: what a build made of the model, and the table that shows it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import RenderableType
    from rich.table import Table

    from eoracc.passes.graph.linears import Linear

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
    "adapter_lines",
    "adapter_tables",
    "factorized_reports",
    "fidelity_table",
    "format_bytes",
    "linear_report",
    "report_lines",
    "survey_lines",
]

_WORST = 5


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
      bits_per_weight: per weight that the original has in the linears that the build compresses;
        their codes, scales, zero points and factors all count.
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
      role: last part of the name; ``q_proj.v`` and ``q_proj.u`` of the factors of a weight.
      shape: ``(N, K)``.
      bits: per code; None where it is not compressed.
      group_size: columns that share a scale; None where it is not compressed.
      rank: of its correction; 0 for none.
      bytes: as stored.
      errors: relative output error after each pass, by the pass's name.
      notes: what else there is to say, a fallback for example.
      factor_of: the weight that it is a factor of, by the name of its linear; None of none.
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
      adapters: those that the artifact has, or had when they were scored.
      surveys: what each survey found, ``{"pass": name, ...}``, in order.
      factorized: the weights that became products of two, in execution order.
      targets: what each target built and how long that took, for those that build.
    """

    fidelity: FidelityReport
    parity: Mapping[str, Any]
    linears: Sequence[LinearReport]
    build: BuildReport
    adapters: AdaptersReport = field(default_factory=AdaptersReport)
    surveys: Sequence[Mapping[str, Any]] = ()
    factorized: Sequence[FactorizedReport] = ()
    targets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

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
            # Older reports have no such parts.
            adapters=AdaptersReport.from_dict(content["adapters"])
            if "adapters" in content
            else AdaptersReport(),
            surveys=content.get("surveys", ()),
            factorized=[
                FactorizedReport(**{**one, "shape": tuple(one["shape"])})
                for one in content.get("factorized", ())
            ],
            targets=content.get("targets", {}),
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
        factor_of=None if linear.whole is None else linear.whole.name,
    )


def factorized_reports(linears: Iterable[Linear]) -> list[FactorizedReport]:
    """Describe the weights that ``linears`` hold factors of, once each, in their order."""
    wholes = dict.fromkeys(linear.whole for linear in linears if linear.whole is not None)
    return [_factorized_report(whole) for whole in wholes]


def _factorized_report(whole: Linear) -> FactorizedReport:
    assert whole.factorized is not None  # noqa: S101 - it has factors
    rows, columns, rank = whole.out_features, whole.in_features, whole.factorized.rank
    return FactorizedReport(
        name=whole.name,
        block=whole.block,
        role=whole.role,
        shape=(rows, columns),
        rank=rank,
        removed=1 - rank * (rows + columns) / (rows * columns),
        errors=dict(whole.errors),
        notes=list(whole.notes),
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
    headings = ("perplexity", "KL", "top-1", "layer error", "parameters", "bits/weight")
    table = _table("fidelity on held-out text", "model", headings)
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


def _table(title: str, first: str, others: Sequence[str]) -> Table:
    from rich import box  # noqa: PLC0415 - `--json` does without
    from rich.table import Table  # noqa: PLC0415

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def adapter_tables(adapters: AdaptersReport) -> list[RenderableType]:
    """Perplexity of every adapter on every text, and the ways of compensation that were compared.

    Empty where there is nothing to show.
    """
    tables: list[RenderableType] = []
    texts = list(adapters.perplexity)
    if texts:
        rows = dict.fromkeys(name for text in texts for name in adapters.perplexity[text])
        table = _table("perplexity on held-out text", "adapter", texts)
        if adapters.original:
            table.add_row("original", *(_figure(adapters.original.get(text)) for text in texts))
        for name in rows:
            table.add_row(
                name,
                *(
                    f"[bold]{_figure(figures.get(name))}[/bold]"
                    if _is_best(figures, name)
                    else _figure(figures.get(name))
                    for figures in (adapters.perplexity[text] for text in texts)
                ),
            )
        tables.append(table)
    if adapters.compensation:
        texts = list(next(iter(adapters.compensation.values())).perplexity)
        table = _table(
            "shared and per task",
            "compensation",
            [*texts, "backbone", "adapters"],
        )
        for name, one in adapters.compensation.items():
            table.add_row(
                name,
                *(_figure(one.perplexity.get(text)) for text in texts),
                format_bytes(one.backbone_bytes),
                format_bytes(sum(one.adapter_bytes.values())),
            )
        tables.append(table)
    return tables


def _is_best(figures: Mapping[str, float], name: str) -> bool:
    return len(figures) > 1 and figures.get(name) == min(figures.values())


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def report_lines(report: Report) -> list[str]:
    """What stands under the table: parity, the worst linears, notes, limits, cost."""
    lines = [parity_line(report.parity), *survey_lines(report.surveys)]
    described: list[LinearReport | FactorizedReport] = [*report.factorized, *report.linears]
    compressed = [one for one in described if one.errors]
    worst = sorted(compressed, key=_last_error, reverse=True)[:_WORST]
    if worst:
        named = ", ".join(f"{linear.name} {_last_error(linear):.3f}" for linear in worst)
        lines.append(f"largest output errors: {named}")
    lines += [f"note: {one.name}: {note}" for one in described for note in one.notes]
    lines += adapter_lines(report.adapters)
    for target, built in report.targets.items():
        engines = built.get("engines", {}).items()
        if sizes := ", ".join(f"{name} {format_bytes(one['size'])}" for name, one in engines):
            lines.append(f"{target}: engines by compute capability: {sizes}")
    lines += [f"limit: {sentence}" for sentence in report.fidelity.exceeded]
    build = report.build
    lines.append(
        f"took {build.wall_s:.0f} s, {build.cpu_s:.0f} s of processor time, "
        f"{format_bytes(build.peak_memory_bytes)} of memory at most"
    )
    return lines


def survey_lines(surveys: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each survey found, in one line."""
    # Loads the passes: what reads a report without surveys, say, has no need of them.
    from eoracc.passes import load_passes  # noqa: PLC0415
    from eoracc.passes.base import pass_type  # noqa: PLC0415
    from eoracc.passes.survey import SurveyPass  # noqa: PLC0415

    if surveys:
        load_passes()
    lines = []
    for found in surveys:
        survey = pass_type(found["pass"])
        assert issubclass(survey, SurveyPass)  # noqa: S101 - nothing else finds anything
        if summary := survey.summary(found):
            lines.append(f"{survey.name}: {summary}")
    return lines


def adapter_lines(adapters: AdaptersReport) -> list[str]:
    """What each adapter that was solved is, and what there is to say of it."""
    lines = []
    for name, one in adapters.solved.items():
        lines.append(_adapter_line(name, one, adapters.parity.get(name)))
        lines += [f"note: adapter {name}: {note}" for note in one.notes]
    return lines


def _adapter_line(name: str, one: AdapterReport, parity: AdapterParity | None) -> str:
    line = (
        f"adapter {name}: rank {one.rank}, {one.factor_type}, {format_bytes(one.bytes)}, "
        f"{one.tokens:,} tokens, {one.cpu_s:.0f} s of processor time, "
        f"mean output error {one.error_without:.3f} without and {one.error_with:.3f} with it"
    )
    if parity is not None:
        share = max(case["max_error"] / case["tolerance"] for case in parity.cases)
        line += f", parity {'passed' if parity.passed else 'FAILED'} ({share:.0%} of its tolerance)"
    return line


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


def _last_error(linear: LinearReport | FactorizedReport) -> float:
    return list(linear.errors.values())[-1]
