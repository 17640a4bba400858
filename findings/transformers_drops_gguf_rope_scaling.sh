#!/usr/bin/env bash
# transformers 5.23.0: the rope scaling of a GGUF file is dropped without a word.
#
# Behaviour: `<architecture>.rope.scaling.*` (linear, YaRN) and the tensor `rope_freqs.weight`, in
# which Llama 3.1 and 3.2 carry theirs, reach neither the configuration nor the model that
# from_pretrained(gguf_file=...) makes. Its rope type is "default". The same model as safetensors
# has the scaling.
#
# Seen, Python 3.11.7:
#   transformers 5.23.0, gguf 0.19.0
#   none       rope type 'default', frequencies without scaling: True
#   linear     rope type 'default', frequencies without scaling: True
#   yarn       rope type 'default', frequencies without scaling: True
#   rope_freqs rope type 'default', frequencies without scaling: True
#
# Why it matters: the model computes another function at every position but the first, and short
# texts hide it. Read the metadata, or check for it, before a GGUF is converted.
#
# Usage: findings/transformers_drops_gguf_rope_scaling.sh
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0 numpy==2.4.6

cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM' 2>errors || { cat errors; exit 1; }
import sys

import gguf
import numpy as np
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

HIDDEN, HEADS, FEED_FORWARD, VOCABULARY = 32, 2, 64, 16


def write(name: str, scaling: str) -> None:
    writer = gguf.GGUFWriter(name, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    if scaling in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(64)
    shapes = {
        "token_embd": (VOCABULARY, HIDDEN),
        "output_norm": (HIDDEN,),
        "output": (VOCABULARY, HIDDEN),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,),
        **{f"blk.0.attn_{part}": (HIDDEN, HIDDEN) for part in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_up": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, FEED_FORWARD),
    }
    rng = np.random.default_rng(0)
    for tensor, shape in shapes.items():
        writer.add_tensor(f"{tensor}.weight", rng.standard_normal(shape).astype(np.float32))
    if scaling == "rope_freqs":
        divisors = np.linspace(1, 8, HIDDEN // HEADS // 2)
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


print(f"transformers {transformers.__version__}, gguf 0.19.0")
dropped = []
for scaling in ("none", "linear", "yarn", "rope_freqs"):
    write(f"{scaling}.gguf", scaling)
    config = AutoConfig.from_pretrained(".", gguf_file=f"{scaling}.gguf")
    model = AutoModelForCausalLM.from_pretrained(".", gguf_file=f"{scaling}.gguf")
    frequencies = model.model.rotary_emb.inv_freq
    plain = 10000.0 ** -(np.arange(0, HIDDEN // HEADS, 2) / (HIDDEN // HEADS))
    is_plain = np.allclose(frequencies.numpy(), plain, rtol=1e-5)
    dropped.append(is_plain)
    kind = config.rope_parameters["rope_type"]
    print(f"{scaling:10} rope type {kind!r}, frequencies without scaling: {is_plain}")
if not all(dropped):
    sys.exit("the finding no longer holds: rope scaling of a GGUF is read")
PROGRAM
