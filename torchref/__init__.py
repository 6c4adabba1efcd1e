"""What jaxlm computes, in plain PyTorch and naive on purpose: a second implementation to check it against.

Keys are repeated for each query head, masks are whole matrices, recurrent layers go token by token. Nothing of jaxlm
is used here but its configs.
"""

from torchref import optim
from torchref.attention import Attention
from torchref.loss import cross_entropy
from torchref.model import LanguageModel, build_model
from torchref.sampling import generate

__all__ = ["Attention", "LanguageModel", "build_model", "cross_entropy", "generate", "optim"]
