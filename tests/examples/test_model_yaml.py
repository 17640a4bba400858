from __future__ import annotations

from pathlib import Path

import pytest

from eoracc.compiler.compare.methods import find_methods
from eoracc.compiler.config.load import load_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize(
    "path", sorted(EXAMPLES.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_every_example_is_a_valid_model_yaml(path: Path) -> None:
    config = load_config(path, ())
    assert config.output_path(path.parent).parent == path.parent / "build"
    if config.compare is not None:
        assert find_methods(config, list(config.compare.methods))


def test_no_two_examples_write_to_one_folder() -> None:
    found = [load_config(path, ()).output_path(path.parent) for path in EXAMPLES.glob("*/*.yaml")]
    assert len(found) >= 6
    assert len(set(found)) == len(found)
