"""The rows that the tasks of 11-785 continue: held-out or training data of a run, or prompts in an .npz file."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int, Integer

from jaxlm.data import transcripts
from jaxlm.data.arrays import read_npz
from jaxlm.data.batches import TokenStream
from jaxlm.data.corpus import identity, load_corpus, read_transcripts
from jaxlm.data.shards import ShardedTokens
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.run.folder import Run, check_data, check_named

ARRAYS = ("inp", "tgt", "vocabulary")
"""What a file of prompts may hold."""


class Rows(NamedTuple):
    """Prompts of one length, and what really follows them.

    prompts: [R, P] int32 ids; <eos> comes first where the run's rows begin with it.
    truths: ids that follow each prompt, possibly none; None where they are not known.
    """

    prompts: Int[np.ndarray, "R P"]
    truths: list[Int[np.ndarray, " _"]] | None


Data = list[transcripts.Utterance] | Integer[np.ndarray, " n"] | ShardedTokens
"""The utterances of a split in full, without <eos> and <pad>; of a text, its tokens."""


def held_out(run: Run) -> Data:
    """The validation split of a run.

    Raises:
      UserError: the data are missing, or are not those of the run.
    """
    return _split(run, "validation")


def held_out_rows(run: Run, prompt: int, new: int, limit: int | None, *, whole: bool) -> Rows:
    """<eos> and the first `prompt` characters of each held-out transcript that has them, and up to `new` that follow.

    Of a text, pieces of prompt + new tokens.

    Args:
      whole: only transcripts that have all of the `new` characters.

    Raises:
      UserError: there is no such row.
    """
    return _rows(run, "validation", prompt, prompt + new * whole, prompt + new, lambda places: places[:limit])


def training_rows(run: Run, prompt: int, new: int, most: int) -> Rows:
    """Rows of the training split as `held_out_rows` with `whole` makes them: at most `most`, evenly spread over it.

    Raises:
      UserError: there is no such row.
    """

    def spread(places: Sequence[int]) -> Sequence[int]:
        return [places[i] for i in np.linspace(0, len(places) - 1, min(most, len(places))).astype(int)]

    return _rows(run, "training", prompt, prompt + new, prompt + new, spread)


def _split(run: Run, split: Literal["training", "validation"]) -> Data:
    check_named(run)
    cfg = run.config.data
    if run.corpus_sha256 is not None:  # first: other data may have characters that the run does not know
        check_data(identity(cfg), run.corpus_sha256)
    if run.tokenizer.eos_token is not None:
        read = read_transcripts(cfg)
        return read.train if split == "training" else read.val
    corpus = load_corpus(cfg, run.config.model.max_seq_len, run.tokenizer)
    stream = corpus.train if split == "training" else corpus.val
    assert isinstance(stream, TokenStream)
    return stream.tokens


def _rows(
    run: Run,
    split: Literal["training", "validation"],
    prompt: int,
    least: int,
    most: int,
    choose: Callable[[Sequence[int]], Sequence[int]],
) -> Rows:
    """The chosen ones of the transcripts with at least `least` characters, or of the pieces of `most` tokens."""
    data, width = _split(run, split), prompt
    if isinstance(data, list):
        places: Sequence[int] = [place for place, row in enumerate(data) if len(row) >= least]
        longest = max(map(len, data), default=0)
        reason = f"no {split} transcript has {least} characters (the longest has {longest})"
    else:
        places = range(len(data) // most)
        reason = f"the {split} split has {len(data)} tokens, fewer than the {most} of a row"
    if not places:
        raise UserError(f"{reason}: the task needs a run with longer {split} data")
    if isinstance(data, list):
        width, start = prompt + 1, np.array([run.tokenizer.eos_token], np.int32)
        rows = [np.concatenate([start, data[place][:most]]) for place in choose(places)]
    else:
        rows = [data[place * most : (place + 1) * most].astype(np.int32) for place in choose(places)]
    return Rows(np.stack([row[:width] for row in rows]), [row[width:] for row in rows])


def read_rows(path: Path, run: Run, limit: int | None) -> Rows:
    """The prompts of an .npz file, as ids of the run.

    The file holds `inp` [R, P], the ids of the prompts; `tgt` [R, n], those that really follow (optional); and
    `vocabulary` [V] of strings, the symbol of each id ("<sos>" stands for <eos>). Ids are converted by their symbols.
    Without `vocabulary` they are the run's own, and a warning says so. Where the run's rows begin with <eos>, it is put
    before prompts that do not.

    Raises:
      UserError: the file cannot be read, holds anything else, or has a symbol that the run does not know.
    """
    arrays = _read_arrays(path)
    ids = _own_ids(arrays.get("vocabulary"), run.tokenizer, path)
    prompts, *truths = (
        _converted(name, arrays[name], ids, run.tokenizer, path) for name in arrays if name != "vocabulary"
    )
    if truths and len(truths[0]) != len(prompts):
        raise UserError(f"{path}: inp has {len(prompts)} rows, tgt {len(truths[0])}: give one of each a row")
    eos = run.tokenizer.eos_token
    begins = prompts[:, 0] == eos
    if eos is not None and not begins.any():
        prompts = np.insert(prompts, 0, eos, axis=1)
    elif eos is not None and not begins.all():
        raise UserError(
            f"{path}: row {int(begins.argmax())} of inp begins with <eos>, row {int(begins.argmin())} does not: "
            "begin all rows alike"
        )
    return Rows(prompts[:limit], list(truths[0][:limit]) if truths else None)


def symbols(tokenizer: Tokenizer) -> list[str] | None:
    """How each id is spelled; None where spellings are not all different: byte-level BPE has parts of characters."""
    spelled = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    return spelled if len(set(spelled)) == len(spelled) else None


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, `inp` first."""
    how = "save it with np.savez(file, inp=ids, tgt=next_ids, vocabulary=np.array(symbols))"
    try:
        arrays = read_npz(path)
    except FileNotFoundError:
        raise UserError(f"prompts {path} do not exist: give an .npz file") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} does not hold prompts ({error}): {how}, no array of objects") from None
    other = sorted(set(arrays) - set(ARRAYS))
    if other or "inp" not in arrays:
        what = f"has an array {other[0]!r}" if other else "has no array 'inp'"
        raise UserError(f"{path} {what}: {how}; tgt and vocabulary may be left out")
    return arrays


def _own_ids(vocabulary: np.ndarray | None, tokenizer: Tokenizer, path: Path) -> dict[int, tuple[str, int | None]]:
    """By id of the file: its symbol, and the run's id; None where the run has no such symbol."""
    own = symbols(tokenizer)
    if vocabulary is None:
        shown = [str(i) for i in range(tokenizer.vocab_size)] if own is None else own
        ends = "" if own is None else f", from 0 = {own[0]!r} to {len(own) - 1} = {own[-1]!r}"
        warnings.warn(f"{path} has no array 'vocabulary': its ids are read as the run's own{ends}", stacklevel=2)
        return {i: (symbol, i) for i, symbol in enumerate(shown)}
    if vocabulary.ndim != 1 or vocabulary.dtype.kind != "U":
        raise UserError(
            f"{path}: vocabulary is {vocabulary.dtype} of shape {vocabulary.shape}: give the symbol of each id, as "
            "np.array(['A', 'B', ...])"
        )
    if own is None:
        raise UserError(f"{path} has a vocabulary, but ids of the run have no symbols: give its own ids without one")
    known = {symbol: i for i, symbol in enumerate(own)}
    if tokenizer.eos_token is not None:
        known["<sos>"] = tokenizer.eos_token  # as in transcripts of .npy files
    given = vocabulary.tolist()
    if twice := [symbol for symbol in given if given.count(symbol) > 1]:
        raise UserError(f"{path}: vocabulary holds {twice[0]!r} more than once: give each id a symbol of its own")
    return {i: (symbol, known.get(symbol)) for i, symbol in enumerate(given)}


def _converted(
    name: str, array: np.ndarray, ids: dict[int, tuple[str, int | None]], tokenizer: Tokenizer, path: Path
) -> Int[np.ndarray, "R n"]:
    """Ids of the file as ids of the run."""
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "iu":
        raise UserError(f"{path}: {name} is {array.dtype} of shape {array.shape}: give integers [rows, ids of a row]")
    for value in np.unique(array).tolist():
        row = int((array == value).any(axis=1).argmax())
        if value not in ids:
            raise UserError(f"{path}: row {row} of {name} holds id {value}: the vocabulary has 0 to {len(ids) - 1}")
        symbol, own = ids[value]
        if own is None:
            raise UserError(f"{path}: row {row} of {name} holds {symbol!r}, which the vocabulary of the run has not")
        if own == tokenizer.pad_token:
            raise UserError(f"{path}: row {row} of {name} holds {symbol!r}: give rows of one length without padding")
    return np.vectorize(lambda value: ids[value][1], otypes=[np.int32])(array)
