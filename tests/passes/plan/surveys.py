"""What a survey pass is given, for a model of a test."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.sweep.survey import Survey
from eoracc.passes.graph.embeddings import find_embeddings
from eoracc.passes.graph.linears import find_linears

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from eoracc.compiler.frontend.load import LoadedModel
    from eoracc.compiler.text.windows import Windows
    from eoracc.passes.base import LayerPass

__all__ = ["survey_of"]


def survey_of(
    loaded: LoadedModel,
    windows: Windows | None,
    folder: Path,
    following: Sequence[LayerPass] = (),
) -> Survey:
    """The context of a survey.

    Args:
      loaded: the model, which passes change in place.
      windows: the calibration text.
      folder: for results that are kept.
      following: passes of the next sweep.
    """
    return Survey(
        model=loaded.model,
        linears=find_linears(loaded.model),
        embeddings=find_embeddings(loaded.model),
        windows=windows,
        following=following,
        checkpoint=loaded.folder,
        trust_remote_code=False,
        folder=folder,
        key="key",
        progress=SilentProgress(),
    )
