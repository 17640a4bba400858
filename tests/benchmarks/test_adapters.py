from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.adapters import ADAPTERS, main, random_factors
from eoracc.passes.solvers.factor_types import FactorType
from eoracc.plugins.adapters import pack_adapter
from eoracc.runtime.adapters.files import adapter_names
from eoracc.runtime.adapters.slots import read_slots
from tests.tiny_artifact import write_tiny_artifact


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_artifact(tmp_path_factory.mktemp("slots"), adapter_type="int8")


@pytest.mark.parametrize("factor_type", ["int8", "int4"])
def test_random_factors_fill_every_slot(artifact: Path, factor_type: FactorType) -> None:
    slots = read_slots(artifact)
    factors = random_factors(slots, 3, factor_type, seed=1)
    assert factors.keys() == slots.linears.keys()
    assert pack_adapter(slots, factors)
    for name, one in factors.items():
        assert (one.rank, one.factor_type) == (3, factor_type)
        rows, columns = slots.linears[name]
        # An element of the product has variance 1e-4 / columns; there are hundreds of them.
        assert np.std(one.product()) == pytest.approx(0.01 * columns**-0.5, rel=0.5)
        assert one.product().shape == (rows, columns)
    again, other = (random_factors(slots, 3, factor_type, seed=seed) for seed in (1, 2))
    name = next(iter(factors))
    assert np.array_equal(factors[name].lora_a, again[name].lora_a)
    assert not np.array_equal(factors[name].lora_a, other[name].lora_a)


def test_every_kind_is_benched_on_a_copy(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--threads", "1", "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1"]
    out = tmp_path / "found.json"
    main([f"tiny={artifact}", "--kind", "int8:16", "int4:32", *sizes, "--json", str(out)])
    found = json.loads(out.read_text())
    assert [(one["label"], one["factor_type"], one["rank"]) for one in found] == [
        ("tiny", "int8", 16),
        ("tiny", "int4", 32),
    ]
    for one in found:
        assert [row["adapter"] for row in one["adapters"]] == ["none", *ADAPTERS]
        assert one["switch"]["outputs_differ"]
    # Only rank 16 has a bar.
    lines = [line for line in capsys.readouterr().out.splitlines() if "tiny + " in line]
    assert [line.count("≤") for line in lines] == [1, 1, 0, 0]
    assert adapter_names(artifact) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "'nothing' names no artifact: give LABEL=DIR"),
        (["a={artifact}", "--kind", "int3:16"], "'int3:16' is not TYPE:RANK"),
        (["a={artifact}", "--kind", "int8:0"], "'int8:0' is not TYPE:RANK"),
    ],
)
def test_a_bad_argument_is_told(
    artifact: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([one.format(artifact=artifact) for one in arguments])
    assert message in capsys.readouterr().err


def test_an_artifact_without_slots_is_one_sentence(tiny_without_slots: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: tiny: .*takes no adapters"):
        main([f"tiny={tiny_without_slots}"])


@pytest.fixture(scope="module")
def tiny_without_slots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_artifact(tmp_path_factory.mktemp("plain"))
