"""The sound files that cases are made from: every kind of file that eoracc reads from others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ADAPTER", "TEMPLATES", "write_templates"]

ADAPTER = "math"
TEMPLATES = (
    "checkpoint",
    "shards",
    "sentencepiece",
    "gguf",
    "artifact",
    "peft",
    "project",
    "chat",
)
"""Folders of :func:`write_templates`."""

_PASSES: Sequence[Any] = ("calibrate", {"quantize_rtn": {"bits": 4, "group_size": 16}})
_CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Yes."},
]


def write_templates(root: Path) -> None:
    """Write a folder of each of :data:`TEMPLATES` into ``root``."""
    from tests.tiny_artifact import write_byte_tokenizer
    from tests.tiny_build import tiny_workspace

    workspace = tiny_workspace(root / "workspace", num_hidden_layers=1)
    write_byte_tokenizer(workspace / "model", chat=True)
    checkpoint = Path(shutil.copytree(workspace / "model", root / "checkpoint"))
    _write_token_files(checkpoint)
    _write_shards(checkpoint, root / "shards")
    _write_sentencepiece(checkpoint, root / "sentencepiece")
    _write_gguf(root / "gguf")
    _write_artifact(workspace, root / "artifact")
    _write_peft(root / "artifact", root / "peft")
    _write_project(root / "project")
    _write_chat(root / "chat")
    shutil.rmtree(workspace)


def _write_token_files(folder: Path) -> None:
    """Files that older checkpoints have beside tokenizer.json."""
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": {"content": "<unk>"}}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 0, "<s>": 1}))


def _write_shards(checkpoint: Path, folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, own in shards.items() for name in own}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_sentencepiece(checkpoint: Path, folder: Path) -> None:
    import sentencepiece

    shutil.copytree(checkpoint, folder)
    for name in ("tokenizer.json", "added_tokens.json"):
        (folder / name).unlink()
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat sat on the mat", "a dog and a cat", "hello"] * 20),
            model_writer=file,
            vocab_size=50,
            model_type="bpe",
            minloglevel=3,
            num_threads=1,
        )


def _write_gguf(folder: Path) -> None:
    from tests.gguf_files import VOCABULARY, write_gguf
    from tests.tiny_models import tiny_model

    source = tiny_model(
        "llama", folder / "source", vocab_size=len(VOCABULARY), num_hidden_layers=1, head_dim=8
    )
    write_gguf(folder / "model.gguf", source)
    shutil.rmtree(source)


def _write_artifact(workspace: Path, folder: Path) -> None:
    from eoracc.compiler.driver import build
    from eoracc.compiler.progress import SilentProgress
    from eoracc.runtime.adapters.adapter import Adapter
    from eoracc.runtime.adapters.store import add_adapter
    from eoracc.runtime.artifact.manifest import read_manifest
    from tests.tiny_artifact import tiny_factors, tiny_slots
    from tests.tiny_build import tiny_config

    config = tiny_config(_PASSES, verify={"windows": 1, "window_length": 16})
    built = build(config, config_dir=workspace, progress=SilentProgress()).output
    factors = tiny_factors(tiny_slots(built), rank=3, seed=0)
    add_adapter(built, Adapter(ADAPTER, factors, read_manifest(built).digest))
    built.rename(folder)


def _write_peft(artifact: Path, folder: Path) -> None:
    from eoracc.compiler.adapters.exchange import export_peft

    export_peft(artifact, ADAPTER, folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["rank_pattern"] = {r".*\.q_proj": config["r"]}
    config["alpha_pattern"] = {"o_proj": config["r"]}
    path.write_text(json.dumps(config))


def _write_project(folder: Path) -> None:
    folder.mkdir()
    content = {
        "model": "missing",
        "calibration": {
            "mixture": [{"text": "text.txt", "weight": 2}, {"text": "chats.jsonl"}],
            "samples": 4,
            "sequence_length": 16,
            "seed": 3,
        },
        "passes": [
            "calibrate",
            {"quantize_gptq": {"bits": 3, "group_size": 16, "damping": 0.01}},
            {
                "eora": {
                    "rank": 4,
                    "overrides": {"*.o_proj": {"rank": 2}, "*.q_proj": {"skip": True}},
                }
            },
        ],
        "targets": ["onnxruntime"],
        "onnxruntime": {"accuracy_level": 0, "adapter_type": "int8"},
        "adapters": {"math": {"text": "text.txt", "rank": 4}},
        "verify": {"windows": 2, "compare": ["svd"], "limits": {"kl": 0.5}},
        "compare": {"methods": ["none", "svd"], "budgets": ["3.5", "30%"]},
        "output": "out",
    }
    (folder / "model.yaml").write_text(json.dumps(content, indent=1))
    (folder / "text.txt").write_text("A state of the union.\n\nTwo words, and three.\n" * 60)
    records = [{"text": f"Record {i} of many words.", "messages": _CONVERSATION} for i in range(40)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "chats.jsonl").write_text(lines)


def _write_chat(folder: Path) -> None:
    folder.mkdir()
    body = {
        "model": "artifact",
        "messages": _CONVERSATION[:2],
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "stop": ["\n", "end"],
        "logit_bias": {"70": -5},
        "logprobs": True,
        "top_logprobs": 2,
        "n": 1,
        "stream": False,
        "adapters": {ADAPTER: 0.5},
        "chat_template_kwargs": {"opening": "x"},
    }
    (folder / "body.json").write_text(json.dumps(body))
