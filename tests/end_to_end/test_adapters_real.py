"""Adapters of the real model: in PEFT, in onnxruntime-genai, and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from eoracc.compiler.adapters.exchange import export_peft, import_adapter, relative_error
from eoracc.compiler.adapters.restore import restore_backbone
from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.compiler.frontend.load import load as load_checkpoint
from eoracc.compiler.targets.parity_record import logits_tolerance
from eoracc.passes.solvers.factor_types import store_factors
from eoracc.passes.solvers.factors import svd_factors
from eoracc.plugins.adapters import pack_adapter
from eoracc.runtime.adapters.adapter import Adapter
from eoracc.runtime.adapters.files import read_adapter
from eoracc.runtime.adapters.slots import read_slots
from eoracc.runtime.adapters.store import add_adapter
from eoracc.runtime.artifact.manifest import read_manifest, verify_manifest
from eoracc.runtime.decode.text import Tokenizer
from eoracc.runtime.onnxruntime.session import open_session
from tests.end_to_end.ways_of_running import build_in, eoracc, genai_tokens

if TYPE_CHECKING:
    from eoracc.passes.graph.linears import Linear

pytestmark = [
    pytest.mark.real,
    # PEFT asks transformers by a name that is being replaced.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

ROOT = Path(__file__).resolve().parents[2]
RANK = 8
NEW_TOKENS = 48
PROMPT = "My fellow citizens, the state of our union"


@pytest.fixture(scope="module")
def artifact(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 rounded to 3 bits and no more: what an adapter gives back shows."""
    work = tmp_path_factory.mktemp("adapters")
    settings = {
        "model": str(smollm2_folder),
        "passes": [{"quantize_rtn": {"bits": 3, "group_size": 64}}],
        "targets": ["onnxruntime"],
        "onnxruntime": {"accuracy_level": 0},
        "verify": {
            "text": str(ROOT / "examples/smollm2/data/speeches-2000-2024.txt"),
            "windows": 1,
            "parity": False,
        },
    }
    return build_in(work, settings)


@pytest.fixture(scope="module")
def linears(
    artifact: Path, smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Linear]:
    """Those of the artifact, original weights at hand."""
    loaded = load_checkpoint(str(smollm2_folder), work=tmp_path_factory.mktemp("restored"))
    return restore_backbone(artifact, loaded.model).linears


@pytest.fixture(scope="module")
def adapted(artifact: Path, linears: list[Linear]) -> Path:
    """The artifact with an adapter ``error``: of what quantization took, the largest directions."""
    factors = {
        linear.name: store_factors(
            *svd_factors(linear.weight() - linear.effective_weight(), RANK), "int8"
        )
        for linear in linears
        if linear.name in read_slots(artifact).linears
    }
    add_adapter(artifact, Adapter("error", factors, read_manifest(artifact).digest))
    return artifact


def test_peft_on_the_dequantized_model_gives_the_same_logits(
    adapted: Path, linears: list[Linear], smollm2_folder: Path, tmp_path: Path
) -> None:
    import peft

    export_peft(adapted, "error", tmp_path / "peft")
    weights = {
        linear.name: linear.effective_weight()
        for linear in linears
        if linear.compressed is not None
    }
    weights["model.embed_tokens"] = weights["lm_head"]  # they are tied
    model = load_eager(smollm2_folder, weights)
    tokens = np.random.default_rng(0).integers(0, 49152, (1, 24))
    without = reference_logits(model, tokens)
    tuned: Any = peft.PeftModel.from_pretrained(model, str(tmp_path / "peft"))
    theirs = reference_logits(tuned.base_model.model, tokens)
    session = open_session(adapted)
    session.operands = pack_adapter(read_slots(adapted), read_adapter(adapted, "error").factors)
    ours, _ = session.run(tokens)
    # Ranks lengthen every sum: no more than a second model of that depth.
    allowed = 2 * logits_tolerance(linears, theirs)
    assert np.abs(theirs - ours).max() <= allowed
    assert np.abs(theirs - without).max() > 100 * allowed


def test_genai_with_an_adapter_says_what_our_session_says(adapted: Path) -> None:
    tokens = Tokenizer(adapted).encode(PROMPT)
    session, slots = open_session(adapted), read_slots(adapted)
    seen = []
    choices: tuple[str | None, ...] = (None, "error")
    for name in choices:
        if name is not None:
            session.operands = pack_adapter(slots, read_adapter(adapted, name).factors)
        theirs = genai_tokens(adapted, tokens, NEW_TOKENS, adapter=name)
        ours: list[int] = []
        step, past = list(tokens), None
        while len(ours) < len(theirs):
            logits, past = session.run(np.array([step]), past=past, last_only=True)
            step = [int(logits[0, -1].argmax())]
            ours += step
        assert ours == theirs
        seen.append(ours)
    assert seen[0] != seen[1]
    assert len(seen[1]) > 8, "choose a prompt whose continuation is long enough"


def test_command_line_carries_an_adapter_to_peft_and_back(adapted: Path, tmp_path: Path) -> None:
    done = eoracc("adapter", "export", adapted, "error", "--to", tmp_path / "peft")
    assert done.returncode == 0, done.stderr
    done = eoracc("adapter", "import", adapted, tmp_path / "peft", "--name", "again", "--json")
    assert done.returncode == 0, done.stderr
    rounding = json.loads(done.stdout)["details"]["rounding"]
    first, again = (read_adapter(adapted, name).factors for name in ("error", "again"))
    errors = [relative_error(one, again[name]) for name, one in first.items()]
    assert rounding["largest"] == pytest.approx(max(errors), rel=1e-6)
    assert max(errors) < 0.03
    done = eoracc("adapter", "list", adapted, "--json")
    assert [one["name"] for one in json.loads(done.stdout)] == ["again", "error"]
    assert eoracc("adapter", "remove", adapted, "again").returncode == 0
    verify_manifest(adapted)
    lora = import_adapter(adapted, tmp_path / "peft", "int4", "int4")
    assert 0.03 < lora.details["rounding"]["mean"] < 0.3
