"""lm-eval's command line, with ``eoracc`` among its models.

    python -m eoracc.runtime.lm_eval --model eoracc --model_args pretrained=ARTIFACT,adapter=NAME
                                     --include_path TASKS --tasks TASK

lm-eval looks for models of other packages nowhere: they are there once they have been imported.
"""

from __future__ import annotations

import sys

from eoracc.errors import EoraccError

__all__ = ["main"]


def main() -> None:
    """Run lm-eval; an error that a user can cause is one sentence and exit code 2."""
    # Registers the model, and says so in a sentence where lm-eval is not installed.
    from lm_eval.__main__ import cli_evaluate

    import eoracc.runtime.lm_eval.model  # noqa: F401, PLC0415

    try:
        cli_evaluate()
    except EoraccError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
