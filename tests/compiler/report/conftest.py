"""A report with every part."""

from __future__ import annotations

import pytest

from eoracc.compiler.report.content import (
    BuildReport,
    FidelityReport,
    FidelityRow,
    LinearReport,
    Report,
    WarningReport,
)


def row(name: str, perplexity: float) -> FidelityRow:
    return FidelityRow(
        name=name,
        perplexity=perplexity,
        kl=0.25,
        top1_agreement=0.5,
        last_layer_error=0.125,
        bytes=12_345_678,
        bits_per_weight=3.25,
    )


def linear(name: str, *errors: float, notes: tuple[str, ...] = ()) -> LinearReport:
    return LinearReport(
        name=name,
        block=0,
        role=name.rpartition(".")[2],
        shape=(4, 16),
        bits=3,
        group_size=16,
        rank=2,
        bytes=100,
        errors=dict(zip(("quantize_gptq", "eora"), errors, strict=False)),
        notes=notes,
    )


@pytest.fixture
def report() -> Report:
    return Report(
        fidelity=FidelityReport(
            rows=[row("original", 20.0), row("eora", 22.5)],
            windows=8,
            window_length=512,
            limits={"kl": 0.1},
            exceeded=["kl is 0.25, more than 0.1"],
        ),
        parity={
            "passed": True,
            "linears": [{"tolerance_share": 0.25}, {"tolerance_share": 0.5}],
            "logits": [{"max_error": 1e-5, "tolerance": 1e-4}],
        },
        linears=[
            linear("a.q_proj", 0.5, 0.2),
            linear("a.k_proj", 0.4, 0.3, notes=("saw 3 tokens: rounded",)),
            linear("lm_head"),
        ],
        notes=["texts have up to 64 tokens"],
        warnings=[
            WarningReport(
                code="few_tokens", linear="a.k_proj", message="has 9 tokens", figures={"tokens": 9}
            )
        ],
        chat={
            "templates": ["default"],
            "notes": ["chat template 'rag': is not a Jinja template (no name): replace it"],
            "onnxruntime_genai": {
                "chats": 7,
                "differences": ["one turn: 'a' instead of 'b'", "tools: fails: no filter"],
                "rewritten": False,
            },
        },
        build=BuildReport(
            wall_s=12.4,
            cpu_s=20.0,
            peak_memory_bytes=1_500_000_000,
            phases=[{"name": "load", "wall_s": 1.0, "cpu_s": 1.0}],
            passes=[
                {"name": "calibrate", "wall_s": 2.0, "cpu_s": 3.6},
                {"name": "eora", "wall_s": 1.0, "cpu_s": 1.2},
            ],
            precisions=["bfloat16", "float32"],
        ),
    )
