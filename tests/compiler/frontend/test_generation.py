"""generation_config.json: what is taken over, and what is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from eoracc.compiler.frontend.generation import read_generation_config
from eoracc.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path


def test_checkpoint_without_one(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) is None


def test_fields_are_read_and_null_is_no_value(tmp_path: Path) -> None:
    fields = {"eos_token_id": [2, 7], "temperature": 1, "top_p": None, "something_new": {"a": 1}}
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    found = read_generation_config(tmp_path)
    assert found is not None
    assert (found.eos_token_id, found.temperature, found.top_p) == ([2, 7], 1, None)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{'do_sample': true}", "is not valid JSON"),
        ("", "is empty"),
        ("[]", "is a list where a JSON object is expected"),
        ('{"eos_token_id": "</s>"}', "field eos_token_id is '</s>': it must be a token's number"),
        ('{"eos_token_id": [2, "x"]}', "field eos_token_id is"),
        ('{"eos_token_id": []}', "field eos_token_id is"),
        ('{"pad_token_id": 0.5}', "field pad_token_id is 0.5"),
        ('{"bos_token_id": true}', "field bos_token_id is True"),
        ('{"eos_token_id": 4000000000}', "field eos_token_id is 4000000000: it must be a token's"),
        ('{"pad_token_id": -2}', "field pad_token_id is -2: it must be a token's number"),
        ('{"temperature": NaN}', "field temperature is nan: it must be a number from 0 to 1e"),
        ('{"temperature": 1e999}', "field temperature is inf: it must be a number"),
        ('{"top_k": 1' + "0" * 200 + "}", "field top_k is 1000.*: it must be a number from -1 to"),
        ('{"temperature": "warm"}', "field temperature is 'warm': it must be a number"),
        ('{"top_k": "5"}', "field top_k is '5'"),
        ('{"do_sample": "yes"}', "field do_sample is 'yes': it must be true or false"),
        ('{"cache_implementation": "none"}', "transformers cannot read it .*cache_implementation"),
        ('{"watermarking_config": 3}', "transformers cannot read it"),
    ],
)
def test_damaged(tmp_path: Path, content: str, match: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ModelError, match=rf"generation_config\.json.*{match}") as caught:
        read_generation_config(tmp_path)
    assert "\n" not in str(caught.value)
