"""What errors of embeddings and heads cost, against the divergence of a whole model."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from eoracc.compiler.eager.model import load_eager
from eoracc.compiler.frontend.load import LoadedModel, load
from eoracc.compiler.sweep.survey import Survey
from eoracc.compiler.text.windows import Windows
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.graph.embeddings import Embedding, find_embeddings
from eoracc.passes.graph.linears import Linear, LinearGroup
from eoracc.passes.graph.logits import LogitSteps
from eoracc.passes.plan.calibrate_outputs import CalibrateOutputs
from eoracc.passes.plan.tables import Tables, _Predictions
from eoracc.passes.quantize.embedding_tables import quantize_embedding_tables
from eoracc.passes.quantize.quantization import EmbeddingBits, Quantization
from eoracc.passes.quantize.quantize_gptq import QuantizeGptq
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from eoracc.plugins.operands.weight import NBitsWeight
from tests.passes.groups import make_group
from tests.passes.plan.surveys import survey_of
from tests.tiny_build import tiny_config
from tests.tiny_models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from eoracc.passes.plan.items import Item

WIDTHS: tuple[EmbeddingBits, ...] = (3, 4, 6, 8)
GPTQ: dict[str, Any] = {"quantize_gptq": {"embedding_group_size": 16}}


def windows() -> Windows:
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (16, 32))
    mask = np.ones_like(ids)
    mask[0, 20:] = 0
    return Windows(ids, mask)


def context_of(loaded: LoadedModel, folder: Path, passes: Any = ("calibrate", GPTQ)) -> Survey:  # noqa: ANN401
    return survey_of(loaded, windows(), folder, tiny_config(passes).passes)


def load_tiny(family: str, folder: Path, **fields: Any) -> LoadedModel:  # noqa: ANN401
    return load(str(tiny_model(family, folder / "model", **fields)), work=folder / "work")


def items_of(context: Survey, *, weighed: bool = True) -> dict[str, Item]:
    if weighed:
        CalibrateOutputs(damping=0.0, samples=8, precision="float32").survey(context)
    quantizer = next(item for item in context.following if isinstance(item, Quantization))
    tables = Tables.of("allocate", WIDTHS, quantizer, context)
    plain = Calibrate(tokens="equal", precision="float32")
    groups = context.walk("heads", plain)
    heads = [
        item
        for group in groups
        if group.linears[0].block is None
        for item in tables.of_heads(group)
    ]
    return {item.name: item for item in [*heads, *tables.of_embeddings()]}


def divergence(loaded: LoadedModel, changes: dict[str, np.ndarray]) -> float:
    """Sum over all tokens of KL(original || model with the weights ``changes``), in nats."""
    text = windows()
    inputs = {
        "input_ids": torch.from_numpy(text.input_ids),
        "attention_mask": torch.from_numpy(text.attention_mask),
    }
    model: Any = load_eager(loaded.folder, {}).double()
    with torch.inference_mode():
        before = torch.log_softmax(model(**inputs).logits, -1)
        for name, weight in changes.items():
            module = model.get_submodule(name)
            module.weight = torch.nn.Parameter(torch.from_numpy(weight).double())
        after = torch.log_softmax(model(**inputs).logits, -1)
        each = (before.exp() * (before - after)).sum(-1)
    return float(each[inputs["attention_mask"].bool()].sum())


def stored_values(context: Survey, name: str, bits: int) -> np.ndarray:
    """The values of a head or table as the pass would store it."""
    quantizer = QuantizeGptq(embedding_bits=bits, embedding_group_size=16)  # type: ignore[arg-type]
    tables: list[Linear | Embedding] = [*context.embeddings, *context.linears]
    table = next(table for table in tables if table.name == name)
    options = quantizer.options_for(table)
    assert options is not None
    if name != "lm_head":
        return options.requantize(table.weight(), None).dequantize()
    for group in context.walk("again", Calibrate(tokens="equal", precision="float32")):
        if group.linears[0].name == name:
            (stored,) = options.compress([table.weight()], group.gram)
            return stored.dequantize()
    raise AssertionError


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("cohere", {"logit_scale": 0.3, "tie_word_embeddings": False}),
        ("granite", {"logits_scaling": 4.0, "tie_word_embeddings": False}),
        ("phi", {}),  # a bias
        # In a window shorter than the padding transformers computes NaN.
        (
            "gemma2",
            {
                "final_logit_softcapping": 2.0,
                "tie_word_embeddings": False,
                "sliding_window": 64,
            },
        ),
    ],
)
def test_a_heads_distortion_is_twice_the_divergence_that_it_causes(
    family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    loaded = load_tiny(family, tmp_path, **fields)
    context = context_of(loaded, tmp_path / "survey")
    item = items_of(context)["lm_head"]
    assert item.table
    assert item.shared_by == ()
    assert [option.plan["bits"] for option in item.options] == list(WIDTHS)
    for option in item.options:
        if option.plan["bits"] < 8:
            continue  # no longer small
        weight = stored_values(context, "lm_head", option.plan["bits"])
        exact = 2 * divergence(loaded, {"lm_head": weight})
        # All tokens are in the sample; what is left is the third order.
        assert option.candidate.distortion == pytest.approx(exact, rel=0.05)
    losses = [option.candidate.distortion for option in item.options]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 4 * losses[1] > 64 * losses[3]


def test_an_embeddings_distortion_is_about_twice_the_divergence_that_it_causes(
    tmp_path: Path,
) -> None:
    loaded = load_tiny("llama", tmp_path)
    context = context_of(loaded, tmp_path / "survey")
    item = items_of(context)["model.embed_tokens"]
    name = "model.embed_tokens"
    for option in item.options:
        if option.plan["bits"] == 8:
            exact = 2 * divergence(loaded, {name: stored_values(context, name, 8)})
            # Gradients of drawn labels, taken as independent of the token: no identity.
            assert 0.5 < option.candidate.distortion / exact < 2


def test_a_scale_after_the_look_up_counts(tmp_path: Path) -> None:
    loaded = load_tiny("gemma3", tmp_path)
    (table,) = [one for one in find_embeddings(loaded.model) if one.of_tokens]
    assert table.scale == pytest.approx(48**0.5, rel=2.0**-8)  # rounded to bfloat16


def test_a_tied_table_is_one_item_and_pays_for_both_uses(tmp_path: Path) -> None:
    loaded = load_tiny("smollm", tmp_path)
    context = context_of(loaded, tmp_path / "survey")
    items = items_of(context)
    assert list(items) == ["lm_head"]
    assert items["lm_head"].names == ("lm_head", "model.embed_tokens")
    # A head and an embedding whose options differ cannot share their codes.
    apart = {"embedding_group_size": 16, "overrides": {"model.embed_tokens": {"symmetric": True}}}
    context = context_of(loaded, tmp_path / "apart", ("calibrate", {"quantize_gptq": apart}))
    items = items_of(context)
    assert {name: item.shared_by for name, item in items.items()} == {
        "lm_head": (),
        "model.embed_tokens": (),
    }


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"lm_head": {"bits": 3}},
        {"lm_head": {"symmetric": True, "group_size": 32}},
        {"lm_head": {"skip": True}},
        {"model.embed_tokens": {"bits": 8}},
        {"model.embed_tokens": {"skip": True}},
        {"*e*d*": {"bits": 4}},
    ],
)
@pytest.mark.parametrize("family", ["smollm", "llama"])
def test_tables_are_planned_as_a_build_stores_them(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    loaded = load_tiny(family, tmp_path)
    options = {"embedding_group_size": 16, "overrides": overrides}
    context = context_of(loaded, tmp_path / "survey", ("calibrate", {"quantize_rtn": options}))
    items = items_of(context, weighed=False)
    (quantize,) = (item for item in context.following if isinstance(item, QuantizeRtn))
    heads = [linear for linear in context.linears if linear.block is None]
    for head in heads:
        quantize.call(LinearGroup((head,)))
    quantize_embedding_tables(quantize, context.embeddings, heads)
    # The names of each stored weight, with its bits and bytes.
    stored: dict[int, tuple[list[str], int, int]] = {}
    tables: list[Linear | Embedding] = [*heads, *context.embeddings]
    for table in tables:
        weight = table.compressed
        if isinstance(weight, NBitsWeight):
            names, *_ = stored.setdefault(id(weight), ([], weight.bits, weight.nbytes))
            names.append(table.name)
    planned = []
    for item in items.values():
        (option,) = item.options
        planned.append((list(item.names), option.plan["bits"], option.candidate.nbytes))
    assert planned == list(stored.values())


def test_an_override_settles_the_bits_of_a_table(tmp_path: Path) -> None:
    loaded = load_tiny("llama", tmp_path)
    options = {"embedding_group_size": 16, "overrides": {"lm_head": {"bits": 8}}}
    context = context_of(loaded, tmp_path, ("calibrate", {"quantize_gptq": options}))
    items = items_of(context)
    assert [option.plan["bits"] for option in items["lm_head"].options] == [8]
    assert [option.plan["bits"] for option in items["model.embed_tokens"].options] == list(WIDTHS)


@pytest.mark.parametrize("bits", [4, None])
def test_without_gradients_tables_keep_their_bits(bits: int | None, tmp_path: Path) -> None:
    loaded = load_tiny("llama", tmp_path)
    gptq = {"quantize_gptq": {"embedding_bits": bits}}
    items = items_of(context_of(loaded, tmp_path, ("calibrate", gptq)), weighed=False)
    found = {name: [option.plan["bits"] for option in item.options] for name, item in items.items()}
    assert found == ({} if bits is None else {"lm_head": [4], "model.embed_tokens": [4]})


def test_a_sample_of_a_heads_inputs_copies_no_others() -> None:
    rng = np.random.default_rng(3)
    # 40 batches of 4,000 tokens, 41 MB in all, of which the sample is 262 kB.
    batch = rng.standard_normal((4_000, 64)).astype(np.float32)
    counted = rng.integers(0, 3, (40, 4_000)).astype(np.float32)
    weight = rng.standard_normal((16, 64)).astype(np.float32)
    group = make_group({"lm_head": weight}, batch)
    group.activations = lambda: iter([(batch, weights) for weights in counted])
    tracemalloc.start()
    try:
        found = _Predictions.of("allocate", weight, group, LogitSteps(()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4e6
    at_batch, token = np.nonzero(counted)
    chosen = np.linspace(0, len(token) - 1, 1024).astype(int)
    assert np.array_equal(found.inputs, batch[token[chosen]])
    assert np.array_equal(found.weights, counted[at_batch[chosen], token[chosen]])
    logits = found.inputs.astype(np.float64) @ weight.T
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    # Float32 sums of 64 products; an error d of logits moves a probability by less than d.
    rounding = 64 * 2.0**-24 * float((np.abs(found.inputs) @ np.abs(weight.T)).max())
    expected = odds / odds.sum(axis=1, keepdims=True)
    assert np.abs(found.probabilities - expected).max() < rounding
