"""Templates and special tokens are found where transformers finds them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from eoracc.errors import ArtifactError, RequestError
from eoracc.runtime.decode.chat_files import Chat
from eoracc.runtime.request import ChatOptions
from tests.chats import user
from tests.tiny_artifact import write_byte_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

NAMED = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
TOKEN = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False}
TOKEN |= {"single_word": False}

CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "config": {"config": {"chat_template": "C"}},
    "list": {"config": {"chat_template": NAMED}},
    "no default": {"config": {"chat_template": NAMED[1:]}},
    "file": {"config": {"chat_template": "C"}, "chat_template.jinja": "F\r\n\n"},
    "file and list": {"config": {"chat_template": NAMED}, "chat_template.jinja": "F"},
    "folder alone": {
        "config": {"chat_template": "C"},
        "additional_chat_templates/tool_use.jinja": "A",
        "additional_chat_templates/rag.jinja": "R",
    },
    "both": {"chat_template.jinja": "F", "additional_chat_templates/tool_use.jinja": "A"},
    "old file": {"chat_template.json": '{"chat_template": "J"}'},
}


def write(folder: Path, files: dict[str, Any]) -> Path:
    """A byte tokenizer with other files, and other fields of its tokenizer_config.json."""
    write_byte_tokenizer(folder)
    for name, content in files.items():
        if name == "config":
            path = folder / "tokenizer_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | content))
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content.encode())
    return folder


def of_transformers(folder: Path, **options: Any) -> str:  # noqa: ANN401
    """What transformers renders, or that it cannot."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return str(tokenizer.apply_chat_template([user("hi")], tokenize=False, **options))
    except ValueError:
        return "refused"


@pytest.mark.parametrize("case", CASES)
def test_templates_are_chosen_as_in_transformers(case: str, tmp_path: Path) -> None:
    folder = write(tmp_path, CASES[case])
    for tools in (None, [], [{"name": "f"}]):
        wanted = of_transformers(folder, tools=tools)
        options = ChatOptions(tools=tools)
        if wanted == "refused":
            with pytest.raises((ArtifactError, RequestError), match="chat template"):
                Chat(folder).render([user("hi")], options)
        else:
            assert Chat(folder).render([user("hi")], options) == wanted


def test_a_template_by_name(tmp_path: Path) -> None:
    chat = Chat(write(tmp_path, CASES["list"]))
    assert chat.render([user("hi")], ChatOptions(template="tool_use")) == "T"
    assert chat.render([user("hi")], ChatOptions(template="default", tools=[])) == "D"
    with pytest.raises(RequestError, match="'rag': is none of default, tool_use: choose one"):
        chat.render([user("hi")], ChatOptions(template="rag"))


NAMES = (
    "{% for t in [bos_token, eos_token, pad_token, unk_token, cls_token] %}<{{ t }}>{% endfor %}"
)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config": {"bos_token": {"__type": "AddedToken", **TOKEN}, "eos_token": None}},
        {"special_tokens_map.json": json.dumps({"bos_token": TOKEN, "cls_token": "<unk>"})},
        {
            "config": {"added_tokens_decoder": {"2": TOKEN | {"content": "</s>"}}},
            "special_tokens_map.json": json.dumps({"cls_token": "<unk>"}),
        },
    ],
)
def test_special_tokens_are_those_of_transformers(files: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path, files | {"chat_template.jinja": NAMES})
    wanted = of_transformers(folder)
    assert "<<s>>" in wanted
    assert Chat(folder).render([user("hi")], ChatOptions()) == wanted


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"config": {"chat_template": 3}}, "neither a text nor a list of named templates"),
        ({"config": {"chat_template": [{"name": "default"}]}}, "neither a text nor a list"),
        ({"config": {"chat_template": [{"name": "a", "template": None}]}}, "neither a text nor"),
        ({"tokenizer_config.json": "{"}, r"tokenizer_config\.json: is not valid JSON"),
        ({"tokenizer_config.json": "[]"}, r"tokenizer_config\.json: is a list where a JSON object"),
    ],
)
def test_damaged_files_are_named(files: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=problem):
        Chat(write(tmp_path, files))
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja: is not UTF-8 text"):
        Chat(tmp_path)


def test_an_invalid_template_fails_at_its_first_use(tmp_path: Path) -> None:
    chat = Chat(write(tmp_path, {"chat_template.jinja": "{% if %}"}))
    with pytest.raises(ArtifactError, match="chat template 'default': is not a Jinja template"):
        chat.render([user("hi")], ChatOptions())
