"""`python scripts/reproduce_nanogpt_gpu.py ...` is `jaxlm reproduce nanogpt-gpu ...`."""

import sys

from jaxlm.cli.main import main

sys.exit(main(["reproduce", "nanogpt-gpu", *sys.argv[1:]]))
