"""Reading and scoring what llama.cpp has quantized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from numpy.typing import NDArray

from benchmarks.gguf_files import tensor_name
from benchmarks.gguf_peers import read_model, score_file
from eoracc.compiler.eager.model import load_eager
from eoracc.compiler.frontend.load import LoadedModel, load
from eoracc.compiler.report.fidelity import Scorer
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.text.windows import Windows
from eoracc.passes.graph.embeddings import find_embeddings
from eoracc.passes.graph.linears import find_linears
from tests.tiny_models import VOCABULARY, tiny_model

Float = NDArray[np.float32]

HEADS = {"q_proj": 6, "k_proj": 2}

DAMAGE = np.float32(1.5)
"""Factor of the embedding in the file, which the checkpoint does not have."""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("model")
    return load(str(tiny_model("smollm", folder / "model")), work=folder / "work")


def as_llama_cpp_has_it(weight: Float, heads: int) -> Float:
    """Rows of each head, those that rotate together next to each other."""
    rows = np.arange(len(weight)).reshape(heads, 2, -1)
    return weight[np.stack([rows[:, 0], rows[:, 1]], axis=2).ravel()]


def write_file(path: Path, loaded: LoadedModel) -> tuple[dict[str, tuple[Float, float]], float]:
    """Write the model as llama.cpp does.

    Returns:
      Each linear of a block with the largest rounding of its weights, and their bits per weight.
    """
    writer = GGUFWriter(path, "llama")
    writer.add_head_count(HEADS["q_proj"])
    writer.add_head_count_kv(HEADS["k_proj"])
    expected = {}
    bits = weights = 0.0
    for linear in find_linears(loaded.model):
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
    (table,) = find_embeddings(loaded.model)
    writer.add_tensor("token_embd.weight", DAMAGE * table.weight())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected, bits / weights


def test_weights_are_read_as_the_graph_has_them(loaded: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    expected, bits = write_file(path, loaded)
    linears = find_linears(loaded.model)
    found = read_model(path, linears)
    assert found.weights.keys() == expected.keys() | {"lm_head"}
    for name, (weight, rounding) in expected.items():
        assert rounding < 0.01 * np.abs(weight).max()
        np.testing.assert_allclose(found.weights[name], weight, rtol=0, atol=rounding)
    (table,) = find_embeddings(loaded.model)
    np.testing.assert_array_equal(found.embedding, DAMAGE * table.weight())
    np.testing.assert_array_equal(found.weights["lm_head"], found.embedding)
    assert found.bits_per_weight == pytest.approx(bits)
    assert found.file_bytes == path.stat().st_size


def test_a_file_is_scored_with_its_own_embedding_and_head(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write_file(path, loaded)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 24))
    original = Executor(loaded.model.clone())
    scorer = Scorer(original, Windows(ids, np.ones_like(ids)))
    row = score_file(path, original, loaded.model, (scorer, scorer))
    kept = score_file(path, original, loaded.model, (scorer, scorer), checkpoint_embedding=True)
    # What follows the embedding is normalised: scaling it changes the residual sum and the logits.
    eager = load_eager(loaded.folder, {})
    with torch.inference_mode():
        eager.get_parameter("model.embed_tokens.weight").mul_(float(DAMAGE))
        logits = eager(input_ids=torch.from_numpy(ids)).logits[:, :-1].double()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(ids[:, 1:]).flatten()
    )
    assert row.wiki.perplexity == pytest.approx(float(losses.exp()), rel=1e-3)
    assert kept.wiki.perplexity == pytest.approx(scorer.original().perplexity, rel=1e-3)
    assert abs(row.wiki.perplexity / kept.wiki.perplexity - 1) > 5e-3
    assert row.file_bytes == path.stat().st_size
