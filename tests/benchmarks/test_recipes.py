from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from benchmarks.recipes import RECIPES, Setting
from eoracc.compiler.config.load import load_config
from eoracc.passes.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("3g64", "eoracc 3-bit group 64, GPTQ"),
        ("4row-eora32", "eoracc 4-bit whole row, GPTQ + EoRA rank 32"),
        ("3g64-outputs", "eoracc 3-bit group 64, GPTQ, outputs matched"),
        (
            "4g128-eora16-int4-outputs",
            "eoracc 4-bit group 128, GPTQ + EoRA rank 16 int4, outputs matched",
        ),
        ("3g64-equal", "eoracc 3-bit group 64, GPTQ, tokens as they are"),
    ],
)
def test_settings_are_labelled_by_what_they_do(text: str, label: str) -> None:
    assert Setting.parse(text).label == label


def test_settings_become_passes() -> None:
    assert Setting.parse("3g64-svd8-int8-outputs-equal").passes() == [
        {"calibrate": {"match": "outputs", "tokens": "equal"}},
        {"quantize_gptq": {"bits": 3, "group_size": 64, "embedding_bits": None}},
        {"svd": {"rank": 8, "factor_type": "int8"}},
    ]
    assert Setting.parse("4row").passes() == [
        {"calibrate": {"match": "weights", "tokens": "unit"}},
        {"quantize_gptq": {"bits": 4, "group_size": -1, "embedding_bits": None}},
    ]


@pytest.mark.parametrize("text", ["5g64", "3g64-int4", "3g64-eora", "3g64-outputs-eora4", "x"])
def test_other_texts_are_no_settings(text: str) -> None:
    with pytest.raises(ValueError, match="is no setting: give one like 3g64"):
        Setting.parse(text)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_builds_that_model_yaml_can_describe(name: str, tmp_path: Path) -> None:
    content = {
        "model": "model.gguf",
        "calibration": {"text": "text.txt"},
        "passes": RECIPES[name].passes(),
        "verify": {"text": "text.txt"},
        "output": "out",
    }
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert len(load_config(path).recipe.passes) == len(RECIPES[name].passes())


@pytest.mark.parametrize(
    ("name", "megabytes"),
    [("folder-105", 105.5), ("folder-93", 93.5), ("folder-88", 88.2), ("folder-80", 80.0)],
)
def test_folder_recipes_have_the_size_of_llama_cpps_files(name: str, megabytes: float) -> None:
    recipe = RECIPES[name]
    assert recipe.folder_limit_bytes == round(1e6 * megabytes)
    # What the build spends is what its folder is compared with.
    allocate = next(item["allocate"] for item in recipe.passes() if "allocate" in item)
    assert parse_size(allocate["size"]) == recipe.folder_limit_bytes
