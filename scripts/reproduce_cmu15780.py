"""`python scripts/reproduce_cmu15780.py ...` is `jaxlm reproduce cmu15780 ...`."""

import sys

from jaxlm.cli.main import main

sys.exit(main(["reproduce", "cmu15780", *sys.argv[1:]]))
