"""`python scripts/reproduce_nanogpt_optimizers.py ...` is `jaxlm reproduce nanogpt-optimizers ...`."""

import sys

from jaxlm.cli.main import main

sys.exit(main(["reproduce", "nanogpt-optimizers", *sys.argv[1:]]))
