"""A new pass is one module: nothing else has to be edited for model.yaml, help and builds."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import eoracc.passes
from eoracc.compiler import driver
from eoracc.compiler.cli import main
from eoracc.compiler.config.load import load_config
from eoracc.compiler.config.passes import comparator_names, method_names
from eoracc.compiler.config.schema import describe_passes, json_schema, model_yaml_page
from eoracc.compiler.progress import SilentProgress
from eoracc.errors import ConfigError
from eoracc.passes import base, load_passes
from tests.tiny_build import tiny_config, tiny_workspace

TESTS = Path(__file__).parent

HEAD = """\
from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field
from typing_extensions import override

from eoracc.passes.base import register
"""


@dataclass(frozen=True)
class NewPass:
    """A pass that the product does not have.

    Attributes:
      name: of the pass.
      source: of its module, without the common imports.
      passes: of a build with it.
      options: of its own and inherited ones, with a part of their help.
      table: the file with the tests that all passes of its kind share.
      verify: further options of the section ``verify``.
    """

    name: str
    source: str
    passes: list[Any]
    options: dict[str, str]
    table: Path
    verify: dict[str, Any] = field(default_factory=dict)


COMPENSATION = NewPass(
    "new_compensation",
    '''
    from eoracc.passes.compensate.base import Compensation, Factors
    from eoracc.passes.solvers.factors import svd_factors
    from eoracc.passes.solvers.lost_output import LostOutput

    @register
    @dataclass(frozen=True, kw_only=True)
    class NewCompensation(Compensation):
        """Compensate with a part of the plain SVD.

        Options:
          share: of the largest rank that is used.
        """

        name: ClassVar[str] = "new_compensation"
        share: Annotated[float, Field(ge=0, le=1)] = 1

        @override
        def factors(self, lost: LostOutput, rank: int) -> Factors:
            return svd_factors(lost.delta, int(rank * self.share))
    ''',
    ["calibrate", "quantize_rtn", {"new_compensation": {"rank": 4, "share": 0.5}}],
    {"share": "of the largest rank", "rank": "columns of each correction"},
    TESTS / "compensate" / "test_base.py",
    {"compare": ["new_compensation", "svd"]},
)

FACTORIZATION = NewPass(
    "new_factorization",
    '''
    from eoracc.passes.factorize.base import Factorization
    from eoracc.passes.solvers.factorization import plain_factors

    @register
    @dataclass(frozen=True, kw_only=True)
    class NewFactorization(Factorization):
        """Factorise with the plain SVD of a scaled weight.

        Options:
          scale: that the weight is multiplied by.
        """

        name: ClassVar[str] = "new_factorization"
        scale: float = 1

        @override
        def solve(self, weight, gram, rank):
            return plain_factors(self.scale * weight, rank)
    ''',
    ["calibrate", {"new_factorization": {"ratio": 0.3, "scale": 0.9}}],
    {"scale": "that the weight", "ratio": "share of a weight's parameters"},
    TESTS / "factorize" / "test_base.py",
)

QUANTIZATION = NewPass(
    "new_quantization",
    '''
    from eoracc.passes.quantize.quantization import Quantization

    @register
    @dataclass(frozen=True, kw_only=True)
    class NewQuantization(Quantization):
        """Quantize weights that are clipped first.

        Options:
          limit: what weights are clipped to.
        """

        name: ClassVar[str] = "new_quantization"
        limit: Annotated[float, Field(gt=0)] = 9

        @override
        def solve(self, weight, gram):
            return self.round_to_nearest(weight.clip(-self.limit, self.limit))
    ''',
    [
        "calibrate",
        {"new_quantization": {"bits": 3, "group_size": 16, "overrides": {"*.k_proj": {"bits": 8}}}},
        {"eora": {"rank": 2}},
    ],
    {"limit": "what weights are clipped to", "group_size": "columns that share a scale"},
    TESTS / "quantize" / "test_quantization.py",
)

PRUNING = NewPass(
    "new_pruning",
    '''
    from eoracc.passes.compression import Compression
    from eoracc.passes.solvers.grid import group_width, round_to_nearest

    @register
    @dataclass(frozen=True, kw_only=True)
    class NewPruning(Compression):
        """Set the smallest weights to zero, and store the others in 8 bits.

        Options:
          sparsity: share of the weights that become zero.
        """

        name: ClassVar[str] = "new_pruning"
        sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.5

        @override
        def requantize(self, weight, gram):
            kept = np.abs(weight) > np.quantile(np.abs(weight), self.sparsity)
            return round_to_nearest(np.where(kept, weight, 0), bits=8, group_size=16)

        @override
        def code_bytes(self, out_features, in_features):
            return out_features * -(-in_features // 16) * (16 + 2 + 1)
    ''',
    ["calibrate", {"new_pruning": {"sparsity": 0.25}}, {"eora": {"rank": 2}}],
    {"sparsity": "share of the weights", "overrides": "by name pattern"},
    TESTS / "quantize" / "test_quantization.py",
)

NEW = [COMPENSATION, FACTORIZATION, QUANTIZATION, PRUNING]


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[NewPass], None]]:
    """Puts the module of a pass beside those of the product, until the test ends."""
    load_passes()
    folder = tmp_path / "passes"
    folder.mkdir()
    monkeypatch.setattr(eoracc.passes, "__path__", [*eoracc.passes.__path__, str(folder)])
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    added: list[str] = []

    def add(new: NewPass) -> None:
        (folder / f"{new.name}.py").write_text(HEAD + dedent(new.source), encoding="utf-8")
        importlib.invalidate_caches()
        added.append(new.name)

    yield add
    for name in added:
        sys.modules.pop(f"eoracc.passes.{name}", None)
        vars(eoracc.passes).pop(name, None)


@pytest.mark.parametrize("new", NEW, ids=lambda new: new.name)
def test_model_yaml_knows_a_new_pass(
    new: NewPass, add: Callable[[NewPass], None], tmp_path: Path
) -> None:
    path = tmp_path / "model.yaml"
    content = {
        "model": "m",
        "calibration": {"text": "t"},
        "passes": new.passes,
        "verify": {**new.verify},
        "output": "o",
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"there is no pass '{new.name}'"):
        load_config(path)
    add(new)
    config = load_config(path)
    assert new.name in [item.name for item in config.passes]
    assert config.model_validate(config.resolved()) == config
    path.write_text(path.read_text("utf-8").replace("passes:", f"passes:\n- {new.name}: {{x: 1}}"))
    with pytest.raises(ConfigError, match=rf"passes\.0\.{new.name}\.x: unknown key"):
        load_config(path)


@pytest.mark.parametrize("new", NEW, ids=lambda new: new.name)
def test_schema_and_help_know_a_new_pass(new: NewPass, add: Callable[[NewPass], None]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    add(new)
    content = {"model": "m", "passes": new.passes, "verify": {**new.verify}, "output": "o"}
    jsonschema.validate(content, json_schema())
    described = {known["name"]: known for known in describe_passes()}[new.name]
    options = {option["name"]: option["doc"] for option in described["options"]}
    assert all(options.values())
    for name, text in new.options.items():
        assert text in options[name]
    assert f"### `{new.name}`" in model_yaml_page()
    shown = CliRunner().invoke(main, ["passes", "--json"])
    assert new.name in [known["name"] for known in json.loads(shown.output)]
    printed = CliRunner().invoke(main, ["schema"])
    assert new.name in json.loads(printed.output)["$defs"]


@pytest.mark.parametrize("new", NEW, ids=lambda new: new.name)
def test_shared_tests_take_a_new_pass_up(new: NewPass, add: Callable[[NewPass], None]) -> None:
    add(new)
    methods = runpy.run_path(str(new.table))["METHODS"]
    assert new.name in [method.name for method in methods]


def test_comparisons_know_a_new_compensation_and_factorization(
    add: Callable[[NewPass], None],
) -> None:
    assert not {"new_compensation", "new_factorization"} & set(method_names())
    for new in (COMPENSATION, FACTORIZATION):
        add(new)
    assert {"new_compensation", "new_factorization"} <= set(method_names())
    assert "new_compensation" in comparator_names()
    compare = json_schema()["$defs"]["VerifyConfig"]["properties"]["compare"]
    assert "new_compensation" in compare["items"]["enum"]


@pytest.mark.parametrize("new", NEW, ids=lambda new: new.name)
def test_builds_with_a_new_pass(
    new: NewPass, add: Callable[[NewPass], None], tmp_path: Path
) -> None:
    add(new)
    workspace = tiny_workspace(tmp_path / "workspace")
    verify = {"windows": 1, "window_length": 16, "parity": new is PRUNING, **new.verify}
    config = tiny_config(new.passes, verify=verify)
    result = driver.build(config, config_dir=workspace, progress=SilentProgress())
    report = json.loads((result.output / "report.json").read_text("utf-8"))
    compressed = [*report["factorized"], *report["linears"]]
    errors = [
        linear["errors"][new.name]
        for linear in compressed
        if linear["name"] != "lm_head" and new.name in linear["errors"]
    ]
    assert len(errors) == 14, "seven linears in each of two blocks"
    assert all(0 < error < 1 for error in errors)
    scored = json.dumps(report["fidelity"])
    assert all(f'"{name}"' in scored for name in new.verify.get("compare", ()))
