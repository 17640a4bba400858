from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from eoracc.runtime import ArtifactError, BackendError, Model, load
from eoracc.runtime.manifest import read_manifest
from eoracc.runtime.session import open_session
from tests.tiny_artifact import write_byte_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "a state of the union"


@pytest.fixture(scope="module")
def model(tiny_artifact: Path) -> Model:
    return load(tiny_artifact)


def test_encodes_bytes(model: Model) -> None:
    tokens = model.encode(TEXT)
    assert len(tokens) == len(TEXT)
    assert tokens[1] == tokens[7] == tokens[10]  # blanks


def test_chat_template_wraps_the_prompt(model: Model) -> None:
    assert model.has_chat_template
    chat, plain = model.encode(TEXT, chat=True), model.encode(TEXT)
    start = next(i for i in range(len(chat)) if chat[i : i + len(plain)] == plain)
    assert chat[start - len("user: ") : start] == model.encode("user: ")
    assert chat[-len("assistant: ") :] == model.encode("assistant: ")


def test_a_prompt_begins_with_bos_where_the_tokenizer_says_so(
    tiny_artifact: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    write_byte_tokenizer(folder, bos=True, chat=True)
    model = Model(folder, read_manifest(folder))
    plain = model.encode(TEXT)
    assert plain[0] == 1
    assert len(plain) == 1 + len(TEXT)
    chat = model.encode(TEXT, chat=True)
    assert chat[0] == 1  # the template's own
    assert chat[1] != 1
    assert model.encode(TEXT) == plain


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_the_tokens(model: Model, tiny_artifact: Path, threads: int) -> None:
    prompt = model.encode(TEXT)
    other = load(tiny_artifact, threads=threads)
    assert list(other.generate_tokens(prompt, 16)) == list(model.generate_tokens(prompt, 16))


def test_greedy_tokens_agree_with_and_without_the_library(
    model: Model, tiny_artifact: Path
) -> None:
    prompt = model.encode(TEXT)
    generated = list(model.generate_tokens(prompt, 64))
    for library in (True, False):
        session = open_session(tiny_artifact, library=library, threads=1)
        assert session.generate([prompt], 64, stop=[2]) == [generated]


def test_characters_of_several_tokens_come_whole(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "naïve 日本 😀 end"
    tokens = model.encode(text)
    assert len(tokens) == len(text.encode())
    monkeypatch.setattr(model, "generate_tokens", lambda *_, **__: iter(tokens))
    pieces = list(model.generate(TEXT))
    assert "".join(pieces) == text
    assert all(pieces)


def test_the_token_that_ends_the_text_is_left_out(tiny_artifact: Path, tmp_path: Path) -> None:
    free = list(load(tiny_artifact).generate_tokens([5, 6, 7], 12))
    end = free[6]
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = [2, end]
    (folder / "genai_config.json").write_text(json.dumps(config))
    model = Model(folder, load(tiny_artifact).manifest)
    assert list(model.generate_tokens([5, 6, 7], 12)) == free[: free.index(end)]


def test_sampling_repeats_with_its_seed_only(model: Model) -> None:
    def sample(seed: int) -> list[int]:
        return list(model.generate_tokens(model.encode(TEXT), 24, temperature=1.5, seed=seed))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_top_p_near_zero_is_greedy(model: Model) -> None:
    prompt = model.encode(TEXT)
    sampled = model.generate_tokens(prompt, 24, temperature=1.5, top_p=1e-6, seed=1)
    assert list(sampled) == list(model.generate_tokens(prompt, 24))


def test_bounds(model: Model) -> None:
    assert list(model.generate_tokens(model.encode(TEXT), 0)) == []
    with pytest.raises(ArtifactError, match="the prompt is empty"):
        next(model.generate_tokens([], 4))
    with pytest.raises(ArtifactError, match="the prompt has 128 tokens, the model takes 128"):
        next(model.generate("x" * 128, 4))
    assert len(list(model.generate_tokens([5] * 120, 99))) <= 8


def test_changed_byte_is_found_before_anything_is_loaded(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    library = folder / "libeoracc_ops.so"
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)
    monkeypatch.setattr("eoracc.runtime.model.import_backend", lambda _: pytest.fail("loaded"))
    with pytest.raises(ArtifactError, match=r"libeoracc_ops\.so: its content is not"):
        load(folder)


def test_missing_package_is_named_with_its_install_line(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(
        BackendError, match=r"onnxruntime-genai is not installed: pip install 'eoracc\[cpu\]'"
    ):
        load(tiny_artifact)


def test_artifact_without_chat_template(tiny_artifact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model = Model(folder, load(tiny_artifact).manifest)
    assert not model.has_chat_template
    with pytest.raises(ArtifactError, match="has no chat template: use --no-chat"):
        model.encode(TEXT, chat=True)


def test_runtime_needs_no_torch(tiny_artifact: Path) -> None:
    script = (
        "import sys\n"
        "from eoracc.runtime import load\n"
        "''.join(load(sys.argv[1]).generate('abc', 4))\n"
        "heavy = {'torch', 'transformers', 'eoracc.compiler', 'eoracc.passes'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_artifact)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
