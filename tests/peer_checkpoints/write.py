"""Write the tiny checkpoints of this folder with the packages that compress models elsewhere.

They need an environment of their own, made in a folder outside of the repository::

    python -m venv FOLDER/venv
    FOLDER/venv/bin/pip install torch==2.13.0
    FOLDER/venv/bin/pip install -r tests/peer_checkpoints/requirements.txt
    FOLDER/venv/bin/python tests/peer_checkpoints/write.py [NAME ...]

Beside each checkpoint, ``peer.safetensors`` holds the oracle of the tests, in float32: some weights
as the package itself dequantizes them (``<module>``), and the logits on ``ids`` of the original
with all of them.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

HERE = Path(__file__).parent
ORIGINAL = HERE / "original"
VOCABULARY = 96
SHOWN = ("k_proj", "o_proj", "down_proj")
"""Modules whose weights are kept: of every shape one. The logits depend on all."""
GPTQ: Mapping[str, Mapping[str, Any]] = {
    "gptq_w4": {"bits": 4, "group_size": 64},
    "gptq_w4_act_order": {"bits": 4, "group_size": 32, "desc_act": True},
    "gptq_w3": {"bits": 3, "group_size": 32},
    "gptq_w3_asymmetric": {"bits": 3, "group_size": 64, "sym": False, "format": "gptq_v2"},
    "gptq_w2_asymmetric": {"bits": 2, "group_size": 32, "sym": False},
    "gptq_w8_rows": {"bits": 8, "group_size": -1, "act_group_aware": False},
}


def ids(count: int = 12, seed: int = 1) -> torch.Tensor:
    """Token ids ``[1, count]``."""
    return torch.randint(0, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


def write_original() -> None:
    """One layer with odd sizes: groups do not divide every row, keys are fewer than queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.1 * torch.randn_like(parameter)
    # What is not quantized is cast to bfloat16 by GPTQModel: these values it keeps.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(ORIGINAL)
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, "t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(ORIGINAL / "tokenizer.json"))
    (ORIGINAL / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0"})
    )


def keep(folder: Path, name: str) -> Path:
    """Move what a loader needs from ``folder`` to the checked-in folder ``name``."""
    kept = HERE / name
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    for file in ("config.json", "quantize_config.json", "model.safetensors"):
        if (folder / file).is_file():
            shutil.copyfile(folder / file, kept / file)
    return kept


def write_oracle(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """The original with ``weights`` in place of its linears, and its logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ORIGINAL, dtype=torch.float32)
    for name, weight in weights.items():
        module = model.get_submodule(name)
        assert module.weight.shape == weight.shape, name
        module.weight.data = weight
    tokens = ids()
    with torch.no_grad():
        logits = model(tokens).logits
    shown = {name: weight for name, weight in weights.items() if name.endswith(SHOWN)}
    save_file({"ids": tokens, "logits": logits, **shown}, folder / "peer.safetensors")


def write_gptq(name: str, work: Path) -> None:
    """A checkpoint of GPTQModel, read again by GPTQModel."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    model = GPTQModel.load(
        str(ORIGINAL), quantize_config=QuantizeConfig(**GPTQ[name]), dtype=torch.float32
    )
    calibration = [
        {"input_ids": ids(48, seed)[0].tolist(), "attention_mask": [1] * 48}
        for seed in range(2, 18)
    ]
    model.quantize(calibration, batch_size=1)
    model.save(str(work / name))
    folder = keep(work / name, name)
    loaded = GPTQModel.load(
        str(work / name), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16
    )
    weights = {}
    for path, module in loaded.model.named_modules():
        if isinstance(module, TorchLinear):
            # Its product rounds to the type of the scales, which the file has in float16.
            module.scales = module.scales.float()
            weights[path] = super(TorchLinear, module).dequantize_weight().T.contiguous()
    write_oracle(folder, weights)


WRITERS: Mapping[str, Callable[[str, Path], None]] = dict.fromkeys(GPTQ, write_gptq)


def main() -> None:
    """Write the original, where there is none, and the named checkpoints, or all."""
    if not ORIGINAL.exists():
        write_original()
    for name in sys.argv[1:] or WRITERS:
        with tempfile.TemporaryDirectory() as work:
            WRITERS[name](name, Path(work))


if __name__ == "__main__":
    main()
