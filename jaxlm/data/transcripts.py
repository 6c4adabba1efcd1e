"""Speech transcripts: read utterances from CSV or .npy files, and cut them into framed, padded rows."""

import csv
import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from jaxlm.data.arrays import read_npy
from jaxlm.data.files import decode_utf8
from jaxlm.data.reading import open_regular, read_regular
from jaxlm.data.tokenizer import TranscriptTokenizer
from jaxlm.errors import UserError

HEADER = ["id", "transcript"]
"""The columns of a CSV file."""

Utterance = Int[np.ndarray, " _"]
"""The ids of one transcript, without <eos> around it; it may be empty."""


def find_files(path: Path) -> tuple[Path, ...]:
    """The files that a path stands for: itself, or the .csv or .npy files of a folder, sorted by name.

    Raises:
      UserError: there is nothing at the path, or the folder has no such file or both kinds.
    """
    if path.is_file() and path.suffix.lower() == ".csv":
        return (path,)
    if not path.is_dir():
        what = "is not a CSV file" if path.exists() else "does not exist"
        raise UserError(f"transcripts {path} {what}: give a .csv file with columns id,transcript, or a folder")
    files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lower() in (".csv", ".npy"))
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) != 1:
        what = "no .csv and no .npy file" if not kinds else "both .csv and .npy files"
        raise UserError(f"folder {path} has {what}: give a folder of one kind")
    return tuple(files)


def read(files: Sequence[Path], tokenizer: TranscriptTokenizer) -> list[Utterance]:
    """The utterances of some files, in order: each row of a CSV file, each .npy file.

    Raises:
      UserError: a file that does not hold transcripts, or a character outside the vocabulary; the message names the
        file, the row and the character.
    """
    return [_encode(text, where, tokenizer) for file in files for where, text in _texts(file)]


def cut(utterances: Iterable[Utterance], tokenizer: TranscriptTokenizer, seq_len: int) -> UInt8[np.ndarray, "R T1"]:
    """Rows of seq_len targets: each utterance between two <eos>, and filled up with <pad>.

    An utterance of n characters has n + 1 targets. If these are more than seq_len, it takes several rows. Each row but
    the first begins with the last token of the row before, so every target is in exactly one row.
    """
    pieces = []
    for ids in utterances:
        framed = np.concatenate([[tokenizer.eos_token], ids, [tokenizer.eos_token]])
        pieces += [framed[start : start + seq_len + 1] for start in range(0, len(framed) - 1, seq_len)]
    rows = np.full((len(pieces), seq_len + 1), tokenizer.pad_token, np.uint8)
    for row, piece in zip(rows, pieces, strict=True):
        row[: len(piece)] = piece
    return rows


def identity(train: Sequence[Path], val: Sequence[Path]) -> str:
    """sha256 (hex) over the contents of all files in order, with the split of each, whatever their paths are."""
    digest = hashlib.sha256()
    for split, files in (("train", train), ("val", val)):
        for path in files:
            with open_regular(path) as file:
                digest.update(f"{split} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _encode(text: str, where: str, tokenizer: TranscriptTokenizer) -> Utterance:
    try:
        return tokenizer.encode(text)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _texts(file: Path) -> Iterator[tuple[str, str]]:
    """The place of each transcript of a file, for messages, and its text."""
    return _csv_texts(file) if file.suffix.lower() == ".csv" else _npy_texts(file)


def _csv_texts(path: Path) -> Iterator[tuple[str, str]]:
    # Spreadsheets write a byte order mark.
    text = decode_utf8(read_regular(path), str(path), lines=True).removeprefix("\ufeff")
    number = 0
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        for number, row in enumerate(csv.reader(io.StringIO(text, newline=""), strict=True), 1):
            if number == 1:
                if row != HEADER:
                    raise UserError(f"{path} row 1: header is {','.join(row)!r}: write {','.join(HEADER)!r}")
            elif row and len(row) != len(HEADER):  # blank lines are skipped
                raise UserError(
                    f"{path} row {number}: {len(row)} columns instead of {len(HEADER)}: write {','.join(HEADER)}"
                )
            elif row:
                yield f"{path} row {number}", row[1]
    except csv.Error as error:
        raise UserError(f"{path} row {number + 1}: not CSV ({error}): quote the field, or correct it") from None
    if number == 0:
        raise UserError(f"{path} is empty: begin with the row {','.join(HEADER)!r}")


def _npy_texts(path: Path) -> Iterator[tuple[str, str]]:
    how = "save it with np.save(file, np.array(list(text)))"
    try:
        array = read_npy(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} does not hold an array of characters ({error}): {how}, not as objects") from None
    if array.dtype.kind != "U" or array.ndim > 1:
        raise UserError(f"{path} holds {array.dtype} of shape {array.shape}, not a list of characters: {how}")
    entries = array.reshape(-1).tolist()
    start = int(entries[:1] in (["<sos>"], ["<eos>"]))
    stop = len(entries) - int(len(entries) > start and entries[-1] == "<eos>")
    if len(entries) == 1 and start < stop:
        entries = list(entries[0])  # the whole transcript in one string
        stop = len(entries)
    for place in range(start, stop):
        if len(entries[place]) != 1:
            raise UserError(f"{path}: entry {place} is {entries[place]!r}, not a single character: {how}")
    yield str(path), "".join(entries[start:stop])
