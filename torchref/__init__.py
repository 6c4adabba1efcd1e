"""What jaxlm computes, in plain PyTorch and naive on purpose: a second implementation to check it against.

Nothing of jaxlm is used here but its configs.
"""

from torchref import optim

__all__ = ["optim"]
