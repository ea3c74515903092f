"""The command `labkit`: thin, over the same API as the notebooks.

Results go to stdout (with `--json` as one document), all else to stderr.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command; an error of labkit's becomes its text and an exit, not a traceback."""
    from labkit.cli.app import app
    from labkit.errors import LabkitError, SpecError

    try:
        app()
    except SpecError as exc:
        print(exc, file=sys.stderr)
        sys.exit(2)
    except LabkitError as exc:
        print(exc, file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # whoever read our output has seen enough: labkit ls | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as exc:
        print(f"labkit: {exc}", file=sys.stderr)
        sys.exit(1)
