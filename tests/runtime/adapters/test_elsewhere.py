"""Adapters through the APIs that unmodified ONNX Runtime and onnxruntime-genai have for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import onnxruntime_genai
import pytest

from eoracc.plugins.adapters import pack_adapter
from eoracc.runtime.adapters.adapter import Adapter
from eoracc.runtime.adapters.files import read_adapter
from eoracc.runtime.adapters.slots import read_slots
from eoracc.runtime.adapters.store import add_adapter
from eoracc.runtime.artifact.manifest import read_manifest
from eoracc.runtime.onnxruntime.session import Session, open_session
from tests.tiny_artifact import tiny_factors, write_tiny_artifact

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

GENAI: Any = onnxruntime_genai
ORT: Any = onnxruntime
NAMES = ("math", "code")
PROMPT = [5, 9, 33, 70]
LENGTH = 32


@pytest.fixture(scope="module", params=["int8", "float16"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_artifact(
        tmp_path_factory.mktemp(str(request.param)), adapter_type=request.param
    )
    slots, digest = read_slots(folder), read_manifest(folder).digest
    for seed, name in enumerate(NAMES):
        factors = tiny_factors(slots, rank=4, seed=seed, size=1.0)
        add_adapter(folder, Adapter(name, factors, digest))
    return folder


@pytest.fixture
def session(artifact: Path) -> Session:
    return open_session(artifact)


def feed(session: Session, artifact: Path, name: str | None) -> None:
    """Give our own session the operands of an adapter, or take them away."""
    factors = {} if name is None else read_adapter(artifact, name).factors
    session.operands = pack_adapter(read_slots(artifact), factors)


def greedy(session: Session) -> list[int]:
    tokens, step, past = list(PROMPT), list(PROMPT), None
    while len(tokens) < LENGTH:
        logits, past = session.run(np.array([step]), past=past, last_only=True)
        step = [int(logits[0, -1].argmax())]
        tokens += step
    return tokens


def same_until_the_end(theirs: Sequence[int], ours: Sequence[int], end: int) -> bool:
    """Whether tokens are equal up to the first that ends a text, which genai leaves out."""
    stop = ours.index(end) if end in ours else len(ours)
    return list(theirs)[:stop] == list(ours)[:stop] and len(theirs) in (stop, stop + 1)


def test_genai_switches_adapters_of_one_model(artifact: Path, session: Session) -> None:
    model = GENAI.Model(str(artifact))
    adapters = GENAI.Adapters(model)
    for name in NAMES:
        adapters.load(str(artifact / "adapters" / f"{name}.onnx_adapter"), name)
    (end,) = GENAI.Tokenizer(model).eos_token_ids
    seen = []
    choices: tuple[str | None, ...] = (None, *NAMES, None)
    for choice in choices:
        parameters = GENAI.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, max_length=LENGTH)
        generator = GENAI.Generator(model, parameters)
        if choice is not None:
            generator.set_active_adapter(adapters, choice)
        generator.append_tokens(PROMPT)
        while not generator.is_done():
            generator.generate_next_token()
        theirs = [int(token) for token in generator.get_sequence(0)]
        feed(session, artifact, choice)
        assert same_until_the_end(theirs, greedy(session), int(end)), choice
        seen.append(tuple(theirs))
    assert seen[0] == seen[3]
    assert len(set(seen)) == 3, "adapters must change the text, or nothing is shown"


def stock_feeds(inference: Any) -> dict[str, NDArray[Any]]:  # noqa: ANN401 - onnxruntime has no types
    feeds: dict[str, NDArray[Any]] = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in inference.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    feeds["input_ids"] = np.array([PROMPT])
    feeds["attention_mask"] = np.ones((1, len(PROMPT)), np.int64)
    return feeds


def test_onnxruntime_sets_an_adapter_for_one_run(artifact: Path) -> None:
    options = ORT.SessionOptions()
    options.log_severity_level = 3
    inference = ORT.InferenceSession(
        str(artifact / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    # The function bodies on both sides: the very same arithmetic.
    session = open_session(artifact, library=False)
    seen = []
    choices: tuple[str | None, ...] = (None, *NAMES)
    for choice in choices:
        run_options = ORT.RunOptions()
        if choice is not None:
            adapter = ORT.LoraAdapter()
            adapter.Load(str(artifact / "adapters" / f"{choice}.onnx_adapter"))
            run_options.add_active_adapter(adapter)
        theirs = inference.run(["logits"], stock_feeds(inference), run_options)[0]
        feed(session, artifact, choice)
        ours, _ = session.run(np.array([PROMPT]), last_only=True)
        np.testing.assert_array_equal(theirs, ours)
        seen.append(theirs)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(seen[one] - seen[other]).max() > 0.1
