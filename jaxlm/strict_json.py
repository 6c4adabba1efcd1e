"""JSON that every reader takes: Python's own writes NaN and Infinity, which JSON (RFC 8259) does not have."""

import json
import math
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """A value as JSON text, with null for numbers that are not finite, as for those that are not known.

    Surrogates, which Python makes of file names that are not UTF-8, are escaped, so that the text can be encoded.

    Args:
      options: those of `json.dumps`.
    """
    text = json.dumps(_finite(value), allow_nan=False, **options)
    return text.encode("utf-8", "backslashreplace").decode()  # \\udc80 is JSON's own escape too


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
