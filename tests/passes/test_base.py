from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import pytest
from typing_extensions import override

from eoracc.passes import base, load_passes
from eoracc.passes.base import LayerPass, ModelPass, pass_names, pass_type, passes_of, register
from eoracc.passes.compensate.base import Compensation
from eoracc.passes.compensate.eora import Eora
from eoracc.passes.quantize.quantization import Quantization
from eoracc.passes.quantize.quantize_gptq import QuantizeGptq
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn

load_passes()


@dataclass(frozen=True, kw_only=True)
class Nothing(ModelPass):
    """Changes nothing."""

    name: ClassVar[str] = "nothing"
    precedes = (LayerPass,)

    @override
    def call(self, model: ir.Model) -> None:
        pass


def test_a_name_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTRY", {})
    assert register(Nothing) is Nothing
    assert pass_names() == ("nothing",)
    assert pass_type("nothing") is Nothing
    with pytest.raises(ValueError, match="two passes are named 'nothing'"):
        register(Nothing)


def test_passes_by_kind_are_sorted_by_name() -> None:
    assert passes_of(Quantization) == (QuantizeGptq, QuantizeRtn)
    names = [known.name for known in passes_of(Compensation)]
    assert names == sorted(names)
    assert Eora.name in names
    with pytest.raises(KeyError):
        pass_type("nothing")


def test_a_kind_may_forbid_what_comes_before_it() -> None:
    assert list(Nothing().problems([])) == []
    assert list(Nothing().problems([QuantizeRtn()])) == [
        ((), "must come before 'quantize_rtn': move it up")
    ]
