from __future__ import annotations

import json
import math

import pytest

from eoracc.report_file import encode_report

LINEAR = {
    "name": "model.layers.0.self_attn.q_proj",
    "shape": (576, 576),
    "bits": None,
    "errors": {"quantize_gptq": 0.123456789012345, "eora": 1.98765432109876e-05},
}


def test_seven_digits_of_floats_and_all_of_integers() -> None:
    content = {"linears": [LINEAR], "bytes": 123456789012, "exact": True, "none": {}, "empty": []}
    read = json.loads(encode_report(content))
    for name, error in read["linears"][0]["errors"].items():
        assert error == pytest.approx(LINEAR["errors"][name], rel=5e-7)  # type: ignore[index]
        assert len(str(error)) <= len("1.987654e-05")
    assert read["linears"][0]["shape"] == [576, 576]
    assert {name: read[name] for name in ("bytes", "exact", "none", "empty")} == {
        "bytes": 123456789012,
        "exact": True,
        "none": {},
        "empty": [],
    }


def test_what_is_read_back_gives_the_same_bytes() -> None:
    first = encode_report({"linears": [LINEAR] * 3, "text": 'a "b"\nü', "x": 1 / 3})
    assert encode_report(json.loads(first)) == first
    assert first.endswith(b"}\n")


def test_a_line_for_each_linear() -> None:
    lines = encode_report({"a": 1, "linears": [LINEAR] * 3, "b": 2}).decode().splitlines()
    assert len(lines) == 1 + 1 + 3 + 1
    assert all("q_proj" in line for line in lines[2:5])


def test_numbers_that_json_lacks_are_refused() -> None:
    for number in (math.nan, math.inf):
        with pytest.raises(ValueError, match="JSON compliant"):
            encode_report({"linears": [{"error": number}]})
