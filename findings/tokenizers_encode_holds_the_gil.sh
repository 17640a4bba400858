#!/usr/bin/env bash
# tokenizers 0.23.3: encode() holds Python's global lock, encode_batch() releases it.
#
# Behaviour: while Tokenizer.encode works on a long text, no other thread of the process runs any
# Python: a thread that ticks every millisecond stands still from the first to the last byte.
# Tokenizer.encode_batch([text]) gives the same tokens, and the other thread ticks on.
#
# Seen: tokenizers 0.23.3, Python 3.11.7, AMD EPYC with AVX2, 2 cores:
#   tokenizers 0.23.3, 3,150,800 characters
#   encode:       4.09 s, longest pause of another thread 3.93 s (96%)
#   encode_batch: 3.28 s, longest pause of another thread 0.10 s (3%)
#
# Why it matters: a server that tokenizes in a thread of its own still stops every stream of tokens
# for as long as one client's prompt takes, unless it calls encode_batch.
#
# Usage: findings/tokenizers_encode_holds_the_gil.sh
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check tokenizers==0.23.3

"$folder/venv/bin/python" - <<'PROGRAM'
import sys
import threading
import time

import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
words = [f"word{i * i % 997} " for i in range(2000)]
tokenizer.train_from_iterator(
    words, trainers.BpeTrainer(vocab_size=400, show_progress=False)
)
text = "".join(words) * 200


def longest_pause(call):
    """Seconds of the call, the longest time between two ticks of another thread, and its result."""
    ticks, ended = [], threading.Event()

    def tick():
        while not ended.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    time.sleep(0.05)
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    time.sleep(0.05)
    ended.set()
    thread.join()
    return seconds, max(b - a for a, b in zip(ticks, ticks[1:])), result


print(f"tokenizers {tokenizers.__version__}, {len(text):,} characters")
shares, ids = {}, []
for name, call in (
    ("encode", lambda: tokenizer.encode(text).ids),
    ("encode_batch", lambda: tokenizer.encode_batch([text])[0].ids),
):
    seconds, pause, result = longest_pause(call)
    shares[name] = pause / seconds
    ids.append(result)
    print(
        f"{name + ':':13} {seconds:.2f} s, longest pause of another thread {pause:.2f} s "
        f"({shares[name]:.0%})"
    )
assert ids[0] == ids[1]
if shares["encode"] < 0.9 or shares["encode_batch"] > 0.5:
    sys.exit("the finding no longer holds: the pauses are others")
PROGRAM
