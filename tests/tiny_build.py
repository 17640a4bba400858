"""Whole builds of random two-layer models, a second or two each."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.tiny_artifact import write_byte_tokenizer
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from eoracc.compiler.config.sections import BuildConfig
    from eoracc.compiler.report.content import FidelityReport

__all__ = ["DEFAULT_LEVEL", "EORA", "tiny_config", "tiny_workspace", "without_folder"]

DEFAULT_LEVEL: dict[str, Any] = {"onnxruntime": {}}
"""For :func:`tiny_config`, to leave the accuracy level out, as users' files do."""

_BYTES = 260
"""Vocabulary of the byte tokenizer."""

EORA: Sequence[Any] = (
    "calibrate",
    {"quantize_gptq": {"bits": 3, "group_size": 16}},
    {"eora": {"rank": 4}},
)


def tiny_workspace(folder: Path, family: str = "smollm", **fields: Any) -> Path:  # noqa: ANN401
    """``folder`` with a checkpoint ``model`` of ``family``, its tokenizer, and ``text.txt``.

    ``fields`` replace those of its configuration.
    """
    write_byte_tokenizer(tiny_model(family, folder / "model", vocab_size=_BYTES, **fields))
    letters = np.random.default_rng(0).choice(list("aaabcdefgh "), 4000)
    (folder / "text.txt").write_text("".join(letters))
    return folder


def tiny_config(passes: Sequence[Any] = EORA, **fields: Any) -> BuildConfig:  # noqa: ANN401
    """A configuration for :func:`tiny_workspace`; ``fields`` replace whole sections.

    Activations are floats unless ``onnxruntime`` is given: most tests compare closely.
    """
    from eoracc.compiler.config.sections import BuildConfig

    return BuildConfig.model_validate(
        {
            "model": "model",
            "calibration": {"text": "text.txt", "samples": 6, "sequence_length": 32},
            "passes": list(passes),
            "verify": {"windows": 2, "window_length": 32, "compare": ["svd"]},
            "output": "out",
        }
        | fields
        | {"onnxruntime": fields.get("onnxruntime", {"accuracy_level": 0})}
    )


def without_folder(fidelity: FidelityReport) -> FidelityReport:
    """``fidelity`` without the bytes of folders: the digits of the report's times count there."""
    return replace(fidelity, rows=[replace(row, folder_bytes=None) for row in fidelity.rows])
