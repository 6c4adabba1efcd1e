"""Reads a file of weights in a process of its own and measures the memory that this takes."""

import subprocess
import sys

SCRIPT = """
import re, sys
from pathlib import Path
import numpy as np
from jaxlm.convert.files import open_tensors

def used(what):
    return int(re.search(rf"{what}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000

if sys.argv[1].endswith(".bin"):
    import torch
kept, before = [], used("RssAnon")
files = open_tensors(Path(sys.argv[1]))
largest = max(np.prod(files.shape(name)) * np.dtype(files.dtype(name)).itemsize for name in files.names) / 1e6
dropped = max((np.array(files.read(name)), used("RssAnon"))[1] for name in files.names) - before
kept = [np.array(files.read(name)) for name in files.names]
held = sum(array.nbytes for array in kept) / 1e6
print(largest, dropped, held, used("RssAnon") - before)
"""


def memory_of_reading(file):
    """Megabytes: of the largest tensor, used at most while tensors are read and dropped, of all, used by all kept.

    Pages of mapped files do not count: the system takes them back when it needs them.
    """
    done = subprocess.run([sys.executable, "-c", SCRIPT, file], capture_output=True, text=True, check=True)
    return [float(number) for number in done.stdout.split()]
