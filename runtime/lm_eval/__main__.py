"""lm-eval's command line, with ``eoracc`` among its models.

    python -m eoracc.runtime.lm_eval --model eoracc --model_args pretrained=ARTIFACT,adapter=NAME
                                     --include_path TASKS --tasks TASK

lm-eval does not search other packages for models; importing the module registers ``eoracc``.
"""

from __future__ import annotations

import sys

from eoracc.failure import end_process

__all__ = ["main"]


def main() -> None:
    """Run lm-eval; an error ends it with one sentence and the exit code of ``eoracc.failure``."""
    try:
        from lm_eval.__main__ import cli_evaluate

        # The import registers the model.
        import eoracc.runtime.lm_eval.model  # noqa: F401, PLC0415

        cli_evaluate()
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 - panics of Rust libraries are no Exception
        sys.exit(end_process(error))


if __name__ == "__main__":
    main()
