"""Files that no command accepts, and the commands that are given them, as one would type them."""

import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import foreign_folders
import fuzz_targets
import llama2c
import numpy as np
import safetensors.numpy


def make_all(folder: Path) -> None:
    """Makes everything that `COMMANDS` name. No file is large: large ones only say so."""
    fuzz_targets._make_run(folder)  # folder / "run", which is sound
    _make_configs(folder)
    _make_run_parts(folder)
    _make_texts(folder)
    _make_transcripts(folder)
    _make_hugging_face(folder)
    _make_others(folder)


def _run(folder: Path, name: str, **files: object) -> Path:
    """A copy of the sound run with other files; a string or bytes are the content, anything else is put as JSON."""
    copy = folder / name
    shutil.copytree(folder / "run", copy)
    for file, content in files.items():
        path = copy / file.replace("__", ".")
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return copy


def _make_configs(folder: Path) -> None:
    sound = json.loads((folder / "run" / "config.json").read_text())
    del sound["sha256"]  # as older versions wrote it: a changed one would be all that is said

    def with_model(**fields: object) -> dict:
        return {**sound, "config": {**sound["config"], "model": {**sound["config"]["model"], **fields}}}

    text = json.dumps(sound)
    contents = {
        **{
            "empty": "",
            "not-json": "{'a': 1}",
            "array": "[]",
            "null": "null",
            "no-config": "{}",
            "latin": b'{"a": "\xe9"}',
        },
        **{"deep": '{"config": ' + "[" * 100_000, "deep-closed": '{"config": ' + "[" * 5000 + "]" * 5000 + "}"},
        "twice": text.replace('"vocab_size": 30', '"vocab_size": 30, "vocab_size": 31'),
        "nan": text.replace('"dropout": 0.0', '"dropout": NaN'),
        "infinity": text.replace('"norm_eps": 1e-05', '"norm_eps": 1e999'),
        "digits": text.replace('"vocab_size": 30', '"vocab_size": ' + "9" * 5000),
        "surrogate": text.replace('"preset": "tiny"', '"preset": "\\ud800"'),
        "escape": with_model(activation="\x1b]0;owned\x07\x1b[2J"),
        **{"unknown-field": with_model(auto_map="evil.Model"), "wrong-type": with_model(num_heads="four")},
        **{
            "layers": with_model(num_layers=10**9),
            "vocabulary": with_model(vocab_size=2**62),
            "long": with_model(init="x" * 10**6),
        },
        **{"window": with_model(window=[]), "model": {**sound, "config": {**sound["config"], "model": None}}},
    }
    for name, content in contents.items():
        _run(folder, f"config-{name}", config__json=content)
    for name in ("pipe", "folder", "zero", "loop"):
        (_run(folder, f"config-{name}") / "config.json").unlink()
    os.mkfifo(folder / "config-pipe" / "config.json")
    (folder / "config-folder" / "config.json").mkdir()
    (folder / "config-zero" / "config.json").symlink_to("/dev/zero")
    (folder / "config-loop" / "config.json").symlink_to("config.json")


def _make_run_parts(folder: Path) -> None:
    bpe = {"type": "bpe", "tokenizer": foreign_folders.word_tokenizer()}

    def with_bpe(**fields: object) -> dict:
        return {**bpe, "tokenizer": {**bpe["tokenizer"], "model": {**bpe["tokenizer"]["model"], **fields}}}

    vocabulary = bpe["tokenizer"]["model"]["vocab"]
    contents = {
        **{"empty": "", "deep": "[" * 100_000, "type": {"type": "pickle"}, "chars": {"type": "char", "chars": ""}},
        **{
            "size": {"type": "char", "chars": "".join(map(chr, range(0x100, 0x100 + 40)))},  # the model has 30
            "ids": {"type": "ids", "vocab_size": -1},
            "no-bpe": {"type": "bpe"},
        },
        "huge-id": with_bpe(vocab={**vocabulary, "x": 4294967295}),
        "merge": with_bpe(merges=[["a", "zz"]]),
    }
    for name, content in contents.items():
        _run(folder, f"tokenizer-{name}", tokenizer__json=content)
    (_run(folder, "tokenizer-pipe") / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer-pipe" / "tokenizer.json")
    shutil.rmtree(_run(folder, "no-checkpoint") / "checkpoints")
    step = Path("checkpoints", "0")
    (_run(folder, "manifest-array") / step / "manifest.json").write_text("[]")
    (_run(folder, "manifest-deep") / step / "manifest.json").write_text("[" * 100_000)
    shutil.rmtree(_run(folder, "no-params") / step / "params")
    linked = _run(folder, "linked") / step / "params"
    linked.rename(folder / "elsewhere")
    linked.symlink_to(folder / "elsewhere")
    _run(folder, "metrics-deep", metrics__jsonl="[" * 100_000 + "\n{}\n")


def _make_texts(folder: Path) -> None:
    for name, content in {
        "empty.txt": b"",
        "latin.txt": b"caf\xe9" * 99,
        "short.txt": b"abc",
        "sound.txt": b"abc " * 999,
    }.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.txt")
    (folder / "zero.txt").symlink_to("/dev/zero")
    (folder / "loop.txt").symlink_to("loop.txt")
    (folder / "deep.jsonl").write_text("[" * 100_000)
    (folder / "field.jsonl").write_text('{"body": "abc"}\n')
    (folder / "half.jsonl").write_text('{"text": "\\ud800"}\n')
    (folder / "taken").mkdir()
    (folder / "taken" / "x").write_text("")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "manifest.json").write_text('{"format": "jaxlm-tokens-1", "format": 2}')


def _make_transcripts(folder: Path) -> None:
    rows = {
        "header": "a,b\n1,AB\n",
        "columns": "id,transcript\n1,AB,C\n",
        "lower": "id,transcript\n1,abc\n",
        "empty": "",
    }
    for name, content in {**rows, "quote": 'id,transcript\n1,"AB\n'}.items():
        (folder / f"{name}.csv").write_text(content)
    head = "{{'descr': '{}', 'fortran_order': False, 'shape': {}, }}\n"
    arrays = {"objects": ("|O", "(3,)"), "terabytes": ("<U1", "(1000000000000,)"), "negative": ("<U1", "(-1,)")}
    for name, (kind, shape) in {**arrays, "bytes": ("|S1", "(3,)")}.items():
        (folder / f"npy-{name}").mkdir()
        text = head.format(kind, shape).encode()
        content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + b"abc"
        (folder / f"npy-{name}" / "a.npy").write_bytes(content)
    (folder / "npy-pickle").mkdir()
    (folder / "npy-pickle" / "a.npy").write_bytes(pickle.dumps(_Touch(folder / "escaped")))
    (folder / "both").mkdir()
    for suffix in ("csv", "npy"):
        (folder / "both" / f"a.{suffix}").write_text("")
    np.savez(folder / "objects.npz", inp=np.array([None]))
    with zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inp.npy", bytes(10**8))
    (folder / "text.npz").write_text("no archive")


class _Touch:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _make_hugging_face(folder: Path) -> None:
    gpt2 = foreign_folders.GPT2

    def model(name: str, **fields: object) -> Path:
        return foreign_folders.write(folder / f"hf-{name}", {**gpt2, **fields}, foreign_folders.weights(gpt2))

    configs = {
        "deep": "[" * 100_000,
        "twice": '{"model_type": "gpt2", "model_type": "llama"}',
        "empty": "",
        "list": "[1]",
    }
    for name, content in configs.items():
        (model(name) / "config.json").write_text(content)
    model("unknown", model_type="evil", auto_map={"AutoModel": "evil.Model"})
    model("experts", num_experts=8)
    model("layers", n_layer=10**9)
    model("wide", n_embd=2**40)
    model("vocabulary", vocab_size=2**31 - 1)
    (model("none") / "model.safetensors").unlink()
    heads = {
        "length": struct.pack("<Q", 2**63) + b"{}",
        "text": struct.pack("<Q", 4) + b"abcd",
        "cut": (folder / "hf-layers" / "model.safetensors").read_bytes()[:2000],
        "shape": _head({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        "offsets": _head({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}),
    }
    for name, content in heads.items():
        (model(f"head-{name}") / "model.safetensors").write_bytes(content)
    (model("pipe") / "model.safetensors").unlink()
    os.mkfifo(folder / "hf-pipe" / "model.safetensors")
    places = {"up": "../../etc/passwd", "absolute": "/etc/passwd", "gone": "model-9.safetensors", "number": 7}
    for name, place in places.items():
        (model(f"index-{name}") / "model.safetensors").unlink()
        index = {"weight_map": {"a": place}}
        (folder / f"hf-index-{name}" / "model.safetensors.index.json").write_text(json.dumps(index))
    (model("msgpack") / "model.safetensors").rename(folder / "hf-msgpack" / "flax_model.msgpack")
    (model("code") / "model.safetensors").unlink()
    (folder / "hf-code" / "pytorch_model.bin").write_bytes(pickle.dumps(_Touch(folder / "escaped")))
    (model("bomb") / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "hf-bomb" / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**8))


def _head(content: dict) -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + bytes(16)


def _make_others(folder: Path) -> None:
    (folder / "ckpt.pt").write_text("no checkpoint")
    sizes = llama2c.SIZES
    llama2c.write(folder / "sound.bin", sizes, llama2c.weights(), 1, True)
    sound = (folder / "sound.bin").read_bytes()
    (folder / "version.bin").write_bytes(sound[:4] + struct.pack("<i", 2) + sound[8:])
    (folder / "cut.bin").write_bytes(sound[:-4])
    (folder / "huge.bin").write_bytes(struct.pack("<7i", *[2**31 - 1] * 7))
    (folder / "empty.bin").write_bytes(b"")
    for name, content in {"deep": "[" * 100_000, "sound": json.dumps({"dim": 6, "n_layers": 2, "n_heads": 3})}.items():
        (folder / f"meta-{name}").mkdir()
        (folder / f"meta-{name}" / "params.json").write_text(content)
    (folder / "meta-deep" / "consolidated.00.pth").write_bytes(b"")
    (folder / "torchref").mkdir()
    (folder / "torchref" / "config.json").write_text('{"torchref": {"vocab_size": NaN}}')
    safetensors.numpy.save_file({"a": np.ones(1, np.float32)}, folder / "torchref" / "model.safetensors")


CONFIGS = (
    *(
        [
            "empty",
            "not-json",
            "array",
            "null",
            "no-config",
            "latin",
            "deep",
            "deep-closed",
            "twice",
            "nan",
            "infinity",
            "digits",
            "surrogate",
            "escape",
        ]
    ),
    *(
        [
            "unknown-field",
            "wrong-type",
            "layers",
            "vocabulary",
            "long",
            "window",
            "model",
            "pipe",
            "folder",
            "zero",
            "loop",
        ]
    ),
)
TOKENIZERS = ["empty", "deep", "type", "chars", "size", "ids", "no-bpe", "huge-id", "merge", "pipe"]
MODELS = (
    *(
        [
            "deep",
            "twice",
            "empty",
            "list",
            "unknown",
            "experts",
            "layers",
            "wide",
            "vocabulary",
            "none",
            "head-length",
            "head-text",
            "head-cut",
            "head-shape",
        ]
    ),
    *(["head-offsets", "pipe", "index-up", "index-absolute", "index-gone", "index-number", "msgpack", "code", "bomb"]),
)
SPEECH = "train librispeech-char --data.path"

COMMANDS = [
    *(
        "",
        "trian tiny",
        "compare a b",
        "train no-such-preset",
        "train tiny --no-such-option 1",
        "train tiny --train.steps four",
    ),
    *(
        "train tiny --train.steps -1",
        "train tiny --optim.learning-rate nan",
        "train tiny --model.num-layers 10000000000",
    ),
    *(
        f"train tiny --model.vocab-size {10**30}",
        "train tiny --resume",
        "train tiny --resume --out nowhere",
        "sample nowhere",
    ),
    *("sample run --step 7", "sample run --prompt-file nowhere.txt", "sample run --prompt-file latin.txt"),
    *("sample run --prompt-file zero.txt", "sample run --prompt-file pipe.txt", "sample run --prompt abc"),
    *("sample run --temperature -1", "sample run --top-p 2", "info no-such-thing", "runs nowhere", "runs metrics-deep"),
    *(f"sample config-{name}" for name in CONFIGS),
    *("info config-deep", "eval config-twice", "attend config-nan --text A", "train tiny --resume --out config-digits"),
    *(f"sample tokenizer-{name}" for name in TOKENIZERS),
    *("sample no-checkpoint", "sample manifest-array", "sample manifest-deep", "sample no-params", "sample linked"),
    *(f"train tiny --data.path {name}" for name in ("nowhere.txt", "empty.txt", "latin.txt", "short.txt", "pipe.txt")),
    *("train tiny --data.path zero.txt", "train tiny --data.path loop.txt", "train tiny --data.path corpus"),
    "train tiny --data.path sound.txt --out taken",
    *(f"{SPEECH} {name}.csv" for name in ("header", "columns", "lower", "empty", "quote")),
    *(
        f"{SPEECH} {name}"
        for name in ("npy-objects", "npy-terabytes", "npy-negative", "npy-bytes", "npy-pickle", "both")
    ),
    *(
        f"eval run --task prediction --prompts {name}"
        for name in ("nowhere.npz", "objects.npz", "bomb.npz", "text.npz")
    ),
    *(f"convert --from hf hf-{name} new" for name in MODELS),
    *(
        "convert --from nanogpt ckpt.pt new",
        "convert --from nanogpt nowhere new",
        "convert --from torchref torchref new",
    ),
    *(f"convert --from llama2c {name}.bin new" for name in ("version", "cut", "huge", "empty")),
    *("convert --from meta meta-deep new", "convert --from meta meta-sound new", "convert run taken --to hf"),
    *(
        "prepare no-such-dataset",
        "prepare --data.path deep.jsonl --out new",
        "prepare --data.path field.jsonl --out new",
    ),
    *(
        "prepare --data.path half.jsonl --out new",
        "prepare --data.path nowhere.txt --out new",
        "prepare --check corpus",
    ),
    *("prepare --check nowhere", "prepare --data.path pipe.txt --out new"),
]
"""What is typed after `jaxlm`, in the folder that `make_all` has filled."""
