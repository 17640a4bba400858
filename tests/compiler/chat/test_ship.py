"""Every reader of an artifact's chat templates renders what transformers renders."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from eoracc.compiler.chat.conversations import Conversation, conversations_for
from eoracc.compiler.chat.ship import ChatTemplates, ship_chat
from eoracc.errors import ModelError, RequestError
from eoracc.runtime.decode.chat_files import Chat
from eoracc.runtime.request import ChatOptions
from tests.chats import SPECIAL_TOKENS, TEMPLATES, of_transformers, user
from tests.tiny_artifact import write_byte_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

TRIMMED = "{% for m in messages %}\n  {% if 'x' in m.content %}\n<{{ m.content }}>\n{% endif %}"
TRIMMED += "{% endfor %}"


def ship(sources: dict[str, str], folder: Path, *, genai: bool = True) -> dict[str, Any]:
    write_byte_tokenizer(folder, chat=True)
    (folder / "genai_config.json").write_text(
        json.dumps(
            {
                "model": {
                    "type": "llama",
                    "context_length": 1,
                    "vocab_size": 1,
                    "decoder": {"filename": "model.onnx"},
                },
                "search": {},
            }
        )
    )
    return ship_chat(ChatTemplates(sources, SPECIAL_TOKENS), folder, genai=genai)


def of_genai(folder: Path, conversation: Conversation) -> str:
    """What unmodified onnxruntime-genai renders with the files of an artifact."""
    genai: Any = pytest.importorskip("onnxruntime_genai")
    tools = conversation.options.tools
    return str(
        genai.Tokenizer(str(folder)).apply_chat_template(
            json.dumps(conversation.messages),
            tools=None if tools is None else json.dumps(tools),
            add_generation_prompt=conversation.options.begins_answer,
        )
    )


@pytest.mark.parametrize("name", ["llama3", "qwen3", "smollm3", "zephyr"])
def test_genai_is_given_a_template_that_it_renders_right(name: str, tmp_path: Path) -> None:
    source = TEMPLATES[name].read_text(encoding="utf-8")
    report = ship({"default": source}, tmp_path)
    assert report["onnxruntime_genai"]["differences"] == []
    assert report["onnxruntime_genai"]["rewritten"]
    conversations = conversations_for([source])
    assert report["onnxruntime_genai"]["chats"] == len(conversations)
    for conversation in conversations:
        wanted = of_transformers(source, conversation.messages, conversation.options)
        assert wanted is not None
        assert of_genai(tmp_path, conversation) == wanted
        assert Chat(tmp_path).render(conversation.messages, conversation.options) == wanted


def test_what_genai_renders_right_is_left_alone(tmp_path: Path) -> None:
    source = TEMPLATES["qwen2_5"].read_text(encoding="utf-8")
    report = ship({"default": source}, tmp_path)
    assert report["onnxruntime_genai"] == {"chats": 11, "differences": [], "rewritten": False}
    assert (tmp_path / "chat_template.jinja").read_text() == source
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_transformers_reads_the_original(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    assert ship({"default": TRIMMED}, tmp_path)["onnxruntime_genai"]["rewritten"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == TRIMMED
    assert ChatTemplates.of(tokenizer).sources == {"default": TRIMMED}


def test_named_templates_stay_beside_each_other(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    sources = {"default": TRIMMED, "tool_use": "T", "rag": "R"}
    report = ship(sources, tmp_path)
    assert report["templates"] == ["default", "rag", "tool_use"]
    assert ChatTemplates.of(AutoTokenizer.from_pretrained(tmp_path)).sources == sources
    assert Chat(tmp_path).sources == sources
    # Built again, the folder has no templates of before.
    ship({"rag": "R"}, tmp_path)
    assert Chat(tmp_path).sources == {"rag": "R"}
    ship({}, tmp_path)
    assert Chat(tmp_path).sources == {}


def test_what_cannot_be_rewritten_is_reported(tmp_path: Path) -> None:
    report = ship({"default": "{{ messages[0].content | wordcount }}"}, tmp_path)
    genai = report["onnxruntime_genai"]
    assert len(genai["differences"]) == genai["chats"] > 0
    assert genai["differences"][0].startswith("one turn: fails: ")
    assert not genai["rewritten"]


def test_an_invalid_template_is_reported(tmp_path: Path) -> None:
    report = ship({"default": "{% if %}", "rag": "R"}, tmp_path)
    (note,) = report["notes"]
    assert note.startswith("chat template 'default': is not a Jinja template")
    assert "onnxruntime_genai" not in report


def test_special_tokens_of_the_class_are_shipped(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    bos = {"__type": "AddedToken", "content": "<s>", "special": True}
    path.write_text(json.dumps({"bos_token": bos, "eos_token": None, "chat_template": []}))
    ship_chat(ChatTemplates({"default": "{{ eos_token }}"}, SPECIAL_TOKENS), tmp_path, genai=False)
    config = json.loads(path.read_text())
    assert config == {"bos_token": bos, "eos_token": "</s>", "unk_token": "<unk>"}
    assert Chat(tmp_path).render([user("hi")], ChatOptions()) == "</s>"


def test_a_name_unfit_for_a_file_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    factory: Any = PreTrainedTokenizerFast
    tokenizer = factory(tokenizer_object=Tokenizer(models.BPE()))
    tokenizer.chat_template = {"../evil": "x"}
    with pytest.raises(ModelError, match=r"chat template '\.\./evil' cannot be that of a file"):
        ChatTemplates.of(tokenizer)


def test_texts_that_a_template_looks_for_are_tried() -> None:
    source = (
        "{{ '</a>' in x }}{{ x.split('<b>')[0] }}{{ x | replace('c', '') }}{{ '<d>' not in x }}"
    )
    names = [conversation.name for conversation in conversations_for([source, source])]
    assert [name for name in names if name.endswith("' inside")] == [
        "'</a>' inside",
        "'<d>' inside",
        "'<b>' inside",
        "'c' inside",
    ]
    assert "tools" not in names
    assert "tools" in [conversation.name for conversation in conversations_for(["{{ tools }}"])]


def test_conversations_fit_templates_of_models(tmp_path: Path) -> None:
    source = TEMPLATES["mistral_v3"].read_text(encoding="utf-8")
    ship({"default": source}, tmp_path)
    for conversation in conversations_for([source]):
        try:
            text = Chat(tmp_path).render(conversation.messages, conversation.options)
        except RequestError:
            continue
        assert text.startswith("<s>[INST]") or "[AVAILABLE_TOOLS]" in text
