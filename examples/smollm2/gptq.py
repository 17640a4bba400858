"""Make the checkpoints of imported_gptq.yaml: SmolLM2-135M by GPTQModel, in 4 and in 3 bits.

GPTQModel needs an environment of its own, in a folder outside of the repository::

    python -m venv FOLDER/venv
    FOLDER/venv/bin/pip install torch==2.13.0
    FOLDER/venv/bin/pip install -r tests/peer_checkpoints/requirements.txt

The first command makes a folder of safetensors from the GGUF file, in eoracc's own environment; the
second quantizes it in that of GPTQModel, some minutes for each width::

    python -m examples.smollm2.gptq original
    FOLDER/venv/bin/python examples/smollm2/gptq.py quantize 4 3
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

DATA = Path(__file__).parent / "data"
ORIGINAL = DATA / "original"
WINDOWS, LENGTH, GROUP = 8, 256, 128


def write_original() -> None:
    """Write the model of the GGUF file as a folder in float32."""
    from eoracc.compiler.frontend.load import load  # noqa: PLC0415 - GPTQModel's environment has neither
    from examples.smollm2.fetch import fetch  # noqa: PLC0415 - as above

    ORIGINAL.mkdir(exist_ok=True)
    print(load(str(fetch().gguf), work=ORIGINAL).folder)


def quantize(bits: int) -> None:
    """Write ``data/gptq-w<bits>``, calibrated on the first windows of the speeches."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # fewer are an error of GPTQModel's
    import torch  # noqa: PLC0415 - of that environment
    from gptqmodel import GPTQModel, QuantizeConfig  # noqa: PLC0415 - of that environment

    source = str(ORIGINAL / "source")
    text = (DATA / "speeches-1900-1999.txt").read_text(encoding="utf-8")[:100_000]
    # float32: products of bfloat16 take ten times as long on processors without them.
    model = GPTQModel.load(
        source, quantize_config=QuantizeConfig(bits=bits, group_size=GROUP), dtype=torch.float32
    )
    tokens = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    windows = [tokens[start : start + LENGTH] for start in range(0, WINDOWS * LENGTH, LENGTH)]
    model.quantize(
        [{"input_ids": window, "attention_mask": [1] * LENGTH} for window in windows], batch_size=1
    )
    model.save(str(DATA / f"gptq-w{bits}"))


if __name__ == "__main__":
    if sys.argv[1:] == ["original"]:
        write_original()
    elif sys.argv[1:2] == ["quantize"]:
        for width in sys.argv[2:]:
            quantize(int(width))
    else:
        sys.exit(__doc__)
