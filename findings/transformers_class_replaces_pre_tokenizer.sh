#!/usr/bin/env bash
# transformers 5.23.0: a tokenizer class replaces the pre-tokenizer that tokenizer.json holds.
#
# Behaviour: with "tokenizer_class": "GPT2Tokenizer" in tokenizer_config.json, AutoTokenizer reads
# vocabulary and merges from tokenizer.json, but builds the pre-tokenizer of GPT-2 itself. A step
# "Digits" before it, with which several byte-level tokenizers split numbers, is lost: numbers and
# the white space before them get other tokens than in training. There is no warning. Without that
# class, or with PreTrainedTokenizerFast, tokenizer.json is used as it is. Qwen2Tokenizer likewise
# puts its own pattern there.
#
# Seen, Python 3.11.7:
#   transformers 5.23.0, tokenizers 0.23.3
#   tokenizer.json           ['a', 'ĠĠ', '1', '2']
#   GPT2Tokenizer            ['a', 'Ġ', 'Ġ', '12']
#   Qwen2Tokenizer           ['a', 'Ġ', 'Ġ', '1', '2']
#   PreTrainedTokenizerFast  ['a', 'ĠĠ', '1', '2']
#
# Why it matters: a library that reads tokenizer.json and one that reads the class give a model
# other tokens from the same files. Compare the tokens of both before shipping either.
#
# Usage: findings/transformers_class_replaces_pre_tokenizer.sh
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  transformers==5.23.0 tokenizers==0.23.3

cd "$folder"
"$folder/venv/bin/python" - <<'PROGRAM' 2>errors || { cat errors; exit 1; }
import json
import sys
from pathlib import Path

import tokenizers
import transformers
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoTokenizer

TEXT = "a  12"
vocabulary = {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), "ĠĠ", "12"])}
trained = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "Ġ"), ("1", "2")]))
digits = Digits(individual_digits=True)
trained.pre_tokenizer = Sequence([digits, ByteLevel(add_prefix_space=False)])
trained.decoder = decoders.ByteLevel()
print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}")
expected = trained.encode(TEXT).tokens
print(f"tokenizer.json           {expected}")
same = {}
for name in ("GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"):
    folder = Path(name)
    folder.mkdir()
    trained.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokens = AutoTokenizer.from_pretrained(folder).tokenize(TEXT)
    same[name] = tokens == expected
    print(f"{name:24} {tokens}")
if same != {"GPT2Tokenizer": False, "Qwen2Tokenizer": False, "PreTrainedTokenizerFast": True}:
    sys.exit("the finding no longer holds: the classes treat tokenizer.json otherwise")
PROGRAM
