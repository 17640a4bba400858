from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.compiler.frontend.load import load
from eoracc.errors import ModelError
from eoracc.passes.graph.linears import find_linears
from eoracc.passes.graph.names import PARTS
from eoracc.passes.graph.spec import Stage, check
from tests.compiler.frontend.checkpoints import edit_config, refused
from tests.graph_session import GraphSession, assert_close, assert_equals_eager
from tests.tiny_artifact import write_byte_tokenizer
from tests.tiny_models import FAMILIES, VOCABULARY, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = 12
LENGTHS = (12, 8, 5)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: tiny_model(family, root / family) for family in FAMILIES}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_model("llama", tmp_path / "model")


def tokens() -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(7).integers(3, VOCABULARY, (len(LENGTHS), TOKENS))


@pytest.mark.parametrize("family", FAMILIES)
def test_graph_equals_eager_model(
    family: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    loaded = load(str(checkpoints[family]), work=tmp_path)
    check(loaded.model, Stage.FRONTEND, after="frontend")
    assert_equals_eager(loaded, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_are_named_as_modules(
    family: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    loaded = load(str(checkpoints[family]), work=tmp_path)
    eager = load_eager(loaded.folder, {})
    modules = {
        name: module.weight.numpy()
        for name, module in eager.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    linears = find_linears(loaded.model)
    for linear in linears:
        weight = modules.pop(linear.name, None)
        if weight is not None:
            np.testing.assert_array_equal(linear.weight(), weight)
    # What is left is stored fused: it stacks the parts that the graph has.
    by_name = {linear.name: linear for linear in linears}
    for name, weight in modules.items():
        parent, _, role = name.rpartition(".")
        parts = [by_name[f"{parent}.{part}"].weight() for part in PARTS[role]]
        np.testing.assert_array_equal(np.concatenate(parts), weight)


@pytest.mark.parametrize("family", ["smollm", "qwen2", "qwen3", "gemma3"])
def test_tied_head_multiplies_with_the_embedding(
    family: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    loaded = load(str(checkpoints[family]), work=tmp_path)
    wide = [
        name
        for name, value in loaded.model.graph.initializers.items()
        if value.shape is not None and VOCABULARY in tuple(value.shape)
    ]
    assert wide == ["model.embed_tokens.weight"]


def test_graph_does_not_depend_on_where_the_checkpoint_lies(
    checkpoint: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    loaded = [load(str(folder), work=tmp_path) for folder in (checkpoint, moved)]
    assert loaded[0].digest == loaded[1].digest
    assert loaded[0].model.graph.name == loaded[1].model.graph.name
    assert str(tmp_path) not in str(loaded[0].model.graph.name)


def test_digest_covers_weights_and_configuration(checkpoint: Path, tmp_path: Path) -> None:
    before = load(str(checkpoint), work=tmp_path).digest
    edit_config(checkpoint, rms_norm_eps=2e-6)
    after_config = load(str(checkpoint), work=tmp_path).digest
    _edit_weights(checkpoint, "model.norm.weight", lambda weight: weight + 1)
    assert len({before, after_config, load(str(checkpoint), work=tmp_path).digest}) == 3


def test_sharded_bfloat16_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    model: Any = load_eager(checkpoint, {})
    model.to(torch.bfloat16)
    folder = tmp_path / "sharded"
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded = load(str(folder), work=tmp_path)
    expected = reference_logits(load_eager(folder, {}), tokens())
    assert_close(GraphSession(loaded.model, tmp_path).logits(tokens()), expected, loaded.config)


def test_tokenizer_files(checkpoint: Path, tmp_path: Path) -> None:
    loaded = load(str(checkpoint), work=tmp_path / "work")
    with pytest.raises(ModelError, match="has no tokenizer that can be read"):
        loaded.tokenizer()
    write_byte_tokenizer(checkpoint, chat=True)
    files = loaded.write_tokenizer(loaded.tokenizer(), tmp_path / "out")
    assert [path.name for path in files] == [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ]
    assert {path.parent for path in files} == {tmp_path / "out"}


def test_tokenizer_that_loads_and_cannot_tokenize(checkpoint: Path, tmp_path: Path) -> None:
    path = write_byte_tokenizer(checkpoint) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "long"}))
    with pytest.raises(ModelError, match="has no tokenizer that can be read"):
        load(str(checkpoint), work=tmp_path).tokenizer()


# --- bad input ------------------------------------------------------------------------------------


def _edit_weights(folder: Path, name: str, change: Any) -> None:  # noqa: ANN401
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def test_missing_tensor(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path)
    refused(checkpoint, tmp_path, "has no tensor model.layers.1.mlp.up_proj.weight")


def test_tensor_of_another_shape(checkpoint: Path, tmp_path: Path) -> None:
    _edit_weights(checkpoint, "model.norm.weight", lambda weight: weight[:-1])
    refused(checkpoint, tmp_path, "cannot be built.*model.norm.weight")


def test_tensor_without_a_place(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "model.safetensors"
    extra = {"model.layers.0.self_attn.sinks": np.zeros(6, np.float32)}
    save_file(load_file(path) | extra, path)
    refused(checkpoint, tmp_path, "tensor model.layers.0.self_attn.sinks has no place")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_values_that_are_not_finite(
    checkpoint: Path, tmp_path: Path, name: str, value: float
) -> None:
    def poison(weight: Any) -> Any:  # noqa: ANN401
        weight.flat[3] = value
        return weight

    _edit_weights(checkpoint, name, poison)
    refused(checkpoint, tmp_path, f"{name} holds NaN or Inf")


def test_unsupported_family(checkpoint: Path, tmp_path: Path) -> None:
    edit_config(checkpoint, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    refused(checkpoint, tmp_path, "model_type 'gpt2' is not supported: its position embeddings are")


@pytest.mark.parametrize(
    ("linear", "flag"),
    [("self_attn.q_proj", "attention_bias"), ("mlp.up_proj", "mlp_bias")],
)
def test_bias_that_the_configuration_turns_off(
    checkpoint: Path, tmp_path: Path, linear: str, flag: str
) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    name = f"model.layers.0.{linear}"
    tensors[f"{name}.bias"] = np.ones(len(tensors[f"{name}.weight"]), np.float32)
    save_file(tensors, path)
    refused(checkpoint, tmp_path, f"tensor {name}.bias .* {flag} in its config.json is false")


def test_bias_of_the_head_keeps_the_name_of_the_output(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "model.safetensors"
    before = GraphSession(load(str(checkpoint), work=tmp_path).model, tmp_path).logits(tokens())
    bias = np.random.default_rng(3).standard_normal(VOCABULARY).astype(np.float32)
    save_file(load_file(path) | {"lm_head.bias": bias}, path)
    after = GraphSession(load(str(checkpoint), work=tmp_path).model, tmp_path).logits(tokens())
    np.testing.assert_allclose(after, before + bias, rtol=0, atol=1e-5)
