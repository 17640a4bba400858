from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from eoracc.compiler.frontend.load import load
from eoracc.compiler.targets.tensorrt.check_model import check_model
from eoracc.errors import ConfigError, PassError, TargetError
from tests.tiny_build import tiny_config
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from eoracc.errors import EoraccError

SECTION = {"context_length": 64}


def check(family: str, folder: Path, target: str, **fields: Any) -> None:  # noqa: ANN401
    options: dict[str, Any] = {"targets": [target]}
    if target != "onnxruntime":
        options[target] = SECTION
    source = load(str(tiny_model(family, folder / "model", **fields)), work=folder)
    check_model(tiny_config(["calibrate"], **options), source)


@pytest.mark.parametrize(
    ("family", "target", "fields", "error", "message"),
    [
        (
            "gemma2",
            "tensorrt_rtx",
            {},
            PassError,
            (
                r"node .*: caps its scores \(attn_logit_softcapping\), which TensorRT's attention "
                "cannot: take the target out of 'targets'"
            ),
        ),
        ("gemma2", "tensorrt", {}, PassError, "caps its scores"),
        (
            "llama",
            "tensorrt_rtx",
            {"head_dim": 6},
            TargetError,
            (
                "tensorrt_rtx: has no attention for heads of 6 elements, as the model has, but for "
                "8 to 256: take it out of 'targets'"
            ),
        ),
        ("llama", "tensorrt_rtx", {"head_dim": 264}, TargetError, "heads of 264 elements"),
        ("llama", "tensorrt_rtx", {"max_position_embeddings": 32}, ConfigError, "context_length"),
    ],
)
def test_model_that_no_engine_is_built_of(
    family: str,
    target: str,
    fields: dict[str, Any],
    error: type[EoraccError],
    message: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=f"^{message}" if message.startswith("tensorrt") else message):
        check(family, tmp_path, target, **fields)


@pytest.mark.parametrize(
    ("family", "target", "fields"),
    [
        ("llama", "tensorrt_rtx", {"head_dim": 100}),
        ("gemma3", "tensorrt_rtx", {"final_logit_softcapping": 2.0}),
        ("gemma2", "onnxruntime", {}),
        ("llama", "onnxruntime", {"head_dim": 6}),
    ],
)
def test_model_that_the_target_takes(
    family: str, target: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    check(family, tmp_path, target, **fields)
