"""TensorRT and TensorRT for RTX, which share an interface: load engines and collect errors."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from eoracc.errors import ArtifactError, BackendError
from eoracc.runtime.packages import import_package

if TYPE_CHECKING:
    from pathlib import Path

    from eoracc.runtime.tensorrt.cuda import Device
    from eoracc.runtime.tensorrt.engine_set import EngineFile, EngineSet

__all__ = ["Library", "find_engine"]

_KEPT_MESSAGES = 4


def find_engine(folder: Path, engines: EngineSet, device: Device) -> EngineFile:
    """Find the engine for a GPU.

    Args:
      folder: of the target, for errors.
      engines: of the target.
      device: the GPU.

    Raises:
      ArtifactError: there is no engine for the compute capability.
    """
    for engine in engines.engines:
        if engine.compute_capability == device.compute_capability:
            return engine
    known = ", ".join(engines.compute_capabilities) or "none"
    raise ArtifactError(
        f"{folder}: has no engine for the compute capability {device.compute_capability} of "
        f"{device.name}: it has engines for {known}; build it for this one, too"
    )


class Library:
    """An imported package, with the last errors that it logged.

    Attributes:
      module: the package.
    """

    def __init__(self, package: str) -> None:
        """Import ``package``.

        Raises:
          BackendError: it is not installed.
        """
        self.module = import_package(package)
        self._complaints: deque[str] = deque(maxlen=_KEPT_MESSAGES)
        self._logger = _make_logger(self.module, self._complaints)
        self._runtime: Any = None

    @property
    def complaint(self) -> str:
        """The last logged errors in one line, since TensorRT raises no exceptions; clears them."""
        text = "; ".join(dict.fromkeys(self._complaints)) or "it gives no reason"
        self._complaints.clear()
        return " ".join(text.split())

    def check_version(self, folder: Path, engines: EngineSet) -> None:
        """Check that the package has the version that built ``engines``.

        Raises:
          BackendError: the versions differ; an engine runs only with its own version.
        """
        own = str(self.module.__version__)
        if own != engines.version:
            package = engines.package.replace("_", "-")
            raise BackendError(
                f"{folder}: its engines were built with {package} {engines.version} and {own} is "
                f"installed: pip install '{package}=={engines.version}', or build it again"
            )

    def load_engine(self, path: Path) -> Any:  # noqa: ANN401 - TensorRT has no types
        """Deserialize an engine on the GPU whose context is current.

        Raises:
          ArtifactError: the file cannot be read.
          BackendError: TensorRT rejects it; the text has the reason.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from None
        if self._runtime is None:
            self._runtime = self.module.Runtime(self._logger)
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise BackendError(f"{path}: {self.module.__name__} refuses it: {self.complaint}")
        return engine


def _make_logger(module: Any, complaints: deque[str]) -> Any:  # noqa: ANN401 - no types
    class Logger(module.ILogger):  # type: ignore[misc]
        """Keeps errors for the exception that follows, and prints nothing."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:  # noqa: ANN401 - no types
            if severity <= module.ILogger.Severity.ERROR:
                complaints.append(msg)

    return Logger()
