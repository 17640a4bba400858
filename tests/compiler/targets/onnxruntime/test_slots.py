"""Slots for adapters in lowered graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from eoracc.compiler.frontend.load import load
from eoracc.compiler.targets.genai_config import genai_config
from eoracc.compiler.targets.onnxruntime.lower import lower
from eoracc.passes.graph.linears import Linear, LinearGroup, find_linears
from eoracc.passes.graph.spec import Stage, check
from eoracc.passes.pack_projections import PackProjections
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from eoracc.plugins.adapters import SLOTS_KEY, AdapterSlots, pack_adapter
from eoracc.runtime.onnxruntime.session import Session, open_session
from tests.tiny_artifact import tiny_factors, tiny_slots, write_tiny_artifact
from tests.tiny_models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

IDS = np.random.default_rng(0).integers(3, VOCABULARY, (2, 9))


def lowered(work: Path, adapter_type: str, *, packed: bool = False, **fields: Any) -> ir.Model:  # noqa: ANN401
    model = load(str(tiny_model("llama", work / "model", **fields)), work=work).model
    if packed:
        PackProjections().call(model)
    for linear in find_linears(model):
        if linear.role != "v_proj":
            QuantizeRtn(bits=4, group_size=16, overrides={}).call(LinearGroup((linear,)))
    return lower(model, adapter_type=adapter_type)


@pytest.mark.parametrize("adapter_type", ["int8", "float16"])
def test_every_compressed_linear_of_a_block_has_a_slot(tmp_path: Path, adapter_type: str) -> None:
    model = lowered(tmp_path, adapter_type, intermediate_size=96)
    check(model, Stage.ONNXRUNTIME, after="the lowering")
    slots = AdapterSlots.from_json(model.metadata_props[SLOTS_KEY])
    assert slots.type == adapter_type
    names = [name for slot in slots.slots for name in slot.linears]
    attention = [f"self_attn.{role}_proj" for role in ("q", "k", "o")]
    roles = [*attention, *(f"mlp.{role}_proj" for role in ("gate", "up", "down"))]
    # Neither the head, which stands in no block, nor v_proj, which is not compressed.
    assert sorted(names) == sorted(f"model.layers.{i}.{role}" for i in range(2) for role in roles)
    gated = next(slot for slot in slots.slots if slot.name == "model.layers.0.mlp.gate_up_proj")
    assert gated == replace(gated, parts=(96, 96), in_features=48, out_features=192)
    inputs = {str(value.name): value for value in model.graph.inputs}
    for slot in slots.slots:
        for operand in slots.operands:
            value = inputs.pop(slot.input(operand))
            assert value.const_value is not None
            assert value.const_value.nbytes == 0
            assert value.shape is not None
            assert value.shape[0] == ir.SymbolicDim("adapters")
    index = inputs["adapter_index"]
    assert index.const_value is not None
    assert index.const_value.numpy().tolist() == [0]
    assert not any("adapter_" in name for name in inputs if name != "adapter_index")


def test_no_slots_where_none_are_asked_for_or_none_fit(tmp_path: Path) -> None:
    assert SLOTS_KEY not in lowered(tmp_path, "none").metadata_props
    bare = load(str(tiny_model("llama", tmp_path / "bare")), work=tmp_path)
    model = lower(bare.model, adapter_type="int8")
    assert SLOTS_KEY not in model.metadata_props
    assert "adapter_index" not in {value.name for value in model.graph.inputs}


def test_linears_packed_before_compression(tmp_path: Path) -> None:
    """One linear in the checkpoint's eyes, a node of two parts."""
    model = lowered(tmp_path, "int8", packed=True, intermediate_size=96)
    slots = AdapterSlots.from_json(model.metadata_props[SLOTS_KEY])
    gated = next(slot for slot in slots.slots if slot.name.endswith("gate_up_proj"))
    assert (gated.linears, gated.parts) == ((gated.name,), (96, 96))
    assert gated.shapes == {gated.name: (192, 48)}


def test_genai_feeds_no_defaults_and_warns_of_none(tmp_path: Path) -> None:
    source = load(str(tiny_model("smollm", tmp_path / "model")), work=tmp_path)
    for linear in find_linears(source.model):
        QuantizeRtn(bits=4, group_size=16).call(LinearGroup((linear,)))
    config = genai_config(source.config, lower(source.model, adapter_type="int8"))
    decoder = config["model"]["decoder"]
    fed = {"input_ids", "attention_mask", "past_key_names", "past_value_names", "position_ids"}
    assert set(decoder["inputs"]) <= fed
    assert decoder["session_options"]["log_severity_level"] == 3


def _run(session: Session, feeds: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    return _run_mixed(session, IDS, feeds)


def _run_mixed(
    session: Session, ids: NDArray[np.int64], feeds: dict[str, NDArray[Any]]
) -> NDArray[np.float32]:
    given = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "logits_to_keep": np.array(ids.shape[1]),
        **session._no_past(len(ids)),
        **feeds,
    }
    logits: NDArray[np.float32] = session._inference.run(["logits"], given)[0]
    return logits


@pytest.mark.parametrize("adapter_type", ["int8", "float16"])
@pytest.mark.parametrize("library", [True, False])
def test_an_adapter_changes_a_model_and_its_absence_does_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], adapter_type: str, library: bool
) -> None:
    (tmp_path / "bare").mkdir()
    folder = write_tiny_artifact(tmp_path, adapter_type=adapter_type)
    bare = open_session(write_tiny_artifact(tmp_path / "bare"), library=library)
    session = open_session(folder, library=library)
    assert capfd.readouterr().err == "", "ONNX Runtime warns of defaults"
    expected = _run(bare, {})
    np.testing.assert_array_equal(_run(session, {}), expected)
    slots = tiny_slots(folder)
    arrays = pack_adapter(slots, tiny_factors(slots, rank=3, seed=1))
    changed = np.abs(_run(session, arrays) - expected)
    assert changed.max(axis=(1, 2)).min() > 0.1 * expected.std()
    np.testing.assert_array_equal(_run(session, {}), expected)
    # Rows that use it and rows that do not, in one batch: each as it would be alone.
    mixed = _run(session, arrays | {"adapter_index": np.array([-1, 0], np.int32)})
    alone = [
        _run_mixed(session, IDS[row : row + 1], feeds)[0] for row, feeds in enumerate(({}, arrays))
    ]
    # Sums of a few hundred terms in another order, through two layers.
    bound = 1000 * 2.0**-24 * np.abs(expected).max()
    assert bound < 1e-3 * changed.max()
    np.testing.assert_allclose(mixed, alone, rtol=0, atol=bound)


@pytest.mark.parametrize("factor_type", ["int8", "int4", "float16"])
@pytest.mark.parametrize("packed", [False, True])
def test_an_adapter_is_what_the_same_factors_are_when_baked_in(
    tmp_path: Path, factor_type: str, packed: bool
) -> None:
    """Every linear's factors reach its own rows and no others."""
    adapter_type = "float16" if factor_type == "float16" else "int8"
    source = tiny_model("llama", tmp_path / "model", intermediate_size=96)

    def compressed() -> tuple[ir.Model, list[Linear]]:
        model = load(str(source), work=tmp_path).model
        if packed:
            PackProjections().call(model)
        linears = [linear for linear in find_linears(model) if linear.block is not None]
        for linear in linears:
            QuantizeRtn(bits=4, group_size=16).call(LinearGroup((linear,)))
        return model, linears

    with_slots = lower(compressed()[0], adapter_type=adapter_type)
    slots = AdapterSlots.from_json(with_slots.metadata_props[SLOTS_KEY])
    factors = tiny_factors(slots, rank=5, seed=2, factor_type=factor_type)
    model, linears = compressed()
    bare = lower(model)
    for linear in linears:
        linear.compensate(factors[linear.name])
    baked = lower(model)
    check(baked, Stage.ONNXRUNTIME, after="the lowering")
    expected, plain = (_run(_session(one), {}) for one in (baked, bare))
    actual = _run(_session(with_slots), pack_adapter(slots, factors))
    # Sums of a few hundred terms in another order, through two layers.
    bound = 1000 * 2.0**-24 * np.abs(expected).max()
    assert bound < 1e-3 * np.abs(expected - plain).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


def _session(model: ir.Model) -> Session:
    """``model`` in ONNX Runtime, through its function bodies."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    content = ir.to_proto(model).SerializeToString()
    return Session(ort.InferenceSession(content, options, providers=["CPUExecutionProvider"]))
