"""Every kind of rotary embedding against the eager model of the original checkpoint."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.compiler.frontend.load import load
from eoracc.errors import ModelError
from eoracc.passes.graph.spec import Stage, check
from eoracc.runtime.artifact.long_rope import LongRope
from tests.graph_session import GraphSession, assert_close, padded_mask
from tests.tiny_models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

ORIGINAL = 32
ORIGINAL_LENGTH = {"original_max_position_embeddings": ORIGINAL}
SHORT, LONG = [1.0 + 0.05 * i for i in range(8)], [1.0 + 0.3 * i for i in range(8)]

# Prefill below and beyond the original length, a cached step, a batch of both kinds of rows.
CALLS: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((20,), (20,)),
    ((70,), (70,)),
    ((45,), (36, 1, 1, 7)),
    ((45, 32, 7), (45,)),
]


def rope(rope_type: str, **options: object) -> dict[str, object]:
    return {"rope_type": rope_type, "rope_theta": 10000.0, **options}


def longrope(**options: object) -> dict[str, object]:
    factors: dict[str, object] = {"short_factor": SHORT, "long_factor": LONG}
    return rope("longrope", **(factors | ORIGINAL_LENGTH | options))


def yarn(**options: object) -> dict[str, object]:
    return rope("yarn", **({"factor": 4.0} | ORIGINAL_LENGTH | options))


# Family, and its rope_parameters, of tables that mobius computes right.
RIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", rope("default", rope_theta=500000.0)),
    "linear": ("qwen2", rope("linear", factor=4.0)),
    "llama3": (
        "llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL_LENGTH),
    ),
    "yarn": ("qwen3", yarn()),
    "yarn without values": ("llama", yarn(beta_fast=None, beta_slow=None)),
    "yarn mscale": ("llama", yarn(mscale=0.707, mscale_all_dim=1.2)),
    "yarn beta": ("llama", yarn(beta_fast=8.0, beta_slow=0.5)),
    "dynamic": ("llama", rope("dynamic", factor=4.0)),
    "partial": ("phi3", rope("default", partial_rotary_factor=0.5)),
    "two thetas": (
        "gemma3",
        {
            "sliding_attention": rope("default", rope_theta=20000.0),
            "full_attention": rope("linear", rope_theta=1e6, factor=8.0),
        },
    ),
}

# The same, where mobius leaves something out.
REPAIRED: dict[str, tuple[str, dict[str, Any]]] = {
    "yarn without a factor": ("llama", yarn(factor=None)),
    "yarn attention_factor": ("mistral", yarn(attention_factor=0.9)),
    "yarn without truncate": ("llama", yarn(truncate=False)),
    "proportional": ("llama", rope("proportional", partial_rotary_factor=0.5, factor=2.0)),
    "partial that Llama ignores": ("llama", rope("default", partial_rotary_factor=0.5)),
    "longrope": ("phi3", longrope()),
    "longrope factor": ("phi3", longrope(factor=2.0)),
    "longrope attention_factor": ("llama", longrope(factor=2.0, attention_factor=1.3)),
    "longrope partial": (
        "phi3",
        longrope(partial_rotary_factor=0.75, short_factor=SHORT[:6], long_factor=LONG[:6]),
    ),
    "longrope in some layers": (
        "gemma3",
        {"sliding_attention": rope("default"), "full_attention": longrope(attention_factor=1.2)},
    ),
}


def checkpoint(folder: Path, family: str, parameters: dict[str, Any]) -> Path:
    fields: dict[str, Any] = {"rope_parameters": parameters, "sliding_window": None}
    if family == "gemma3":
        del fields["sliding_window"]
    if family == "phi3":
        fields |= ORIGINAL_LENGTH
    return tiny_model(family, folder / "model", **fields)


def check_calls(folder: Path, model: ir.Model, work: Path) -> None:
    """Compare the graph with the eager model, which runs each row alone and without padding."""
    eager = load_eager(folder, {})
    session = GraphSession(model, work)
    rng = np.random.default_rng(3)
    for lengths, chunks in CALLS:
        ids = rng.integers(3, VOCABULARY, (len(lengths), max(lengths)))
        mask = padded_mask(lengths, max(lengths), left=False)
        actual = session.logits(ids, mask, chunks=chunks)
        for row, length in enumerate(lengths):
            own = chunks if len(lengths) == 1 else (length,)
            expected = reference_logits(eager, ids[row : row + 1, :length], chunks=own)
            assert_close(actual[row : row + 1, :length], expected, eager.config)


def replaced(model: ir.Model) -> bool:
    return any(name.endswith("_table") for name in model.graph.initializers)


@pytest.mark.parametrize("name", RIGHT)
def test_right_tables_stay(name: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, *RIGHT[name])
    model = load(str(folder), work=tmp_path).model
    assert not replaced(model)
    check_calls(folder, model, tmp_path)


@pytest.mark.parametrize("name", REPAIRED)
def test_other_tables_are_replaced(name: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, *REPAIRED[name])
    model = load(str(folder), work=tmp_path).model
    assert replaced(model)
    kept = [initializer for initializer in model.graph.initializers if "rotary_emb" in initializer]
    assert bool(kept) == (name == "longrope in some layers")
    check(model, Stage.FRONTEND, after="frontend")
    expected = LongRope(ORIGINAL, 128) if "longrope" in name else None
    assert LongRope.of(model.metadata_props) == expected
    check_calls(folder, model, tmp_path)


# --- as old checkpoints write it ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"rope_theta": 777.0}),
        ("llama", {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("llama", {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 4.0}}),
        (
            "qwen2",
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, **ORIGINAL_LENGTH}},
        ),
        (
            "phi3",
            {
                **ORIGINAL_LENGTH,
                "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
            },
        ),
        (  # the old field wins, with its theta
            "llama",
            {
                "rope_theta": 500.0,
                "rope_parameters": rope("default"),
                "rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 2e4},
            },
        ),
        (
            "gemma3",
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 2e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
    ],
)
def test_old_fields(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_model(family, tmp_path / "model")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps(config | fields))
    check_calls(folder, load(str(folder), work=tmp_path).model, tmp_path)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (rope("su"), "no entry 'su'"),
        (longrope(short_factor=SHORT[:5]), "must match the size"),
        (longrope(original_max_position_embeddings=1), "division by zero"),
        (longrope(short_factor=[0.0] * 8), "its cosines are no finite numbers"),
        (rope("default", rope_theta=None), "unsupported operand"),
    ],
)
def test_parameters_that_give_no_tables(
    parameters: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = tiny_model("llama", tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": parameters}))
    with pytest.raises(ModelError, match=rf"config\.json: rope_parameters: .*{message}") as caught:
        load(str(folder), work=tmp_path)
    assert "\n" not in str(caught.value)


def test_layers_that_change_at_different_lengths(tmp_path: Path) -> None:
    parameters = {
        "sliding_attention": longrope(),
        "full_attention": longrope() | {"original_max_position_embeddings": 64},
    }
    folder = checkpoint(tmp_path, "gemma3", parameters)
    with pytest.raises(ModelError, match=r"config\.json: .*original_max_position_embeddings of 32"):
        load(str(folder), work=tmp_path)
