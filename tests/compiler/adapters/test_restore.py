from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest

from eoracc.compiler import driver
from eoracc.compiler.adapters.restore import restore_backbone
from eoracc.compiler.config.sections import BuildConfig
from eoracc.compiler.frontend import load as frontend
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.report.gates import fidelity_report
from eoracc.compiler.sweep.backbone import Backbone
from eoracc.errors import ArtifactError
from eoracc.passes.base import ModelPass
from eoracc.plugins.op import FUSED_OP
from tests.tiny_build import DEFAULT_LEVEL, tiny_config, tiny_workspace

if TYPE_CHECKING:
    from pathlib import Path

QUICK: dict[str, Any] = {"windows": 1, "window_length": 16, "parity": False}


def factored(factor_type: str, rank: int = 5) -> list[Any]:
    return [
        "calibrate",
        {"quantize_gptq": {"bits": 3, "group_size": 16}},
        {"eora": {"rank": rank, "factor_type": factor_type}},
    ]


def restored(workspace: Path, config: BuildConfig, work: Path) -> Backbone:
    model = frontend.load(str(workspace / "model"), work=work).model
    for item in config.passes:
        if isinstance(item, ModelPass):
            item.call(model)
    return restore_backbone(workspace / "out", model)


@pytest.mark.parametrize(
    ("family", "passes"),
    [
        ("smollm", factored("float16")),
        ("smollm", factored("int8")),
        ("smollm", factored("int4")),
        ("smollm", factored("int8", rank=0)),
        ("smollm", ["pack_projections", *factored("int8")]),
        ("phi3", factored("float16", rank=17)),
        *(
            (
                "smollm",
                [
                    *factored(factor_type)[:-1],
                    {
                        "eora": {
                            "rank": 5,
                            "factor_type": factor_type,
                            "overrides": {"*.k_proj": {"rank": 0}, "*.up_proj": {"rank": 17}},
                        }
                    },
                ],
            )
            for factor_type in ("float16", "int4")
        ),
        (
            "llama",
            [
                {
                    "quantize_rtn": {
                        "bits": 4,
                        "group_size": -1,
                        "symmetric": True,
                        "overrides": {
                            "lm_head": {"bits": 8},
                            "model.embed_tokens": {"bits": 8},
                            "*.o_proj": {"skip": True},
                        },
                    }
                },
                {
                    "svd": {
                        "rank": 3,
                        "overrides": {"*.q_proj": {"rank": 6}, "*.v_proj": {"skip": True}},
                    }
                },
            ],
        ),
    ],
    ids=[
        "float16",
        "int8",
        "int4",
        "rank 0",
        "packed",
        "phi3",
        "float16 ranks",
        "int4 ranks",
        "mixed",
    ],
)
def test_an_artifact_gives_back_every_operand_of_its_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, passes: list[Any]
) -> None:
    workspace = tiny_workspace(tmp_path, family)
    built: list[Backbone] = []

    def watch(original: Any, compressed: Any, *rest: Any, **options: Any) -> Any:  # noqa: ANN401
        built.append(Backbone.of(compressed._model))
        return fidelity_report(original, compressed, *rest, **options)

    monkeypatch.setattr(driver, "fidelity_report", watch)
    config = tiny_config(passes, verify=QUICK, **DEFAULT_LEVEL)
    driver.build(config, config_dir=workspace, progress=SilentProgress())
    found = restored(workspace, config, tmp_path / "work")
    assert [one.name for one in found.linears] == [one.name for one in built[0].linears]
    compressed = 0
    for own, original in zip(found.linears, built[0].linears, strict=True):
        np.testing.assert_array_equal(own.effective_weight(), original.effective_weight())
        if original.quantized is None:
            assert own.quantized is None
            continue
        compressed += 1
        assert own.quantized is not None
        np.testing.assert_array_equal(own.quantized.packed, original.quantized.packed)
        np.testing.assert_array_equal(own.quantized.scales, original.quantized.scales)
        if original.factors is None or original.factors.rank == 0:
            # Beside parts that have some, it has factors of rank 0.
            assert own.factors is None or own.factors.rank == 0
            continue
        assert own.factors is not None
        assert own.factors.rank == original.factors.rank
        assert own.factors.factor_type == original.factors.factor_type
        for part in ("lora_a", "lora_b", "lora_a_scale", "lora_b_scale"):
            np.testing.assert_array_equal(
                getattr(own.factors, part), getattr(original.factors, part)
            )
    assert compressed >= 8
    tables = [one for one in found.model.graph if one.op_type == "GatherNBits"]
    assert len(tables) == sum(one.op_type == "GatherNBits" for one in built[0].model.graph)


def test_an_artifact_of_another_model_is_refused(tmp_path: Path) -> None:
    workspace = tiny_workspace(tmp_path / "a")
    config = tiny_config(verify=QUICK)
    driver.build(config, config_dir=workspace, progress=SilentProgress())
    path = workspace / "out" / "model.onnx"
    other = ir.load(path)
    node = next(one for one in other.graph if one.op_type == FUSED_OP)
    node.metadata_props["eoracc.linears"] = "model.layers.7.q,model.k,model.v"
    ir.save(other, path)
    with pytest.raises(ArtifactError, match=r"has a linear 'model.layers.7.q', which the model"):
        restored(workspace, config, tmp_path / "work")
    path.write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=r"model\.onnx: is no ONNX graph"):
        restored(workspace, config, tmp_path / "work")
