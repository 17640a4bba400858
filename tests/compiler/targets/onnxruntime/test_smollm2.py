"""The uncompressed SmolLM2, lowered: logits, tokens and greedy text against transformers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnxruntime_genai
import pytest
import torch

from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.compiler.frontend.load import LoadedModel, load
from eoracc.compiler.targets.genai_config import genai_config
from eoracc.compiler.targets.onnxruntime.lower import lower
from eoracc.passes.graph.spec import Stage, check
from tests.graph_session import GraphSession, assert_close, padded_mask

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.real

TEXTS = (
    "The Congress of 1815 met.\n\n1. First, 2½ million dollars; 3 of them   left\n",
    "def f(x):\n    return x ** 2  # 12345\n\n\n7",
    "Naïve café, 東京 2024年, ٣٤, x²",
)


@pytest.fixture(scope="module")
def source(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(str(smollm2_folder), work=tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def artifact(source: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    lowered = lower(source.model)
    check(lowered, Stage.ONNXRUNTIME, after="lower")
    ir.save(lowered, folder / "model.onnx", external_data="model.onnx.data")
    content = genai_config(source.config, lowered, generation=source.generation)
    (folder / "genai_config.json").write_text(json.dumps(content))
    source.write_tokenizer(source.tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def eager(source: LoadedModel) -> Any:  # noqa: ANN401
    return load_eager(source.folder, {})


@pytest.mark.parametrize("lowered", [False, True])
def test_logits(source: LoadedModel, eager: Any, tmp_path: Path, *, lowered: bool) -> None:  # noqa: ANN401
    session = GraphSession(lower(source.model) if lowered else source.model, tmp_path)
    tokens = source.tokenizer()(" ".join(TEXTS) * 2, add_special_tokens=False)["input_ids"]
    ids = np.array(tokens[:48], np.int64).reshape(2, 24)
    padded = padded_mask((24, 13), 24, left=not lowered)
    for rows, mask, chunks in [(2, None, (24,)), (2, None, (21, 1, 1, 1)), (1, None, (16, 8))]:
        expected = reference_logits(eager, ids[:rows], mask, chunks=chunks)
        actual = session.logits(ids[:rows], mask, chunks=chunks)
        assert_close(actual, expected, source.config)
    expected = reference_logits(eager, ids, padded)
    assert_close(session.logits(ids, padded), expected, source.config, padded)


def test_genai_tokenizes_as_transformers(source: LoadedModel, artifact: Path) -> None:
    tokenizer = source.tokenizer()
    genai = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(artifact)))
    for text in TEXTS:
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert genai.encode(text).tolist() == expected
        assert genai.decode(np.array(expected, np.int32)) == text


def test_genai_generates_as_transformers(source: LoadedModel, artifact: Path, eager: Any) -> None:  # noqa: ANN401
    tokenizer = source.tokenizer()
    messages = [{"role": "user", "content": "Name the planets of the solar system."}]
    prompt: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ids = prompt["input_ids"]
    model = onnxruntime_genai.Model(str(artifact))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + 16, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    expected = eager.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=16,
        do_sample=False,
    )
    assert generator.get_sequence(0).tolist() == expected[0].tolist()
