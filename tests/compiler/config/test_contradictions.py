from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from eoracc.errors import ConfigError
from tests.compiler.config.files import ADAPTED, MINIMAL, error, load

if TYPE_CHECKING:
    from pathlib import Path

COMPRESSIONS = (
    "'imported', 'prune_magnitude', 'prune_sparsegpt', 'prune_wanda', 'quantize_gptq' or "
    "'quantize_rtn'"
)


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        (["eora"], "passes.0.eora: needs 'calibrate' before it: put it above"),
        (
            ["calibrate", "eora"],
            f"passes.1.eora: needs {COMPRESSIONS} before it: put it above",
        ),
        (
            ["quantize_gptq", "calibrate"],
            "passes.0.quantize_gptq: needs 'calibrate' before it: put it above",
        ),
        (["svd"], f"passes.0.svd: needs {COMPRESSIONS} before it: put it above"),
        (
            ["quantize_rtn", "pack_projections"],
            "passes.1.pack_projections: must come before 'quantize_rtn': move it up",
        ),
        (
            ["calibrate", "quantize_gptq", "quantize_rtn"],
            (
                "passes.2.quantize_rtn: the weights are compressed already by 'quantize_gptq': "
                "keep one of the two"
            ),
        ),
        (
            [{"calibrate": {"through": "original", "match": "outputs"}}],
            "passes.0.calibrate.match: contradicts 'through: original': keep one of the two",
        ),
        (["calibrate", "calibrate"], "passes.1.calibrate: occurs twice: keep one"),
        (
            ["quantize_rtn", "svd", "quantize_factors"],
            (
                "passes.2.quantize_factors: factors of 'svd' have 4 bits already: give it "
                "'factor_type: float16', or leave this pass out"
            ),
        ),
        (
            [{"select_last_k": {"ratio": 0.2}}] * 2,
            "passes.1.select_last_k: occurs twice: keep one",
        ),
        (
            ["select_last_k"],
            "passes.0: 'select_last_k' needs one target: give either 'ratio' or 'average_bits'",
        ),
        ([], "passes: must not be empty"),
    ],
)
def test_order_of_passes(tmp_path: Path, passes: list[object], expected: str) -> None:
    text = f"model: m\ncalibration: {{text: t}}\npasses: {json.dumps(passes)}\noutput: o\n"
    assert error(tmp_path, text) == f"model.yaml:3: {expected}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "passes: [calibrate]\nverify: {text: t}",
            "passes.0.calibrate: needs a text: give 'calibration: {text: …}'",
        ),
        ("passes: [quantize_rtn]", "verify: needs held-out text: give 'verify: {text: …}'"),
        (
            "passes: [quantize_rtn]\ncalibration: {text: t}\nverify: {field: f}",
            "verify.field: belongs to a 'text': give verify.text too",
        ),
        (
            "passes: [quantize_rtn]\nverify: {text: t, field: f, messages: m}",
            "verify.messages: conflicts with 'field': keep one of the two",
        ),
        (
            "passes: [quantize_rtn]\ncalibration: {text: t, seed: 1}",
            "calibration.seed: random windows come from anywhere in the text",
        ),
    ],
)
def test_texts_that_contradict_each_other(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in error(tmp_path, f"model: m\noutput: o\n{text}\n")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("  math: {", "  Math: {", "adapter 'Math': is no valid name"),
        ("  math: {", "  none: {", "adapter 'none': is no valid name"),
        ("rank: 4", "rank: -4", "adapters.math.rank: must be greater than or equal to 0"),
        ("rank: 4", "rnak: 4", "adapters.math.rnak: unknown key: did you mean 'rank'?"),
        ("text: t, ", "", "adapters.math: needs a text: give 'text: …' or 'mixture:"),
        (
            "factor_type: int4",
            "factor_type: float16",
            "adapters.math.factor_type: is float16, while onnxruntime.adapter_type is int8",
        ),
        ("{rank: 2}", "{factor_type: float16}", ".factor_type: is float16, while"),
        ("adapter_type: int8", "adapter_type: none", "the model takes no adapters: set"),
        ("verify: {text: h, windows: 2}", "verify: {windows: 2}", "give adapters.code.verify.text"),
        (
            "verify: {text: h, windows: 2}",
            "verify: {field: f, offset_tokens: 9}",
            "adapters.code.verify.field: belongs to a 'text'",
        ),
        (
            "text: u, seed: 1",
            "text: u, field: f, messages: g",
            "adapters.code.messages: conflicts with 'field'",
        ),
        (
            "samples: 5}",
            "samples: 5, text: c}",
            "calibration.text: conflicts with 'mixture'",
        ),
        ("field: body", "field: x, messages: y", "calibration.mixture.1.messages: conflicts with"),
        ("weight: 2", "weight: 0", "calibration.mixture.0.weight: must be greater than 0"),
        ("verify: {text: v, ", "verify: {", "calibration has several: give verify.text"),
        ("[calibrate, quantize_gptq]", "[calibrate]", "adapters: needs a quantize pass"),
    ],
)
def test_mistakes_in_adapters_and_mixtures(
    tmp_path: Path, old: str, new: str, problem: str
) -> None:
    assert old in ADAPTED
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, ADAPTED.replace(old, new))
    assert problem in str(caught.value)


def test_comparing_adapters_needs_some(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"verify.compare_adapters: compares adapters: give"):
        load(tmp_path, MINIMAL + "verify: {compare_adapters: true}\n")
