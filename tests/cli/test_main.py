"""The command: exit codes, one-line refusals, output."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from checking import PROGRAMS
from support import command, refused, snapshot

from jaxlm import compilation_cache
from jaxlm.cli.main import COMMANDS, main
from jaxlm.cli.options import read_text
from jaxlm.config.base import to_dict
from jaxlm.config.presets import preset
from jaxlm.data.files import sealed
from jaxlm.errors import CheckError


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trane"], "command 'trane' is unknown: choose one of train, sample"),
        (["compare"], "command 'compare' is not there yet"),
        (["train", "gpt5"], "preset 'gpt5' is unknown: choose one of nanogpt-cpu"),
        (["train", "tiny", "--model.num-layer", "3"], "--model.num-layer, 3; perhaps you meant --model.num-layers"),
        (["train", "tiny", "--model.activation", "swish"], "'swish'"),
        (["train", "tiny", "--model.num-layers", "two"], "'two'"),
        (["train", "tiny", "--model.num-heads", "5"], "num_heads = 5 does not divide embed_dim = 32"),
        (
            ["train", "tiny", "--model.family", "recurrent", "--model.window", "3"],
            "family = 'recurrent' does not read window = 3",
        ),
        (["train", "tiny", "--model.family", "rnn"], "'rnn'"),
        (["train", "tiny", "--model.vocab-size", "70"], "vocab_size = 70 is not the tokenizer's"),
        (["train", "tiny", "--optim.name", "lino"], "optim.name = 'lino' is not an optimizer of jaxlm or Optax"),
        (
            ["train", "gpt2-124m", "--optim.name", "sgd", "--optim.b2", "0.9"],
            "b2 = 0.9 is not read by sgd: leave it out",
        ),
        (
            ["train", "tiny", "--optim.name", "sgd", "--optim.arguments", "nesterov=true", "momentun=0.9"],
            "argument 'momentun' of sgd is unknown: choose one of momentum, nesterov",
        ),
        (
            ["train", "--out", "runs/tiny-1", "--resume", "--optim.name", "sgd"],
            "was trained with optim.name = 'adamw', not 'sgd'",
        ),
        (["train", "tiny", "--optim.warmup-steps", "500"], "warmup_steps = 500 is not below steps = 500"),
        (["attend", "runs/tiny-1", "--mesh.data", "2"], "--mesh.data"),
        (["train", "tiny", "--mesh.data", "0"], "mesh.data = 0 is out of range: give at least 1, or -1"),
        (["train", "tiny", "--mesh.process-id", "1"], "mesh.process_id = 1 with mesh.coordinator = None"),
        (
            ["train", "tiny", "--data.dataset", "wiki"],
            "dataset 'wiki' is unknown: choose one of librispeech, tinyshakespeare",
        ),
        (["train", "tiny", "--data.path", "nothing.txt"], "nothing.txt does not exist"),
        (["train", "tiny", "--data.path", "empty.txt"], "empty.txt is empty"),
        (["train", "tiny", "--data.path", "short.txt"], "shorter than one context of max_seq_len = 32"),
        (["train", "tiny", "--data.path", "latin.txt"], "not UTF-8: byte 0xe9 at offset 3"),
        (["train", "tiny", "--out", "runs/tiny-1"], "already holds a run: continue it with --resume"),
        (["train", "tiny", "--out", "full"], "full already holds something"),
        (["train", "tiny", "--out", "full", "--resume"], "full is not a run"),
        (["train", "tiny", "--resume"], "--resume needs the run to continue"),
        (["train", "tiny", "--optim.keep-schedule"], "--optim.keep-schedule is for a run that goes on: add --resume"),
        (["train", "tiny", "--optim.eps", "0"], "eps = 0.0 is too small"),
        (["train", "tiny", "--model.norm-eps", "inf"], "norm_eps = inf is out of range: give a finite number"),
        (
            ["train", "tiny", "--optim.name", "lion", "--optim.arguments", "b1=Infinity"],
            "argument 'b1=Infinity' of lion is out of range: give a finite number",
        ),
        (["train", "chargpt", "--out", "runs/tiny-1", "--resume"], "was trained with preset 'tiny', not 'chargpt'"),
        (
            ["train", "--out", "runs/tiny-1", "--resume", "--model.num-layers", "3"],
            "was trained with model.num_layers = 1, not 3",
        ),
        (["train", "--out", "runs/tiny-1", "--resume", "--train.seed", "3"], "was trained with train.seed = 0, not 3"),
        (["train", "tiny", "--data.path", "text.txt", "--sample.prompt", "é"], "characters 'é' are outside"),
        (["train", "tiny", "--data.path", "text.txt", "--out", "text.txt/run"], "text.txt/run cannot be written"),
        (["sample", "runs/tiny-1", "--prompt", "a\udcff"], "prompt is not UTF-8: byte 0xff at offset 1"),
        (["sample"], "RUN is missing; see jaxlm sample --help"),
        (["sample", "runs"], "runs is not a run: it has no config.json"),
        (["sample", "runs/tiny-1", "--prompt", "ROMEO€é"], "characters 'é€' are outside the vocabulary"),
        (["sample", "runs/tiny-1", "--prompt", ""], "prompt is empty"),
        (["sample", "runs/tiny-1", "--step", "7"], "step 7 has no checkpoint in runs/tiny-1: choose one of 15, 30"),
        (["sample", "runs/tiny-1", "--top-p", "2"], "top_p = 2.0"),
        (["sample", "runs/tiny-1", "--min-p", "2"], "min_p = 2.0"),
        (["sample", "runs/tiny-1", "--stop", "a", ""], "stop = ('a', '') holds an empty text"),
        (["sample", "runs/tiny-1", "--forbidden-tokens", "3", "99"], "forbidden_tokens holds 99: the vocabulary has 0"),
        (
            ["sample", "runs/tiny-1", "--prompt", "a", "--prompt-file", "b.txt"],
            "--prompt 'a' and --prompt-file",
        ),
        (["sample", "runs/tiny-1", "--prompt-file", "none.txt"], "none.txt cannot be read (No such file or directory)"),
        (["sample", "runs/tiny-1", "--prompt-file", "full"], "full cannot be read (Is a directory)"),
        (["sample", "runs/tiny-1", "--prompt-file", "latin.txt"], "latin.txt is not UTF-8: byte 0xe9 at offset 3"),
        (["sample", "runs/tiny-1", "--prompt-file", "empty.txt"], "prompt is empty"),
        (["eval", "runs/tiny-1", "--task", "guess"], "'guess'"),
        (["eval", "runs/tiny-1", "--task", "likelihood", "--limit", "0"], "limit = 0 is too small"),
        (["eval", "runs/tiny-1", "--task", "likelihood", "--batch-size", "0"], "batch_size = 0 is too small"),
        (
            ["eval", "runs/tiny-1", "--limit", "5"],
            "--limit 5 is not for --task loss: leave it out, or",
        ),
        (
            ["eval", "runs/tiny-1", "--task", "prediction", "--oracle", "full"],
            "--oracle full is not for --task prediction: leave it out, or use --task generation",
        ),
        (
            ["eval", "runs/tiny-1", "--task", "prediction"],
            "39 tokens are beyond the learned position table, max_seq_len = 32: use a run with a longer table",
        ),
        (
            ["eval", "runs/tiny-1", "--task", "generation", "--oracle", "full"],
            "oracle full is neither a run nor",
        ),
        (["eval", "runs/tiny-1", "--task", "generation", "--top-p", "2"], "top_p = 2.0"),
        (["eval", "other"], "other/config.json is not a configuration of this version: ModelConfig has no field depth"),
        (["prepare", "wiki"], "dataset 'wiki' is unknown"),
        (["prepare"], "DATASET is missing (or --data.path, or --check); see jaxlm prepare --help"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_changes_nothing(folder, arguments, words):
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("To be, or not to be")
    (folder / "latin.txt").write_bytes("thé".encode("latin-1").replace(b"\xe9", b"e\xe9") * 99)
    (folder / "full").mkdir(exist_ok=True)
    (folder / "full" / "thesis.txt").write_text("mine")
    (folder / "other").mkdir(exist_ok=True)
    config = json.loads((folder / "runs/tiny-1/config.json").read_text())
    config["config"]["model"]["depth"] = 3
    (folder / "other" / "config.json").write_text(json.dumps(sealed(config)))
    before = snapshot(folder)
    assert words in refused(*arguments)
    assert snapshot(folder) == before


def test_help_and_version():
    code, out, err = command("--help")
    assert (code, err) == (0, "")
    assert all(name in out for name in COMMANDS)
    assert command("--version")[0] == 0
    assert command()[0] == 2


def test_the_module_is_the_command():
    module = subprocess.run([sys.executable, "-m", "jaxlm", "--help"], capture_output=True, text=True, check=True)
    assert module.stdout == command("--help")[1]
    refusal = subprocess.run([sys.executable, "-m", "jaxlm", "trane"], capture_output=True, text=True, check=False)
    assert (refusal.returncode, refusal.stdout) == (2, "")
    assert refusal.stderr.startswith("jaxlm: error: command 'trane' is unknown")


LONG = [
    ["--help"],
    ["train", "--help"],
    ["presets"],
    ["presets", "--json"],
    ["info", "tiny"],
    ["info", "tiny", "--json"],
]


@pytest.mark.parametrize("arguments", [*LONG, ["runs"]], ids=" ".join)
def test_a_reader_that_leaves_is_no_error(tmp_path, arguments):
    """stdout is a pipe that nobody reads: as in `jaxlm info tiny | true`."""
    for number in range(3):
        run = tmp_path / "runs" / f"tiny-{number}"
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps({"config": to_dict(preset("tiny"))}))
    reader, writer = os.pipe()
    os.close(reader)
    try:
        process = subprocess.run(
            [sys.executable, "-m", "jaxlm", *arguments],
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONUNBUFFERED": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    finally:
        os.close(writer)
    assert (process.returncode, process.stderr) == (128 + signal.SIGPIPE, b"")


def test_what_a_locale_cannot_show_is_replaced(tmp_path):
    run = tmp_path / "runs" / "tiny-1"
    run.mkdir(parents=True)
    config = to_dict(preset("tiny"))
    config["sample"]["prompt"] = "grün"
    (run / "config.json").write_text(json.dumps({"config": config}), encoding="utf-8")
    ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    environment = {**os.environ, **ascii_only, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    jaxlm = [sys.executable, "-X", "utf8=0", "-m", "jaxlm", "runs", str(tmp_path / "runs")]
    text, found = (
        subprocess.run([*jaxlm, *more], capture_output=True, text=True, check=True, env=environment).stdout
        for more in ([], ["--json"])
    )
    assert "gr?n" in text
    assert json.loads(found)["runs"][0]["settings"] == {"sample.prompt": "grün"}


def test_sampling_repeats_with_its_seed(folder):
    arguments = ["sample", "runs/tiny-1", "--prompt", "ROMEO:", "--num-samples", "3", "--max-new-tokens", "20"]
    first, again, other = (command(*arguments, "--seed", seed) for seed in (1, 1, 2))
    assert first[0] == 0
    assert first[1] == again[1] != other[1]
    texts = json.loads(command(*arguments, "--seed", 1, "--json")[1])["texts"]
    assert len(set(texts)) == 3
    assert "\n---\n".join(texts) + "\n" == first[1]
    assert all(text.startswith("ROMEO:") and len(text) == 26 for text in texts)


def test_text_as_it_comes_and_json_and_the_kept_file_say_the_same(folder, monkeypatch):
    arguments = ["sample", "runs/tiny-1", "--prompt", "ROMEO:", "--max-new-tokens", "20", "--seed", "5"]
    kept = folder / "runs/tiny-1/samples"
    code, text, err = command(*arguments)
    assert code == 0
    assert f"kept: {kept.relative_to(folder)}/step-30-seed-5.json" in err
    found = json.loads(command(*arguments, "--json")[1])
    assert found.keys() == {"run", "step", "sample", "texts", "samples"}
    (sample,) = found["samples"]
    assert text == found["texts"][0] + "\n" == "ROMEO:" + sample["text"] + "\n"
    assert (len(sample["tokens"]), len(sample["log_probs"]), sample["finished"]) == (20, 20, "length")
    files = [json.loads((kept / name).read_text()) for name in ("step-30-seed-5.json", "step-30-seed-5-2.json")]
    assert files == [found, found]
    flushed = []
    with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", PROGRAMS)
        patch.setattr(out, "flush", lambda: flushed.append(out.getvalue()))
        assert main(arguments) == 0
    assert flushed[0] == "ROMEO:"
    assert len(flushed) > 20
    stop = sample["text"][7:9]
    code, text, _ = command(*arguments, "--stop", stop, "never")
    assert (code, text) == (0, "ROMEO:" + sample["text"].partition(stop)[0] + "\n")


def test_a_prompt_comes_from_a_file_or_stdin_to_the_last_newline(folder, monkeypatch):
    prompt = b"ROMEO:\nO \n"
    (folder / "prompt.txt").write_bytes(prompt)
    few = ["sample", "runs/tiny-1", "--max-new-tokens", "5", "--json"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(prompt), newline=None))
    found = [json.loads(command(*few, "--prompt-file", name)[1]) for name in ("prompt.txt", "-")]
    assert found[0]["texts"][0].startswith("ROMEO:\nO \n")
    assert found[0] == found[1]
    assert found[0]["sample"]["prompt"] == prompt.decode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\r\nb\r"), newline=None))
    assert read_text("-") == "a\r\nb\r"


def test_sample_and_eval_keep_the_programs_they_compile(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    assert command("sample", "runs/tiny-1", "--max-new-tokens", "5", "--min-p", "0.1")[0] == 0
    assert any(path.name.startswith("jit__advance") for path in tmp_path.iterdir())
    assert command("eval", "runs/tiny-1", "--task", "likelihood", "--limit", "1")[0] == 0
    assert any(path.name.startswith("jit__score") for path in tmp_path.iterdir())


def test_a_run_from_before_a_field_of_sample_opens(folder):
    shutil.copytree("runs/tiny-1", "old")
    record = json.loads((folder / "old/config.json").read_text())
    for name in ("min_p", "repetition_penalty", "forbidden_tokens", "stop"):
        del record["config"]["sample"][name]
    (folder / "old/config.json").write_text(json.dumps(sealed(record)))
    code, text, _ = command("sample", "old", "--max-new-tokens", "5")
    shutil.rmtree("old")
    assert (code, text) == (0, command("sample", "runs/tiny-1", "--max-new-tokens", "5")[1])


@pytest.mark.parametrize(("leave", "code"), [("signal", 130), ("close", 141)])
def test_leaving_a_sample_in_the_middle_is_quiet(folder, leave, code):
    endless = ["sample", "runs/tiny-1", "--prompt", "ROMEO:", "--max-new-tokens", "1000000"]
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # off in what a shell starts by &
    run = "import sys; from jaxlm.cli.main import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{heed}; {run}", *endless],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": PROGRAMS},
    )
    before = sorted((folder / "runs/tiny-1/samples").iterdir())
    assert process.stdout.read(50).startswith(b"ROMEO:")  # as it comes, past the cache
    if leave == "signal":
        process.send_signal(signal.SIGINT)
    else:
        process.stdout.close()
    try:
        assert process.wait(120) == code
    finally:
        process.kill()
    err = process.stderr.read().decode()
    process.stderr.close()
    process.stdout.close()
    assert "pass the learned position table" in err
    assert "Traceback" not in err
    assert "Exception" not in err
    assert sorted((folder / "runs/tiny-1/samples").iterdir()) == before


def test_another_family_on_a_preset_drops_what_it_does_not_read(folder):
    few = ["--train.steps", "5", "--optim.warmup-steps", "2", "--data.path", "text.txt", "--sample.max-new-tokens", "5"]
    code, _, err = command("train", "tiny", "--model.family", "recurrent", "--model.cell", "gru", *few, "--out", "gru")
    assert code == 0, err
    assert json.loads((folder / "gru/config.json").read_text())["config"]["model"]["cell"] == "gru"
    shutil.rmtree("gru")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "tiny", "--out", "new"],
        ["sample", "runs/tiny-1"],
        ["eval", "runs/tiny-1"],
        ["attend", "runs/tiny-1", "--text", "a"],
        ["convert", "--from", "hf", "source", "new"],
        ["info"],
        ["reproduce", "stats305", "--quick", "--out", "new"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_that_compiles_keeps_its_programs(folder, tmp_path, monkeypatch, arguments):
    def reached():
        raise CheckError("kept")

    monkeypatch.setattr(compilation_cache, "kept_programs", reached)
    code, out, err = command(*(str(tmp_path / "new") if word == "new" else word for word in arguments))
    assert (code, out, err.splitlines()[-1]) == (1, "", "jaxlm: error: kept")


@pytest.mark.parametrize("number", ["abc", "0", "-1"])
def test_a_number_of_virtual_devices_that_is_none_is_refused(number, monkeypatch, capsys):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", number)
    assert main(["presets"]) == 2
    assert f"JAX_NUM_CPU_DEVICES={number} is not a number of devices: give at least 1" in capsys.readouterr().err
