"""The tokenizer of a run, a Hugging Face folder or a prepared corpus, and the token that ends its texts."""

from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.convert.stop_tokens import stop_tokens
from jaxlm.data.bpe import END_OF_TEXT, BPETokenizer
from jaxlm.data.document_tokens import special_ids
from jaxlm.data.hugging_face import from_hugging_face
from jaxlm.data.reading import read_json
from jaxlm.data.shards import MANIFEST
from jaxlm.data.tokenizer import from_dict
from jaxlm.errors import UserError

SPELLINGS = END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>"
"""Special tokens that end a text in models at large."""


class TokenizerSource(NamedTuple):
    """A tokenizer for documents."""

    tokenizer: BPETokenizer
    end_of_text: int


def read_tokenizer(folder: Path) -> TokenizerSource:
    """Reads the tokenizer.json of a folder, and of its other files which token ends a text.

    That is the one of a prepared corpus, or else the stop token of a run, or the eos_token_id of a Hugging Face folder
    (of several the one that is spelled as in SPELLINGS, or the first), or a special token spelled as in SPELLINGS.

    Raises:
      UserError: the folder has no tokenizer of byte-pair encoding, or no special token that ends a text.
    """
    content = _json(folder / "tokenizer.json")
    try:
        tokenizer = from_dict(content) if "type" in content else from_hugging_face(content)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(
            f"{folder / 'tokenizer.json'} is not a tokenizer that jaxlm can read ({error}): name another folder"
        ) from None
    if not isinstance(tokenizer, BPETokenizer):
        raise UserError(
            f"{folder / 'tokenizer.json'} has no end-of-text token, as its type is {content.get('type')!r}: "
            "give a folder with a byte-pair encoding, or learn one with --data.tokenizer bpe"
        )
    special = {i: text for text, i in special_ids(tokenizer).items()}
    named = [i for i in _named(folder) if i in special] or list(special)
    spelled = [i for text in SPELLINGS for i in named if special[i] == text]
    ends = [*spelled, *(i for i in _named(folder) if i in special)]
    if not ends:
        raise UserError(
            f"{folder} names no special token that ends a text: set eos_token_id in its config.json, or learn a "
            "tokenizer with --data.tokenizer bpe"
        )
    return TokenizerSource(tokenizer, ends[0])


def _named(folder: Path) -> tuple[int, ...]:
    """The ids that end a text, as the files beside the tokenizer name them."""
    if (folder / MANIFEST).is_file():
        stop = _json(folder / MANIFEST).get("end_of_text")
    else:
        config = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
        if "config" not in config:
            return stop_tokens(folder)
        sample = config["config"].get("sample") if isinstance(config["config"], dict) else None
        stop = sample.get("stop_token") if isinstance(sample, dict) else None
    stops = stop if isinstance(stop, list) else () if stop is None else (stop,)
    if not all(type(one) is int for one in stops):
        raise UserError(f"{folder} names {stop!r:.40} as the end of a text: give the id of a token")
    return tuple(stops)


def _json(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): name a folder with a tokenizer.json") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object: name a folder with a tokenizer.json")
    return content
