"""Artifacts in lm-eval: ``python -m eoracc.runtime.lm_eval --model eoracc …``."""

from __future__ import annotations

from eoracc.runtime.lm_eval.model import EoraccLM

__all__ = ["EoraccLM"]
