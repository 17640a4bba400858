"""Adapters to and from PEFT, with PEFT itself on the dequantized model for an oracle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from eoracc.compiler.adapters.exchange import (
    ORIGIN_FILE,
    export_onnx,
    export_peft,
    import_adapter,
    relative_error,
    round_factors,
)
from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.errors import ArtifactError
from eoracc.plugins.adapters import pack_adapter
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.runtime.adapters.adapter import Adapter
from eoracc.runtime.adapters.slots import read_slots
from eoracc.runtime.adapters.store import add_adapter
from eoracc.runtime.artifact.manifest import read_manifest
from eoracc.runtime.onnxruntime.session import open_session
from tests.tiny_artifact import tiny_factors, tiny_weights, write_tiny_artifact

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

# PEFT asks transformers by a name that is being replaced.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

UNIT = 2.0**-24
TOKENS = np.random.default_rng(1).integers(4, 200, (2, 20))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with int8 slots and its checkpoint."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_artifact(folder, adapter_type="int8")
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with float16 slots."""
    return write_tiny_artifact(tmp_path_factory.mktemp("half"), adapter_type="float16")


@pytest.fixture
def artifact(work: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(work / "artifact", tmp_path / "artifact"))


@pytest.fixture(scope="module")
def backbone_weights(work: Path) -> dict[str, NDArray[np.float32]]:
    return tiny_weights(work)


def dequantized(work: Path, weights: Mapping[str, NDArray[np.float32]]) -> Any:  # noqa: ANN401 - PEFT takes any module
    """The transformers model with the weights of the artifact's backbone."""
    return load_eager(work / "checkpoint", weights)


def artifact_logits(artifact: Path, factors: Mapping[str, LowRank]) -> NDArray[np.float32]:
    session = open_session(artifact)
    session.operands = pack_adapter(read_slots(artifact), factors)
    return session.run(TOKENS)[0]


def tolerance(factors: Mapping[str, LowRank], logits: NDArray[np.float32]) -> float:
    """As of ``compiler.verify.logits_tolerance``: 14 linears with rank 2 baked in, and a head."""
    depths = [one.lora_a.shape[1] + 2 + one.rank for one in factors.values()] + [48]
    return float(UNIT * np.sqrt(depths).sum() * np.abs(logits).max())


def put(artifact: Path, factors: Mapping[str, LowRank], name: str = "math") -> None:
    add_adapter(artifact, Adapter(name, factors, read_manifest(artifact).digest))


def uneven(factors: dict[str, LowRank]) -> dict[str, LowRank]:
    """Ranks that differ from linear to linear, one of 0 and one left out."""
    found = {}
    for index, (name, one) in enumerate(factors.items()):
        rank = (4, 1, 3, 4, 0)[index % 5]
        found[name] = LowRank(
            lora_a=one.lora_a[:rank],
            lora_b=one.lora_b[:, :rank],
            lora_a_scale=None if one.lora_a_scale is None else one.lora_a_scale[:rank],
            lora_b_scale=one.lora_b_scale,
            bits=one.bits,
        )
    del found["model.layers.1.mlp.down_proj"]
    return found


# --- export ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("even", [True, False])
def test_peft_on_the_dequantized_model_gives_the_same_logits(
    work: Path,
    artifact: Path,
    tmp_path: Path,
    backbone_weights: Mapping[str, NDArray[np.float32]],
    *,
    even: bool,
) -> None:
    import peft

    factors = tiny_factors(read_slots(artifact), rank=4, seed=3, size=1.0)
    if not even:
        factors = uneven(factors)
    put(artifact, factors)
    export_peft(artifact, "math", tmp_path / "peft")
    model = dequantized(work, backbone_weights)
    without = reference_logits(model, TOKENS)
    tuned: Any = peft.PeftModel.from_pretrained(model, str(tmp_path / "peft"))
    theirs = reference_logits(tuned.base_model.model, TOKENS)
    ours = artifact_logits(artifact, factors)
    allowed = tolerance(factors, theirs)
    assert np.abs(theirs - ours).max() <= allowed
    assert np.abs(theirs - without).max() > 1000 * allowed


def test_exported_config_says_ranks_by_module(artifact: Path, tmp_path: Path) -> None:
    import peft

    factors = uneven(tiny_factors(read_slots(artifact), rank=4, seed=3))
    put(artifact, factors)
    export_peft(artifact, "math", tmp_path / "peft")
    config = peft.LoraConfig.from_pretrained(str(tmp_path / "peft"))
    used = {name: one.rank for name, one in factors.items() if one.rank}
    assert set(config.target_modules) == set(used)
    assert config.r == config.lora_alpha == 4
    assert config.rank_pattern == config.alpha_pattern
    assert len(config.rank_pattern) == sum(rank != 4 for rank in used.values())
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for name, rank in used.items():
        assert len(tensors[f"base_model.model.{name}.lora_A.weight"]) == rank


def test_a_fine_tune_starts_from_it(
    work: Path,
    artifact: Path,
    tmp_path: Path,
    backbone_weights: Mapping[str, NDArray[np.float32]],
) -> None:
    import peft

    factors = tiny_factors(read_slots(artifact), rank=4, seed=3)
    put(artifact, factors)
    export_peft(artifact, "math", tmp_path / "peft")
    model = dequantized(work, backbone_weights)
    tuned: Any = peft.PeftModel.from_pretrained(model, str(tmp_path / "peft"), is_trainable=True)
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(factors)
    optimizer = torch.optim.SGD(trained, lr=0.02)
    tokens = torch.from_numpy(TOKENS)
    losses = []
    for _ in range(6):
        loss = tuned(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits = artifact_logits(artifact, factors).astype(np.float64)
    shifted = logits[:, :-1] - logits[:, :-1].max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(shifted, TOKENS[:, 1:, None], axis=-1)[..., 0]
    ours = (np.log(np.exp(shifted).sum(axis=-1)) - chosen).mean()
    allowed = 2 * tolerance(factors, logits.astype(np.float32)) + 64 * UNIT * ours
    assert losses[0] == pytest.approx(ours, abs=allowed)
    assert losses[-1] < losses[0] - 1000 * allowed
    # And what it has learnt goes back onto the backbone.
    tuned.save_pretrained(tmp_path / "tuned")
    imported = import_adapter(artifact, tmp_path / "tuned", "tuned")
    assert imported.details["rounding"]["largest"] < 0.02


def test_exported_values_are_float16_where_nothing_is_lost(half: Path, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(half, tmp_path / "artifact"))
    factors = tiny_factors(read_slots(artifact), rank=4, seed=3)
    put(artifact, factors)
    export_peft(artifact, "math", tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {array.dtype for array in tensors.values()} == {np.dtype(np.float16)}
    (tmp_path / "peft" / ORIGIN_FILE).unlink()
    imported = import_adapter(artifact, tmp_path / "peft", "again")
    for name, one in factors.items():
        np.testing.assert_array_equal(imported.factors[name].lora_a, one.lora_a)
        np.testing.assert_array_equal(imported.factors[name].lora_b, one.lora_b)


def test_onnx_files_come_back_as_they_were(artifact: Path, tmp_path: Path) -> None:
    put(artifact, tiny_factors(read_slots(artifact), rank=4, seed=3))
    written = export_onnx(artifact, "math", tmp_path / "onnx")
    assert [path.name for path in written] == ["math.json", "math.onnx_adapter"]
    for path in written:
        assert path.read_bytes() == (artifact / "adapters" / path.name).read_bytes()
    imported = import_adapter(artifact, tmp_path / "onnx" / "math.onnx_adapter", "copy")
    add_adapter(artifact, imported)
    copy, original = (
        (artifact / "adapters" / f"{name}.onnx_adapter").read_bytes() for name in ("copy", "math")
    )
    assert copy == original
    (tmp_path / "onnx" / "math.json").unlink()
    with pytest.raises(ArtifactError, match="does not say the adapter's name: give one with --na"):
        import_adapter(artifact, tmp_path / "onnx" / "math.onnx_adapter", None)


def test_folder_that_is_there_is_not_written_over(artifact: Path, tmp_path: Path) -> None:
    put(artifact, tiny_factors(read_slots(artifact), rank=4, seed=3))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").touch()
    with pytest.raises(ArtifactError, match="taken: cannot be made: Directory not empty: choose"):
        export_peft(artifact, "math", tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "taken"]


# --- import ---------------------------------------------------------------------------------------


def train(work: Path, folder: Path, **options: Any) -> Any:  # noqa: ANN401 - of PEFT
    """An ordinary LoRA of the checkpoint, as PEFT makes and saves it, with random factors."""
    import peft

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
    }
    model = peft.get_peft_model(
        load_eager(work / "checkpoint", {}), peft.LoraConfig(**settings | options)
    )
    model.save_pretrained(str(folder))
    return model


def deltas(model: Any) -> dict[str, NDArray[np.float64]]:  # noqa: ANN401 - of PEFT
    """What PEFT adds to each weight."""
    return {
        name: module.get_delta_weight("default").detach().numpy().astype(np.float64)
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}},
        {"alpha_pattern": {"layers.0.*": 3}, "rank_pattern": {"v_proj": 1}, "use_rslora": True},
    ],
)
def test_ordinary_lora_lands_on_the_backbone(
    work: Path, half: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    expected = deltas(train(work, tmp_path / "lora", **options))
    exact = import_adapter(half, tmp_path / "lora", "lora")
    rounded = import_adapter(work / "artifact", tmp_path / "lora", "lora")
    assert set(exact.factors) == set(rounded.factors) == set(expected)
    assert len(expected) == 6
    for name, delta in expected.items():
        one = exact.factors[name]
        assert one.factor_type == "float16"
        # Either factor is rounded to 11 bits once, beyond what float32 sums lose.
        size = np.abs(one.up().astype(np.float64)) @ np.abs(one.down().astype(np.float64))
        assert (np.abs(one.product() - delta) <= 2.0**-10 * size).all()
        one = rounded.factors[name]
        assert one.factor_type == "int8"
        error = np.linalg.norm(one.product() - delta) / np.linalg.norm(delta)
        assert error < 0.02
        assert error <= rounded.details["rounding"]["largest"] + 1e-6
    worst = rounded.details["rounding"]["linear"]
    dense = np.linalg.norm(rounded.factors[worst].product() - expected[worst])
    largest = rounded.details["rounding"]["largest"]
    assert largest == pytest.approx(dense / np.linalg.norm(expected[worst]), rel=1e-3)


def test_int4_is_coarser_and_said_to_be(work: Path, tmp_path: Path) -> None:
    train(work, tmp_path / "lora")
    by_type = {
        kind: import_adapter(work / "artifact", tmp_path / "lora", "lora", kind)
        for kind in ("int8", "int4")
    }
    errors = {kind: one.details["rounding"]["mean"] for kind, one in by_type.items()}
    assert 5 * errors["int8"] < errors["int4"] < 0.3
    assert by_type["int4"].factor_types == ("int4",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_16_bits_are_read(
    work: Path, half: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    train(work, tmp_path / "lora", target_modules=["q_proj"], lora_alpha=4)
    path = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_torch(path).items()}
    save_torch(tensors, path)
    imported = import_adapter(half, tmp_path / "lora", "lora")
    for name, one in imported.factors.items():
        stored = tensors[f"base_model.model.{name}.lora_A.weight"].float().numpy()
        np.testing.assert_array_equal(one.lora_a, stored.astype(np.float16))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"use_dora": True}, "'use_dora' is set: it scales the weights themselves"),
        ({"lora_bias": True}, "'lora_bias' is set: it adds biases"),
        ({"modules_to_save": ["norm"]}, "'modules_to_save' is set: it replaces whole modules"),
        ({"init_lora_weights": "pissa"}, "is for weights that its training has changed"),
        ({"trainable_token_indices": [1]}, "'trainable_token_indices' is set: it replaces embed"),
        ({"target_modules": ["embed_tokens"]}, "factors of an embedding, which belongs to the"),
        (
            {"target_modules": ["lm_head"]},
            r"lm_head\.base_layer\.weight', a weight itself",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of what it is asked for here
def test_more_than_a_plain_lora_is_refused(
    work: Path, tmp_path: Path, options: dict[str, Any], problem: str
) -> None:
    train(work, tmp_path / "lora", **{"init_lora_weights": True, **options})
    with pytest.raises(ArtifactError, match=problem):
        import_adapter(work / "artifact", tmp_path / "lora", "lora")


@pytest.fixture
def lora(work: Path, tmp_path: Path) -> Path:
    """A small ordinary adapter, to be spoilt."""
    train(work, tmp_path / "lora", target_modules=["q_proj"])
    return tmp_path / "lora"


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"peft_type": "IA3"}, "is a PEFT adapter of type IA3: only LORA is known"),
        ({"bias": "all"}, "'bias' is 'all': it replaces biases"),
        ({"fan_in_fan_out": True}, "'fan_in_fan_out' is set: its factors are those of transposed"),
        ({"use_something_new": {"a": 1}}, "'use_something_new' is set: that kind of LoRA is not"),
        ({"r": 8}, r"do not have rank 8, which adapter_config\.json gives"),
        ({"r": None}, r"adapter_config\.json: 'r' is None where a rank of 1 to 65,536 must be"),
    ],
)
def test_config_that_is_refused(
    work: Path, lora: Path, values: dict[str, object], problem: str
) -> None:
    edit_config(lora, **values)
    with pytest.raises(ArtifactError, match=problem):
        import_adapter(work / "artifact", lora, "lora")


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({KEY: None}, "has lora_B and not the other factor"),
        ({KEY: np.full((4, 48), np.nan, np.float32)}, "its factors hold NaN or Inf"),
        (
            {KEY: np.zeros((4, 47), np.float32)},
            r"for a weight \[96, 47\], the artifact's is \[96, 48",
        ),
        ({KEY: np.zeros((4, 48), np.int32)}, "is of type I32: save it as float32"),
        ({KEY.replace(".0.", ".7."): np.zeros((4, 48), np.float32)}, "has lora_A and not the oth"),
        ({"lora_magnitude_vector": np.zeros(1, np.float32)}, r"scales the weights .* \(DoRA\)"),
        ({"x.bias": np.zeros(1, np.float32)}, "a bias: train it with bias none"),
    ],
)
def test_tensors_that_are_refused(
    work: Path, lora: Path, changes: dict[str, NDArray[Any] | None], problem: str
) -> None:
    path = lora / "adapter_model.safetensors"
    tensors = {name: array for name, array in load_file(path).items() if name not in changes}
    tensors |= {name: array for name, array in changes.items() if array is not None}
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match=problem):
        import_adapter(work / "artifact", lora, "lora")


def test_pickle_is_never_read(work: Path, lora: Path) -> None:
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    with pytest.raises(
        ArtifactError, match=r"and adapter_model\.bin is a pickle, which may run cod"
    ):
        import_adapter(work / "artifact", lora, "lora")
    with pytest.raises(ArtifactError, match="is neither a folder of PEFT"):
        import_adapter(work / "artifact", lora / "adapter_model.bin", "lora")


def test_sources_that_are_none(work: Path, lora: Path, tmp_path: Path) -> None:
    artifact = work / "artifact"
    with pytest.raises(ArtifactError, match="nowhere: there is no such file or folder"):
        import_adapter(artifact, tmp_path / "nowhere", "x")
    with pytest.raises(ArtifactError, match="does not say the adapter's name"):
        import_adapter(artifact, lora, None)
    with pytest.raises(ArtifactError, match="takes factors of type int8 or int4, not float16"):
        import_adapter(artifact, lora, "x", "float16")
    (lora / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="is truncated inside its header"):
        import_adapter(artifact, lora / "adapter_model.safetensors", "x")
    (lora / "adapter_config.json").unlink()
    with pytest.raises(ArtifactError, match=r"adapter_config\.json: is missing: give a folder"):
        import_adapter(artifact, lora, "x")


def test_compensation_of_another_backbone_is_refused(
    artifact: Path, half: Path, tmp_path: Path
) -> None:
    put(artifact, tiny_factors(read_slots(artifact), rank=4, seed=3))
    export_peft(artifact, "math", tmp_path / "peft")
    export_onnx(artifact, "math", tmp_path / "onnx")
    again = import_adapter(artifact, tmp_path / "peft", None)
    assert (again.name, again.details["from"]) == ("math", "PEFT, peft")
    assert again.details["origin"]["name"] == "math"
    with pytest.raises(ArtifactError, match="was made for the backbone"):
        import_adapter(half, tmp_path / "peft", None)
    with pytest.raises(ArtifactError, match="is for the backbone"):
        import_adapter(half, tmp_path / "onnx" / "math.onnx_adapter", None)


# --- rounding -------------------------------------------------------------------------------------


def test_relative_error_is_that_of_the_dense_products() -> None:
    rng = np.random.default_rng(0)
    exact = LowRank(
        lora_a=rng.standard_normal((5, 40), np.float32),
        lora_b=rng.standard_normal((30, 5), np.float32),
    )
    stored = round_factors(exact, "int8")
    delta = exact.up().astype(np.float64) @ exact.down()
    error = np.linalg.norm(delta - stored.up().astype(np.float64) @ stored.down())
    assert relative_error(exact, stored) == pytest.approx(error / np.linalg.norm(delta), rel=1e-9)
    assert relative_error(exact, exact) < 1e-12
    nothing = LowRank(lora_a=np.zeros((2, 40), np.float32), lora_b=np.zeros((30, 2), np.float32))
    assert relative_error(nothing, nothing) == 0


def test_what_cancels_takes_no_codes() -> None:
    """Factors that grow against each other would lose everything if rounded as they are."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 40)), rng.standard_normal((30, 2))
    large_a = np.concatenate([a, 1e3 * a[:1], 1e3 * a[:1]]).astype(np.float32)
    large_b = np.concatenate([b, b[:, :1], -b[:, :1]], axis=1).astype(np.float32)
    large_b[:, 2] += 1e-3 * large_b[:, 1]
    exact = LowRank(lora_a=large_a, lora_b=large_b)
    assert relative_error(exact, round_factors(exact, "int8")) < 0.02
