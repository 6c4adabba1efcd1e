"""What reads files of others: sets of valid files, each with the reader whose bounds `fuzzing.try_bytes` checks."""

import contextlib
import gzip
import io
import json
import lzma
from pathlib import Path

import foreign_folders
import numpy as np
from fuzz_models import MODELS
from fuzz_target import MODEL, Target, written

from jaxlm.cli import train
from jaxlm.config import ExperimentConfig
from jaxlm.config.base import to_dict
from jaxlm.config.prepare import PrepareConfig
from jaxlm.errors import CheckError, UserError


def _record(model=MODEL):
    config = ExperimentConfig(preset="tiny", model=model)
    return {"config": to_dict(config), "corpus_sha256": None, "init_from": None, "versions": {"jax": "0.10.1"}}


def _rows():
    rows = [{"step": i, "elapsed_s": 0.5 * i, "loss": 3.0, "lr": 1e-3, "grad_norm": 1.0} for i in (1, 2)]
    return "".join(json.dumps(row) + "\n" for row in [*rows, {"step": 2, "elapsed_s": 1.5, "val_loss": 2.0}]).encode()


def _make_listing(folder: Path) -> None:
    run = folder / "runs" / "tiny-1"
    (run / "checkpoints" / "2").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(_record()))
    (run / "metrics.jsonl").write_bytes(_rows())
    (run / "checkpoints" / "2" / "manifest.json").write_text(json.dumps({"step": 2, "val_loss": 2.0, "sha256": {}}))


def _read_listing(folder: Path) -> None:
    from jaxlm.cli.main import main
    from jaxlm.run import checkpoint, manifest
    from jaxlm.run.metrics import read_rows

    for arguments in (["runs", str(folder / "runs")], ["runs", str(folder / "runs"), "--json"]):
        code = main(arguments)
        if code not in (0, 1, 2):
            raise AssertionError(f"exit code {code}")
    checkpoints = folder / "runs" / "tiny-1" / "checkpoints"
    checkpoint.best_step(checkpoints)
    for step in checkpoint.steps(checkpoints):
        with contextlib.suppress(CheckError):
            manifest.verify(checkpoints / str(step))
    read_rows(folder / "runs" / "tiny-1" / "metrics.jsonl")


def _read_record(folder: Path) -> None:
    from jaxlm.run.folder import read_record

    read_record(folder)


def _make_run(folder: Path) -> None:
    import jax

    from jaxlm.data.tokenizer import TranscriptTokenizer
    from jaxlm.model.build import build_model, init_params
    from jaxlm.run import checkpoint
    from jaxlm.run.folder import new_folder
    from jaxlm.training.step import TrainState

    params = init_params(build_model(MODEL), jax.random.key(0))
    with new_folder(folder / "run", ExperimentConfig(preset="tiny", model=MODEL), TranscriptTokenizer(), None) as aside:
        checkpoint.save(aside / "checkpoints", TrainState(params, (), jax.numpy.int32(0)), None, keep=1)


def _read_run(folder: Path) -> None:
    """Opens a run whose sums fit the damaged files: whoever damages on purpose also writes the sums anew."""
    from jaxlm.data.files import json_digest, sealed
    from jaxlm.run import manifest
    from jaxlm.run.folder import load_run

    for path in [*(folder / "run" / "checkpoints").glob("*/manifest.json"), *(folder / "run").glob("*.json")]:
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(path.read_text())
            if isinstance(content, dict) and path.name == "manifest.json":
                content["sha256"] = manifest.digests(path.parent)
                content["sha256"]["manifest.json"] = json_digest(content)
            elif isinstance(content, dict):
                content = sealed(content)
            path.write_text(json.dumps(content))
    load_run(folder / "run")


def _texts(tokenizer) -> None:
    """What is done with a tokenizer."""
    for text in ("abc de", "", "é\U0001f600\n" * 3) if tokenizer.token_bytes() is not None else ("0 6",):
        tokenizer.decode(tokenizer.encode(text))
        [*tokenizer.encode_blocks([text, text[:1]])]


def _read_tokenizer(folder: Path) -> None:
    from jaxlm.data.tokenizer import load

    _texts(load(folder / "tokenizer.json"))


def _read_hugging_face_tokenizer(folder: Path) -> None:
    from jaxlm.run.foreign_model import _tokenizer
    from jaxlm.run.tokenizer_source import read_tokenizer

    _texts(_tokenizer(folder, None, 1000))
    with contextlib.suppress(UserError):
        read_tokenizer(folder)
    source = read_tokenizer(folder)
    source.tokenizer.token_bytes()


def _read_transcripts(folder: Path) -> None:
    from jaxlm.data import transcripts
    from jaxlm.data.tokenizer import TranscriptTokenizer

    tokenizer = TranscriptTokenizer()
    transcripts.cut(transcripts.read(transcripts.find_files(folder), tokenizer), tokenizer, 7)


def _npy(array: np.ndarray) -> bytes:
    made = io.BytesIO()
    np.save(made, array)
    return made.getvalue()


def _npz(**arrays: np.ndarray) -> bytes:
    made = io.BytesIO()
    np.savez(made, **arrays)
    return made.getvalue()


def _read_prompts(folder: Path) -> None:
    from jaxlm.data.tokenizer import TranscriptTokenizer
    from jaxlm.evals.rows import read_rows
    from jaxlm.model.build import build_model
    from jaxlm.run.folder import Run

    config = ExperimentConfig(preset="tiny", model=MODEL)
    run = Run(folder, config, build_model(MODEL), {}, TranscriptTokenizer(), 0, None)
    read_rows(folder / "prompts.npz", run, None)


def _make_prepared(folder: Path) -> None:
    from jaxlm.data.prepare import prepare_corpus

    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"document {i} abc"}) + "\n" for i in range(20)))
    cfg = PrepareConfig(path=str(folder / "a.jsonl"), bpe_vocab_size=300, shard_tokens=31)
    prepare_corpus(cfg, folder / "corpus", workers=1)


def _read_prepared(folder: Path) -> None:
    from jaxlm.data import shards

    shards.is_prepared(folder / "corpus")
    corpus = shards.open_prepared(folder / "corpus")
    with contextlib.suppress(CheckError):
        shards.check_prepared(folder / "corpus")
    corpus.tokens[: len(corpus.tokens)]
    corpus.boundary(0.1)
    _texts(corpus.tokenizer)


def _read_documents(folder: Path) -> None:
    from jaxlm.data.documents import find_sources, read_pieces

    cfg = PrepareConfig(path=str(folder))
    for _ in read_pieces(find_sources(cfg), cfg, may_cut=True):
        pass


def _read_texts(folder: Path) -> None:
    from jaxlm.data.texts import open_text

    for _ in open_text(str(folder), "text").blocks():
        pass


def _read_bins(folder: Path) -> None:
    from jaxlm.data.nanogpt_bins import is_bins, open_bins

    if is_bins(folder):
        bins = open_bins(folder, None)
        bins.both[: len(bins.both)]


def _read_recipe(folder: Path) -> None:
    from jaxlm.data import sources

    sources.read_recipe(folder / "recipe.toml")


def _recipe() -> bytes:
    from jaxlm.data import sources

    return (sources.RECIPES / "tinyshakespeare.toml").read_bytes()


def _read_options(folder: Path) -> None:
    from jaxlm.cli.options import parse_options

    text = (folder / "arguments").read_bytes().decode("utf-8", "surrogateescape")
    arguments = [word for word in text.split("\n") if word not in ("-h", "--help")]
    parse_options(train._TrainOptions, arguments, "train", train._defaults)


ARGUMENTS = (
    b"tiny\n--model.window\n3\n5\n--train.steps\n4\n--optim.learning-rate\n1e-3\n--data.path\nx.txt\n--sample.prompt\na"
)

TARGETS: dict[str, Target] = {
    "config": Target(lambda folder: written(config__json=_record())(folder), _read_record, ("config.json",)),
    "listing": Target(
        _make_listing, _read_listing, ("runs/*/config.json", "runs/*/*.jsonl", "runs/*/*/*/manifest.json")
    ),
    "run": Target(_make_run, _read_run, ("run/*.json", "run/checkpoints/0/**/*")),
    "options": Target(written(arguments=ARGUMENTS), _read_options, ("arguments",)),
    "recipe": Target(lambda folder: written(recipe__toml=_recipe())(folder), _read_recipe, ("recipe.toml",)),
    "char": Target(
        written(tokenizer__json={"type": "char", "chars": "\n abcdeé\U0001f600"}), _read_tokenizer, ("tokenizer.json",)
    ),
    "ids": Target(written(tokenizer__json={"type": "ids", "vocab_size": 70}), _read_tokenizer, ("tokenizer.json",)),
    "bpe": Target(
        lambda folder: written(tokenizer__json={"type": "bpe", "tokenizer": foreign_folders.word_tokenizer()})(folder),
        _read_tokenizer,
        ("tokenizer.json",),
    ),
    "hf_tokenizer": Target(
        lambda folder: written(tokenizer__json=foreign_folders.word_tokenizer(), config__json={"eos_token_id": 0})(
            folder
        ),
        _read_hugging_face_tokenizer,
        ("*.json",),
    ),
    "csv": Target(written(a__csv=b'id,transcript\n1,AB C\n2,"D\'E"\n'), _read_transcripts, ("a.csv",)),
    "npy": Target(written(a__npy=_npy(np.array(list("AB C")))), _read_transcripts, ("a.npy",)),
    "prompts": Target(
        written(prompts__npz=_npz(inp=np.ones((2, 3), int), tgt=np.ones((2, 2), int), vocabulary=np.array(["A", "B"]))),
        _read_prompts,
        ("prompts.npz",),
    ),
    "prepared": Target(_make_prepared, _read_prepared, ("corpus/*",)),
    "documents": Target(
        written(a__jsonl=b'{"text": "abc"}\n{"text": "d\\u00e9"}\n', b__txt="é text\n".encode()),
        _read_documents,
        ("*",),
    ),
    "texts": Target(
        written(
            a__jsonl__gz=gzip.compress(b'{"text": "abc"}\n'),
            b__txt=b"\xef\xbb\xbftext\n",
            c__txt__xz=lzma.compress(b"d\n"),
        ),
        _read_texts,
        ("*",),
    ),
    "bins": Target(
        written(train__bin=bytes(40), val__bin=bytes(20), meta__json={"vocab_size": 2, "itos": {"0": "a", "1": "b"}}),
        _read_bins,
        ("*",),
    ),
    **MODELS,
}
"""By name."""
NEED_TORCH = ("torch", "nanogpt", "meta")
SLOW = ("run", "options", "gpt2", "llama", "llama2c")
"""Those that trace a model or start a parser take a tenth of a second or more."""
