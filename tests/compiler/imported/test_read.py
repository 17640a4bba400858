"""Checkpoints of other packages, as those wrote them (tests/peer_checkpoints/write.py)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eoracc.compiler import driver
from eoracc.compiler.adapters.restore import restore_backbone
from eoracc.compiler.config.contradictions import contradictions
from eoracc.compiler.frontend.load import LoadedModel, load
from eoracc.compiler.imported.read import read_compressed
from eoracc.compiler.progress import SilentProgress
from eoracc.errors import EoraccError, ModelError, PassError
from eoracc.plugins.operands.dense import DenseWeight
from eoracc.plugins.operands.weight import NBitsWeight
from eoracc.runtime.artifact.manifest import verify_manifest
from tests.tiny_build import tiny_config

PEERS = Path(__file__).parents[2] / "peer_checkpoints"
ORIGINAL = PEERS / "original"
CODES = {
    "gptq_w4": (4, True),
    "gptq_w3": (3, True),
    "gptq_w3_asymmetric": (3, False),
    "gptq_w2_asymmetric": (2, False),
    "gptq_w8_rows": (8, True),
}
"""Bits, and whether there are no zero points."""
QUICK: dict[str, Any] = {"text": "text.txt", "windows": 1, "window_length": 16}
PASSES: list[Any] = ["calibrate", "imported", {"eora": {"rank": 8, "factor_type": "float16"}}]


def oracle(name: str) -> dict[str, torch.Tensor]:
    """What the package itself reads: weights by module, and logits on ids."""
    return load_file(PEERS / name / "peer.safetensors")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(str(ORIGINAL), work=tmp_path_factory.mktemp("original"))


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    shutil.copytree(ORIGINAL, tmp_path / "model")
    letters = np.random.default_rng(0).integers(0, 96, 3000)
    (tmp_path / "text.txt").write_text(" ".join(f"t{number}" for number in letters))
    return tmp_path


def build(workspace: Path, compressed: Path, passes: list[Any] = PASSES, **fields: Any) -> Any:  # noqa: ANN401
    config = tiny_config(passes, compressed=str(compressed), **fields)
    assert not list(contradictions(config))
    return driver.build(config, config_dir=workspace, progress=SilentProgress())


@pytest.mark.parametrize("name", [*CODES, "gptq_w4_act_order"])
def test_weights_are_those_that_the_peer_reads(
    name: str, original: LoadedModel, tmp_path: Path
) -> None:
    checkpoint = read_compressed(str(PEERS / name), original, work=tmp_path)
    peer = oracle(name)
    assert len(checkpoint.weights) == 7
    for module, read in checkpoint.weights.items():
        held = read()
        if module in peer:
            np.testing.assert_array_equal(held.weight.dequantize(), peer[module].numpy())
        if name in CODES:
            bits, symmetric = CODES[name]
            assert isinstance(held.weight, NBitsWeight)
            assert (held.weight.bits, held.dequantized) == (bits, "")
            assert (held.weight.zero_points is None) == symmetric
            assert held.weight.scales.dtype == np.float16


@pytest.mark.parametrize("name", ["gptq_w3_asymmetric", "gptq_w4_act_order"])
def test_a_build_holds_the_codes_and_gains_by_factors(name: str, workspace: Path) -> None:
    result = build(workspace, PEERS / name)
    verify_manifest(workspace / "out")
    source = result.manifest.source
    assert source["compressed"] == str(PEERS / name)
    assert len(source["compressed_digest"]) == 64
    rows = {row.name: row for row in result.report.fidelity.rows}
    assert list(rows) == ["original", "quantized", "svd", "eora"]
    assert rows["eora"].kl < rows["quantized"].kl
    backbone = restore_backbone(
        workspace / "out", load(str(workspace / "model"), work=workspace / "again").model
    )
    reported = {one.name: one for one in result.report.linears}
    peer = oracle(name)
    for linear in backbone.linears:
        if linear.block is None:
            assert linear.compressed is None
            continue
        if linear.name in peer:
            np.testing.assert_array_equal(linear.backbone_weight(), peer[linear.name].numpy())
        assert linear.factors is not None
        notes = " ".join(reported[linear.name].notes)
        assert ("kept in floats" in notes) == isinstance(linear.compressed, DenseWeight)


@pytest.mark.parametrize("name", ["gptq_w3", "gptq_w4_act_order"])
def test_an_artifact_scores_as_the_peers_own_weights_do(name: str, workspace: Path) -> None:
    """Without factors. Logits are some units, and sum 64 products per layer in float32."""
    from eoracc.runtime.model import load as load_artifact

    build(workspace, PEERS / name, ["imported"], calibration=None, verify=QUICK)
    peer = oracle(name)
    (tokens,) = peer["ids"].tolist()
    logits = peer["logits"][0].double()
    expected = torch.log_softmax(logits, -1)[range(len(tokens) - 1), tokens[1:]].numpy()
    found = load_artifact(workspace / "out").score(tokens).logprobs
    tolerance = 64 * 2.0**-24 * 16 * float(logits.abs().max())
    assert tolerance < 0.01 * np.ptp(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def test_embeddings_are_rounded_on_request_only(workspace: Path) -> None:
    passes = [{"imported": {"embedding_bits": 6}}]
    build(workspace, PEERS / "gptq_w4", passes, calibration=None, verify=QUICK)
    backbone = restore_backbone(
        workspace / "out", load(str(workspace / "model"), work=workspace / "again").model
    )
    head = next(linear for linear in backbone.linears if linear.block is None)
    assert head.quantized is not None
    assert head.quantized.bits == 6
    assert backbone.embeddings[0].compressed is head.quantized


def test_a_left_out_linear_keeps_the_original_weight(workspace: Path) -> None:
    passes: list[Any] = [
        "calibrate",
        {"imported": {"overrides": {"*.o_proj": {"skip": True}}}},
        {"eora": {"rank": 2}},
    ]
    build(workspace, PEERS / "gptq_w4", passes)
    backbone = restore_backbone(
        workspace / "out", load(str(workspace / "model"), work=workspace / "again").model
    )
    kept = [linear.role for linear in backbone.linears if linear.compressed is None]
    assert kept == ["o_proj", "lm_head"]


# --- what does not belong together ----------------------------------------------------------------


def changed(tmp_path: Path, name: str = "gptq_w4", **config: Any) -> Path:  # noqa: ANN401
    """A copy of a checkpoint with other fields of config.json."""
    folder = Path(shutil.copytree(PEERS / name, tmp_path / "changed"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def refused(folder: Path, original: LoadedModel, tmp_path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read_compressed(str(folder), original, work=tmp_path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"hidden_size": 128}, "hidden_size is 128, and 64 in the original"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2', and 'llama' in the original"),
        ({"rms_norm_eps": 0.5}, "rms_norm_eps is 0.5"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quant_method 'hqq', which is not read"),
        ({"quantization_config": 3}, "quantization_config is no object"),
    ],
)
def test_another_configuration_is_refused(
    fields: dict[str, Any], expected: str, original: LoadedModel, tmp_path: Path
) -> None:
    assert expected in refused(changed(tmp_path, **fields), original, tmp_path)


def test_another_rotary_embedding_is_refused(original: LoadedModel, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 5.0}
    assert "rope_theta is 5.0" in refused(
        changed(tmp_path, rope_parameters=rope), original, tmp_path
    )


def test_another_tokenizer_is_refused(original: LoadedModel, tmp_path: Path) -> None:
    folder = changed(tmp_path)
    content = (ORIGINAL / "tokenizer.json").read_text()
    content = content.replace('"t3": 3', '"t3": 4').replace('"t4": 4', '"t4": 3')
    (folder / "tokenizer.json").write_text(content)
    assert "the token t3 has the number 4, and 3" in refused(folder, original, tmp_path)


def test_another_norm_is_refused_and_a_rounded_one_is_not(
    original: LoadedModel, tmp_path: Path
) -> None:
    folder = changed(tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float16)
    tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(96)
    save_file(tensors, path, {"format": "pt"})
    assert len(read_compressed(str(folder), original, work=tmp_path).weights) == 7
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.02
    save_file(tensors, path, {"format": "pt"})
    assert "model.norm.weight differs from the original" in refused(folder, original, tmp_path)


def test_the_weights_of_another_model_are_refused(workspace: Path, tmp_path: Path) -> None:
    folder = changed(tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.gate_proj"
    tensors[f"{name}.qweight"] = tensors["model.layers.0.mlp.up_proj.qweight"].clone()
    tensors[f"{name}.scales"] = tensors["model.layers.0.mlp.up_proj.scales"].clone()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(PassError, match=r"gate_proj.*times the original weight, so that it is not"):
        build(workspace, folder)
    assert not (workspace / "out").exists()


def test_the_original_itself_is_refused(original: LoadedModel, tmp_path: Path) -> None:
    assert "nothing is compressed" in refused(ORIGINAL, original, tmp_path)


@pytest.mark.parametrize(
    ("passes", "compressed", "expected"),
    [
        (["imported"], None, "needs the checkpoint that it takes over"),
        (["quantize_rtn"], "m", "is read by the pass 'imported'"),
        (["imported", "quantize_rtn"], "m", "compressed already by 'imported'"),
        (["pack_projections", "imported"], "m", "behind 'pack_projections'"),
        (["calibrate", "imported", "caldera"], "m", "quantizes again what 'imported'"),
    ],
)
def test_contradictions(passes: list[str], compressed: str | None, expected: str) -> None:
    found = dict(contradictions(tiny_config(passes, compressed=compressed)))
    assert any(expected in problem for problem in found.values()), found


def test_comparisons_refuse_an_imported_backbone(workspace: Path) -> None:
    from eoracc.compiler.compare.run import compare

    config = tiny_config(PASSES, compressed=str(PEERS / "gptq_w4"))
    with pytest.raises(EoraccError, match="compressed: methods are compared on weights"):
        compare(config, ["svd"], ["4"], config_dir=workspace, progress=SilentProgress())
