from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from typing_extensions import override

from eoracc.compiler.eager.model import load_eager, reference_logits, replace_weights
from eoracc.errors import ModelError
from tests.graph_session import assert_close, padded_mask
from tests.tiny_models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

RNG = np.random.default_rng(11)
Array = np.ndarray[Any, np.dtype[np.float32]]


def draw(*shape: int) -> Array:
    return RNG.standard_normal(shape, np.float32)


def scaled(rows: int, columns: int) -> Array:
    """A weight that keeps the variance of its input."""
    weight: Array = draw(rows, columns) * np.float32(columns**-0.5)
    return weight


def input_ids(rows: int = 3, length: int = 12) -> NDArray[np.int64]:
    return np.random.default_rng(5).integers(3, VOCABULARY, (rows, length))


def test_without_weights_it_is_the_checkpoint(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    model: Any = load_eager(folder, {})
    assert not model.training
    assert model.config._attn_implementation == "eager"
    for name, tensor in load_file(folder / "model.safetensors").items():
        np.testing.assert_array_equal(model.get_parameter(name).numpy(), tensor)


def test_weight_takes_the_place_of_the_modules_own(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model("llama", tmp_path)
    weight = draw(48, 88)
    name = "model.layers.1.mlp.down_proj"
    expected: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    expected.get_submodule(name).weight.data = torch.from_numpy(weight)
    actual = reference_logits(load_eager(folder, {name: weight}), input_ids())
    np.testing.assert_array_equal(actual, reference_logits(expected, input_ids()))
    assert np.abs(actual - reference_logits(load_eager(folder, {}), input_ids())).max() > 0.1


def test_parts_of_fused_modules(tmp_path: Path) -> None:
    folder = tiny_model("phi3", tmp_path)
    block = "model.layers.0"
    parts = {"q_proj": draw(96, 96), "k_proj": draw(32, 96), "v_proj": draw(32, 96)}
    gate, up = draw(88, 96), draw(88, 96)
    weights = {f"{block}.self_attn.{role}": weight for role, weight in parts.items()}
    weights |= {f"{block}.mlp.gate_proj": gate, f"{block}.mlp.up_proj": up}
    model: Any = load_eager(folder, weights)
    stored = model.get_submodule(f"{block}.self_attn.qkv_proj").weight.numpy()
    np.testing.assert_array_equal(stored, np.concatenate(list(parts.values())))
    stored = model.get_submodule(f"{block}.mlp.gate_up_proj").weight.numpy()
    np.testing.assert_array_equal(stored, np.concatenate([gate, up]))


def test_packed_weights_of_separate_modules(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    packed = draw(96 + 32 + 32, 48)
    name = "model.layers.0.self_attn"
    model: Any = load_eager(folder, {f"{name}.qkv_proj": packed})
    stored = [model.get_submodule(f"{name}.{role}_proj").weight.numpy() for role in "qkv"]
    np.testing.assert_array_equal(np.concatenate(stored), packed)


@pytest.mark.parametrize("replaced", ["lm_head", "model.embed_tokens"])
def test_tied_head_is_untied(tmp_path: Path, replaced: str) -> None:
    folder = tiny_model("smollm", tmp_path)
    own = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    weight = draw(*own.shape)
    model: Any = load_eager(folder, {replaced: weight})
    kept = {"lm_head", "model.embed_tokens"} - {replaced}
    np.testing.assert_array_equal(model.get_submodule(replaced).weight.numpy(), weight)
    np.testing.assert_array_equal(model.get_submodule(kept.pop()).weight.numpy(), own)


def test_tied_head_stays_tied_otherwise(tmp_path: Path) -> None:
    model: Any = load_eager(tiny_model("smollm", tmp_path), {})
    assert model.lm_head.weight is model.model.embed_tokens.weight


class _Lazy(Mapping[str, Array]):
    """Notes which weights are read."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.reads: list[str] = []

    @override
    def __getitem__(self, name: str) -> Array:
        self.reads.append(name)
        return draw(48, 96)

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @override
    def __len__(self) -> int:
        return len(self.names)


def test_lazy_weights_are_read_once_each(tmp_path: Path) -> None:
    names = [f"model.layers.{block}.self_attn.o_proj" for block in (0, 1)]
    weights = _Lazy(names)
    load_eager(tiny_model("llama", tmp_path), weights)
    assert weights.reads == names


@pytest.mark.parametrize(
    "name", ["model.layers.9.mlp.down_proj", "model.layers.0.mlp.other_proj", "head"]
)
def test_unknown_module(tmp_path: Path, name: str) -> None:
    folder = tiny_model("llama", tmp_path)
    with pytest.raises(ModelError, match=f"has no module '{name}'"):
        load_eager(folder, {name: draw(4, 4)})


@pytest.mark.parametrize("shape", [(48, 87), (47, 88), (49, 88)])
def test_weight_of_another_shape(tmp_path: Path, shape: tuple[int, int]) -> None:
    folder = tiny_model("llama", tmp_path)
    name = "model.layers.0.mlp.down_proj"
    with pytest.raises(ModelError, match=r"does not fit the eager model's \(48, 88\)"):
        load_eager(folder, {name: draw(*shape)})


@pytest.mark.parametrize("chunks", [(12,), (8, 1, 1, 1, 1), (7, 5), (1,) * 12])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_chunks_do_not_change_logits(tmp_path: Path, family: str, chunks: tuple[int, ...]) -> None:
    model = load_eager(tiny_model(family, tmp_path), {})
    whole = model(torch.from_numpy(input_ids()), use_cache=False).logits.detach().numpy()
    assert_close(reference_logits(model, input_ids(), chunks=chunks), whole, model.config)


@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_change_logits(tmp_path: Path, *, left: bool) -> None:
    model = load_eager(tiny_model("llama", tmp_path), {})
    lengths = (12, 7, 3)
    mask = padded_mask(lengths, 12, left=left)
    ids = input_ids()
    padded = reference_logits(model, ids, mask)
    for row, length in enumerate(lengths):
        valid = mask[row].astype(bool)
        alone = reference_logits(model, ids[row : row + 1, valid])
        assert alone.shape[1] == length
        assert_close(padded[row : row + 1, valid], alone, model.config)


def test_chunks_that_do_not_add_up(tmp_path: Path) -> None:
    model = load_eager(tiny_model("llama", tmp_path), {})
    with pytest.raises(ValueError, match=r"chunks \(5, 5\) do not add up to the 12 tokens"):
        reference_logits(model, input_ids(), chunks=(5, 5))


def test_factors_take_the_place_of_a_module_and_leave_its_bias(tmp_path: Path) -> None:
    folder = tiny_model("llama_bias", tmp_path)
    u, v = draw(48, 5), draw(5, 88)
    name = "model.layers.1.mlp.down_proj"
    model: Any = load_eager(folder, {f"{name}.v": v, f"{name}.u": u})
    bias = load_file(folder / "model.safetensors")[f"{name}.bias"]
    x = draw(3, 88)
    expected = x.astype(np.float64) @ v.T.astype(np.float64) @ u.T.astype(np.float64) + bias
    actual = model.get_submodule(name)(torch.from_numpy(x)).numpy()
    bound = (88 + 5 + 1) * 2.0**-24 * (np.abs(x) @ np.abs(v.T) @ np.abs(u.T) + np.abs(bias))
    assert (np.abs(actual - expected) <= bound).all()
    assert bound.max() < 1e-3 * np.abs(expected).max()
    assert np.abs(expected - bias).max() > 1


def test_factors_of_a_part_of_a_fused_module(tmp_path: Path) -> None:
    folder = tiny_model("phi3", tmp_path)
    name = "model.layers.0.self_attn"
    u, v, key = scaled(96, 5), scaled(5, 96), scaled(32, 96)
    weights: dict[str, Array] = {
        f"{name}.q_proj.v": v,
        f"{name}.q_proj.u": u,
        f"{name}.k_proj": key,
    }
    model: Any = load_eager(folder, weights)
    whole = load_file(folder / "model.safetensors")[f"{name}.qkv_proj.weight"]
    joined: Array = np.concatenate([u @ v, key, whole[-32:]])
    expected = reference_logits(load_eager(folder, {f"{name}.qkv_proj": joined}), input_ids())
    assert_close(reference_logits(model, input_ids()), expected, model.config)
    # Once more: the factors have modules by now.
    replace_weights(model, {f"{name}.q_proj.v": 2 * v, f"{name}.q_proj.u": np.divide(u, 2)})
    assert_close(reference_logits(model, input_ids()), expected, model.config)


def test_factors_of_a_packed_weight_share_what_they_read(tmp_path: Path) -> None:
    folder = tiny_model("qwen2", tmp_path)
    name = "model.layers.0.self_attn"
    u, v = scaled(96 + 32 + 32, 5), scaled(5, 48)
    model: Any = load_eager(folder, {f"{name}.qkv_proj.v": v, f"{name}.qkv_proj.u": u})
    attention = model.get_submodule(name)
    assert attention.q_proj.v is attention.k_proj.v is attention.v_proj.v
    product: Array = np.matmul(u, v)
    expected = reference_logits(load_eager(folder, {f"{name}.qkv_proj": product}), input_ids())
    assert_close(reference_logits(model, input_ids()), expected, model.config)


def test_a_factor_of_a_module_in_one_piece(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    with pytest.raises(ModelError, match=r"has 'model\.layers\.0\.mlp\.up_proj' as one module"):
        load_eager(folder, {"model.layers.0.mlp.up_proj.u": draw(88, 3)})


def test_rows_of_long_rope_do_not_depend_on_the_longest(tmp_path: Path) -> None:
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [3.0] * 8,
        "original_max_position_embeddings": 8,
    }
    model = load_eager(tiny_model("llama", tmp_path, rope_parameters=parameters), {})
    lengths = (12, 8, 5)
    ids = input_ids()
    logits = reference_logits(model, ids, padded_mask(lengths, 12, left=False))
    for row, length in enumerate(lengths):
        alone = reference_logits(model, ids[row : row + 1, :length])
        assert_close(logits[row : row + 1, :length], alone, model.config)
