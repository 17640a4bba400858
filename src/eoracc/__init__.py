"""eoracc: a compiler for compressed, compensated language models.

The root exception lives here because every package below may raise it and none of them
may import another one upwards::

    EoraccError                    exit code 2: bad input, one clear sentence
    ├── plugins.operands
    │   └── PluginError            the native library or one of its operands
    ├── runtime.errors
    │   ├── ArtifactError          an artifact that is missing, damaged, foreign, or in the way
    │   ├── BackendError           a package, driver or GPU is missing, or refuses the model
    │   ├── RequestError           a request that cannot be served as it is
    │   └── BusyError              more requests than may wait
    ├── runtime.server.errors
    │   └── ApiError               what an HTTP request is answered with
    └── compiler.errors
        ├── ConfigError            model.yaml and the command line
        ├── ModelError             a checkpoint that cannot be read or is not supported
        ├── DataError              calibration or evaluation text
        ├── PassError              a pass on a node of the graph
        └── GateError              exit code 1: a build that is correct but not good enough
"""

from __future__ import annotations

from typing import ClassVar

__all__ = ["EoraccError", "__version__"]

__version__ = "0.1.0"


class EoraccError(Exception):
    """Base of every error that eoracc raises on purpose; its text is one clear sentence."""

    exit_code: ClassVar[int] = 2
