"""A run on transcripts of its own, trained once, and the same network as a model of text."""

import contextlib
import dataclasses

import pytest
from held_out import LINES
from support import command

from jaxlm.config import DataConfig
from jaxlm.data.corpus import load_corpus
from jaxlm.data.tokenizer import CharTokenizer
from jaxlm.run.folder import load_run

TRAIN = ["train", "tiny", "--data.tokenizer", "transcript", "--data.path", "train.csv", "--data.val-path", "val.csv"]
SMALL = ["--model.num-layers", "1", "--model.max-seq-len", "96", "--model.position", "rope", "--train.steps", "20"]
RATE = ["--optim.learning-rate", "0.03", "--optim.warmup-steps", "2"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A working folder with transcripts of its own and runs/tiny-1, trained once."""
    root = tmp_path_factory.mktemp("work")
    for name, lines in (("train", LINES * 4), ("val", LINES)):
        (root / f"{name}.csv").write_text("id,transcript\n" + "".join(f"{i},{line}\n" for i, line in enumerate(lines)))
    with contextlib.chdir(root):
        code, _, err = command(*TRAIN, *SMALL, *RATE)
    assert code == 0, err
    return root


@pytest.fixture(scope="session")
def trained(folder):
    return load_run(folder / "runs/tiny-1")


@pytest.fixture(scope="session")
def text_run(folder, trained):
    """The same network as a model of characters: the text is the transcripts' lines."""
    text = "\n".join(LINES * 5)
    (folder / "text.txt").write_text(text)
    tokenizer = CharTokenizer(text + "0123456789"[: 30 - len(set(text))])  # as many as the model has
    cfg = dataclasses.replace(trained.config, data=DataConfig(path=str(folder / "text.txt")))
    sha256 = load_corpus(cfg.data, 32).sha256
    return dataclasses.replace(trained, config=cfg, tokenizer=tokenizer, corpus_sha256=sha256)
