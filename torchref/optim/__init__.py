"""Optimizers as their papers write them, one parameter at a time.

All take a list of parameters or of groups, each group with options of its own, as `torch.optim` does, and dense
gradients. What they keep is in at least float32 whatever the parameters are. Values that make no sense raise
ValueError. A schedule sets `group["lr"]`, as those of torch do.

In the formulas g is the gradient, p the parameter, t counts steps from 1, beta and gamma are the decay rates of the
first and the second moment.
"""

from torchref.optim.adafactor import Adafactor
from torchref.optim.adam import Adam, AdamW
from torchref.optim.adamsn import AdamSN
from torchref.optim.base import clip_by_global_norm
from torchref.optim.sgd import SGD

__all__ = ["SGD", "Adafactor", "Adam", "AdamSN", "AdamW", "clip_by_global_norm"]
