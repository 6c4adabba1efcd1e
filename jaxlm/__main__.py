"""`python -m jaxlm` is the `jaxlm` command."""

import sys

from jaxlm.cli.main import main

if __name__ == "__main__":  # a worker process imports this file too
    sys.exit(main())
