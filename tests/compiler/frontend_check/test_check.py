from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest

from eoracc.compiler.frontend.load import load
from eoracc.compiler.frontend_check.check import MARGIN, check_frontend
from eoracc.compiler.progress import SilentProgress
from eoracc.errors import ModelError
from eoracc.passes.graph.linears import find_linears
from tests.tiny_models import FAMILIES, tiny_model

if TYPE_CHECKING:
    from eoracc.compiler.frontend.load import LoadedModel

_ORIGINAL = 64
"""Original positions of the Llama whose context was extended; below its window, above a prompt."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    rope = {**FAMILIES["llama3_rope"][1]["rope_parameters"]}
    rope["original_max_position_embeddings"] = _ORIGINAL
    # Too few positions for a prompt that passes the original ones.
    extended: dict[str, Any] = {"rope_parameters": rope, "max_position_embeddings": _ORIGINAL + 6}
    return {
        "llama": tiny_model("llama", root / "llama"),
        "extended": tiny_model("llama3_rope", root / "extended", **extended),
        "mistral": tiny_model("mistral", root / "mistral"),
    }


def _load(folder: Path, work: Path) -> LoadedModel:
    return load(str(folder), work=work)


def _nodes(loaded: LoadedModel, op_type: str) -> list[ir.Node]:
    return [node for node in loaded.model.graph if node.op_type == op_type]


def _insert(loaded: LoadedModel, operand: ir.Value, op_type: str, other: ir.Value) -> ir.Value:
    """``op_type(operand, other)``, in place of ``operand`` for all that read it."""
    node = ir.node(op_type, [operand, other], name=f"inserted_{op_type}")
    result = node.outputs[0]
    result.name, result.type, result.shape = (
        f"{operand.name}_{op_type}",
        operand.type,
        operand.shape,
    )
    operand.replace_all_uses_with(result)
    node.replace_input_with(0, operand)
    producer = operand.producer()
    if producer is None:
        loaded.model.graph.insert_before(next(iter(loaded.model.graph)), node)
    else:
        loaded.model.graph.insert_after(producer, node)
    return result


def _constant(loaded: LoadedModel, value: float) -> ir.Value:
    tensor = ir.tensor(np.array(value, np.float32), name=f"constant_{value}")
    made = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype))
    made.shape = ir.Shape([])
    loaded.model.graph.register_initializer(made)
    return made


def _scale_embedding(loaded: LoadedModel) -> None:
    # The size of a first norm's output hides the size of its input, but not next to the epsilon.
    for node in _nodes(loaded, "RMSNormalization")[:1]:
        node.attributes.add(ir.AttrFloat32("epsilon", 1e-3))


def _scale_scores(loaded: LoadedModel) -> None:
    node = _nodes(loaded, "Attention")[1]
    node.attributes.add(ir.AttrFloat32("scale", 1.01 * node.attributes["scale"].as_float()))


def _scale_attention_output(loaded: LoadedModel) -> None:
    linear = next(item for item in find_linears(loaded.model) if item.role == "o_proj")
    _insert(loaded, linear.node.outputs[0], "Mul", _constant(loaded, 1.001))


def _shift_last_norm(loaded: LoadedModel) -> None:
    (last,) = _nodes(loaded, "RMSNormalization")[-1].outputs
    _insert(loaded, last, "Add", _constant(loaded, 0.01))


def _other_activation(loaded: LoadedModel) -> None:
    sigmoid = _nodes(loaded, "Sigmoid")[0]
    _insert(loaded, sigmoid.outputs[0], "Mul", _constant(loaded, 1.001))


def _scale_logits(loaded: LoadedModel) -> None:
    graph = loaded.model.graph
    logits = graph.outputs[0]
    logits.name = "unscaled"
    graph.outputs[0] = ir.Value(name="logits")
    scaled = _insert(loaded, logits, "Mul", _constant(loaded, 0.999))
    scaled.name = "logits"
    graph.outputs[0] = scaled


def _count_from_the_step(loaded: LoadedModel) -> None:
    """Positions that begin at 0 in every step, which a prompt does not show."""
    graph = loaded.model.graph
    positions = next(value for value in graph.inputs if value.name == "position_ids")
    first = ir.node("ReduceMin", [positions], {"keepdims": 1}, name="first")
    first.outputs[0].name, first.outputs[0].type = "first", positions.type
    _insert(loaded, positions, "Sub", first.outputs[0])
    first.replace_input_with(0, positions)
    graph.insert_before(next(iter(graph)), first)


def _mix_rows(loaded: LoadedModel) -> None:
    """A factor that is 1 for the longest row of a batch alone."""
    graph = loaded.model.graph
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    embedding = _nodes(loaded, "Gather")[0].outputs[0]
    tape = ir.tape.Tape()
    axis = tape.initializer(ir.tensor(np.array([1]), name="second_axis"))
    rows = tape.initializer(ir.tensor(np.array([0]), name="first_axis"))
    length = tape.op("ReduceSum", [mask, axis], {"keepdims": 1})
    longest = tape.op("ReduceMax", [length, rows], {"keepdims": 1})
    share = tape.op("Div", [tape.op("Cast", [value], {"to": 1}) for value in (length, longest)])
    factor = tape.op("Unsqueeze", [share, axis])
    for value in (length, longest):
        value.type = ir.TensorType(ir.DataType.INT64)
    for value in tape.initializers:
        graph.register_initializer(value)
    graph.insert_before(next(iter(graph)), tape.nodes)
    _insert(loaded, embedding, "Mul", factor)


def _forget_late_positions(loaded: LoadedModel) -> None:
    value = loaded.model.graph.initializers["model.rotary_emb.cos_cache"]
    assert value.const_value is not None
    table = value.const_value.numpy().copy()
    table[_ORIGINAL + 1 :] *= 0.99
    value.const_value = ir.tensor(table, name=value.name)


def _widen_window(loaded: LoadedModel) -> None:
    value = loaded.model.graph.initializers["mask.window_5"]
    value.const_value = ir.tensor(np.array(6), name=value.name)


@pytest.mark.parametrize(
    ("family", "change", "match"),
    [
        (
            "llama",
            _scale_embedding,
            r"embedding or first norm of block 0, .*rms_norm_eps.*input_layernorm/RMS",
        ),
        ("llama", _scale_scores, r"attention of block 1 \(node \S*/Attention_node_44 .*every call"),
        ("llama", _scale_attention_output, r"norm of block 0.*rms_norm_eps.*post_attention_layern"),
        (
            "llama",
            _other_activation,
            r"MLP of block 0.*hidden_act 'silu'.*layers\.0/mlp/Mul_node_31",
        ),
        ("llama", _shift_last_norm, r"in the norm before the head, .*\(node inserted_Add "),
        ("llama", _scale_logits, r"in the head .*node inserted_Mul is off by 0\.001"),
        ("llama", _count_from_the_step, r"attention .* in a prompt and a step on its cache, round"),
        ("llama", _mix_rows, r"block 0.*in a batch of two lengths, rounding"),
        ("extended", _forget_late_positions, r"rope_parameters \(llama3: .*after a cache of 64, r"),
        ("mistral", _widen_window, r"attention of block 0.*sliding_window 5 .*every call"),
    ],
)
def test_the_first_difference_is_named(
    family: str,
    change: Callable[[LoadedModel], None],
    match: str,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    loaded = _load(folders[family], tmp_path)
    change(loaded)
    with pytest.raises(ModelError, match=match) as caught:
        check_frontend(loaded, SilentProgress())
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{folders[family]}: ")


def test_a_right_graph_passes_and_stays_as_it_is(folders: dict[str, Path], tmp_path: Path) -> None:
    loaded = _load(folders["extended"], tmp_path)
    before = ir.to_proto(loaded.model).SerializeToString(deterministic=True)
    progress = SilentProgress()
    check_frontend(loaded, progress)
    assert [time.name for time in progress.times] == ["check"]
    assert ir.to_proto(loaded.model).SerializeToString(deterministic=True) == before


def test_a_graph_that_cannot_run(folders: dict[str, Path], tmp_path: Path) -> None:
    loaded = _load(folders["llama"], tmp_path)
    _insert(loaded, _nodes(loaded, "Gather")[0].outputs[0], "Reshape", _constant(loaded, 3.0))
    with pytest.raises(ModelError, match="cannot run in ONNX Runtime"):
        check_frontend(loaded, SilentProgress())


def test_a_model_that_transformers_cannot_run(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "model"))
    loaded = _load(folder, tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="transformers cannot run this model"):
        check_frontend(loaded, SilentProgress())


def test_tolerances_are_far_below_what_matters() -> None:
    # Llama 3 70B: 80 blocks of four levels, the widest inputs 28672 and 8192, 8192 positions.
    depth = 80 * (3 * 8192**0.5 + 28672**0.5) + 8192**0.5
    assert MARGIN * 2.0**-24 * (depth + 2 * 8192) < 0.1
