from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from eoracc.compiler.compare.folder import WorkFolder
from eoracc.errors import ArtifactError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    return WorkFolder(tmp_path / "some" / "work")


def test_figures_are_kept_by_key(work: WorkFolder) -> None:
    with work.claimed():
        (work.sweeps("a") / "0").mkdir(parents=True)
        (work.sweeps("b") / "0").mkdir(parents=True)
        work.keep("a", {"kl": 0.1})
        # The sweeps of a row that is finished have served.
        assert not work.sweeps("a").exists()
        assert work.sweeps("b").exists()
    assert work.figures("a", {"kl"}) == {"kl": 0.1}
    assert work.figures("b", {"kl"}) is None
    assert work.figures("a", {"kl", "bytes"}) is None  # of a version with other figures


@pytest.mark.parametrize("content", ["", '{"kl": 0.', "[]", '"kl"', '{"kl": 0.1}'])
def test_a_damaged_row_is_not_there(
    work: WorkFolder, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    with work.claimed():
        work.keep("a", {"kl": 0.1})
        (work.path / "rows" / "a.json").write_text(content)
    assert work.figures("a", {"kl"}) is None
    assert len(caplog.records) == 1


def test_a_fresh_start_forgets_everything(work: WorkFolder) -> None:
    with work.claimed():
        work.keep("a", {"kl": 0.1})
        (work.path / "stray").touch()
        (work.path / "link").symlink_to(work.path.parent)
    with work.claimed(fresh=True):
        assert list(work.path.iterdir()) == []
    assert not work.path.exists()
    assert work.path.parent.exists()


def test_one_comparison_at_a_time(work: WorkFolder) -> None:
    with (
        work.claimed(),
        pytest.raises(
            ArtifactError, match=r"work: another comparison is running there \(this process\)"
        ),
        work.claimed(fresh=True),
    ):
        pass
