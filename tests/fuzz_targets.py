"""What reads files of others: sets of valid files, each with the reader whose bounds `fuzzing.try_bytes` checks."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

import foreign_folders
import llama2c
import numpy as np
import safetensors.numpy

from jaxlm.cli import train
from jaxlm.config import ExperimentConfig, ModelConfig
from jaxlm.config.base import to_dict
from jaxlm.config.prepare import PrepareConfig
from jaxlm.errors import CheckError, UserError

MODEL = ModelConfig(vocab_size=30, max_seq_len=8, num_layers=1, embed_dim=4, num_heads=1)


@dataclasses.dataclass(frozen=True)
class Target:
    """Valid files, by their path in a folder, and what reads them."""

    make: Callable[[Path], None]
    read: Callable[[Path], object]
    damaged: tuple[str, ...]
    """The files that are damaged, one at a time; patterns for glob."""


def _write(**files):
    """A maker of files, given as bytes or as what JSON holds; __ stands for a dot in a name."""

    def make(folder: Path) -> None:
        for name, content in files.items():
            path = folder / name.replace("__", ".")
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())

    return make


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


def _read_tensors(folder: Path) -> None:
    from jaxlm.convert.files import open_tensors

    files = open_tensors(folder)
    for name in files.names:
        files.read(name)


def _make_shards(folder: Path) -> None:
    places = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    for name, file in places.items():
        safetensors.numpy.save_file({name: np.ones((2, 3), np.float32)}, folder / file)
    content = {"metadata": {"total_size": 48}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def _make_hugging_face(folder: Path) -> None:
    foreign_folders.write(folder, {**foreign_folders.GPT2, "eos_token_id": 3})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    (folder / "tokenizer.json").write_text(json.dumps(foreign_folders.word_tokenizer()))


def _read_hugging_face(folder: Path) -> None:
    from jaxlm.run.foreign_model import read_model

    read_model("hf", folder)


def _make_llama(folder: Path) -> None:
    foreign_folders.write(folder, {**foreign_folders.LLAMA, "rope_theta": 1e4, "rms_norm_eps": 1e-5})


def _make_flax(folder: Path) -> None:
    import flax.serialization

    tree = {
        "transformer": {"ln_f": {"scale": np.ones(3, np.float32)}, "h": {"0": {"kernel": np.ones((2, 3), np.float16)}}}
    }
    (folder / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))


def _nanogpt():
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 8, "bias": False, "vocab_size": 30, "dropout": 0.0}
    from jaxlm.convert.nanogpt import to_nanogpt
    from jaxlm.model.build import build_model, init_params

    return sizes, to_nanogpt, build_model, init_params


def _make_nanogpt(folder: Path) -> None:
    import jax

    _, to_nanogpt, build_model, init_params = _nanogpt()
    cfg = dataclasses.replace(MODEL, tie_embeddings=True)
    to_nanogpt(cfg, init_params(build_model(cfg), jax.random.key(0)), folder / "model")


def _read_nanogpt(folder: Path) -> None:
    from jaxlm.convert.nanogpt import from_nanogpt

    from_nanogpt(folder / "model")


def _make_torch(folder: Path) -> None:
    import torch

    torch.save({"a": torch.ones(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}, folder / "pytorch_model.bin")
    legacy = folder / "legacy.bin"
    torch.save({"a": torch.ones(2, 3)}, legacy, _use_new_zipfile_serialization=False)


def _read_torch(folder: Path) -> None:
    from jaxlm.convert.files import open_tensors

    for file in ("pytorch_model.bin", "legacy.bin"):
        files = open_tensors(folder / file)
        for name in files.names:
            files.read(name)


def _make_llama2c(folder: Path) -> None:
    for version in (0, 1):
        llama2c.write(folder / f"model{version}.bin", llama2c.SIZES, llama2c.weights(), version, True)


def _read_llama2c(folder: Path) -> None:
    from jaxlm.convert import from_llama2c

    for version in (0, 1):
        from_llama2c(folder / f"model{version}.bin")


def _make_meta(folder: Path) -> None:
    import torch

    sizes = {
        "dim": 6,
        "n_layers": 2,
        "n_heads": 3,
        "n_kv_heads": 1,
        "multiple_of": 1,
        "vocab_size": -1,
        "norm_eps": 1e-5,
    }
    (folder / "params.json").write_text(json.dumps({**sizes, "rope_theta": 1e4}))
    state = llama2c.weights({**llama2c.SIZES, "hidden_dim": 16}, tied=False)
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, folder / "consolidated.00.pth")


def _read_meta(folder: Path) -> None:
    from jaxlm.convert import from_meta

    from_meta(folder)


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
    "config": Target(lambda folder: _write(config__json=_record())(folder), _read_record, ("config.json",)),
    "listing": Target(
        _make_listing, _read_listing, ("runs/*/config.json", "runs/*/*.jsonl", "runs/*/*/*/manifest.json")
    ),
    "run": Target(_make_run, _read_run, ("run/*.json", "run/checkpoints/0/**/*")),
    "options": Target(_write(arguments=ARGUMENTS), _read_options, ("arguments",)),
    "recipe": Target(lambda folder: _write(recipe__toml=_recipe())(folder), _read_recipe, ("recipe.toml",)),
    "char": Target(
        _write(tokenizer__json={"type": "char", "chars": "\n abcdeé\U0001f600"}), _read_tokenizer, ("tokenizer.json",)
    ),
    "ids": Target(_write(tokenizer__json={"type": "ids", "vocab_size": 70}), _read_tokenizer, ("tokenizer.json",)),
    "bpe": Target(
        lambda folder: _write(tokenizer__json={"type": "bpe", "tokenizer": foreign_folders.word_tokenizer()})(folder),
        _read_tokenizer,
        ("tokenizer.json",),
    ),
    "hf_tokenizer": Target(
        lambda folder: _write(tokenizer__json=foreign_folders.word_tokenizer(), config__json={"eos_token_id": 0})(
            folder
        ),
        _read_hugging_face_tokenizer,
        ("*.json",),
    ),
    "csv": Target(_write(a__csv=b'id,transcript\n1,AB C\n2,"D\'E"\n'), _read_transcripts, ("a.csv",)),
    "npy": Target(_write(a__npy=_npy(np.array(list("AB C")))), _read_transcripts, ("a.npy",)),
    "prompts": Target(
        _write(prompts__npz=_npz(inp=np.ones((2, 3), int), tgt=np.ones((2, 2), int), vocabulary=np.array(["A", "B"]))),
        _read_prompts,
        ("prompts.npz",),
    ),
    "prepared": Target(_make_prepared, _read_prepared, ("corpus/*",)),
    "documents": Target(
        _write(a__jsonl=b'{"text": "abc"}\n{"text": "d\\u00e9"}\n', b__txt="é text\n".encode()), _read_documents, ("*",)
    ),
    "safetensors": Target(
        _write(
            model__safetensors=safetensors.numpy.save({"a": np.ones((2, 3), np.float32), "b": np.ones(2, np.float16)})
        ),
        _read_tensors,
        ("*",),
    ),
    "index": Target(_make_shards, _read_tensors, ("*",)),
    "gpt2": Target(_make_hugging_face, _read_hugging_face, ("*",)),
    "llama": Target(_make_llama, _read_hugging_face, ("*",)),
    "flax": Target(_make_flax, _read_tensors, ("*",)),
    "llama2c": Target(_make_llama2c, _read_llama2c, ("*",)),
    "torch": Target(_make_torch, _read_torch, ("*",)),
    "nanogpt": Target(_make_nanogpt, _read_nanogpt, ("model/*",)),
    "meta": Target(_make_meta, _read_meta, ("*",)),
}
"""By name; the last three need torch."""
NEED_TORCH = ("torch", "nanogpt", "meta")
SLOW = ("run", "options", "gpt2", "llama", "llama2c")
"""Those that trace a model or start a parser take a tenth of a second or more."""
