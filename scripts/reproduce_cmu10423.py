"""`python scripts/reproduce_cmu10423.py ...` is `jaxlm reproduce cmu10423 ...`."""

import sys

from jaxlm.cli.main import main

sys.exit(main(["reproduce", "cmu10423", *sys.argv[1:]]))
