"""The base of every configuration: a frozen dataclass that checks its fields and converts to JSON and back."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typeguard

from jaxlm.errors import UserError

_Config = TypeVar("_Config", bound="Validated")

FLOAT32_MAX = 3.4028234663852886e38
"""The largest finite number of float32."""

FLOAT32_TINY = 2.0**-126
"""The smallest number of float32 that processors do not take for 0."""


def check_at_least(config: object, minimum: float, *names: str) -> None:
    """Raises UserError if one of the named fields is below `minimum`. None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= minimum:
            least = f"{minimum:.3g}" if isinstance(minimum, float) else minimum
            raise UserError(f"{name} = {value!r} is too small: give at least {least}")


def check_at_most(config: object, maximum: int, *names: str) -> None:
    """Raises UserError if one of the named fields is above `maximum`. None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value <= maximum:
            raise UserError(f"{name} = {value!r} is too large: give at most {maximum}")


def _check_number(name: str, value: Any, hint: Any) -> None:
    """Raises UserError if a number does not fit into the 32 bits that it will be computed in."""
    if isinstance(value, int) and "float" not in str(hint):
        if abs(value) >= 2**31:
            raise UserError(f"{name} = {value!r} is out of range: give less than 2^31")
    elif isinstance(value, int | float) and not abs(value) <= FLOAT32_MAX:  # NaN too
        raise UserError(f"{name} = {value!r} is out of range: give a finite number, of float32")


def check_rate(config: object, *names: str) -> None:
    """Raises UserError if one of the named fields is outside [0, 1). None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            raise UserError(f"{name} = {value!r} is out of range: give 0 <= {name} < 1")


def check_seed(config: Any) -> None:
    """Raises UserError if the seed is outside 0 .. 2^31 - 1."""
    if not 0 <= config.seed < 2**31:
        raise UserError(f"seed = {config.seed!r} is out of range: give 0 <= seed < 2^31")


def _in_words(hint: Any) -> str:
    """A type in English: "a whole number or None"."""
    *others, last = dict.fromkeys(_kinds(hint))  # each once
    return f"{', '.join(others)} or {last}" if others else last


def _kinds(hint: Any, several: bool = False) -> list[str]:
    """What a type accepts, one by one; `several` for the items of a tuple."""
    parts = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for part in parts for kind in _kinds(part, several)]
    if get_origin(hint) is tuple:
        items = _kinds(parts[0], several=True)
        return items if parts[-1] is ... else [f"{len(parts)} {' or '.join(items)}"]
    if get_origin(hint) is Literal:
        return [repr(part) for part in parts]
    if hint in (bool, types.NoneType):
        return ["True", "False"] if hint is bool else ["None"]
    noun = {int: "whole number", float: "number", str: "text"}.get(hint, hint.__name__)
    return [f"{noun}s" if several else f"a {noun}"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validated:
    """Checks each field against its annotation when a config is created, and that numbers fit into 32 bits."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise UserError(f"{name} = {value!r} is unknown: choose one of {', '.join(map(str, get_args(hint)))}")
            try:
                typeguard.check_type(value, hint, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
            except typeguard.TypeCheckError:
                raise UserError(f"{name} = {value!r} has the wrong type: give {_in_words(hint)}") from None
            items = value if isinstance(value, tuple) else (value,)
            if any(isinstance(item, bool) for item in items) and hint is not bool and bool not in get_args(hint):
                raise UserError(f"{name} = {value!r} has the wrong type: give a number, not True or False")
            for item in items:
                _check_number(name, item, hint)
            if any(type(item) is int and abs(item) >= 2**31 for item in items):  # in a field of floats
                floats = tuple(float(item) if type(item) is int else item for item in items)
                object.__setattr__(self, name, floats if isinstance(value, tuple) else floats[0])


def to_dict(config: Validated) -> dict[str, Any]:
    """A config as JSON types: dicts, lists, strings, numbers."""
    return dataclasses.asdict(config)


def from_dict(cls: type[_Config], data: Mapping[str, Any]) -> _Config:
    """The config that a JSON object describes.

    Raises:
      UserError: an unknown key, a missing key, or a value that its field does not accept; the message names it.
    """
    hints = get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise UserError(f"{cls.__name__} has no field {', '.join(unknown)}: it has {', '.join(hints)}")
    fields = dataclasses.fields(cls)
    required = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in data]
    if required:
        raise UserError(f"{cls.__name__} needs {', '.join(required)}: give a value")
    values = {}
    for name, value in data.items():
        nested = hints[name]
        if isinstance(nested, type) and issubclass(nested, Validated):
            if not isinstance(value, Mapping):
                raise UserError(f"{name} = {value!r} is not an object: give the fields of {nested.__name__}")
            value = from_dict(nested, value)
        values[name] = tuple(value) if isinstance(value, list) else value  # JSON has no tuples
    return cls(**values)


def difference(first: Validated, second: Validated, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """The fields in which two configs of one class differ: (dotted name, first value, second value)."""
    differences = []
    for field in dataclasses.fields(first):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if isinstance(a, Validated):
            differences += difference(a, b, f"{prefix}{field.name}.")
        elif a != b:
            differences.append((prefix + field.name, a, b))
    return differences
