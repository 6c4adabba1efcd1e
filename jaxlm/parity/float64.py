"""Foreign torch code in float64, where it would compute some parts in float32 whatever the type of the model."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """Makes torch take float64 wherever code asks for float32, so that a float64 model has no float32 part.

    transformers computes softmax, RMS norms and rotary angles in float32 in a model of any type. In here its own
    formulas, unchanged, are as exact as float64. The buffers that it computes when a model is built (the frequencies
    of RoPE) need this, too: build the model in here.
    """
    import safetensors.torch  # noqa: F401  (its table of types must not be made in here)
    import torch
    from torch.overrides import TorchFunctionMode

    narrow = torch.float32

    class Widened(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.float:
                func = torch.Tensor.double
            args = tuple(torch.float64 if argument is narrow else argument for argument in args)
            kwargs = {name: torch.float64 if value is narrow else value for name, value in (kwargs or {}).items()}
            return func(*args, **kwargs)

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Widened():
            yield
    finally:
        torch.set_default_dtype(before)
