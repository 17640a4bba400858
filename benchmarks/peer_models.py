"""Make a peer's model from a checkpoint with the peer's own tools.

    python benchmarks/peer_models.py genai HUGGING_FACE_FOLDER FOLDER BLOCK_SIZE
    python benchmarks/peer_models.py gguf SOURCE.gguf TARGET.gguf TYPE [IMPORTANCE.safetensors]

This file imports nothing from the project, so it runs in any interpreter that has the peer.
"""

from __future__ import annotations

import ctypes
import runpy
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def make_genai(source: Path, target: Path, block_size: int) -> None:
    """Run onnxruntime-genai's model builder: int4 for the CPU, head and embedding included."""
    AutoConfig = import_module("transformers").AutoConfig
    read = AutoConfig.from_pretrained

    def flat(*arguments: Any, **options: Any) -> Any:
        # The builder (0.18) knows Gemma 3's two rotary bases by the names of transformers 4.
        config = read(*arguments, **options)
        rope = getattr(config, "rope_parameters", None)
        if isinstance(rope, dict) and "sliding_attention" in rope:
            config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]
            config.rope_theta = rope["full_attention"]["rope_theta"]
            config.rope_parameters = rope["full_attention"]
        return config

    AutoConfig.from_pretrained = flat
    sys.argv = ["builder", "-i", str(source), "-o", str(target), "-p", "int4", "-e", "cpu"]
    sys.argv += ["-c", str(target / "cache"), "--extra_options", f"block_size={block_size}"]
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


def make_gguf(source: Path, target: Path, kind: str, importance: Path | None = None) -> None:
    """Let llama.cpp quantize a GGUF file to ``kind``, such as ``Q4_0``.

    ``importance`` holds the mean square of each weight's inputs, ``float32 [K]`` by tensor.
    """
    llama_cpp = import_module("llama_cpp")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.allow_requantize = True
    if importance is not None:
        matrix = import_module("safetensors.numpy").load_file(importance)
        entry = llama_cpp.llama_model_imatrix_data
        pointer = ctypes.POINTER(ctypes.c_float)
        entries = [
            entry(name.encode(), array.ctypes.data_as(pointer), array.size)
            for name, array in matrix.items()
        ]
        # An entry without a name ends the list.
        options.imatrix = (entry * (len(entries) + 1))(*entries)
    names = str(source).encode(), str(target).encode()
    if code := llama_cpp.llama_model_quantize(*names, ctypes.byref(options)):
        raise SystemExit(f"{source}: llama.cpp cannot quantize it to {kind}, code {code}")


def main() -> None:
    """Make one model."""
    tool, source, target, setting, *more = sys.argv[1:]
    if tool == "genai":
        make_genai(Path(source), Path(target), int(setting))
    else:
        make_gguf(Path(source), Path(target), setting, *map(Path, more))


if __name__ == "__main__":
    main()
