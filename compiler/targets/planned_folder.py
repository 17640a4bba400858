"""The bytes of an artifact's folder before its weights are solved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eoracc.compiler.targets.artifact import encoded_json
from eoracc.compiler.targets.file_bytes import files_bytes
from eoracc.compiler.targets.genai_config import genai_config
from eoracc.compiler.targets.onnxruntime.lower import artifact_graph
from eoracc.compiler.targets.record_size import most_record_bytes
from eoracc.compiler.targets.weights_file import graph_bytes
from eoracc.passes.graph.linears import find_linears
from eoracc.plugins.library import library_path
from eoracc.runtime.artifact.manifest import Manifest
from eoracc.runtime.parity.tokens import TOKENS_FILE

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

    from eoracc.compiler.config.sections import BuildConfig
    from eoracc.compiler.frontend.load import LoadedModel

__all__ = ["PlannedFolder"]

_MANIFEST_BYTES = 6_144
"""Of manifest.json beside the configuration: hashes, versions, the machine, figures of parity."""

_REPORT_BYTES = 6_144
"""Of report.json beside its linears: fidelity, surveys, times, notes, warnings."""

_LINEAR_BYTES = 768
"""Of report.json for each linear: its entry, those of surveys, a note and a warning. A linear
without note and warning takes half of it."""


@dataclass(frozen=True, eq=False)
class PlannedFolder:
    """What a build will write for the target ``onnxruntime``.

    Attributes:
      config: of the build.
      loaded: the checkpoint.
      folder: has the files of the tokenizer and the chat templates already, and nothing else.
      lean: whether the records that only ``eoracc verify`` reads are left out.
    """

    config: BuildConfig
    loaded: LoadedModel
    folder: Path
    lean: bool = False

    def nbytes(self, model: ir.Model) -> int:
        """Bytes of the folder with ``model``, never fewer than it will have with usual weights.

        All files are counted as they will be but the records of the build, which are bounded, and
        scales, which count in float16: only the solved weights tell which of them it cannot hold.

        Args:
          model: after all passes; its weights may be any of their size. It is left as it is.
        """
        lowered = artifact_graph(model, adapter_type=self.config.onnxruntime.adapter_type)
        search = genai_config(
            self.loaded.config,
            lowered,
            generation=self.loaded.generation,
            custom_ops_library=library_path().name,
        )
        found = self._known_bytes() + len(encoded_json(search)) + graph_bytes(lowered)
        return found + self._record_bytes(model, found)

    def conditions(self) -> dict[str, Any]:
        """What the bytes depend on beside checkpoint and passes, for keys of kept figures.

        The length of the configuration, which manifest.json repeats, is left out: figures are kept
        where another method is added to it.
        """
        return {
            "adapter_type": self.config.onnxruntime.adapter_type,
            "parity": self.config.verify.parity,
            "lean": self.lean,
            "known_bytes": self._known_bytes(),
        }

    def _known_bytes(self) -> int:
        """Bytes of the files that are there before the graph: tokenizer, templates, library."""
        left_out = (TOKENS_FILE,) if self.lean else ()
        kept = (path for path in self.folder.rglob("*") if path.name not in left_out)
        return files_bytes([*kept, library_path()])

    def _record_bytes(self, model: ir.Model, folder_bytes: int) -> int:
        """A bound of the manifest, the report, and the record of parity."""
        linears = find_linears(model)
        found = _MANIFEST_BYTES + self._config_bytes()
        found += _REPORT_BYTES + _LINEAR_BYTES * len(linears)
        if self.config.verify.parity and not self.lean:
            vocabulary = int(self.loaded.config.vocab_size)
            found += most_record_bytes(linears, vocabulary, folder_bytes)
        return found

    def _config_bytes(self) -> int:
        """Bytes of a manifest that has the configuration, and nothing else."""
        config = self.config.resolved()
        manifest = Manifest.of({}, source={}, config=config, packages={}, parity={})
        return len(manifest.to_json().encode())
