"""How a tensor of another format holds parameters: transposed, several side by side, or by heads."""

from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """Parameters side by side along their last axis, then maybe transposed.

    `join` and `split` are inverse to each other; a single parameter is joined with nothing.
    """

    transposed: bool = False
    """The last axes change places: a kernel (in, out) becomes a weight (out, in), as in torch's Linear."""
    heads: int | None = None
    """With several parameters: those of the first head come first, then those of the second. None = whole parameters,
    one after the other."""

    def shape(self, shapes: list[Shape]) -> Shape:
        """The shape of the tensor that holds parameters of these shapes."""
        joined = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
        return joined[::-1] if self.transposed else joined

    def join(self, leaves: list[np.ndarray]) -> np.ndarray:
        """The tensor that holds these parameters."""
        if self.heads is not None:
            parts = [leaf.reshape(*leaf.shape[:-1], self.heads, -1) for leaf in leaves]
            joined = np.concatenate(parts, axis=-1).reshape(*leaves[0].shape[:-1], -1)
        else:
            joined = leaves[0] if len(leaves) == 1 else np.concatenate(leaves, axis=-1)
        return joined.T if self.transposed else joined

    def split(self, tensor: np.ndarray, shapes: list[Shape]) -> list[np.ndarray]:
        """The parameters of these shapes in a tensor."""
        tensor = tensor.T if self.transposed else tensor
        widths = [shape[-1] // (self.heads or 1) for shape in shapes]
        if self.heads is not None:
            tensor = tensor.reshape(*tensor.shape[:-1], self.heads, -1)
        parts = np.split(tensor, np.cumsum(widths)[:-1], axis=-1)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


class Entry(NamedTuple):
    """A tensor of another format, and the parameters that it holds."""

    name: str
    paths: tuple[str, ...]
    """Paths of the parameters, such as block_0/attention/query/kernel, in their order in the tensor."""
    layout: Layout
