"""Whole builds and runs of checkpoints with tokenizers that onnxruntime-genai does not open."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from eoracc.compiler import driver
from eoracc.compiler.cli import main
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.report.lines import tokenizer_lines
from eoracc.runtime import load
from eoracc.runtime.artifact.manifest import describe_file, read_manifest
from eoracc.runtime.parity.tokens import TOKENS_FILE
from tests.tiny_artifact import CHAT_TEMPLATE
from tests.tiny_build import tiny_config, tiny_workspace
from tests.tiny_models import tiny_model
from tests.tokenizer_zoo import STRINGS, ZOO

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from eoracc.compiler.driver import BuildResult

PASSES = [{"quantize_rtn": {"bits": 8, "group_size": 16}}]


def vocab_and_merges(model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    config = (model / "config.json").read_text()
    ZOO["vocab_and_merges"](model)
    (model / "config.json").write_text(config)


def named_templates(model: Path) -> None:
    path = model / "tokenizer_config.json"
    templates = [
        {"name": name, "template": CHAT_TEMPLATE.replace("assistant", name)}
        for name in ("default", "tool_use")
    ]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
    (model / "chat_template.jinja").unlink(missing_ok=True)


def optional_space(model: Path) -> None:
    """DeepSeek's pattern, which genai's engine of regular expressions takes for an error."""
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\s?\p{L}+"}}
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            split | {"behavior": "Isolated", "invert": False},
            content["pre_tokenizer"] | {"use_regex": False},
        ],
    }
    path.write_text(json.dumps(content))


def build(workspace: Path) -> BuildResult:
    verify = {"windows": 2, "window_length": 32, "parity": False}
    config = tiny_config(PASSES, verify=verify)
    return driver.build(config, config_dir=workspace, progress=SilentProgress())


@pytest.mark.parametrize(
    ("change", "said"),
    [(vocab_and_merges, ""), (named_templates, ""), (optional_space, "Invalid regex")],
)
def test_what_is_built_runs(tmp_path: Path, change: Callable[[Path], None], said: str) -> None:
    from transformers import AutoTokenizer

    workspace = tiny_workspace(tmp_path)
    tiny_model("smollm", workspace / "model", vocab_size=420)
    change(workspace / "model")
    built = build(workspace)
    (line,) = tokenizer_lines(built.report.tokenizer) or [""]
    assert said in line
    model = load(built.output)
    tokenizer: Any = AutoTokenizer.from_pretrained(workspace / "model")
    for text in STRINGS:
        assert model.encode(text) == tokenizer(text)["input_ids"]
    options: dict[str, Any] = {"ignore_end": True, "temperature": 1.0, "seed": 1}
    completion = model.generate("abc", 12, **options)
    assert len(completion.tokens) == 12
    assert completion.text == model.decode(completion.tokens)
    pieces = [piece.text for piece in model.generate("abc", 12, stream=True, **options)]
    assert "".join(pieces) == completion.text
    if change is named_templates:
        assert (
            model.encode("a", chat=True)
            == tokenizer.apply_chat_template(
                [{"role": "user", "content": "a"}], add_generation_prompt=True
            )["input_ids"]
        )


def test_verify_compares_tokens(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {"passed": True, "linears": [], "logits": []}
    parity = SimpleNamespace(passed=True, as_dict=lambda: figures)
    monkeypatch.setattr("eoracc.runtime.parity.check.check_parity", lambda *_: parity)
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    done = CliRunner().invoke(main, ["verify", str(folder)])
    assert done.exit_code == 0, done.output
    assert "tokens: those of the checkpoint (" in done.output
    done = CliRunner().invoke(main, ["verify", str(folder), "--json"])
    assert json.loads(done.stdout)["tokens"]["difference"] is None
    path = folder / "tokenizer.json"
    content = path.read_text()
    path.write_text(json.dumps(json.loads(content) | {"normalizer": {"type": "Lowercase"}}))
    renew_manifest(folder, path.name)
    done = CliRunner().invoke(main, ["verify", str(folder)])
    assert done.exit_code == 1
    assert "tokens: FAILED: 'Hello world' has tokens [" in done.output
    # An artifact of an eoracc that recorded none.
    path.write_text(content)
    (folder / TOKENS_FILE).unlink()
    renew_manifest(folder, path.name)
    renew_manifest(folder, TOKENS_FILE)
    done = CliRunner().invoke(main, ["verify", str(folder)])
    assert done.exit_code == 0
    assert "tokens: no record" in done.output


def renew_manifest(folder: Path, name: str) -> None:
    entry = describe_file(folder / name) if (folder / name).exists() else None
    manifest = read_manifest(folder).with_files({name: entry})
    (folder / "manifest.json").write_text(manifest.to_json())
