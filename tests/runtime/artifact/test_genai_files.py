from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from eoracc.errors import ArtifactError
from eoracc.runtime.artifact.genai_files import read_model_files

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("key", ["filename", "custom_ops_library"])
def test_config_that_points_out_of_the_folder(
    tiny_artifact: Path, tmp_path: Path, key: str
) -> None:
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    config = json.loads((folder / "genai_config.json").read_text())
    decoder = config["model"]["decoder"]
    (decoder if key == "filename" else decoder["session_options"])[key] = "../evil"
    (folder / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"names '\.\./evil', which is not in the folder"):
        read_model_files(folder)


@pytest.mark.parametrize("name", ["\x00", "circle"])
def test_config_that_names_no_file(tiny_artifact: Path, tmp_path: Path, name: str) -> None:
    config = json.loads((tiny_artifact / "genai_config.json").read_text())
    config["model"]["decoder"]["filename"] = name
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(ArtifactError, match="which is not in the folder"):
        read_model_files(tmp_path)


_FILES = '{"model": {"context_length": 8, "decoder": {"filename": %s}}}'
_LIBRARY = _FILES.replace("}}}", ', "session_options": {"custom_ops_library": {}}}}}')


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"model": {"decoder": {}}}',
        '{"model": []}',
        _FILES % "3",
        _FILES % '""',
        _LIBRARY % '"model.onnx"',
    ],
)
def test_config_that_describes_nothing(tmp_path: Path, text: str) -> None:
    with pytest.raises(ArtifactError, match=r"genai_config\.json: is missing"):
        read_model_files(tmp_path)
    (tmp_path / "genai_config.json").write_text(text)
    with pytest.raises(ArtifactError, match="does not describe a decoder"):
        read_model_files(tmp_path)
