"""`python scripts/reproduce_stats305.py ...` is `jaxlm reproduce stats305 ...`."""

import sys

from jaxlm.cli.main import main

sys.exit(main(["reproduce", "stats305", *sys.argv[1:]]))
