"""Reports as lines and tables for the console."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from rich.console import RenderableType
    from rich.table import Table

    from eoracc.compiler.report.content import (
        AdapterParity,
        AdapterReport,
        AdaptersReport,
        FactorizedReport,
        FidelityRow,
        LinearReport,
        Report,
        WarningReport,
    )

__all__ = [
    "adapter_lines",
    "adapter_tables",
    "chat_lines",
    "fidelity_table",
    "folder_parts",
    "format_bytes",
    "parity_line",
    "report_lines",
    "survey_lines",
    "tokenizer_lines",
    "warning_lines",
]

_WORST = 5
"""Linears that are named, those with the largest output errors."""


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
    headings = ("perplexity", "KL", "top-1", "layer error", "folder", "bits/weight")
    table = _table("fidelity on held-out text", "model", headings)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.perplexity:.2f}",
            f"{row.kl:.4f}",
            f"{row.top1_agreement:.1%}",
            f"{row.last_layer_error:.4f}",
            "" if row.folder_bytes is None else format_bytes(row.folder_bytes),
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
    from rich.text import Text  # noqa: PLC0415 - `--json` does without

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
                    Text(_figure(figures.get(name)), style="bold")
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
    """The lines under the table: warnings, parity, the worst linears, notes, limits, cost."""
    lines = [*warning_lines(report.warnings), parity_line(report.parity)]
    lines += survey_lines(report.surveys)
    described: list[LinearReport | FactorizedReport] = [*report.factorized, *report.linears]
    compressed = [item for item in described if item.errors]
    worst = sorted(compressed, key=_last_error, reverse=True)[:_WORST]
    if worst:
        named = ", ".join(f"{linear.name} {_last_error(linear):.3f}" for linear in worst)
        lines.append(f"largest output errors: {named}")
    lines += [f"note: {item.name}: {note}" for item in described for note in item.notes]
    lines += [f"note: {note}" for note in report.notes]
    lines += chat_lines(report.chat)
    lines += tokenizer_lines(report.tokenizer)
    lines += adapter_lines(report.adapters)
    for target, built in report.targets.items():
        engines = built.get("engines", {}).items()
        if sizes := ", ".join(f"{name} {format_bytes(engine['size'])}" for name, engine in engines):
            lines.append(f"{target}: engines by compute capability: {sizes}")
    lines += [f"limit: {sentence}" for sentence in report.fidelity.exceeded]
    build = report.build
    if build.precisions:
        lines.append(f"calibration: products in {' and '.join(build.precisions)}")
    if build.passes:
        shares = ", ".join(f"{entry['name']} {entry['cpu_s']:.0f} s" for entry in build.passes)
        lines.append(f"processor time of the passes: {shares}")
    lines.append(
        f"took {build.wall_s:.0f} s, {build.cpu_s:.0f} s of processor time, "
        f"{format_bytes(build.peak_memory_bytes)} of memory at most"
    )
    return lines


def folder_parts(folder_kinds: Mapping[str, int]) -> str:
    """``linears 52.0 MB, tokenizer 3.5 MB``: what the bytes of a folder are spent on."""
    # Loads the view of the graph: reports of adapters do without.
    from eoracc.compiler.report.folder import KINDS  # noqa: PLC0415

    return ", ".join(
        f"{KINDS.get(kind, kind)} {format_bytes(size)}" for kind, size in folder_kinds.items()
    )


def warning_lines(warnings: Sequence[WarningReport]) -> list[str]:
    """One line for each kind of warning, with the first linear that has it."""
    kinds: dict[str, list[WarningReport]] = {}
    for warning in warnings:
        kinds.setdefault(warning.code, []).append(warning)
    lines = []
    for code, alike in kinds.items():
        first = alike[0]
        place = "" if first.linear is None else f"{first.linear}: "
        others = "" if len(alike) == 1 else f" (and {len(alike) - 1} more linears)"
        lines.append(f"warning: {code}: {place}{first.message}{others}")
    return lines


def tokenizer_lines(tokenizer: Mapping[str, Any]) -> list[str]:
    """What is special about the tokenizer; empty where there is nothing to say."""
    lines = [f"note: {note}" for note in tokenizer.get("notes", ())]
    genai = tokenizer.get("onnxruntime_genai", {})
    if "refused" in genai:
        lines.append(
            f"tokenizer: unmodified onnxruntime-genai cannot use it ({genai['refused']}), "
            "eoracc can"
        )
    elif genai.get("other_tokens"):
        lines.append(
            "tokenizer: unmodified onnxruntime-genai gives other tokens for "
            f"{genai['other_tokens']} of {genai['texts']} texts ({genai['first']}), eoracc does not"
        )
    return lines


def survey_lines(surveys: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line on the result of each survey."""
    # Loads the passes: a command that formats other lines has no need of them.
    from eoracc.passes import load_passes  # noqa: PLC0415
    from eoracc.passes.base import pass_type  # noqa: PLC0415
    from eoracc.passes.survey import SurveyPass  # noqa: PLC0415

    if surveys:
        load_passes()
    lines = []
    for result in surveys:
        survey = pass_type(result["pass"])
        if not issubclass(survey, SurveyPass):
            raise TypeError(f"{survey.name} is no survey, so it has no result")
        if summary := survey.summary(result):
            lines.append(f"{survey.name}: {summary}")
    return lines


def chat_lines(chat: Mapping[str, Any]) -> list[str]:
    """What users of the chat templates must know; empty where there is nothing to say."""
    lines = [f"note: {note}" for note in chat.get("notes", ())]
    genai = chat.get("onnxruntime_genai", {})
    if differences := genai.get("differences"):
        lines.append(
            f"chat template: unmodified onnxruntime-genai renders {len(differences)} of "
            f"{genai['chats']} chats otherwise than eoracc and transformers ({differences[0]})"
        )
    return lines


def adapter_lines(adapters: AdaptersReport) -> list[str]:
    """One line on each solved adapter, and its notes."""
    lines = []
    for name, adapter in adapters.solved.items():
        lines.append(_adapter_line(name, adapter, adapters.parity.get(name)))
        lines += [f"note: adapter {name}: {note}" for note in adapter.notes]
    return lines


def _adapter_line(name: str, adapter: AdapterReport, parity: AdapterParity | None) -> str:
    line = (
        f"adapter {name}: rank {adapter.rank}, {adapter.factor_type}, "
        f"{format_bytes(adapter.bytes)}, "
        f"{adapter.tokens:,} tokens, {adapter.cpu_s:.0f} s of processor time, "
        f"mean output error {adapter.error_without:.3f} without "
        f"and {adapter.error_with:.3f} with it"
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
    linears = max((linear["tolerance_share"] for linear in parity.get("linears", ())), default=0.0)
    cases = parity.get("logits", ())
    logits = max((case["max_error"] / case["tolerance"] for case in cases), default=0.0)
    return (
        f"parity: {outcome}, largest deviation {linears:.0%} of its tolerance per linear, "
        f"{logits:.0%} on logits ({len(cases)} cases)"
    )


def _last_error(linear: LinearReport | FactorizedReport) -> float:
    return list(linear.errors.values())[-1]
