"""The protocol of the quality benchmarks: models, texts, and their windows.

``wiki.utf8`` with its document tags removed: the first windows of 512 tokens calibrate, windows
from token 200,000 evaluate. ``c4.utf8`` from character 100,000 is the out-of-domain text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from eoracc.compiler.config.sections import TextConfig
from eoracc.compiler.frontend.load import LoadedModel, load
from eoracc.compiler.text.windows import Windows, load_windows
from examples.gemma3 import fetch as gemma3
from examples.packages import Source, assemble
from examples.smollm2 import fetch as smollm2

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "quality"

MODELS = {
    "smollm2": (smollm2.MODEL, smollm2.DATA),
    "gemma3": (gemma3.MODEL, gemma3.DATA),
}

_TEXTS = "exllamav3/conversion/standard_cal_data"
WIKI = Source(
    "wiki.utf8",
    ("exllamav3==1.6.5",),
    lambda path: path == f"{_TEXTS}/wiki.utf8",
    "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
)
C4 = Source(
    "c4.utf8",
    ("exllamav3==1.6.5",),
    lambda path: path == f"{_TEXTS}/c4.utf8",
    "2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41",
)

SAMPLES = 64
WINDOWS = 16
WINDOW_LENGTH = 512
OFFSET_TOKENS = 200_000
C4_OFFSET_CHARACTERS = 100_000

_DOCUMENT_TAG = re.compile(r"</?doc[^>]*>\n?")


@dataclass(frozen=True, eq=False)
class Protocol:
    """A model and its windows.

    Attributes:
      folder: holds the texts, ``wiki.txt`` and ``c4.txt``, and temporary work.
      loaded: the model.
      calibration: windows of Wikipedia to calibrate on.
      wiki: windows of Wikipedia to evaluate on.
      c4: windows of C4 to evaluate on.
    """

    folder: Path
    loaded: LoadedModel
    calibration: Windows
    wiki: Windows
    c4: Windows


def load_protocol(
    model: str, *, checkpoint: Path | None = None, samples: int = SAMPLES, windows: int = WINDOWS
) -> Protocol:
    """Fetch a model and the texts, and cut the windows.

    Args:
      model: a key of :data:`MODELS`.
      checkpoint: folder of a local checkpoint; None downloads it.
      samples: calibration windows.
      windows: evaluation windows of each text.
    """
    folder, source = prepare(model, checkpoint=checkpoint)
    loaded = load(str(source), work=folder / "model")
    tokenizer = loaded.tokenizer()

    def text(file: str, count: int, offset: int = 0) -> Windows:
        return load_windows(
            TextConfig(text=file),
            tokenizer,
            config_dir=folder,
            samples=count,
            sequence_length=WINDOW_LENGTH,
            offset_tokens=offset,
            limits=loaded.limits(),
        )

    return Protocol(
        folder,
        loaded,
        text("wiki.txt", samples),
        text("wiki.txt", windows, OFFSET_TOKENS),
        text("c4.txt", windows),
    )


def prepare(model: str, *, checkpoint: Path | None = None) -> tuple[Path, Path]:
    """Fetch a model and the texts.

    Args:
      model: a key of :data:`MODELS`.
      checkpoint: folder of a local checkpoint; None downloads it.

    Returns:
      The folder with ``wiki.txt`` and ``c4.txt``, and the model's file or folder.
    """
    folder = CACHE / model
    folder.mkdir(parents=True, exist_ok=True)
    _write_texts(folder)
    if checkpoint is None:
        source, data = MODELS[model]
        (checkpoint,) = assemble([source], data)
    return folder, checkpoint.resolve()


def _write_texts(folder: Path) -> None:
    """Fetch the texts and write them in the form that the protocol reads."""
    wiki, c4 = (path.read_text(encoding="utf-8") for path in assemble([WIKI, C4], CACHE))
    (folder / "wiki.txt").write_text(_DOCUMENT_TAG.sub("", wiki), encoding="utf-8")
    (folder / "c4.txt").write_text(c4[C4_OFFSET_CHARACTERS:], encoding="utf-8")
