"""PEFT's adapter_config.json: ranks and factors as PEFT finds them, and values that are refused."""

from __future__ import annotations

import json
import math
import re
import time
from typing import TYPE_CHECKING, Any

import pytest

from eoracc.errors import ArtifactError
from eoracc.runtime.adapters.peft_config import PeftConfig

if TYPE_CHECKING:
    from pathlib import Path

SOUND: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "model.layers.1.mlp.down_proj_extra",
    "q_proj",
]


def write(folder: Path, **values: object) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**SOUND, **values}))
    return path


@pytest.mark.parametrize(
    "patterns",
    [
        {"q_proj": 1},
        {"layers.1.mlp.down_proj": 2, "down_proj": 3},
        {r"^model\.layers\.0\.self_attn\.q_proj": 2},
        {r".*\.layers\.\d+\.mlp\.(down|up)_proj": 5, "model.layers.[01].*": 6},
        {"q_proj|down_proj": 7},
        {"proj": 1, "": 2},
    ],
)
def test_patterns_match_as_in_peft(tmp_path: Path, patterns: dict[str, int]) -> None:
    config = PeftConfig.read(write(tmp_path, rank_pattern=patterns, alpha_pattern=patterns))
    for module in MODULES:
        # PEFT's own rule, by Python's regular expressions.
        found = [value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)]
        rank, alpha = (found[0], found[0]) if found else (4, 8)
        assert config.rank_of(module) == rank
        assert config.factor_of(module) == alpha / rank


def test_root_of_the_rank(tmp_path: Path) -> None:
    config = PeftConfig.read(write(tmp_path, use_rslora=True))
    assert config.factor_of("q_proj") == 8 / math.sqrt(4)


def test_a_match_takes_linear_time(tmp_path: Path) -> None:
    # Python's regular expressions would try 2^1000 ways to split this name.
    config = PeftConfig.read(write(tmp_path, rank_pattern={"(x*)*y": 1}))
    start_s = time.process_time()
    assert config.rank_of("x" * 1000) == 4
    assert time.process_time() - start_s < 1


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["(", "q(?=_proj)", r"(q)\1", "(a{900}){900}", "x" * 2000])
def test_patterns_that_no_linear_time_can_match(tmp_path: Path, field: str, pattern: str) -> None:
    path = write(tmp_path, **{field: {pattern: 1}})
    with pytest.raises(ArtifactError, match=rf"of '{field}' cannot be matched in linear time"):
        PeftConfig.read(path)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"r": 0}, "'r' is 0 where a rank of 1 to 65,536 must be"),
        ({"r": True}, "'r' is True where a rank"),
        ({"r": 4.0}, "'r' is 4.0 where a rank"),
        ({"r": 10**30}, "'r' is 10*0 where a rank"),
        ({"rank_pattern": {"q_proj": -1}}, "'rank_pattern' is -1 where a rank"),
        ({"rank_pattern": [1]}, "'rank_pattern' is no object of patterns"),
        ({"rank_pattern": {f"m{i}": 1 for i in range(9000)}}, "has 9,000 patterns, 8,192 are"),
        ({"lora_alpha": None}, "'lora_alpha' is None where a finite number"),
        ({"lora_alpha": 10**400}, "holds a number of 401 digits"),
        ({"lora_alpha": math.nan}, "'lora_alpha' is nan where a finite number"),
        ({"alpha_pattern": {"q_proj": "8"}}, "'alpha_pattern' is '8' where a finite number"),
        ({"use_rslora": "yes"}, "'use_rslora' is no true or false"),
        ({"peft_type": ["LORA"]}, "is a PEFT adapter of type .* only LORA is known"),
    ],
)
def test_values_that_are_refused(tmp_path: Path, values: dict[str, object], problem: str) -> None:
    path = write(tmp_path, **values)
    with pytest.raises(ArtifactError, match=problem) as refusal:
        PeftConfig.read(path)
    assert str(refusal.value).startswith(str(path))
    assert len(str(refusal.value)) < 600


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '"x"', "\xff"])
def test_files_that_hold_no_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError, match=re.escape(str(path))):
        PeftConfig.read(path)
