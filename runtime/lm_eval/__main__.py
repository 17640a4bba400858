"""lm-eval's command line, with ``eoracc`` among its models.

    python -m eoracc.runtime.lm_eval --model eoracc --model_args pretrained=ARTIFACT,adapter=NAME
                                     --include_path TASKS --tasks TASK

lm-eval does not search other packages for models; importing the module registers ``eoracc``.
"""

from __future__ import annotations

import sys

from eoracc.errors import EoraccError

__all__ = ["main"]


def main() -> None:
    """Run lm-eval; an error of the user ends it with one sentence and exit code 2."""
    from lm_eval.__main__ import cli_evaluate

    # The import registers the model.
    import eoracc.runtime.lm_eval.model  # noqa: F401, PLC0415

    try:
        cli_evaluate()
    except EoraccError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
