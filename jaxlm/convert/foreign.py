"""What converters share: foreign configs and foreign tensors, of which each entry is taken once or refused by name."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.convert.tensors import FLOATS
from jaxlm.errors import UserError
from jaxlm.types import Params


class Fields:
    """The fields of a foreign config. `finish` refuses those that nobody asked for: nothing is guessed."""

    def __init__(self, found: Mapping[str, Any], source: str) -> None:
        self._found, self._source = dict(found), source

    def required(self, name: str) -> Any:
        """The value of a field that has no default.

        Raises:
          UserError: it is missing.
        """
        if self._found.get(name) is None:
            raise UserError(f"{self._source} has no {name}: give its value there")
        return self._found.pop(name)

    def optional(self, name: str, default: Any) -> Any:
        """The value of a field, or its default in the format."""
        return self._found.pop(name, default)

    def translated(self, name: str, default: str, known: Mapping[str, Any]) -> Any:
        """What a field's value is called here.

        Raises:
          UserError: a value that is not among the known ones.
        """
        value = self.optional(name, default)
        if not isinstance(value, str) or value not in known:
            self.refuse(name, value, f"give one of {', '.join(known)}")
        return known[value]

    def only(self, name: str, *accepted: Any) -> None:
        """Takes a field that may be missing, and must have one of these values where it is not.

        Raises:
          UserError: another value.
        """
        value = self.optional(name, accepted[0])
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted):
            self.refuse(name, value, f"jaxlm computes {name} = {accepted[0]!r}")

    def ignore(self, names: Iterable[str]) -> None:
        """Takes fields that change nothing of the function."""
        for name in names:
            self._found.pop(name, None)

    def refuse(self, name: str, value: Any, fix: str) -> None:
        """Raises: UserError, always."""
        raise UserError(f"{self._source}: {name} = {value!r} is not supported: {fix}")

    def finish(self) -> None:
        """Refuses what is left; null means that a field is not used.

        Raises:
          UserError: naming the first unknown field and its value.
        """
        for name, value in sorted(self._found.items()):
            if value is not None:
                self.refuse(name, value, "jaxlm does not know this field; take it out if it changes nothing")


class Tensors:
    """The tensors of a foreign model by name. `finish` tells all that is missing, unfit or left over in one error."""

    def __init__(self, found: Mapping[str, np.ndarray], source: str, buffers: str = "(?!)") -> None:
        """`buffers` matches the end of names that hold no parameters."""
        ignored = re.compile(rf"(^|\.)({buffers})$")
        self._found = {name: tensor for name, tensor in found.items() if not ignored.search(name)}
        self._source = source
        self._problems: list[str] = []
        types = {str(tensor.dtype) for tensor in self._found.values()}
        wide = {FLOATS.get(name) for name in types}
        self.dtype: Literal["bfloat16", "float32", "float64"] = "float64" if "float64" in wide else "float32"
        """The type that holds every value exactly; tensors of other types than FLOATS are refused."""
        if wide == {"bfloat16"}:
            self.dtype = "bfloat16"
        if self.dtype == "float64" and jax.dtypes.canonicalize_dtype(jnp.float64) != jnp.float64:
            raise UserError(f"{source} has weights of float64, which need 64-bit JAX: set JAX_ENABLE_X64=1")

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def prefix(self, *candidates: str) -> str:
        """The first of these that a name begins with; "" if none does."""
        return next((one for one in candidates if any(name.startswith(one) for name in self._found)), "")

    def take(self, name: str, *shape: int) -> np.ndarray:
        """A tensor of this shape, of type `dtype`; NaN in its place where `finish` will refuse."""
        tensor = self._found.pop(name, None)
        if tensor is None:
            self._problems.append(f"{name} is missing")
        elif tensor.shape != shape:
            self._problems.append(f"{name} has shape {tensor.shape}, not {shape}")
        elif str(tensor.dtype) not in FLOATS:
            self._problems.append(f"{name} is of type {tensor.dtype}, not {', '.join(FLOATS)}")
        else:
            return tensor.astype(self.dtype, copy=False)
        return np.full(shape, np.nan, self.dtype)

    def check_tied(self, name: str, table: np.ndarray) -> None:
        """Takes the head of a tied model, which may be missing and must be the table."""
        if name in self._found and not np.array_equal(self.take(name, *table.shape), table):
            self._problems.append(f"{name} is not the embedding table, though the config ties them")

    def finish(self) -> None:
        """Checks that all was taken.

        Raises:
          UserError: tensors that are missing, unfit, or left over, by name.
        """
        problems = self._problems + [f"{name} is unexpected" for name in sorted(self._found)]
        if problems:
            shown = "; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
            raise UserError(f"{self._source} does not fit its config: {shown}")


class Linear(NamedTuple):
    """How a format stores a linear layer: `transposed` means (out, in), as torch's Linear does."""

    tensors: Tensors
    transposed: bool

    def kernel(self, name: str, inputs: int, outputs: int) -> np.ndarray:
        """The weight as (in, out)."""
        if self.transposed:
            return self.tensors.take(f"{name}.weight", outputs, inputs).T
        return self.tensors.take(f"{name}.weight", inputs, outputs)

    def layer(self, name: str, inputs: int, outputs: int, use_bias: bool) -> Params:
        """Kernel (in, out), and bias."""
        made = {"kernel": self.kernel(name, inputs, outputs)}
        return made | ({"bias": self.tensors.take(f"{name}.bias", outputs)} if use_bias else {})
