from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from eoracc.errors import ArtifactError
from eoracc.plugins.adapters import AdapterSlots
from eoracc.runtime.adapters.adapter import Adapter
from eoracc.runtime.adapters.files import adapter_names
from eoracc.runtime.adapters.slots import find_slots, read_slots
from eoracc.runtime.adapters.store import add_adapter
from tests.slots_artifact import SLOTS, write_slots_artifact

if TYPE_CHECKING:
    from pathlib import Path


def test_slots_come_from_the_model(tmp_path: Path) -> None:
    artifact = tmp_path / "a"
    write_slots_artifact(artifact)
    assert read_slots(artifact) == AdapterSlots("int8", SLOTS)
    (artifact / "model.onnx").write_bytes(b"other")
    with pytest.raises(ArtifactError, match=r"model\.onnx: its content is not what manifest"):
        read_slots(artifact)


def test_artifact_that_takes_no_adapters(tmp_path: Path) -> None:
    digest = write_slots_artifact(tmp_path / "a", adapter_type=None).digest
    assert find_slots(tmp_path / "a") is None
    assert adapter_names(tmp_path / "a") == []
    with pytest.raises(ArtifactError, match="a: takes no adapters: build it again, with onnxrunt"):
        add_adapter(tmp_path / "a", Adapter("math", {}, digest))
