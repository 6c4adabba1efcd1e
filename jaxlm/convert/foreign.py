"""What converters share: readers of foreign configs and tensors that use each entry once, or refuse it by name."""

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jaxlm.convert.files import TensorFiles
from jaxlm.convert.layouts import Entry, Shape
from jaxlm.convert.tensors import FLOATS
from jaxlm.errors import CheckError, UserError
from jaxlm.finite import not_finite
from jaxlm.sharding.mesh import find_devices
from jaxlm.types import Params

WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
"""What torch's DataParallel, torch.compile and PEFT put in front of names."""
ROOTS = ("transformer", "model", "lm_head", "gpt_neox", "embed_out")
"""The parts of a whole language model in the formats that are read."""


def wrapper(names: Iterable[str], source: str) -> str:
    """What a wrapper has put in front of all names, such as "module._orig_mod."; "" if there is none.

    Any first part that all names share is a wrapper's if whole language models begin behind it.

    Raises:
      UserError: names of an adapter, whose weights are to be added to those of a model.
    """
    left, found = set(names), ""
    if adapters := sorted(name for name in left if re.search(r"(^|\.)lora_", name)):
        raise UserError(
            f"{source} holds a LoRA adapter ({adapters[0]}): merge the adapter first (PEFT's merge_and_unload), and "
            "save the merged model"
        )
    while left:
        first = f"{min(left).partition('.')[0]}."
        inner = {name.partition(".")[2].partition(".")[0] for name in left}
        known = [one for one in WRAPPERS if all(name.startswith(one) for name in left)]
        if not known and inner <= set(ROOTS) and all(name.startswith(first) for name in left):
            known = [first]
        if not known:
            break
        found, left = found + known[0], {name.removeprefix(known[0]) for name in left}
    return found


def check_layers(layers: int, tensors: int, where: str) -> None:
    """Refuses a config with more layers than the file `where` has tensors.

    Raises:
      UserError: the message names both numbers.
    """
    if layers > tensors:
        raise UserError(f"{where} does not fit its config: {layers} layers, and {tensors} tensors in all")


class Fields:
    """The fields of a foreign config. `finish` refuses those that were not used: nothing is guessed."""

    def __init__(self, fields: Mapping[str, Any], source: str) -> None:
        self._left, self._all, self._source = dict(fields), dict(fields), source

    def required(self, name: str) -> Any:
        """Uses a field that has no default.

        Raises:
          UserError: it is missing.
        """
        if self._left.get(name) is None:
            raise UserError(f"{self._source} has no {name}: give its value there")
        return self._left.pop(name)

    def optional(self, name: str, default: Any) -> Any:
        """Uses a field that may be missing; `default` is its default in the format."""
        return self._left.pop(name, default)

    def translated(self, name: str, default: Any, known: Mapping[Any, Any]) -> Any:
        """Uses a field whose values have other names here, which `known` gives.

        Raises:
          UserError: a value that is not among the known ones.
        """
        value = self.optional(name, default)
        if isinstance(value, list | dict) or value not in known:
            self.refuse(name, value, f"give one of {', '.join(map(str, known))}")
        return known[value]

    def only(self, name: str, *accepted: Any) -> None:
        """Uses a field that may be missing but otherwise must have one of these values.

        Raises:
          UserError: another value.
        """
        value = self.optional(name, accepted[0])
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted):
            self.refuse(name, value, f"jaxlm computes {name} = {accepted[0]!r}")

    def ignore(self, names: Iterable[str]) -> None:
        """Uses fields that do not change the function."""
        for name in names:
            self._left.pop(name, None)

    def seen(self, name: str, default: Any = None) -> Any:
        """The value of a field, without using it."""
        value = self._all.get(name)
        return default if value is None else value

    def ignore_rest(self, reader: str) -> None:
        """Uses all fields that are left, which the source's `reader` does not read, and says once which they are."""
        left = [name for name, value in sorted(self._left.items()) if value is not None]
        if left:
            names = f"{', '.join(left)} {'change' if len(left) > 1 else 'changes'} nothing"
            warnings.warn(
                f"{self._source}: {names}: {reader} does not read {'them' if len(left) > 1 else 'it'}", stacklevel=3
            )
        self._left = {}

    def refuse(self, name: str, value: Any, fix: str) -> NoReturn:
        """Raises UserError, always."""
        raise UserError(f"{self._source}: {name} = {value!r} is not supported: {fix}")

    def finish(self) -> None:
        """Refuses the fields that were not used, except those that are null.

        Raises:
          UserError: naming the first unknown field and its value.
        """
        for name, value in sorted(self._left.items()):
            if value is not None:
                self.refuse(name, value, "jaxlm does not know this field; remove it if it does not change the function")


class Tensors:
    """The tensors of a foreign model by name. `finish` lists everything missing, unfit or unused in one error."""

    def __init__(self, files: TensorFiles, buffers: str = "(?!)") -> None:
        """`buffers` is a pattern for the end of names that are not parameters; by default it matches none.

        What a wrapper puts in front of all names is taken off.

        Raises:
          UserError: as `wrapper`; JAX finds no devices; float64 weights without 64-bit JAX.
        """
        ignored, outer = re.compile(rf"(^|\.)({buffers})$"), len(wrapper(files.names, files.where))
        self._files = files
        self._left = {name[outer:]: name for name in files.names if not ignored.search(name)}
        self._problems: list[str] = []
        find_devices()
        wide = {FLOATS.get(files.dtype(name)) for name in self._left.values()}
        self.dtype: Literal["bfloat16", "float32", "float64"] = "float64" if "float64" in wide else "float32"
        """The narrowest type that holds every value exactly; types that are not in FLOATS are refused."""
        if wide == {"bfloat16"}:
            self.dtype = "bfloat16"
        if self.dtype == "float64" and jax.dtypes.canonicalize_dtype(jnp.float64) != jnp.float64:
            raise UserError(f"{files.where} has float64 weights, which need 64-bit JAX: set JAX_ENABLE_X64=1")

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def prefix(self, *candidates: str) -> str:
        """Returns the first of these that a name begins with; "" if none does."""
        return next((one for one in candidates if any(name.startswith(one) for name in self._left)), "")

    def take(self, name: str, *shape: int) -> np.ndarray:
        """Uses a tensor of this shape, in type `dtype`; returns NaN where `finish` will refuse.

        The values may share memory with a mapped file or a module.

        Raises:
          CheckError: it holds NaN or infinity; the message names it and the first place.
        """
        is_sound = self._check(name, shape)
        stored = self._left.pop(name, None)
        if is_sound and stored is not None:
            tensor = self._files.read(stored).astype(self.dtype, copy=False)
            if place := not_finite(tensor):
                raise CheckError(f"{self._files.where}: {stored} {place}: convert a sound copy of the model")
            return tensor
        return np.full(shape, np.nan, self.dtype)

    def _check(self, name: str, shape: Shape) -> bool:
        """Whether a tensor is there and of this shape and a type that is read; if not, `finish` will say so."""
        stored = self._left.get(name)
        if stored is None:
            self._problems.append(f"{name} is missing")
        elif self._files.shape(stored) != shape:
            self._problems.append(f"{name} has shape {self._files.shape(stored)}, not {shape}")
        elif self._files.dtype(stored) not in FLOATS:
            self._problems.append(f"{name} is of type {self._files.dtype(stored)}, not {', '.join(FLOATS)}")
        else:
            return True
        return False

    def check_layers(self, layers: int) -> None:
        """Refuses a config with more layers than there are tensors, before their names are made.

        Raises:
          UserError: the message names both numbers.
        """
        check_layers(layers, len(self._left), self._files.where)

    def take_all(self, entries: Iterable[Entry], shapes: Mapping[str, Shape], also: str | None = None) -> Params:
        """Uses the tensors that hold the parameters of these shapes, one after the other, and gives JAX arrays.

        Args:
          also: a tensor that the caller will use.

        Raises:
          UserError: as `finish`, before anything is read: a config can name shapes that no memory holds.
        """
        leaves: dict[str, jax.Array] = {}
        entries = list(entries)
        wanted_shapes = [[shapes[path] for path in paths] for _, paths, _ in entries]
        for (name, _, layout), wanted in zip(entries, wanted_shapes, strict=True):
            self._check(name, layout.shape(wanted))
        if self._problems:
            for taken in (also, *(entry.name for entry in entries)):
                self._left.pop(str(taken), None)
            self.finish()
        for (name, paths, layout), wanted in zip(entries, wanted_shapes, strict=True):
            tensor = self.take(name, *layout.shape(wanted))
            leaves |= {path: jnp.array(part) for path, part in zip(paths, layout.split(tensor, wanted), strict=True)}
        return unflatten_dict(leaves, sep="/")

    def check_tied(self, name: str, table: np.ndarray) -> None:
        """Uses the head of a tied model, which may be missing and otherwise must equal the table."""
        if name in self._left and not np.array_equal(self.take(name, *table.shape), table):
            self._problems.append(f"{name} differs from the embedding table, though the config ties them")

    def finish(self) -> None:
        """Checks that every tensor was used.

        Raises:
          UserError: tensors that are missing, unfit or unused, by name.
        """
        problems = self._problems + [f"{name} is unexpected" for name in sorted(self._left)]
        if problems:
            shown = "; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
            begins = list(dict.fromkeys(name.partition(".")[0] for name in sorted(self._left)))[:4]
            told = f" (names that are left begin with {', '.join(begins)})" if self._problems and begins else ""
            raise UserError(f"{self._files.where} does not fit its config{told}: {shown}")
