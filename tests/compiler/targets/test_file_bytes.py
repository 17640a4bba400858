from __future__ import annotations

from typing import TYPE_CHECKING

from eoracc.compiler.targets.file_bytes import files_bytes, folder_bytes

if TYPE_CHECKING:
    from pathlib import Path


def test_every_file_of_a_folder_counts(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "model.onnx.data").write_bytes(b"12345")
    (tmp_path / "adapters" / "one.json").write_bytes(b"{}")
    assert folder_bytes(tmp_path) == 7
    assert files_bytes(tmp_path.iterdir()) == 5
    assert files_bytes(()) == 0
