from __future__ import annotations

import io
import json
from dataclasses import asdict, replace

from rich.console import Console

from eoracc.compiler.report.content import (
    AdapterParity,
    AdapterReport,
    AdaptersReport,
    CompensationReport,
    Report,
    WarningReport,
)
from eoracc.compiler.report.folder import with_folder
from eoracc.compiler.report.lines import (
    adapter_lines,
    adapter_tables,
    fidelity_table,
    folder_parts,
    parity_line,
    report_lines,
    survey_lines,
)


def test_table_shows_every_figure(report: Report) -> None:
    file = io.StringIO()
    rows = with_folder(report, {"model.onnx": 12_345_678}, None).fidelity.rows
    Console(file=file, width=120).print(fidelity_table(rows))
    line = next(line for line in file.getvalue().splitlines() if "eora" in line)
    for figure in ("22.50", "0.2500", "50.0%", "0.1250", "12.3 MB", "3.25"):
        assert figure in line


def test_older_reports_leave_the_bytes_of_the_folder_empty(report: Report) -> None:
    file = io.StringIO()
    Console(file=file, width=120).print(fidelity_table(report.fidelity.rows))
    assert "folder" in file.getvalue()
    assert "MB" not in file.getvalue()


def test_parts_of_a_folder_have_their_names_in_tables() -> None:
    kinds = {"embedding_and_head": 12_345_678, "linears": 999}
    assert folder_parts(kinds) == "embedding and head 12.3 MB, linears 999 B"


def test_lines_under_the_table(report: Report) -> None:
    assert report_lines(report) == [
        "warning: few_tokens: a.k_proj: has 9 tokens",
        (
            "parity: passed, largest deviation 50% of its tolerance per linear, 10% on logits "
            "(1 cases)"
        ),
        "largest output errors: a.k_proj 0.300, a.q_proj 0.200",
        "note: a.k_proj: saw 3 tokens: rounded",
        "note: texts have up to 64 tokens",
        "note: chat template 'rag': is not a Jinja template (no name): replace it",
        (
            "chat template: unmodified onnxruntime-genai renders 2 of 7 chats otherwise than "
            "eoracc and transformers (one turn: 'a' instead of 'b')"
        ),
        "limit: kl is 0.25, more than 0.1",
        "calibration: products in bfloat16 and float32",
        "processor time of the passes: calibrate 4 s, eora 1 s",
        "took 12 s, 20 s of processor time, 1.5 GB of memory at most",
    ]


def test_one_line_for_each_kind_of_warning(report: Report) -> None:
    def warning(code: str, linear: str | None, message: str) -> WarningReport:
        return WarningReport(code=code, linear=linear, message=message, figures={})

    warnings = [
        warning("unlike_text", None, "it differs"),
        warning("few_tokens", "a.q_proj", "10 tokens"),
        warning("dead_channels", "a.q_proj", "3 are zero"),
        warning("few_tokens", "a.k_proj", "9 tokens"),
        warning("few_tokens", "b.k_proj", "8 tokens"),
    ]
    lines = [
        "warning: unlike_text: it differs",
        "warning: few_tokens: a.q_proj: 10 tokens (and 2 more linears)",
        "warning: dead_channels: a.q_proj: 3 are zero",
    ]
    assert report_lines(replace(report, warnings=warnings))[:3] == lines


def test_every_survey_says_what_it_found() -> None:
    tried = [
        {"k": k, "blocks": list(range(4 - k, 4)), "ratio": 0.8 / k, "error": error}
        for k, error in ((2, 0.5), (3, 0.4), (4, 0.45))
    ]
    curve = [{"k": 0, "blocks": [], "error": 0.0}, *tried]
    free = {"k": 2, "blocks": [0, 3], "bits": 2, "average_bits": 2.5, "error": 0.3}
    found = {"bits_per_weight": 3.6, "distortion": 15.0, "least_possible": 14.9}
    assert survey_lines(
        [
            {"pass": "select_last_k", "chosen": tried[1], "curve": curve},
            {"pass": "select_last_k", "chosen": free, "curve": [curve[0], tried[0]]},
            {"pass": "allocate", **found, "alternatives": {"bits alone": {"distortion": 20.0}}},
            {"pass": "allocate", **found, "alternatives": {}},
            {
                "pass": "allocate_ratios",
                "by": "loss",
                "removed": 0.2,
                "linears": {"a": {"ratio": 0.1}, "b": {"ratio": 0.25}},
            },
            {"pass": "calibrate_outputs", "by": "logits", "linears": 8, "tokens": 2048},
        ]
    ) == [
        (
            "select_last_k: blocks 1 to 3 at ratio 0.267, output error 0.4000; 0.5000 for k = 2, "
            "0.4000 for k = 3, 0.4500 for k = 4"
        ),
        "select_last_k: blocks 0, 3 at 2 bits, output error 0.3000; 0.5000 for k = 2",
        (
            "allocate: 3.600 bits per weight leave a distortion of 15, 14.9 at least; "
            "20 with bits alone"
        ),
        "allocate: 3.600 bits per weight leave a distortion of 15, 14.9 at least",
        "allocate_ratios: by loss, ratios from 0.1 to 0.25, 20.0% of the parameters in all",
        "calibrate_outputs: by logits, 8 linears over 2,048 tokens",
    ]


def test_parity_that_failed_or_was_not_checked() -> None:
    assert parity_line({}) == "parity: not checked"
    assert parity_line({"passed": False}).startswith("parity: FAILED")


def test_adapters_are_tables_and_lines() -> None:
    solved = AdapterReport(
        rank=4,
        factor_type="int8",
        linears=2,
        bytes=2_000_000,
        tokens=1000,
        error_without=0.2,
        error_with=0.1,
        cpu_s=3.0,
        notes=["a note"],
    )
    case = {"through": "library", "name": "prefill", "max_error": 0.1, "tolerance": 0.4}
    adapters = AdaptersReport(
        perplexity={"math": {"none": 9.0, "math": 7.5, "code": 8.25}, "code": {"none": 4.0}},
        original={"math": 6.0},
        solved={"math": solved},
        parity={"math": AdapterParity(cases=[{**case, "passed": True}], adapter_effect=2.0)},
        compensation={
            "shared": CompensationReport(
                backbone_bytes=5_000_000, adapter_bytes={"math": 1_000_000}, perplexity={"math": 9}
            )
        },
    )
    assert AdaptersReport.from_dict(json.loads(json.dumps(asdict(adapters)))) == adapters
    console = Console(width=100, file=io.StringIO())
    for table in adapter_tables(adapters):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    shown = [line.split() for line in console.file.getvalue().splitlines()]
    for row in (
        ["adapter", "math", "code"],
        ["original", "6.00"],
        ["none", "9.00", "4.00"],
        ["math", "7.50"],
        ["code", "8.25"],
        ["shared", "9.00", "5.0", "MB", "1.0", "MB"],
    ):
        assert row in shown
    lines = adapter_lines(adapters)
    assert lines[0].startswith("adapter math: rank 4, int8, 2.0 MB, 1,000 tokens, 3 s")
    assert lines[0].endswith("parity passed (25% of its tolerance)")
    assert lines[1] == "note: adapter math: a note"
    assert adapter_tables(AdaptersReport()) == []
