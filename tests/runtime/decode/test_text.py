"""Stop strings do not depend on pieces; characters come whole; chats are rendered and checked."""

from __future__ import annotations

import json
import shutil
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eoracc.errors import ArtifactError, RequestError
from eoracc.runtime.decode.text import StopStrings, Tokenizer
from eoracc.runtime.request import ChatOptions
from tests.tiny_artifact import write_byte_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from eoracc.runtime.request import Prompt


@pytest.fixture(scope="module")
def tokenizer(tiny_artifact: Path) -> Tokenizer:
    return Tokenizer(tiny_artifact)


def first_stop(text: str, stops: list[str]) -> str:
    """Letter by letter: the text before the longest stop string that is complete first."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


LETTERS = st.text("ab", max_size=12)


@given(LETTERS, st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_what_comes_out_does_not_depend_on_the_pieces(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    matcher = StopStrings(stops)
    out = ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        if matcher.found:
            break
        out += matcher.push(text[start:end])
        # What is out can never be taken back.
        assert first_stop(text, stops).startswith(out)
    out += matcher.flush()
    assert out == first_stop(text, stops)
    assert matcher.found == (first_stop(text, stops) != text)


def test_nothing_is_held_back_that_cannot_be_completed() -> None:
    matcher = StopStrings(["\n\n", "END"])
    assert [matcher.push(piece) for piece in ("a\n", "b", "E", "N", "d")] == [
        "a",
        "\nb",
        "",
        "",
        "ENd",
    ]
    assert matcher.push("x\n") == "x"
    assert matcher.flush() == "\n"
    assert not matcher.found


def test_stop_strings_that_end_where_none_is_searched_for() -> None:
    matcher = StopStrings(["ab", "xaby", "bc"])
    # "xab" is held back for "xaby"; the "ab" within does not count.
    assert matcher.push("xab", search=False) == ""
    assert (matcher.push("zb"), matcher.found) == ("xabz", False)
    assert (matcher.push("c"), matcher.found) == ("", True)


def test_a_stop_string_that_is_included() -> None:
    matcher = StopStrings(["END", "ND!"], include=True)
    assert [matcher.push(piece) for piece in ("aEN", "D! b")] == ["a", "END"]
    assert matcher.found


def test_words_are_encoded_with_and_without_a_blank(tokenizer: Tokenizer) -> None:
    word = tokenizer.encode("ab")
    (blank,) = tokenizer.encode(" ")
    assert tokenizer.encode_words(["ab", " ab"]) == [word, [blank, *word], [blank, *word]]
    assert tokenizer.encode_words(()) == []


def test_a_word_without_tokens(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(text: str, *, special: bool) -> list[int]:
        assert not special
        return [] if text == "\u00ad" else [1]

    monkeypatch.setattr(tokenizer, "encode", encode)
    with pytest.raises(RequestError, match=r"bad_words: '\\xad' has no tokens: leave it out"):
        tokenizer.encode_words(["a", "\u00ad"])


def test_characters_of_several_tokens_come_whole(tokenizer: Tokenizer) -> None:
    text = "naïve 日本 😀 end"
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text.encode())
    stream = tokenizer.stream()
    pieces = [stream.decode(token) for token in tokens]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert tokenizer.decode(tokens) == text


def test_prompts_of_all_kinds(tokenizer: Tokenizer) -> None:
    text = tokenizer.encode("hello")
    assert tokenizer.encode_prompt("hello") == text
    assert tokenizer.encode_prompt(text) == tokenizer.encode_prompt(list(np.array(text))) == text
    assert tokenizer.encode_prompt([]) == []
    chat = tokenizer.encode_prompt("hello", chat=True)
    assert tokenizer.encode_prompt([{"role": "user", "content": "hello"}]) == chat
    assert chat == tokenizer.encode("<s>user: hello</s><s>assistant: ", special=False)


def test_a_whole_chat_is_rendered(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": 'Be "brief" {{ m.role }} \\'},
        {"role": "user", "content": "日本?"},
        {"role": "assistant", "content": "yes\nno"},
    ]
    wanted = "".join(f"<s>{one['role']}: {one['content']}</s>" for one in messages)
    whole = ChatOptions(add_generation_prompt=False)
    assert tokenizer.chat.render(messages, whole) == wanted
    begun = tokenizer.encode(f"{wanted}<s>assistant: ", special=False)
    assert tokenizer.encode_prompt(messages) == tokenizer.encode_chat(messages) == begun
    assert tokenizer.encode_prompt(messages, options=whole) == tokenizer.encode(
        wanted, special=False
    )


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([{"role": "user"}], r"messages\[0\]: its 'content' is missing or no text"),
        (["user"], r"messages\[0\]: its 'role' is missing or no text"),
        ([{"content": "a"}], r"messages\[0\]: its 'role' is missing or no text"),
        (
            [{"role": "user", "content": "a"}, {"role": "user", "content": 3}],
            r"messages\[1\]: its 'content' is missing or no text",
        ),
    ],
)
def test_bad_messages_are_named(tokenizer: Tokenizer, messages: Prompt, problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        tokenizer.encode_prompt(messages)
    with pytest.raises(RequestError, match="messages: there are none"):
        tokenizer.encode_chat([])


def test_template_that_refuses(tiny_artifact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    with pytest.raises(RequestError, match=r"the chat template refuses them: .*no system role"):
        Tokenizer(folder).encode_prompt("hello", chat=True)


def test_artifact_without_chat_template(tiny_artifact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(folder)
    assert not tokenizer.has_chat_template
    with pytest.raises(ArtifactError, match="has no chat template: use --no-chat"):
        tokenizer.encode_prompt("hello", chat=True)


def test_a_text_begins_with_bos_where_the_tokenizer_says_so(
    tiny_artifact: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    write_byte_tokenizer(folder, bos=True, chat=True)
    tokenizer = Tokenizer(folder)
    plain = tokenizer.encode("hello")
    assert plain[0] == tokenizer.begin == tokenizer.beginning == 1
    assert plain[1:] == tokenizer.encode("hello", special=False)
    chat = tokenizer.encode_prompt("hello", chat=True)
    assert chat[:2] != [1, 1]
    assert chat[0] == 1  # the template's own


def test_threads_do_not_take_each_others_bos(tiny_artifact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    write_byte_tokenizer(folder, bos=True)
    tokenizer = Tokenizer(folder)
    found: dict[bool, set[int]] = {True: set(), False: set()}

    def work(special: bool) -> None:
        for _ in range(300):
            found[special].add(tokenizer.encode("hello", special=special)[0])

    threads = [threading.Thread(target=work, args=(special,)) for special in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[True] == {1}
    assert len(found[False]) == 1
    assert found[False] != {1}
