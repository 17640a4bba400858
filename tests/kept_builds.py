"""Interrupted tiny builds and comparisons, one for each kind of work that is kept."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from eoracc.compiler import driver
from eoracc.compiler.compare.run import compare
from eoracc.compiler.progress import SilentProgress
from tests.gguf_files import VOCABULARY, write_gguf
from tests.tiny_build import tiny_config, tiny_workspace
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from eoracc.passes.progress import Phase

__all__ = ["KEPT_BUILDS", "InterruptedProgress", "KeptBuild"]

_QUANTIZE = {"quantize_gptq": {"bits": 3, "group_size": 16}}
_EORA = {"eora": {"rank": 2}}
_FACTORIZE = {"factorize_svd": {"ratio": 0.4}}
_QUICK = {"windows": 1, "window_length": 16, "parity": False, "compare": ["svd"]}
_TASK = {
    "text": "text.txt",
    "samples": 4,
    "sequence_length": 16,
    "rank": 2,
    "verify": {"windows": 1, "window_length": 16},
}


class InterruptedProgress(SilentProgress):
    """Interrupts a run, as Ctrl-C does, at the n-th step of the phases with a certain name."""

    def __init__(self, name: str, step: int) -> None:
        super().__init__()
        self._name = name
        self._left = step

    @override
    def _show(self, name: str, total: int) -> AbstractContextManager[Phase]:
        shown = super()._show(name, total)
        if self._name in name:
            with shown as phase:
                phase.advance = self._advance  # type: ignore[method-assign]
        return shown

    def _advance(self, note: str = "") -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt(note)


@dataclass(frozen=True)
class KeptBuild:
    """A build, or a comparison, and the step at which it is interrupted.

    Attributes:
      passes: of model.yaml.
      stop: part of a phase's name, and the number of the step of such phases.
      fields: further sections of model.yaml.
      methods: of the comparison; empty for a build.
      from_gguf: whether the checkpoint is a GGUF file.
    """

    passes: Sequence[Any]
    stop: tuple[str, int]
    fields: Mapping[str, Any]
    methods: Sequence[str] = ()
    from_gguf: bool = False

    def prepare(self, folder: Path) -> Path:
        """Write the checkpoint and the text to ``folder``, which is returned."""
        tiny_workspace(folder)
        if self.from_gguf:
            checkpoint = tiny_model(
                "llama", folder / "llama", vocab_size=len(VOCABULARY), head_dim=8, rms_norm_eps=1e-6
            )
            write_gguf(folder / "model.gguf", checkpoint)
        return folder

    def run(self, workspace: Path, progress: SilentProgress) -> dict[str, str]:
        """The digest of every file of the artifact but its manifest and report, or of each row."""
        model = "model.gguf" if self.from_gguf else "model"
        fields = {"model": model, "verify": _QUICK, **self.fields}
        config = tiny_config(self.passes, **fields)
        if self.methods:
            compared = compare(config, self.methods, ["6"], config_dir=workspace, progress=progress)
            rows = [row.as_dict() for row in compared.rows]
            for row in rows:
                del row["seconds"], row["wall_s"]
            return {row["method"]: _digest(json.dumps(row).encode()) for row in rows}
        output = driver.build(config, config_dir=workspace, progress=progress).output
        return {
            path.relative_to(output).as_posix(): _digest(path.read_bytes())
            for path in sorted(output.rglob("*"))
            if path.is_file() and path.name not in ("manifest.json", "report.json")
        }

    def interrupt(self, workspace: Path) -> list[Path]:
        """Run up to the step; the kept files, as paths in ``workspace``."""
        try:
            self.run(workspace, InterruptedProgress(*self.stop))
        except KeyboardInterrupt:
            work = workspace / (".out.compare" if self.methods else ".out.work")
            files = (path for path in work.rglob("*") if path.is_file())
            return sorted(path.relative_to(workspace) for path in files)
        raise AssertionError(f"there is no step {self.stop}")


_COMPARED = [_QUANTIZE, {"eora": {"rank": 1, "factor_type": "int8"}}]
_OOD = {"text": "text.txt", "offset_tokens": 3000, "windows": 1, "window_length": 16}
_COMPARE = {"methods": {"none": None, "eora": None}, "ood": _OOD}

KEPT_BUILDS: Mapping[str, KeptBuild] = {
    # A finished survey with its Grams, a finished sweep whose factors are mapped, one to resume.
    "sweeps": KeptBuild(
        [
            {"calibrate_outputs": {"by": "covariance"}},
            "calibrate",
            _FACTORIZE,
            "calibrate",
            _QUANTIZE,
            _EORA,
        ],
        ("compress", 22),
        {},
    ),
    "gradients": KeptBuild(
        ["calibrate_outputs", "calibrate", _QUANTIZE, _EORA], ("gradients", 3), {}
    ),
    "findings": KeptBuild(
        [
            {"allocate": {"bits_per_weight": 4, "distortion": "relative"}},
            "calibrate",
            _QUANTIZE,
            _EORA,
        ],
        ("allocate", 6),
        {},
    ),
    "trials": KeptBuild(
        [{"select_last_k": {"ratio": 0.2, "step": 1}}, "calibrate", _FACTORIZE],
        ("compress", 7),
        {},
    ),
    "adapters": KeptBuild(
        ["calibrate", _QUANTIZE, _EORA], ("adapter math", 6), {"adapters": {"math": _TASK}}
    ),
    "gguf": KeptBuild(["calibrate", _QUANTIZE, _EORA], ("compress", 6), {}, from_gguf=True),
    "rows": KeptBuild(
        ["calibrate", *_COMPARED], ("eora", 6), {"compare": _COMPARE}, methods=("none", "eora")
    ),
    "shared sweep": KeptBuild(
        [{"calibrate": {"through": "original"}}, *_COMPARED],
        ("shared sweep", 6),
        {"compare": _COMPARE},
        methods=("none", "eora"),
    ),
}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
