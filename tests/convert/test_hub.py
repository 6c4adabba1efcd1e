"""Names on the Hugging Face Hub, which a server on this machine plays: what is fetched, and every refusal."""

import functools
import http.server
import json
import os
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from foreign_folders import GPT2, write

from jaxlm.convert import from_hf
from jaxlm.convert.files import open_tensors
from jaxlm.convert.hub import local_folder
from jaxlm.errors import UserError
from jaxlm.run.folder import load_run

SHA = "0123456789abcdef0123456789abcdef01234567"
REFUSALS = {"my/gated": (403, "GatedRepo"), "my/lost": (404, "RepoNotFound"), "my/broken": (500, "")}


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hub's API that snapshot_download uses, over a folder with a folder for each model."""

    def __init__(self, folder, asked, *arguments):
        self.folder, self.asked = folder, asked
        super().__init__(*arguments)

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        model = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        status, code = REFUSALS.get(model, (200, ""))
        if status != 200:
            return self.answer(b"", status, {"X-Error-Code": code})
        files = sorted(path for path in (self.folder / model).iterdir())
        if parts[0] == "api" and "tree" in parts:
            rows = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
            return self.answer(json.dumps(rows).encode())
        if parts[0] == "api":
            names = [{"rfilename": file.name} for file in files]
            return self.answer(json.dumps({"id": model, "sha": SHA, "siblings": names}).encode())
        if self.command == "GET":
            self.asked.append(parts[-1])
        content = (self.folder / model / parts[-1]).read_bytes()
        return self.answer(content, 200, {"ETag": f'"{parts[-1]}"', "X-Repo-Commit": SHA})

    def answer(self, content, status=200, heads=()):
        self.send_response(status)
        for name, value in {**dict(heads), "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path):
    """(folder of models, names of the files that were fetched, function that asks for models in a process)."""
    models, asked = tmp_path / "models", []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, models, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache")}
    yield models, asked, functools.partial(ask, {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", **settings})
    server.shutdown()
    server.server_close()


ASK = """
import sys
from jaxlm.convert.hub import local_folder
from jaxlm.errors import UserError
for name in sys.argv[1:]:
    try: print(local_folder(name))
    except UserError as error: print(error)
"""


def ask(settings, *arguments, code=("-c", ASK), **more):
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", **settings, **more}  # other tests go offline
    done = subprocess.run([sys.executable, *code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_model_is_fetched_without_what_is_not_read(hub):
    models, asked, ask = hub
    for name in ("small", "old"):
        (models / "my").mkdir(parents=True, exist_ok=True)
        folder = write(models / "my" / name, GPT2)
        for more in ("README.md", "pytorch_model.bin", "tf_model.h5", "tokenizer.json"):
            (folder / more).write_text("{}")
    (models / "my" / "old" / "model.safetensors").unlink()

    small, old = ask("my/small", "my/old")
    assert sorted(asked) == sorted(2 * ["config.json", "tokenizer.json"] + ["model.safetensors", "pytorch_model.bin"])
    assert "transformer.wte.weight" in open_tensors(local_folder(small))
    assert (local_folder(old) / "pytorch_model.bin").read_text() == "{}"

    asked.clear()
    assert ask("my/small", HF_HUB_OFFLINE="1") == [small]  # from the cache
    assert asked == []


def test_the_command_takes_a_name(hub, tmp_path):
    models, _, ask = hub
    (models / "my").mkdir(parents=True)
    write(models / "my" / "small", GPT2)
    ask("convert", "--from", "hf", "my/small", tmp_path / "run", code=("-m", "jaxlm"))
    run = load_run(tmp_path / "run")
    _, params = from_hf(models / "my" / "small")
    jax.tree.map(np.testing.assert_array_equal, run.params, params)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["source"]["name"] == "small"


def test_refusals_are_one_line_each(hub):
    _, _, ask = hub
    gated, lost, broken = ask("my/gated", "my/lost", "my/broken")
    words = "accept its terms at https://huggingface.co/my/gated, then `hf auth login`"
    assert gated == f"my/gated is gated on the Hugging Face Hub: {words}"
    words = "check the name; a private model needs `hf auth login`"
    assert lost == f"my/lost is neither here nor on the Hugging Face Hub: {words}"
    words = "go online, or give the folder of a model"
    unreachable = f"is not there, and the Hugging Face Hub cannot be reached: {words}"
    assert broken == f"my/broken {unreachable}"
    assert ask("my/small", HF_HUB_OFFLINE="1") == [f"my/small {unreachable}"]
    assert ask("my/small", HF_ENDPOINT="http://127.0.0.1:9") == [f"my/small {unreachable}"]


def test_a_local_path_wins_and_what_is_no_name_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "llama").mkdir(parents=True)
    for name in ("runs/llama", "gpt2", "../gpt2", "/a/b", "a/b/c", "a b/c", ""):
        assert str(local_folder(name)) == (name or ".")
    with pytest.raises(UserError) as error:
        local_folder("runs/other")
    message = "install huggingface_hub: pip install 'jaxlm[hub]'"
    assert str(error.value) == f"runs/other is not there; to take it from the Hugging Face Hub, {message}"


def test_another_failure_gives_its_first_line(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"my/small cannot be taken from .*No space left on device.: try again"):
        local_folder("my/small")
