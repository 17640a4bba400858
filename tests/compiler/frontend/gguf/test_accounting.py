"""What changes the model and has no place in a checkpoint folder is refused by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import pytest

from eoracc.compiler.frontend.gguf.convert import convert
from eoracc.errors import ModelError
from tests.gguf_files import VOCABULARY, write_gguf
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

U64 = gguf.GGUFValueType.UINT64
I8 = gguf.GGUFValueType.INT8

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"{arch}.swirl_factor": 2.0}, r"key llama\.swirl_factor \(2\.0\) may change"),
    "softcap": ({"{arch}.final_logit_softcapping": 30.0}, "llama.final_logit_softcapping has no"),
    "logit scale": ({"{arch}.logit_scale": 0.25}, r"llama\.logit_scale \(0\.25\) may change"),
    "embedding scale": ({"{arch}.embedding_scale": 12.0}, "llama.embedding_scale"),
    "residual scale": ({"{arch}.residual_scale": 0.22}, "llama.residual_scale"),
    "attention scale": ({"{arch}.attention.scale": 0.5}, "llama.attention.scale has no place"),
    "experts": ({"{arch}.expert_count": 8}, "llama.expert_count is 8: a mixture of experts"),
    "clamp": ({"{arch}.attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv"),
    "alibi": ({"{arch}.attention.max_alibi_bias": 8.0}, "llama.attention.max_alibi_bias"),
    "not causal": ({"{arch}.attention.causal": False}, "llama.attention.causal"),
    "pooling": ({"{arch}.pooling_type": 3}, "llama.pooling_type"),
    "rotates a part": ({"{arch}.rope.dimension_count": 4}, "dimension_count is 4 of a head of 8"),
    "sections": ({"{arch}.rope.dimension_sections": [1, 1, 2, 0]}, "llama.rope.dimension_sections"),
    "local base": ({"{arch}.rope.freq_base_swa": 5.0}, "llama.rope.freq_base_swa has no place"),
    "values are shorter": ({"{arch}.attention.value_length": 4}, "value_length differs"),
    "unknown scaling": ({"{arch}.rope.scaling.type": "spiral"}, "type 'spiral' is not known"),
    "negative factor": ({"{arch}.rope.scaling.factor": -2.0}, "rope.scaling.factor is negative"),
    "alpha": ({"{arch}.rope.scaling.alpha": 1000.0}, "llama.rope.scaling.alpha"),
    "attention factor of linear": (
        {"{arch}.rope.scaling.factor": 2.0, "{arch}.rope.scaling.attn_factor": 1.2},
        "llama.rope.scaling.attn_factor",
    ),
    "attention factor of yarn": (
        {
            "{arch}.rope.scaling.type": "yarn",
            "{arch}.rope.scaling.factor": 2.0,
            "{arch}.rope.scaling.attn_factor": 1.2,
        },
        "does not say whether YaRN's own factor",
    ),
    "extrapolation": (
        {
            "{arch}.rope.scaling.type": "yarn",
            "{arch}.rope.scaling.factor": 2.0,
            "{arch}.rope.scaling.yarn_ext_factor": 0.5,
        },
        "yarn_ext_factor is not 1",
    ),
    "longrope without tables": (
        {"{arch}.rope.scaling.type": "longrope"},
        "needs the tensors rope_factors_short.weight",
    ),
    "layout": ({"{arch}.tensor_data_layout": "columns"}, "llama.tensor_data_layout"),
    "temperature": ({"{arch}.attention.temperature_length": 8192}, "attention.temperature_length"),
    "part of a split": ({"split.count": 3, "split.no": 1}, "it is part 2 of 3: merge the parts"),
    "adapter": ({"general.type": "adapter"}, "GGUF calls 'adapter'"),
    "key of another part of the format": ({"diffusion.shift_logits": True}, "diffusion.shift"),
    "suppressed tokens": (
        {"tokenizer.ggml.suppress_tokens": [5]},
        "tokenizer.ggml.suppress_tokens",
    ),
    "white space": (
        {"tokenizer.ggml.remove_extra_whitespaces": True},
        "tokenizer.ggml.remove_extra_whitespaces",
    ),
    "end token outside": (
        {"tokenizer.ggml.eot_token_id": 999},
        f"eot_token_id is 999, and the vocabulary has {len(VOCABULARY)} tokens",
    ),
    "fewer blocks": ({"{arch}.block_count": 1}, "is 1, and the file has tensors of 2 blocks"),
    "many blocks": ({"{arch}.block_count": 10**9}, "has tensors of 2 blocks"),
    "few token types": (
        {"tokenizer.ggml.token_type": [3, 3]},
        f"token_type has 2 values for {len(VOCABULARY)} tokens",
    ),
    "negative window": (
        {"{arch}.attention.sliding_window": (-5, gguf.GGUFValueType.INT32)},
        "attention.sliding_window is -5",
    ),
    "base of zero": ({"{arch}.rope.freq_base": 0.0}, r"rope.freq_base is 0\.0"),
    "negative epsilon": (
        {"{arch}.attention.layer_norm_rms_epsilon": -1.0},
        r"layer_norm_rms_epsilon is -1\.0",
    ),
    "another width": (
        {"{arch}.feed_forward_length": 40},
        "tensor blk.0.ffn_gate.weight is 88 x 48 where the keys of the file make it 40 x 48",
    ),
    "another number of keys": (
        {"{arch}.attention.head_count_kv": 3},
        "tensor blk.0.attn_k.weight is 16 x 48 where the keys of the file make it 24 x 48",
    ),
    "no head count": ({"{arch}.attention.head_count": None}, "attention.head_count is missing"),
    "no epsilon": (
        {"{arch}.attention.layer_norm_rms_epsilon": None},
        "layer_norm_rms_epsilon is missing",
    ),
    "list of widths": (
        {"{arch}.feed_forward_length": [88, 44]},
        "llama.feed_forward_length is a list of 2, not a whole number",
    ),
    "text for a number": (
        {"{arch}.attention.head_count": "six"},
        "llama.attention.head_count is 'six', not a whole number",
    ),
    "number for a text": ({"tokenizer.chat_template": 7}, "chat_template is 7, not a string"),
    "tokens that are no text": (
        {"tokenizer.ggml.tokens": [1, 2, 3]},
        "tokenizer.ggml.tokens is a list of 3, not a list of str",
    ),
    "token twice": ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "has a token twice"),
    "base that is no number": (
        {"{arch}.rope.freq_base": float("nan")},
        "rope.freq_base is nan, not a finite number",
    ),
    "template that is missing": (
        {"tokenizer.chat_templates": ["tool_use"]},
        "chat template 'tool_use' .* is missing",
    ),
}

HARMLESS: dict[str, Any] = {
    "general.name": "A name",
    "general.base_model.0.repo_url": "https://example.org",
    "general.tags": ["a", "b"],
    "general.converted_by": "a tool",
    "general.quantization_version": 2,
    "general.file_type": 0,
    "general.sampling.mirostat": 0,
    "quantize.imatrix.file": "imatrix.dat",
    "split.count": 1,
    "some_tool.version": 3,
    "{arch}.expert_count": 0,
    "{arch}.logit_scale": 1.0,
    "{arch}.attention.causal": True,
    "{arch}.attention.scale": 8**-0.5,
    "{arch}.rope.scaling.type": "none",
    "{arch}.rope.scaling.finetuned": False,
    "{arch}.tensor_data_layout": "Meta AI original pth",
    "{arch}.vocab_size": 3,
    "{arch}.block_count": (2, U64),
    "{arch}.attention.head_count_kv": (2, I8),
    "tokenizer.ggml.fim_prefix_token_id": 4,
    "tokenizer.ggml.add_space_prefix": False,
    "tokenizer.ggml.scores": [0.0] * len(VOCABULARY),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    return tiny_model("llama", folder, vocab_size=len(VOCABULARY), head_dim=8)


@pytest.mark.parametrize("name", REFUSED)
def test_key_is_refused(name: str, checkpoint: Path, tmp_path: Path) -> None:
    keys, match = REFUSED[name]
    path = write_gguf(tmp_path / "model.gguf", checkpoint, keys=keys)
    with pytest.raises(ModelError, match=match) as error:
        convert(path, tmp_path / "source")
    assert str(path) in str(error.value)
    assert "safetensors folder" in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]


def test_frequencies_are_not_scaled_twice(checkpoint: Path, tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "model.gguf",
        checkpoint,
        keys={"{arch}.rope.scaling.factor": 2.0},
        tensors={"rope_freqs.weight": [1.0, 2.0, 4.0, 4.0]},
    )
    with pytest.raises(ModelError, match=r"rope_freqs.weight contradicts rope scaling by 2\.0"):
        convert(path, tmp_path / "source")


def test_keys_that_change_nothing_are_passed_over(checkpoint: Path, tmp_path: Path) -> None:
    plain = convert(write_gguf(tmp_path / "plain.gguf", checkpoint), tmp_path / "plain")
    path = write_gguf(tmp_path / "model.gguf", checkpoint, keys=HARMLESS)
    folder = convert(path, tmp_path / "source")
    for name in ("model.safetensors", "generation_config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (plain / name).read_bytes(), name


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"blk.0.attn_q_norm.weight": [1.0] * 8}, "tensor blk.0.attn_q_norm.weight has no place"),
        ({"swirl.weight": [1.0], "blk.1.swirl.weight": [1.0]}, r"swirl.weight \(and 1 others\)"),
        ({"blk.1.ffn_up.weight": None}, "tensor blk.1.ffn_up.weight is missing"),
        ({"blk.1.attn_q.bias": [0.0] * 48}, "tensor blk.1.attn_q.bias has no place"),
        ({"blk.0.attn_q.bias": [0.0] * 48}, "tensor blk.0.attn_k.bias is missing"),
        ({"rope_freqs.weight": [2.0, 1.0, 0.0, 1.0]}, "divisors that are not positive"),
        ({"rope_freqs.weight": [1.0, 1.0]}, "rope_freqs.weight has 2 values where 4 belong"),
        ({"rope_freqs.weight": [1.0, float("nan"), 1.0, 1.0]}, "rope_freqs.weight holds NaN"),
        ({"rope_factors_long.weight": [1.0] * 4}, "only one of the tensors"),
        ({"token_embd.weight": None}, "tensor token_embd.weight is missing"),
    ],
)
def test_tensor_is_refused(
    tensors: dict[str, Any], match: str, checkpoint: Path, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", checkpoint, tensors=tensors)
    with pytest.raises(ModelError, match=match):
        convert(path, tmp_path / "source")
