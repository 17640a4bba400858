"""Tables and heads under the options of a quantizing pass: shared codes, own codes, none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from eoracc.compiler.frontend.load import load
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.sweep.pipeline import compress
from eoracc.compiler.text.windows import Windows
from eoracc.passes.graph.embeddings import Embedding, find_embeddings
from eoracc.passes.graph.linears import Linear, LinearGroup, find_linears
from eoracc.passes.quantize import row_blocks
from eoracc.passes.quantize.embedding_tables import quantize_embedding_tables
from eoracc.passes.quantize.quantization import EMBEDDING_BITS
from eoracc.passes.quantize.quantize_gptq import QuantizeGptq
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from tests.passes.groups import make_group
from tests.tiny_build import tiny_config
from tests.tiny_models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from eoracc.passes.quantize.quantization import Quantization

TIED, UNTIED = "smollm", "llama"


def quantized(
    family: str, work: Path, **options: object
) -> tuple[Embedding, Linear, list[Linear], dict[str, Any]]:
    """Table, head and all linears of a tiny model, and its stored tensors, after rounding."""
    model = load(str(tiny_model(family, work / "model")), work=work).model
    linears, (table,) = find_linears(model), find_embeddings(model)
    quantize = TypeAdapter(QuantizeRtn).validate_python({"bits": 3, "group_size": 16, **options})
    for linear in linears:
        quantize.call(LinearGroup((linear,)))
    quantize_embedding_tables(quantize, [table], linears)
    (head,) = (linear for linear in linears if linear.block is None)
    stored = {
        str(value.name): value.const_value
        for value in (*head.node.inputs, *table.node.inputs)
        if value is not None and value.const_value is not None
    }
    return table, head, linears, stored


def test_a_tied_table_shares_the_codes_of_its_head(tmp_path: Path) -> None:
    table, head, linears, stored = quantized(TIED, tmp_path)
    assert table.compressed is head.quantized is not None
    assert head.quantized.bits == EMBEDDING_BITS
    assert table.node.inputs[1:] == head.node.inputs[1 : len(table.node.inputs)]
    assert len(stored) == 3, "codes, scales and zero points, once"
    assert {linear.quantized.bits for linear in linears if linear.quantized} == {
        3,
        EMBEDDING_BITS,
    }
    assert table.node.attributes["N"].as_int() == VOCABULARY


def test_an_untied_table_has_codes_of_its_own(tmp_path: Path) -> None:
    table, head, _, stored = quantized(UNTIED, tmp_path, embedding_bits=4)
    assert table.compressed is not None
    assert head.quantized is not None
    assert head.source is not None
    assert table.compressed is not head.quantized
    assert len(stored) == 6
    pairs = (table.compressed, table.weight()), (head.quantized, head.source.numpy().T)
    for found, source in pairs:
        assert found.bits == 4
        original = source.astype(np.float64)
        # Half a step of 16 levels between the extremes of each group, and the scale's rounding.
        steps = found.scales.astype(np.float64).repeat(found.group_size, axis=1)
        off = np.abs(found.dequantize() - original)
        assert (off <= (0.5 + 2.0**-10 * 16) * steps[:, : off.shape[1]]).mean() > 0.99


@pytest.mark.parametrize(
    ("options", "table_bits", "head_bits", "tensors"),
    [
        ({"embedding_bits": None}, None, None, 1),
        ({"overrides": {"lm_head": {"bits": 3}}}, 3, 3, 3),
        ({"overrides": {"lm_head": {"skip": True}}}, None, None, 1),
        ({"overrides": {"model.embed_tokens": {"bits": 8}}}, 8, EMBEDDING_BITS, 6),
        ({"overrides": {"model.embed_tokens": {"skip": True}}}, None, EMBEDDING_BITS, 4),
    ],
)
def test_overrides_of_a_tied_head_hold_for_its_table(
    options: dict[str, Any],
    table_bits: int | None,
    head_bits: int | None,
    tensors: int,
    tmp_path: Path,
) -> None:
    table, head, _, stored = quantized(TIED, tmp_path, **options)
    assert (table.compressed and table.compressed.bits) == table_bits
    assert (head.quantized and head.quantized.bits) == head_bits
    assert len(stored) == tensors


@pytest.mark.parametrize(("family", "tied"), [(TIED, True), (UNTIED, False)])
def test_matching_outputs_leaves_a_tied_table_what_it_was(
    family: str, tied: bool, tmp_path: Path
) -> None:
    """What makes good for errors of the blocks serves the product, not rows that are looked up."""
    loaded = load(str(tiny_model(family, tmp_path / "model")), work=tmp_path / "work")
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (6, 24))
    quantize = {"quantize_gptq": {"bits": 2, "group_size": 16, "embedding_bits": 8}}
    config = tiny_config([{"calibrate": {"match": "outputs"}}, quantize])
    windows = Windows(ids, np.ones_like(ids))
    found = compress(config, loaded, windows, tmp_path / "kept", SilentProgress())
    (table,), head = found.embeddings, found.linears[-1]
    assert head.tied == tied
    assert table.compressed is not None
    assert head.quantized is not None
    for weight, original, matched in (
        (table.compressed, table.weight(), False),
        (head.quantized, head.weight(), not tied),
    ):
        # 256 levels leave an error of a few thousandths of a weight.
        off = np.linalg.norm(weight.dequantize() - original) / np.linalg.norm(original)
        assert (off > 0.05) == matched, off
        assert off < 1


@pytest.mark.parametrize("method", [QuantizeGptq, QuantizeRtn])
def test_blocks_of_rows_are_solved_as_the_whole(
    method: type[Quantization], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(7)
    weights = {"lm_head": rng.standard_normal((50, 32)).astype(np.float32)}
    inputs = rng.standard_normal((200, 32)).astype(np.float32)

    def solved() -> Any:  # noqa: ANN401
        group = make_group(weights, inputs)
        method(bits=3, embedding_bits=3).call(group)
        return group.linears[0].quantized

    whole = solved()
    monkeypatch.setattr(row_blocks, "_BLOCK_WEIGHTS", 7 * 32)
    blocks = solved()
    for part in ("packed", "scales", "zero_points"):
        found, expected = getattr(blocks, part), getattr(whole, part)
        assert found.shape == expected.shape
        # BLAS rounds sums of another number of rows differently: a code may fall to its neighbour.
        assert np.mean(found != expected) < 0.01
    assert np.abs(blocks.dequantize() - whole.dequantize()).mean() < 0.01
