from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest

from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.compiler.frontend import load as frontend
from eoracc.compiler.frontend.load import LoadedModel
from eoracc.compiler.sweep.batch import Batch, make_batches
from eoracc.compiler.sweep.executor import Executor
from eoracc.passes.graph.linears import Linear
from tests.graph_session import assert_close, padded_mask
from tests.tiny_models import FAMILIES, VOCABULARY, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

SEQUENCE = 11


def load(folder: Path, family: str = "llama") -> LoadedModel:
    return frontend.load(str(tiny_model(family, folder / "model")), work=folder)


def tokens(rows: int) -> NDArray[np.int64]:
    return np.random.default_rng(3).integers(3, VOCABULARY, (rows, SEQUENCE))


def run(executor: Executor, batches: list[Batch]) -> NDArray[np.float32]:
    executor.run_to_head(batches, Linear.effective_weight)
    weight = executor.linears[-1].effective_weight()
    return np.concatenate(
        [executor.logits(executor.head_input(batch), weight) for batch in batches]
    )


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_eager_model(family: str, padding: str, tmp_path: Path) -> None:
    loaded = load(tmp_path, family)
    ids = tokens(3)
    mask = np.ones_like(ids)
    if padding != "none":
        mask = padded_mask([SEQUENCE, 4, 7], SEQUENCE, left=padding == "left")
    # Two batches of unequal size.
    logits = run(Executor(loaded.model), make_batches(ids, mask, size=2))
    expected = reference_logits(load_eager(loaded.folder, {}), ids, mask)
    assert_close(logits, expected, loaded.config, mask)


def test_weight_of_is_what_multiplies(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    executor = Executor(loaded.model)
    rng = np.random.default_rng(0)
    changed = {
        linear.name: linear.weight() + 0.05 * rng.standard_normal(linear.weight().shape)
        for linear in executor.linears
        if linear.role in ("k_proj", "down_proj")
    }
    weights = {name: weight.astype(np.float32) for name, weight in changed.items()}

    def weight_of(linear: Linear) -> NDArray[np.float32]:
        return (
            weights.get(linear.name, linear.weight())
            if linear.name in weights
            else (linear.weight())
        )

    ids = tokens(2)
    (batch,) = make_batches(ids, np.ones_like(ids), size=2)
    executor.run_to_head([batch], weight_of)
    logits = executor.logits(executor.head_input(batch), executor.linears[-1].weight())
    expected = reference_logits(load_eager(loaded.folder, weights), ids)
    assert_close(logits, expected, loaded.config)
    original = reference_logits(load_eager(loaded.folder, {}), ids)
    assert np.abs(expected - original).max() > 0.1 * original.std()


def test_inputs_of_a_group_are_what_its_linears_multiply(tmp_path: Path) -> None:
    executor = Executor(load(tmp_path).model)
    ids = tokens(3)
    batches = make_batches(ids, np.ones_like(ids), size=2)
    executor.start(batches)
    (group,) = executor.levels[0]
    inputs = [executor.inputs_of(group, batch) for batch in batches]
    assert [each.shape for each in inputs] == [(2 * SEQUENCE, 48), (SEQUENCE, 48)]
    # What enters the first block is the normalized embedding: its rows have the norm's scale.
    table = {str(k): v for k, v in executor._model.graph.initializers.items()}
    embedding = _array(table["model.embed_tokens.weight"])[ids.reshape(-1)]
    scale = _array(table["model.layers.0.input_layernorm.weight"])
    rms = np.sqrt((embedding.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + 1e-6)
    tolerance = 48 * 2.0**-24 * np.abs(embedding).max() / rms.min()
    assert tolerance < 1e-3
    np.testing.assert_allclose(
        np.concatenate(inputs), embedding / rms * scale, rtol=0, atol=tolerance
    )


def test_values_are_dropped_when_nothing_reads_them_any_more(tmp_path: Path) -> None:
    executor = Executor(load(tmp_path).model)
    ids = tokens(2)
    (batch,) = make_batches(ids, np.ones_like(ids), size=2)
    executor.start([batch])
    alive = []
    for level in range(executor.head_level):
        executor.step(level, [batch], Linear.weight)
        alive.append(len(batch.values))
        products = {executor._output_names[one] for one in executor.levels[level][0].linears}
        assert not products & set(batch.values), f"level {level} leaves its products behind"
    # The residual stream, the next input and, while an attention is to come, cosine, sine and mask.
    assert alive == [5, 5, 5, 5, 2, 2, 2, 1]
    executor.logits(executor.head_input(batch), executor.linears[-1].weight())
    assert len(batch.values) == 1, "only what enters the head is left"


def test_blocks_that_are_alike_share_a_session(tmp_path: Path) -> None:
    executor = Executor(load(tmp_path).model)
    ids = tokens(1)
    run(executor, make_batches(ids, np.ones_like(ids), size=1))
    glue = sum(
        bool(segment.nodes) and not segment.is_attention
        for segments in executor._segments
        for segment in segments
    )
    # The second block repeats the glue between the linears of the first.
    assert len(executor._sessions) <= glue - 3


def test_parameter_bytes_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    loaded = load(tmp_path, "smollm")
    stored = load_file(loaded.folder / "model.safetensors")
    assert Executor(loaded.model).parameter_bytes == sum(a.nbytes for a in stored.values())


def _array(value: ir.Value) -> NDArray[np.float32]:
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy(), np.float32)
