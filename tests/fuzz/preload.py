"""Import what readers need, in the server that workers are forked from, which has no threads."""

from __future__ import annotations

import importlib
import os

# Nothing that a changed file names is fetched.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

for _name in (
    "eoracc.compiler.cli",
    "eoracc.compiler.driver",
    "eoracc.runtime.server.served.artifact",
    "tests.fuzz.pool",
    "torch",
    "transformers",
):
    importlib.import_module(_name)
