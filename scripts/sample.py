"""`python scripts/sample.py ...` is `jaxlm sample ...`."""

import sys

from jaxlm.cli.main import main

sys.exit(main(["sample", *sys.argv[1:]]))
