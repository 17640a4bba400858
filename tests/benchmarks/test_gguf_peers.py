"""Reading what llama.cpp has quantized, and the importance matrix that it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from numpy.typing import NDArray

from benchmarks.gguf_peers import importance, read_linears, tensor_name
from eoracc.compiler.eager.model import load_eager
from eoracc.compiler.frontend.load import LoadedModel, load
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.text.windows import Windows
from eoracc.passes.graph.linears import find_linears
from tests.tiny_models import VOCABULARY, tiny_model

Float = NDArray[np.float32]

HEADS = {"q_proj": 6, "k_proj": 2}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("model")
    return load(str(tiny_model("smollm", folder / "model")), work=folder / "work")


def as_llama_cpp_has_it(weight: Float, heads: int) -> Float:
    """Rows of each head, those that rotate together next to each other."""
    rows = np.arange(len(weight)).reshape(heads, 2, -1)
    return weight[np.stack([rows[:, 0], rows[:, 1]], axis=2).ravel()]


def test_linears_are_read_as_the_graph_has_them(loaded: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_head_count(HEADS["q_proj"])
    writer.add_head_count_kv(HEADS["k_proj"])
    linears = find_linears(loaded.model)
    expected = {}
    bits = weights = 0.0
    for linear in linears:
        if linear.block is None:
            continue
        role = linear.name.rpartition(".")[2]
        weight = linear.weight()
        stored = as_llama_cpp_has_it(weight, HEADS[role]) if role in HEADS else weight
        if role == "o_proj":  # the only one of blocks of 32
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor_name(linear), quantize(stored, kind), raw_dtype=kind)
            rounding = np.abs(weight).max() / 127
        else:
            writer.add_tensor(tensor_name(linear), stored.astype(np.float16))
            rounding = np.abs(weight).max() * 2.0**-11
        expected[linear.name] = weight, rounding
        bits += weight.size * (8.5 if role == "o_proj" else 16)
        weights += weight.size
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_linears(path, linears)
    assert found.weights.keys() == expected.keys()
    for name, (weight, rounding) in expected.items():
        assert rounding < 0.01 * np.abs(weight).max()
        np.testing.assert_allclose(found.weights[name], weight, rtol=0, atol=rounding)
    assert found.bits == pytest.approx(bits / weights)


def test_importance_is_the_mean_square_of_every_input(loaded: LoadedModel, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (3, 24))
    windows = Windows(ids, np.ones_like(ids))
    found = importance(loaded, windows, tmp_path, SilentProgress())
    linears = [one for one in find_linears(loaded.model) if one.block is not None]
    assert found.keys() == {tensor_name(one) for one in linears}
    model = load_eager(loaded.folder, {})
    seen: dict[str, NDArray[np.float64]] = {}
    for linear in linears:

        def hook(_: Any, given: Any, name: str = tensor_name(linear)) -> None:  # noqa: ANN401
            seen[name] = given[0].flatten(0, 1).double().square().mean(0).numpy()

        model.get_submodule(linear.name).register_forward_pre_hook(hook)
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(ids))
    for name, squares in seen.items():
        # A few roundings to eight bits lie before each input, where the processor has units for it.
        limit = 8 * 2.0**-8 * squares.max()
        np.testing.assert_allclose(found[name], squares, rtol=0, atol=limit)
        assert np.ptp(squares) > 5 * limit
