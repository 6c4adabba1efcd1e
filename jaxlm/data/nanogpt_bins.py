"""Tokens as nanoGPT prepares them: a folder with train.bin and val.bin, plain arrays of 16-bit ids."""

import hashlib
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.reading import open_regular, read_json
from jaxlm.data.shards import BLOCK, ShardedTokens
from jaxlm.data.tokenizer import CharTokenizer, IdTokenizer, Tokenizer
from jaxlm.data.tokenizer_file import read_tokenizer_file
from jaxlm.errors import UserError

TRAIN, VAL = "train.bin", "val.bin"
GPT2_VOCABULARY = 50257
"""Ids of the vocabulary of GPT-2, which nanoGPT's own scripts use for all but characters."""

AS_JSON = """python -c "import json, pickle; json.dump(pickle.load(open('meta.pkl', 'rb')), open('meta.json', 'w'))\""""
"""What turns a meta.pkl into a meta.json."""


class Bins(NamedTuple):
    """An open folder; the arrays are memory-mapped."""

    tokenizer: Tokenizer
    train: ShardedTokens
    val: ShardedTokens
    both: ShardedTokens
    sha256: str
    """Of a line for each file with its sha256."""


def is_bins(path: Path) -> bool:
    """Whether a folder has a train.bin."""
    return (path / TRAIN).is_file()


def sha256_of(folder: Path) -> str:
    """Identifies the data; all of them are read.

    Raises:
      UserError: a file is missing or cannot be read.
    """
    lines = ""
    for name in (TRAIN, VAL):
        try:
            with open_regular(folder / name) as file:
                lines += f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n"
        except OSError as error:
            raise UserError(
                f"{folder / name} cannot be read ({error.strerror}): give a folder that has {TRAIN} and {VAL}"
            ) from None
    return hashlib.sha256(lines.encode()).hexdigest()


def open_bins(folder: Path, given: Tokenizer | None) -> Bins:
    """Opens a folder of nanoGPT.

    The tokenizer is the one of the folder: its tokenizer.json, or the characters of its meta.json (nanoGPT's meta.pkl
    as JSON: vocab_size, and itos for characters). Without either it is the given one, or, with a warning, ids as text
    from GPT-2's vocabulary. A meta.pkl is never read: unpickling a file runs whatever code is in it.

    Args:
      given: the tokenizer of a run, or one that the user names.

    Raises:
      UserError: a file is missing, not of 16-bit ids or has an id beyond the vocabulary, a meta.pkl without meta.json,
        or a given tokenizer that is not the folder's.
    """
    sha256, own = sha256_of(folder), _own_tokenizer(folder, given)
    if given is not None and own is not None and own.to_dict() != given.to_dict():
        raise UserError(f"{folder} has tokens of another tokenizer than the given one: give data of the same")
    tokenizer = given or own
    if tokenizer is None:
        warnings.warn(
            f"{folder} names no vocabulary: its tokens are ids below {GPT2_VOCABULARY} (GPT-2's), and so are "
            "prompts and samples; give a tokenizer.json by --data.tokenizer",
            stacklevel=2,
        )
        tokenizer = IdTokenizer(GPT2_VOCABULARY)
    arrays = [_mapped(folder / name, tokenizer.vocab_size) for name in (TRAIN, VAL)]
    train, val, both = (ShardedTokens(part, tokenizer.vocab_size, folder) for part in (arrays[:1], arrays[1:], arrays))
    return Bins(tokenizer, train, val, both, sha256)


def _own_tokenizer(folder: Path, given: Tokenizer | None) -> Tokenizer | None:
    if (folder / "tokenizer.json").is_file():
        return read_tokenizer_file(folder)
    if (folder / "meta.json").is_file():
        return _from_meta(folder / "meta.json")
    if (folder / "meta.pkl").is_file() and given is None:
        raise UserError(
            f"{folder / 'meta.pkl'} is a pickle, which jaxlm never reads, because that can run any code: if you trust "
            f"it, write a meta.json beside it ({AS_JSON}), or give a tokenizer.json by --data.tokenizer"
        )
    return None


def _from_meta(path: Path) -> Tokenizer:
    def refusal(what: str) -> UserError:
        return UserError(f"{path} {what}: write nanoGPT's meta.pkl as JSON, or give a tokenizer.json beside it")

    try:
        meta: Any = read_json(path)
    except (OSError, ValueError) as error:
        raise refusal(f"cannot be read as JSON ({error})") from None
    size = meta.get("vocab_size") if isinstance(meta, dict) else None
    if type(size) is not int or not 0 < size <= 1 << 16:
        raise refusal(f"has vocab_size = {size!r}, not 1 to 65536")
    if "itos" not in meta:
        return IdTokenizer(size)
    itos = meta["itos"]
    symbols: list[Any] = [itos.get(str(i)) for i in range(size)] if isinstance(itos, dict) else []
    characters = all(isinstance(symbol, str) and len(symbol) == 1 for symbol in symbols)
    if len(symbols) != size or len(itos) != size or not characters or symbols != sorted(set(symbols)):
        raise refusal("has an itos that is not one character for each id, in the order of code points")
    return CharTokenizer("".join(symbols))


def _mapped(path: Path, vocab_size: int) -> np.ndarray:
    """The array of a file, whose ids are in the vocabulary."""
    size = path.stat().st_size
    if size % 2:
        raise UserError(f"{path} has an odd number of bytes ({size}): it is not nanoGPT's array of 16-bit ids")
    # nanoGPT writes in the byte order of its machine, little-endian on all that JAX runs on.
    tokens = np.asarray(np.memmap(path, np.uint16, mode="r")) if size else np.empty(0, np.uint16)
    largest = max((int(tokens[start : start + BLOCK].max()) for start in range(0, len(tokens), BLOCK)), default=0)
    if largest >= vocab_size:
        raise UserError(
            f"{path} has the id {largest}, and the vocabulary ends with {vocab_size - 1}: give the tokenizer.json of "
            "the tokens by --data.tokenizer, or their meta.json"
        )
    return tokens
