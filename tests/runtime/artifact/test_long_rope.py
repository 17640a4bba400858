from __future__ import annotations

import pytest

from eoracc.errors import ArtifactError
from eoracc.runtime.artifact.long_rope import LONG_ROPE_KEY, LongRope


def test_metadata_round_trip() -> None:
    long_rope = LongRope(original=4096, longest=131072)
    assert LongRope.of({"other": "entry", **long_rope.to_metadata()}) == long_rope
    assert LongRope.of({"other": "entry"}) is None


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"original": 4096}', '{"original": "x"}'])
def test_damaged_metadata(text: str) -> None:
    with pytest.raises(ArtifactError, match=r"'eoracc\.long_rope' .* build the artifact again"):
        LongRope.of({LONG_ROPE_KEY: text})
