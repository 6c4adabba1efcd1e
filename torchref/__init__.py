"""jaxlm's models and optimizers in plain PyTorch, naive on purpose: a second implementation to check jaxlm against.

Keys are repeated for each query head, masks are full matrices, recurrent layers read one token after another. Of jaxlm
only the configs are used here.
"""

from torchref import course, optim
from torchref.attention import Attention
from torchref.loss import cross_entropy
from torchref.model import LanguageModel, build_model
from torchref.sampling import generate

__all__ = ["Attention", "LanguageModel", "build_model", "course", "cross_entropy", "generate", "optim"]
