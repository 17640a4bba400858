from __future__ import annotations

import json
import threading

import pytest
from starlette.exceptions import HTTPException

from eoracc.runtime.server.api import body
from eoracc.runtime.server.api.body import read_json
from tests.runtime.server.fake import COMPLETIONS, JSON, Server, run


def test_json_is_read_as_python_reads_it() -> None:
    value = {"a": [1, 2.5, "\u00e9\ud800", None, True], "b": {"a": {}}}
    assert read_json(json.dumps(value).encode()) == value
    assert read_json(b"\xef\xbb\xbf[1]") == [1]


@pytest.mark.parametrize(
    ("content", "text"),
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
def test_what_could_be_read_in_two_ways_is_refused(content: bytes, text: str) -> None:
    with pytest.raises(HTTPException) as refused:
        read_json(content)
    assert refused.value.status_code == 400
    assert refused.value.detail == text


def test_broken_json_names_the_place() -> None:
    with pytest.raises(json.JSONDecodeError) as refused:
        read_json(b'{"a": }')
    assert refused.value.pos == 6


@pytest.mark.parametrize("size", [0, 1 << 15])
def test_a_large_body_is_read_beside_the_event_loop(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = []

    def read(content: bytes) -> object:
        readers.append(threading.current_thread() is threading.main_thread())
        return read_json(content)

    monkeypatch.setattr(body, "read_json", read)

    async def test(server: Server) -> None:
        padding = {"metadata": "x" * size}
        answer = await server.post(COMPLETIONS, prompt="hello", **padding)
        assert answer.json()["choices"][0]["text"] == "HELLO"
        for fields, param in (
            ({"prompt": "a", "temperature": 3}, "temperature"),
            ({"prompt": "a", "unheard": 3}, "unheard"),
            ({"prompt": "a", "stop_token_ids": [-1] * 100}, "stop_token_ids.0"),
        ):
            answer = await server.post(COMPLETIONS, **fields, **padding)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == param
        broken = b'{"prompt": ' + b" " * size
        answer = await server.client.post(COMPLETIONS, content=broken, headers=JSON)
        assert answer.status_code == 400
        assert "the body is not valid JSON" in answer.json()["error"]["message"]

    run(test)
    assert readers == [size == 0] * 5


def test_strings_to_look_for_are_short() -> None:
    async def test(server: Server) -> None:
        for name, value in (("stop", "x" * 257), ("stop", ["x" * 257]), ("bad_words", ["x" * 257])):
            answer = await server.post(COMPLETIONS, prompt="a", **{name: value})
            assert answer.status_code == 400
            message = answer.json()["error"]["message"]
            assert message == f"{name}: holds a string of more than 256 characters"
        answer = await server.post(COMPLETIONS, prompt="a", stop="x" * 256, bad_words=["x" * 256])
        assert answer.status_code == 200

    run(test)
