from __future__ import annotations

import json

import pytest
from starlette.exceptions import HTTPException

from eoracc.runtime.server.api.body import read_json


def test_json_is_read_as_python_reads_it() -> None:
    value = {"a": [1, 2.5, "\u00e9\ud800", None, True], "b": {"a": {}}}
    assert read_json(json.dumps(value).encode()) == value
    assert read_json(b"\xef\xbb\xbf[1]") == [1]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"seed": 1, "seed": 2}', "the body gives 'seed' twice: give it once"),
        (b'{"a": [{"b": 1, "b": 1}]}', "the body gives 'b' twice: give it once"),
        (
            b'{"a": {"\\ud800": 1}}',
            r"the body has a field '\ud800', which is not valid Unicode: mend it",
        ),
        (b"[NaN]", "the body is not valid JSON: NaN is no number in JSON"),
        (b"[-Infinity]", "the body is not valid JSON: -Infinity is no number in JSON"),
        (b"\xff", "the body is not UTF-8 text: send JSON in UTF-8"),
        (b"[" * 100_000, "the body is nested too deeply: send a flat object"),
        (b"1" * 5000, "the body holds a number of too many digits: shorten it"),
    ],
    ids=str,
)
def test_what_could_be_read_in_two_ways_is_refused(body: bytes, text: str) -> None:
    with pytest.raises(HTTPException) as refused:
        read_json(body)
    assert refused.value.status_code == 400
    assert refused.value.detail == text


def test_broken_json_names_the_place() -> None:
    with pytest.raises(json.JSONDecodeError) as refused:
        read_json(b'{"a": }')
    assert refused.value.pos == 6
