"""Without a device: every command and every function that computes refuses in one line."""

import json
import os
import subprocess
import sys

PROGRAM = """
import contextlib, io, json, sys, warnings
import numpy as np
import jaxlm
from jaxlm.cli.main import main
from jaxlm.config import ModelConfig
from jaxlm.errors import UserError
from jaxlm.run.fingerprint import fingerprint

commands, run, model = json.loads(sys.argv[1]), sys.argv[2], jaxlm.build_model(ModelConfig(**json.loads(sys.argv[3])))
found = {}
for arguments in commands:
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(arguments)
    found[" ".join(arguments)] = [code, out.getvalue(), err.getvalue()]
params, tokens, mesh = {"a": np.ones(2, np.float32)}, np.ones((1, 3), np.int32), jaxlm.MeshConfig()
functions = {
    "load_run": lambda: jaxlm.load_run(run),
    "score": lambda: jaxlm.score(model, params, tokens),
    "predict": lambda: jaxlm.predict(model, params, tokens, 2),
    "beam_search": lambda: jaxlm.beam_search(model, params, tokens, max_new_tokens=2, beam_width=2),
    "generate": lambda: jaxlm.generate(model, params, tokens, max_new_tokens=2, key=None),
    "stream": lambda: jaxlm.stream(model, params, tokens, max_new_tokens=2, key=None),
    "attention_maps": lambda: jaxlm.attention_maps(model, params, tokens),
    "make_mesh": lambda: jaxlm.make_mesh(mesh),
    "train": lambda: jaxlm.train(jaxlm.preset("tiny"), "never"),
    "fingerprint": fingerprint,
}
for name, function in functions.items():
    try:
        found[name] = [0, "", repr(function())]
    except UserError as error:
        found[name] = [2, "", f"jaxlm: error: {error}\\n"]
    except BaseException as error:
        found[name] = [1, "", repr(error)]
print(json.dumps(found))
"""


def test_without_a_device_everything_that_computes_says_so_in_one_line(folder, tmp_path):
    run, out = str(folder / "runs/tiny-1"), str(tmp_path / "out")
    commands = [
        ["train", "tiny", "--out", out],
        ["sample", run],
        ["eval", run],
        ["attend", run, "--text", "a"],
        ["convert", run, out, "--to", "hf"],
        ["info"],
        ["info", "tiny"],
        ["info", "--fingerprint"],
        ["info", "tiny", "--memory"],
    ]
    cfg = {"vocab_size": 7, "max_seq_len": 8, "num_layers": 1, "embed_dim": 4, "num_heads": 1, "position": "rope"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands), run, json.dumps(cfg)],
        env={**os.environ, "JAX_PLATFORMS": "cuda", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == len(commands) + 10
    for name, (code, printed, message) in found.items():
        assert (code, printed) == (2, ""), f"{name}: {message}"
        assert message.startswith("jaxlm: error: JAX finds no devices (JAX_PLATFORMS=cuda: "), name
        assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()
