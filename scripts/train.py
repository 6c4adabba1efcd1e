"""`python scripts/train.py ...` is `jaxlm train ...`."""

import sys

from jaxlm.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
