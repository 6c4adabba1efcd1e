"""One row under one seed in a process of its own.

python -m jaxlm.reproduce.one EXPERIMENT ROW SEED FOLDER [--quick]
"""

import sys
from pathlib import Path

from jaxlm.compilation_cache import kept_programs
from jaxlm.errors import CheckError, UserError
from jaxlm.reproduce.catalog import experiment
from jaxlm.reproduce.work import StoppedError, perform


def main(arguments: list[str]) -> int:
    """Does the row; returns the exit code of the command."""
    name, row, seed, root, *quick = arguments
    try:
        exp = experiment(name)
        with kept_programs():
            perform(exp, exp.row(row), int(seed), Path(root), bool(quick))
    except StoppedError as stopped:
        return 128 + stopped.signum
    except (UserError, CheckError) as error:
        print(f"jaxlm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
