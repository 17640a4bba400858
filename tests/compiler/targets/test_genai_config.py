from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnxruntime_genai
import pytest

from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.compiler.frontend.load import load
from eoracc.compiler.targets.genai_config import genai_config
from eoracc.compiler.targets.onnxruntime.lower import lower
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from pathlib import Path


def test_llama(tmp_path: Path) -> None:
    loaded = load(str(tiny_model("llama", tmp_path / "model")), work=tmp_path)
    content = genai_config(
        loaded.config, lower(loaded.model), custom_ops_library="libeoracc_cpu.so"
    )
    assert json.loads(json.dumps(content)) == content
    model, decoder = content["model"], content["model"]["decoder"]
    assert model["type"] == "llama"
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, 2, 0)
    assert (model["vocab_size"], model["context_length"]) == (131, 128)
    assert decoder["session_options"]["custom_ops_library"] == "libeoracc_cpu.so"
    assert (decoder["head_size"], decoder["hidden_size"]) == (16, 48)
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (6, 2)
    assert "position_ids" not in decoder["inputs"]
    assert content["search"]["past_present_share_buffer"] is True
    assert content["search"]["max_length"] == 128


@pytest.mark.parametrize(
    ("family", "kind"),
    [("qwen3", "qwen3"), ("gemma2", "gemma2"), ("cohere", "decoder"), ("olmo2", "decoder")],
)
def test_family_that_genai_does_not_know_is_a_decoder(
    family: str, kind: str, tmp_path: Path
) -> None:
    """genai opens the artifact's folder, which it refuses for a type that it does not know."""
    folder = tiny_model(family, tmp_path / "model")
    loaded = load(str(folder), work=tmp_path)
    graph = lower(loaded.model)
    content = genai_config(loaded.config, graph)
    assert content["model"]["type"] == kind
    ir.save(graph, tmp_path / "model.onnx")
    (tmp_path / "genai_config.json").write_text(json.dumps(content))
    model = onnxruntime_genai.Model(str(tmp_path))
    generator = onnxruntime_genai.Generator(model, onnxruntime_genai.GeneratorParams(model))
    generator.append_tokens([5, 6, 7])
    generator.generate_next_token()
    tokens = np.array([[5, 6, 7]])
    best = reference_logits(load_eager(folder, {}), tokens)[0, -1].argmax()
    assert generator.get_sequence(0)[-1] == best


def test_graph_that_keeps_its_attention_shares_no_buffer(tmp_path: Path) -> None:
    loaded = load(str(tiny_model("llama", tmp_path / "model")), work=tmp_path)
    content = genai_config(loaded.config, loaded.model, filename="plain.onnx")
    assert content["search"]["past_present_share_buffer"] is False
    assert content["model"]["decoder"]["inputs"]["position_ids"] == "position_ids"
    assert content["model"]["decoder"]["filename"] == "plain.onnx"
    assert "custom_ops_library" not in content["model"]["decoder"]["session_options"]


def test_long_rope_ends_where_genai_would_keep_a_stale_cache(tmp_path: Path) -> None:
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 32,
    }
    folder = tiny_model("llama", tmp_path / "model", rope_parameters=parameters)
    loaded = load(str(folder), work=tmp_path)
    content = genai_config(loaded.config, lower(loaded.model))
    assert content["model"]["context_length"] == content["search"]["max_length"] == 32
    assert "text_lengths" not in content["model"]["decoder"]["inputs"]


def test_search_defaults_come_from_the_checkpoint(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "model")
    fields = {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "eos_token_id": [2, 7]}
    (folder / "generation_config.json").write_text(json.dumps(fields))
    loaded = load(str(folder), work=tmp_path)
    content = genai_config(loaded.config, lower(loaded.model), generation=loaded.generation)
    assert content["model"]["eos_token_id"] == [2, 7]
    search = content["search"]
    assert (search["do_sample"], search["temperature"], search["top_p"]) == (True, 0.2, 0.9)


@pytest.mark.parametrize(("ends", "pad"), [(2, 2), ([5, 6], 5)])
def test_padding_falls_back_to_the_end_token(tmp_path: Path, ends: object, pad: int) -> None:
    loaded = load(str(tiny_model("llama", tmp_path / "model")), work=tmp_path)
    loaded.config.pad_token_id = None
    loaded.config.eos_token_id = ends
    assert genai_config(loaded.config, lower(loaded.model))["model"]["pad_token_id"] == pad
