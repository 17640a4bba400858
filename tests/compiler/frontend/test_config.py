"""Configurations that no graph can be built from, and fields that have two spellings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.compiler.frontend.load import load
from tests.compiler.frontend.checkpoints import edit_config, refused
from tests.graph_session import GraphSession, assert_close
from tests.tiny_models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_model("llama", tmp_path / "model", num_hidden_layers=1)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "config.json: is not valid JSON"),
        ("\ufeff{}", "config.json: begins with a byte order mark"),
        ("[" * 100000, "config.json: is nested more than"),
        ("[]", "config.json: is a list where a JSON object is expected"),
        ("{}", "has no field model_type"),
        ('{"model_type": ["llama"]}', "has no field model_type"),
    ],
)
def test_damaged_config(checkpoint: Path, tmp_path: Path, content: str, match: str) -> None:
    (checkpoint / "config.json").write_text(content)
    refused(checkpoint, tmp_path, match)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"hidden_size": 0}, "field hidden_size is 0: it must be a positive number"),
        ({"num_attention_heads": 0}, "field num_attention_heads is 0"),
        ({"num_key_value_heads": 0}, "field num_key_value_heads is 0"),
        ({"eos_token_id": []}, "field eos_token_id is an empty list"),
        ({"num_hidden_layers": -1}, "field num_hidden_layers is -1"),
        ({"vocab_size": 0}, "field vocab_size is 0"),
        ({"max_position_embeddings": 0}, "field max_position_embeddings is 0"),
        ({"vocab_size": float("nan")}, "field vocab_size is nan"),
        ({"max_position_embeddings": 10**9}, "is 1000000000: lower it to .* 4194304 at most"),
        ({"rms_norm_eps": -1e-6}, "field rms_norm_eps is -1e-06: it must be a number, and not neg"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta .* is '1e4': it must be a pos"),
        ({"rope_parameters": {"rope_theta": -5.0}}, "rope_theta .* is -5.0"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor of the rotary embedding is 0"),
        ({"hidden_size": "48"}, r"llama' \(TypeError: Field 'hidden_size' expected int, got str"),
        ({"rms_norm_eps": None}, "'rms_norm_eps' expected float, got NoneType"),
        ({"rope_parameters": "linear"}, "'rope_parameters' with value 'linear' doesn't match"),
        ({"tie_word_embeddings": "no"}, "'tie_word_embeddings' expected bool, got str"),
        ({"num_key_value_heads": 4}, "num_attention_heads, 6, is no multiple of .*heads, 4"),
        ({"head_dim": 15}, "head_dim"),
        ({"architectures": "LlamaModel"}, "architecture LlamaModel of model_type 'llama' is not"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}},
            "model_type 'own' is not supported",
        ),
        ({"vocab_size": VOCABULARY - 1}, "cannot be built .*shape mismatch for 'lm_head.weight'"),
    ],
)
def test_values_that_cannot_be(
    checkpoint: Path, tmp_path: Path, fields: dict[str, Any], match: str
) -> None:
    edit_config(checkpoint, **fields)
    refused(checkpoint, tmp_path, match)


def test_heads_that_do_not_divide_the_hidden_size(checkpoint: Path, tmp_path: Path) -> None:
    edit_config(checkpoint, without=("head_dim",), num_attention_heads=5, num_key_value_heads=5)
    refused(checkpoint, tmp_path, r"hidden size \(48\) is not a multiple .* heads \(5\)")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ({"quant_method": "awq"}, "'awq'"),
        ({"quant_method": "fp8"}, "'fp8'"),
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors'"),
        ({"load_in_4bit": True}, "'bitsandbytes'"),
        ({}, "no quant_method"),
    ],
)
def test_quantized_source(
    checkpoint: Path, tmp_path: Path, section: dict[str, Any], said: str
) -> None:
    edit_config(checkpoint, quantization_config=section)
    refused(checkpoint, tmp_path, f"is quantized already .*{said}.*give the model in full")


def test_configuration_that_is_not_quantized_says_so_with_null(
    checkpoint: Path, tmp_path: Path
) -> None:
    edit_config(checkpoint, quantization_config=None)
    assert load(str(checkpoint), work=tmp_path).digest


@pytest.mark.parametrize("architectures", [None, [], "LlamaForCausalLM"])
def test_architectures_that_name_no_class_or_only_one(
    checkpoint: Path, tmp_path: Path, architectures: object
) -> None:
    edit_config(checkpoint, architectures=architectures)
    assert load(str(checkpoint), work=tmp_path).digest


def test_adapter_beside_the_model(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "adapter_config.json").write_text("{}")
    refused(checkpoint, tmp_path, "holds an adapter of PEFT")


@pytest.mark.parametrize(
    "fields",
    [
        # As transformers reads them, the old name replaces the new one with all its fields.
        {
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 500.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 7.0},
    ],
)
def test_rope_has_the_spelling_that_transformers_prefers(
    checkpoint: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    edit_config(checkpoint, without=("rope_parameters",) if len(fields) == 1 else (), **fields)
    tokens = np.random.default_rng(7).integers(3, VOCABULARY, (2, 24))
    loaded = load(str(checkpoint), work=tmp_path)
    expected = reference_logits(load_eager(checkpoint, {}), tokens)
    assert_close(GraphSession(loaded.model, tmp_path).logits(tokens), expected, loaded.config)
