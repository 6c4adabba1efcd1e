"""`python scripts/reproduce_cmu11785.py ...` is `jaxlm reproduce cmu11785 ...`."""

import sys

from jaxlm.cli.main import main

sys.exit(main(["reproduce", "cmu11785", *sys.argv[1:]]))
