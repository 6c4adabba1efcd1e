"""Worker processes that tokenize documents, in whose order the results come back."""

import collections
import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor

import numpy as np

from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.bpe import BPETokenizer
from jaxlm.data.document_tokens import encode_document
from jaxlm.data.documents import Piece
from jaxlm.errors import CheckError

BLOCK_CHARS = 1 << 18
"""Characters that a worker gets at once."""


def tokenized(
    pieces: Iterator[Piece], tokenizer: BPETokenizer, end_of_text: int, workers: int
) -> Generator[tuple[Piece, np.ndarray], None, None]:
    """The pieces in their order, with their tokens."""
    if workers == 1:
        for piece in pieces:
            yield piece, encode_document(tokenizer, piece.text, end_of_text if piece.is_last else None)
        return
    # Forked processes would share locks and memory of the tokenizers library and of whoever calls this.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, context, initializer=_start_worker, initargs=(json.dumps(tokenizer.to_dict()), end_of_text)
    )
    waiting: collections.deque[tuple[list[Piece], Future]] = collections.deque()

    def first() -> Iterator[tuple[Piece, np.ndarray]]:
        block, future = waiting.popleft()
        tokens, lengths = future.result()
        return zip(block, np.split(tokens, np.cumsum(lengths)[:-1]), strict=True)

    try:
        for block in _blocks(pieces):
            with _interrupts_held():
                future = pool.submit(_encode, [(piece.text, piece.is_last) for piece in block])
            waiting.append((block, future))
            if len(waiting) > 2 * workers:
                yield from first()
        while waiting:
            yield from first()
    except BrokenProcessPool:
        raise CheckError("a worker process was killed, perhaps for its memory: give fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """In this block Ctrl-C waits, and processes that start in it never get it, not even before they ignore it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _blocks(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Pieces, about BLOCK_CHARS characters at a time."""
    block, size = [], 0
    for piece in pieces:
        block.append(piece)
        size += len(piece.text)
        if size >= BLOCK_CHARS:
            yield block
            block, size = [], 0
    if block:
        yield block


_worker: tuple[BPETokenizer, int]
"""What a worker process was started with."""


def _start_worker(tokenizer: str, end_of_text: int) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the first one ends the others
    loaded = tokenizers.from_dict(json.loads(tokenizer))
    assert isinstance(loaded, BPETokenizer)
    _worker = loaded, end_of_text
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(pieces: list[tuple[str, bool]]) -> tuple[np.ndarray, list[int]]:
    """The tokens of some pieces, one after another, and how many each has."""
    tokenizer, end_of_text = _worker
    tokens = [encode_document(tokenizer, text, end_of_text if is_last else None) for text, is_last in pieces]
    return np.concatenate(tokens), [len(ids) for ids in tokens]
