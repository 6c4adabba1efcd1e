"""The tokens that end a text, as a Hugging Face folder names them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.data.reading import read_json
from jaxlm.errors import UserError


def stop_tokens(source: Path | Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a text: eos_token_id, a number or a list. None are named: ().

    Args:
      source: a folder, whose generation_config.json goes before its config.json, as in transformers; or the content of
        one of these files.

    Raises:
      UserError: eos_token_id is something else, or a file is not JSON.
    """
    if isinstance(source, Mapping):
        return _ids(source, "the config")
    for name in ("generation_config.json", "config.json"):
        file = source / name
        if not file.is_file():
            continue
        try:
            content = read_json(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read as JSON ({error}): save the model again") from None
        if isinstance(content, dict) and (found := _ids(content, str(file))):
            return found
    return ()


def _ids(config: Mapping[str, Any], where: str) -> tuple[int, ...]:
    text_config = config.get("text_config")  # of a model that reads more than text
    value = config.get("eos_token_id")
    if value is None and isinstance(text_config, Mapping):
        value = text_config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        raise UserError(f"{where}: eos_token_id = {value!r} is neither an id nor a list of ids: correct it")
    return tuple(dict.fromkeys(ids))
