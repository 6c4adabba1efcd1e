"""A prepared corpus on disk: memory-mapped token shards that read as one sequence, and the manifest that lists them.

manifest.json  tokenizer.json  shard-00000.bin  shard-00001.bin  ...
"""

import bisect
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.bpe import BPETokenizer
from jaxlm.data.reading import open_regular, read_json
from jaxlm.errors import CheckError, UserError

FORMAT = "jaxlm-tokens-1"
"""What a manifest of this version says of itself."""

MANIFEST, TOKENIZER, PLAN = "manifest.json", "tokenizer.json", "plan.json"
"""The files beside the shards. A folder with a plan and no manifest is not finished."""

BLOCK = 1 << 23
"""Tokens, or bytes, that are read at once; bounds the memory it takes."""


class ShardedTokens:
    """Arrays of tokens as one sequence, which is never in memory as a whole.

    An array has a length, a dtype and slices that are NumPy arrays; only for places it also takes an array of them.
    """

    def __init__(self, arrays: Sequence[Any], vocab_size: int | None = None, folder: Path | None = None) -> None:
        """What is read is checked against a vocabulary size, if one is given; a message names the folder."""
        self._limit, self._folder = vocab_size, folder
        self._arrays = [array for array in arrays if len(array)]
        self._starts = [0, *itertools.accumulate(map(len, self._arrays))]
        self.dtype = arrays[0].dtype

    def __len__(self) -> int:
        """Tokens of all arrays together."""
        return self._starts[-1]

    def __getitem__(self, places: slice | Int[np.ndarray, "..."]) -> UInt[np.ndarray, "..."]:
        """A stretch without steps (a view where one array has all of it, else a copy), or the tokens at some places."""
        if isinstance(places, slice):
            pieces = self._pieces(*places.indices(len(self)))
            whole = pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, self.dtype), *pieces])
            return self._checked(whole)
        flat = places.ravel()
        which = np.searchsorted(self._starts, flat, side="right") - 1
        order = np.argsort(which, kind="stable")
        found = np.empty(len(flat), self.dtype)
        for mine in np.split(order, np.flatnonzero(np.diff(which[order])) + 1):
            if len(mine):
                shard = which[mine[0]]
                found[mine] = self._arrays[shard][flat[mine] - self._starts[shard]]
        return self._checked(found).reshape(places.shape)

    def part(self, start: int, stop: int) -> "ShardedTokens":
        """A stretch as a sequence of its own; nothing is read."""
        pieces = self._pieces(start, min(stop, len(self)), 1) or [np.empty(0, self.dtype)]
        return ShardedTokens(pieces, self._limit, self._folder)

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        """Refuses ids that no token has: a model would read rows of its table that are not there."""
        if self._limit is not None and ids.size and (largest := int(ids.max())) >= self._limit:
            raise CheckError(
                f"a shard in {self._folder} is damaged: it has the id {largest}, and the vocabulary ends with "
                f"{self._limit - 1}; `jaxlm prepare --check {self._folder}` names the file"
            )
        return ids

    def _pieces(self, start: int, stop: int, step: int) -> list[np.ndarray]:
        """Views of the arrays that hold a stretch."""
        if step != 1:
            raise IndexError(f"step {step} of a slice is not supported: give 1")
        pieces = []
        for shard in range(bisect.bisect_right(self._starts, start) - 1, len(self._arrays)):
            first = self._starts[shard]
            if first >= stop:
                break
            pieces.append(self._arrays[shard][max(start - first, 0) : stop - first])
        return pieces


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedCorpus:
    """An open folder that `jaxlm prepare` wrote."""

    path: Path
    manifest: dict[str, Any]
    sha256: str
    """Of the manifest's bytes, which hold the sha256 of all else: identifies the corpus."""
    tokenizer: BPETokenizer
    tokens: ShardedTokens

    @property
    def end_of_text(self) -> int:
        """The id that ends each document."""
        return self.manifest["end_of_text"]

    def boundary(self, val_fraction: float) -> int:
        """Tokens of the training split: the first floor((1 - val_fraction) * documents) documents.

        Raises:
          CheckError: a shard has not as many ends of documents as the manifest says.
        """
        left, first = int((1 - val_fraction) * self.manifest["documents"]), 0
        for shard in self.manifest["shards"]:
            if left <= shard["documents"]:
                return first + self._end_of(left, shard, first) if left else first
            left, first = left - shard["documents"], first + shard["tokens"]
        return first

    def _end_of(self, documents: int, shard: dict[str, Any], first: int) -> int:
        """How many tokens of a shard, which begins at `first`, end with the end of so many documents."""
        for start in range(0, shard["tokens"], BLOCK):
            block = self.tokens[first + start : first + min(start + BLOCK, shard["tokens"])]
            ends = np.flatnonzero(block == self.end_of_text)
            if documents <= len(ends):
                return start + int(ends[documents - 1]) + 1
            documents -= len(ends)
        raise CheckError(
            f"{self.path / shard['file']} is damaged: it has fewer than {shard['documents']} documents; "
            "restore it, or prepare the corpus again"
        )


def is_prepared(path: Path) -> bool:
    """Whether a folder is one of `jaxlm prepare`, finished or not, or has a manifest that is not JSON."""
    manifest = _read(path / MANIFEST)
    is_damaged = not manifest and (path / MANIFEST).is_file()
    return (path / PLAN).is_file() or is_damaged or FORMAT.rpartition("-")[0] in str(manifest.get("format"))


def open_prepared(path: Path) -> PreparedCorpus:
    """Opens a prepared corpus. The sizes of all files are checked, and the tokenizer's sha256.

    Raises:
      UserError: the folder is not finished, or of another version.
      CheckError: a file is missing or damaged.
    """
    manifest = _read(path / MANIFEST)
    if not manifest and (path / MANIFEST).is_file():
        raise CheckError(f"{path / MANIFEST} cannot be read as JSON: restore it, or prepare the corpus again")
    if not manifest:
        raise UserError(f"{path} is not a prepared corpus, or not finished: give its `jaxlm prepare` command again")
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path} has the format {manifest.get('format')!r}, not {FORMAT!r}: prepare the corpus again")
    for name in ("tokenizer_sha256", "end_of_text", "dtype", "documents", "tokens", "shards"):
        if name not in manifest:
            raise UserError(f"{path / MANIFEST} has no {name!r}: restore it, or prepare the corpus again")
    _check_entries(path, manifest)
    _check_file(path / TOKENIZER, manifest["tokenizer_sha256"])
    tokenizer = tokenizers.load(path / TOKENIZER, "restore it, or prepare the corpus again")
    if not isinstance(tokenizer, BPETokenizer):
        raise CheckError(f"{path / TOKENIZER} is not a byte-pair encoding: restore it, or prepare the corpus again")
    dtype = np.dtype(manifest["dtype"])
    arrays = []
    for shard in manifest["shards"]:
        file = path / shard["file"]
        size = file.stat().st_size if file.is_file() else None
        if size != shard["tokens"] * dtype.itemsize:
            what = "is missing" if size is None else f"has {size} bytes, not {shard['tokens'] * dtype.itemsize}"
            raise CheckError(f"{file} {what}: restore it, or prepare the corpus again")
        arrays.append(np.asarray(np.memmap(file, dtype, mode="r")))  # slices of a plain array take less time
    sha256 = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
    return PreparedCorpus(path, manifest, sha256, tokenizer, ShardedTokens(arrays, tokenizer.vocab_size, path))


def _check_entries(path: Path, manifest: dict[str, Any]) -> None:
    """Refuses entries of other types than `jaxlm prepare` writes."""
    numbers, texts, shards = ("documents", "tokens"), ("file", "sha256"), manifest["shards"]
    is_whole = (
        manifest["dtype"] in ("uint16", "uint32")
        and all(type(manifest[name]) is int for name in (*numbers, "end_of_text"))
        and isinstance(shards, list)
        and all(isinstance(shard, dict) for shard in shards)
        and all(type(shard.get(name)) is int for shard in shards for name in numbers)
        and all(isinstance(shard.get(name), str) for shard in shards for name in texts)
        and all(Path(shard["file"]).name == shard["file"] for shard in shards)  # none lies outside the folder
        and all(shard[name] >= 0 for shard in shards for name in numbers)
        and isinstance(manifest["tokenizer_sha256"], str)
    )
    if not is_whole or not shards:
        raise CheckError(f"{path / MANIFEST} is damaged: restore it, or prepare the corpus again")


def check_prepared(path: Path, report: Callable[[int, int], None] = lambda done, total: None) -> PreparedCorpus:
    """Opens a prepared corpus and reads all of it to check the sha256 of each shard.

    Args:
      report: called with the tokens that have been checked, and all tokens.

    Raises:
      UserError: as `open_prepared`.
      CheckError: a file is missing or damaged.
    """
    corpus, done = open_prepared(path), 0
    for shard in corpus.manifest["shards"]:
        _check_file(path / shard["file"], shard["sha256"])
        done += shard["tokens"]
        report(done, len(corpus.tokens))
    return corpus


def _check_file(file: Path, sha256: str) -> None:
    try:
        with open_regular(file) as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise CheckError(f"{file} cannot be read ({error.strerror}): restore it, or prepare the corpus again") from None
    if found != sha256:
        raise CheckError(
            f"{file} is damaged: its sha256 is {found[:12]}..., not {sha256[:12]}...; restore it, or prepare the "
            "corpus again"
        )


def _read(file: Path) -> dict[str, Any]:
    """A file of JSON; {} if it is not there or holds no object."""
    try:
        content = read_json(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
