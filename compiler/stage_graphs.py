"""One .onnx file for each stage of a build: ``eoracc build --keep-graphs DIR``."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from eoracc.errors import ConfigError

__all__ = ["StageGraphs"]


class StageGraphs:
    """Writes the graph of each stage to a folder, numbered in the order of the build.

    A file ``NN-stage.onnx`` has its weights beside it, in ``NN-stage.onnx.data``. A graph before
    lowering has no function bodies: ONNX Runtime needs the native library to run its eoracc ops.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Keep graphs in ``folder``; None keeps none.

        Raises:
          ConfigError: the folder has files already, or cannot be written.
        """
        self._folder = folder
        self._count = 0
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            occupied = next(folder.iterdir(), None)
        except OSError as error:
            raise ConfigError(
                f"--keep-graphs: {folder} cannot be written ({error.strerror}): give another folder"
            ) from None
        if occupied is not None:
            raise ConfigError(
                f"--keep-graphs: {folder} is not empty ({occupied.name}): give an empty folder"
            )

    def keep(self, stage: str, model: ir.Model) -> None:
        """Write ``model``, the graph after ``stage``; it is not changed."""
        if self._folder is None:
            return
        path = self._folder / f"{self._count:02}-{stage}.onnx"
        self._count += 1
        ir.save(model, path, external_data=f"{path.name}.data")
