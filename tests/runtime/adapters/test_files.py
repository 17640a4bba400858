from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from eoracc.errors import ArtifactError
from eoracc.plugins.adapters import AdapterSlots, pack_adapter
from eoracc.runtime.adapters.adapter import Adapter
from eoracc.runtime.adapters.files import (
    decode_adapter,
    encode_adapter,
    model_version,
    read_adapter,
)
from eoracc.runtime.adapters.onnx_adapter import read_onnx_adapter, write_onnx_adapter
from eoracc.runtime.adapters.store import add_adapter
from eoracc.runtime.artifact.manifest import MANIFEST_FILE, FileEntry, read_manifest
from tests.runtime.adapters.factors import assert_same_factors
from tests.slots_artifact import LAYER, SLOTS, random_factors, write_slots_artifact

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from eoracc.plugins.operands.low_rank import LowRank

MATH = "adapters/math.onnx_adapter"
INT8 = AdapterSlots("int8", SLOTS)
DOWN = f"{LAYER}.mlp.down_proj"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """One with an adapter ``math``."""
    folder = tmp_path / "artifact"
    digest = write_slots_artifact(folder).digest
    add_adapter(folder, Adapter("math", random_factors("int8"), digest, {"text": "gsm"}))
    return folder


@pytest.mark.parametrize(
    ("slots", "factor_type"), [("int8", "int8"), ("int8", "int4"), ("float16", "float16")]
)
@pytest.mark.parametrize("rank", [1, 16, 17])
def test_what_is_stored_is_read(tmp_path: Path, slots: str, factor_type: str, rank: int) -> None:
    digest = write_slots_artifact(tmp_path / "a", adapter_type=slots).digest
    factors = random_factors(factor_type, rank=rank)
    stored = Adapter("math", factors, digest, {"text": "gsm", "perplexity": 3.5})
    add_adapter(tmp_path / "a", stored)
    found = read_adapter(tmp_path / "a", "math")
    assert_same_factors(found.factors, factors)
    assert (found.name, found.backbone, found.details) == ("math", digest, stored.details)
    assert (found.rank, found.factor_types) == (rank, (factor_type,))
    assert found.nbytes == sum(one.input_bytes for one in factors.values())


def test_linears_without_factors_get_none(tmp_path: Path) -> None:
    digest = write_slots_artifact(tmp_path / "a").digest
    some = (f"{LAYER}.self_attn.k_proj", DOWN)
    factors = random_factors("int8", linears=some)
    add_adapter(tmp_path / "a", Adapter("math", factors, digest))
    assert_same_factors(read_adapter(tmp_path / "a", "math").factors, factors)


def test_adapter_of_rank_0_has_no_factors(tmp_path: Path) -> None:
    digest = write_slots_artifact(tmp_path / "a").digest
    add_adapter(tmp_path / "a", Adapter("math", random_factors("int8", rank=0), digest))
    assert read_adapter(tmp_path / "a", "math").factors == {}


def test_unknown_adapter_is_told_which_there_are(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no adapter 'code': it has math$"):
        read_adapter(artifact, "code")
    write_slots_artifact(tmp_path / "bare")
    with pytest.raises(ArtifactError, match=r"has no adapter 'math': it has none$"):
        read_adapter(tmp_path / "bare", "math")


@pytest.mark.parametrize("name", ["../math", "/etc/passwd", "adapters/math", "..", "", "math\0"])
def test_name_never_leads_out_of_the_folder(artifact: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="has no adapter"):
        read_adapter(artifact, name)
    with pytest.raises(ArtifactError, match="is no valid name"):
        add_adapter(artifact, Adapter(name, {}, read_manifest(artifact).digest))


@pytest.mark.parametrize("path", [MATH, "adapters/math.json", "model.onnx"])
def test_one_changed_bit_is_refused(artifact: Path, path: str) -> None:
    content = bytearray((artifact / path).read_bytes())
    content[len(content) // 2] ^= 1
    (artifact / path).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{path}: its content is not what manifest.json says"):
        read_adapter(artifact, "math")


def test_missing_file_is_named(artifact: Path) -> None:
    (artifact / MATH).unlink()
    with pytest.raises(ArtifactError, match=f"{MATH}: is missing"):
        read_adapter(artifact, "math")


def test_link_out_of_the_folder_is_refused(artifact: Path, tmp_path: Path) -> None:
    shutil.move(artifact / MATH, tmp_path / "elsewhere")
    (artifact / MATH).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=f"{MATH}: is a link that leaves the folder"):
        read_adapter(artifact, "math")


def list_files(folder: Path, **contents: bytes) -> None:
    """Put an adapter's files into an artifact by hand, and into its manifest."""
    manifest = read_manifest(folder)
    entries: dict[str, FileEntry | None] = {}
    for suffix, content in contents.items():
        path = f"adapters/math.{suffix}"
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)
        entries[path] = FileEntry(hashlib.sha256(content).hexdigest(), len(content))
    (folder / MANIFEST_FILE).write_text(manifest.with_files(entries).to_json())


def files_of(artifact: Path) -> dict[str, bytes]:
    return {
        suffix: (artifact / f"adapters/math.{suffix}").read_bytes()
        for suffix in ("json", "onnx_adapter")
    }


def test_foreign_adapter_is_refused(artifact: Path, tmp_path: Path) -> None:
    write_slots_artifact(tmp_path / "other", weights=b"others")
    list_files(tmp_path / "other", **files_of(artifact))
    theirs, ours = (
        read_manifest(artifact).digest[:12],
        read_manifest(tmp_path / "other").digest[:12],
    )
    with pytest.raises(
        ArtifactError, match=f"{MATH}: is for the backbone {theirs}, .* is {ours}: m"
    ):
        read_adapter(tmp_path / "other", "math")


def test_description_that_lies_about_the_backbone_is_refused(
    artifact: Path, tmp_path: Path
) -> None:
    digest = write_slots_artifact(tmp_path / "other", weights=b"others").digest
    files = files_of(artifact)
    files["json"] = edited(files["json"], backbone=digest)
    list_files(tmp_path / "other", **files)
    with pytest.raises(ArtifactError, match="is for the backbone"):
        read_adapter(tmp_path / "other", "math")


def edited(description: bytes, **values: object) -> bytes:
    return json.dumps({**json.loads(description), **values}).encode()


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"sha256": "0" * 64}, r"is not the file that its \.json describes"),
        ({"name": "code"}, "is adapter 'code' under another name"),
        ({"schema": 2}, r"its \.json has schema 2, this eoracc reads 1"),
        ({"format": "other"}, r"its \.json does not describe an eoracc adapter"),
        ({"details": []}, r"its \.json does not describe an eoracc adapter"),
        ({"backbone": None}, r"its \.json does not describe an eoracc adapter"),
    ],
)
def test_description_that_is_wrong(artifact: Path, values: dict[str, object], problem: str) -> None:
    list_files(artifact, json=edited(files_of(artifact)["json"], **values))
    with pytest.raises(ArtifactError, match=f"{MATH}: {problem}"):
        read_adapter(artifact, "math")


def damaged_factors(artifact: Path, changes: Mapping[str, Any]) -> dict[str, bytes]:
    """The adapter's files with other arrays, described and listed as if they belonged."""
    files = files_of(artifact)
    stored = read_onnx_adapter(files["onnx_adapter"], "a")
    arrays = {name: array for name, array in stored.arrays.items() if name not in changes}
    arrays |= {name: array for name, array in changes.items() if array is not None}
    factors = write_onnx_adapter(arrays, adapter_version=1, model_version=stored.model_version)
    description = edited(files["json"], sha256=hashlib.sha256(factors).hexdigest())
    return {"json": description, "onnx_adapter": factors}


A, B, SCALE = (f"{DOWN}.adapter_{part}" for part in ("a", "b", "b_scale"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({B: None}, "its operand '.*adapter_b' is missing"),
        ({A: np.zeros((1, 1, 9, 64), np.uint8)}, "'adapter_a' is uint8"),
        ({A: np.zeros((1, 1, 8, 64), np.float32)}, "'adapter_a' is float32"),
        ({B: np.zeros((1, 3, 8, 64), np.uint8)}, "'adapter_b' is uint8"),
        ({SCALE: np.full((1, 48), np.nan, np.float32)}, "holds NaN or Inf"),
        ({"model.layers.9.mlp.x.adapter_a": np.zeros(1, np.uint8)}, "has no slot that takes it"),
    ],
)
def test_factors_that_do_not_fit(artifact: Path, changes: dict[str, Any], problem: str) -> None:
    list_files(artifact, **damaged_factors(artifact, changes))
    with pytest.raises(ArtifactError, match=f"{MATH}: .*{problem}"):
        read_adapter(artifact, "math")


def test_equal_adapters_are_equal_bytes() -> None:
    factors = random_factors("int8")
    one = Adapter("math", factors, "ab" * 32, {"a": 1})
    other = Adapter("math", dict(reversed(factors.items())), "ab" * 32, {"a": 1})
    assert encode_adapter(one, INT8) == encode_adapter(other, INT8)


def test_file_holds_what_the_graph_takes() -> None:
    adapter = Adapter("math", random_factors("int4"), "ab" * 32)
    stored = read_onnx_adapter(encode_adapter(adapter, INT8)[MATH], "a")
    expected = pack_adapter(INT8, adapter.factors)
    assert set(stored.arrays) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(stored.arrays[name], array)


def test_model_version_is_the_first_31_bits() -> None:
    assert model_version("ffffffff" + 56 * "0") == 2**31 - 1
    assert model_version("00000003" + 56 * "f") == 1


def test_factors_alone_are_bound_by_their_version() -> None:
    adapter = Adapter("math", random_factors("int8"), "ab" * 32)
    content = encode_adapter(adapter, INT8)[MATH]
    found = decode_adapter(None, content, INT8, backbone="ab" * 32, place="a")
    assert (found.name, found.backbone, found.details) == ("", "ab" * 32, {})
    assert_same_factors(found.factors, adapter.factors)
    with pytest.raises(ArtifactError, match="a: is for the backbone abababa, this one is cdcdcdcd"):
        decode_adapter(None, content, INT8, backbone="cd" * 32, place="a")


@pytest.mark.parametrize("details", [{"perplexity": float("nan")}, {"path": object()}])
def test_details_are_json(details: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="adapter 'math': its details are no JSON"):
        encode_adapter(Adapter("math", {}, "ab" * 32, details), INT8)


def bad_factors(changes: dict[str, Any]) -> dict[str, LowRank]:
    factors = random_factors("int8", linears=(DOWN,))
    return {DOWN: replace(factors[DOWN], **changes)}


@pytest.mark.parametrize(
    ("factors", "problem"),
    [
        ({"model.layers.7.mlp.x": random_factors("int8")[DOWN]}, "has no slot for an adapter"),
        (random_factors("float16"), "has float16 factors, the model takes int8 or int4"),
        (bad_factors({"lora_b": np.zeros((41, 3), np.int8)}), r"do not fit its \[40, 32\] weight"),
        (bad_factors({"lora_a": np.zeros((4, 32), np.int8)}), r"do not fit its \[40, 32\] weight"),
        (bad_factors({"lora_a_scale": np.full(3, np.inf, np.float32)}), "hold NaN or Inf"),
    ],
)
def test_factors_that_the_model_does_not_take(factors: dict[str, LowRank], problem: str) -> None:
    with pytest.raises(ArtifactError, match=f"adapter 'math': linear '.*{problem}"):
        encode_adapter(Adapter("math", factors, "ab" * 32), INT8)
