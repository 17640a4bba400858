"""Methods of a comparison, from the passes of a model.yaml."""

from __future__ import annotations

from typing import Any

from eoracc.compiler.compare.methods import Method, find_methods
from eoracc.compiler.config.sections import BuildConfig

__all__ = ["QUANTIZE", "config", "method"]

QUANTIZE = {"quantize_gptq": {"bits": 3, "group_size": 16}}


def config(*passes: Any, **fields: Any) -> BuildConfig:  # noqa: ANN401
    return BuildConfig.model_validate(
        {
            "model": "m",
            "output": "o",
            "calibration": {"text": "t"},
            "passes": list(passes) or ["calibrate", QUANTIZE, {"eora": {"rank": 8}}],
            **fields,
        }
    )


def method(name: str, *passes: Any, **fields: Any) -> Method:  # noqa: ANN401
    (found,) = find_methods(config(*passes, **fields), [name])
    return found
