"""`python scripts/train.py ...` is `jaxlm train ...`."""

import sys

from jaxlm.cli.main import main

sys.exit(main(["train", *sys.argv[1:]]))
