"""Rows that go to TensorBoard and Weights & Biases: the same as in metrics.jsonl, also after a kill and a resumption.

The packages are stand-ins that note what they are given; tests of the real ones run where they are installed.
"""

import dataclasses
import importlib.util
import json
import struct
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
from support import refused

from jaxlm.config import DataConfig, ModelConfig
from jaxlm.config.presets import preset
from jaxlm.errors import UserError
from jaxlm.run import sinks
from jaxlm.run.metrics import read_rows
from jaxlm.run.sinks import Sinks, TensorBoard, WeightsAndBiases, check_sinks
from jaxlm.run.training import train

ROWS = [
    {"step": 1, "loss": 4.0, "elapsed_s": 1.5},
    {"step": 5, "loss": 3.0, "elapsed_s": 2.5},
    {"step": 5, "val_loss": 3.5, "elapsed_s": 3.0},
]
LATER = {"step": 10, "loss": 2.0, "elapsed_s": 4.0}


class Writer:
    """Stands for tensorboardX's EventsWriter: scalars in a file of JSON."""

    def __init__(self, prefix):
        self.path, self.scalars = sinks.Path(prefix + ".json"), []

    def write_event(self, event):
        self.scalars += [(v.tag, v.simple_value, event.step, event.wall_time) for v in event.summary.value]

    def flush(self):
        self.path.write_text(json.dumps(self.scalars))

    close = flush


class Server:
    """Stands for wandb: the histories of runs by their id, and the offline folders."""

    def __init__(self, offline=False):
        self.histories, self.offline, self.sessions, self.exit_codes, self.options = {}, offline, 0, [], []

    def init(self, **options):
        self.options.append(options)
        self.sessions += 1
        if self.offline:
            folder = sinks.Path(options["dir"]) / "wandb" / f"offline-run-{self.sessions}-{options['id']}"
            self.histories[folder.name] = history = []
            (folder / "files").mkdir(parents=True)
        else:
            folder, history = sinks.Path(options["dir"]), self.histories.setdefault(options["id"], [])
        return SimpleNamespace(
            dir=str(folder / "files"),
            step=history[-1][0] + 1 if history else 0,
            define_metric=lambda *_, **__: None,
            log=lambda row, step: history.append((step, row)),
            finish=lambda exit_code: self.exit_codes.append(exit_code),
        )


@pytest.fixture
def tensorboard(monkeypatch):
    class Summary(SimpleNamespace):
        Value = SimpleNamespace

    for name, fields in (
        ("tensorboardX", {}),
        ("tensorboardX.event_file_writer", {"EventsWriter": Writer}),
        ("tensorboardX.proto", {}),
        ("tensorboardX.proto.event_pb2", {"Event": SimpleNamespace}),
        ("tensorboardX.proto.summary_pb2", {"Summary": Summary}),
    ):
        module = ModuleType(name)
        vars(module).update(fields)
        monkeypatch.setitem(sys.modules, name, module)


def server(monkeypatch, **options):
    found, module = Server(**options), ModuleType("wandb")
    module.init, module.Settings = found.init, lambda **settings: settings
    monkeypatch.setitem(sys.modules, "wandb", module)
    return found


def scalars(out):
    return json.loads((out / "tensorboard" / "events.json").read_text())


def test_tensorboard_holds_what_metrics_jsonl_holds(tmp_path, tensorboard):
    board = TensorBoard(tmp_path, {}, [])
    for row in (*ROWS, {"step": 7, "loss": 9.0, "elapsed_s": 3.5}):  # of a step that the kill takes back
        board.write(row)  # and it is not closed
    assert [scalar[:3] for scalar in scalars(tmp_path)][-1] == ["loss", 9.0, 7]
    board = TensorBoard(tmp_path, {}, ROWS)
    board.write(LATER)
    assert [scalar[:3] for scalar in scalars(tmp_path)] == [
        ["loss", 4.0, 1],
        ["loss", 3.0, 5],
        ["val_loss", 3.5, 5],
        ["loss", 2.0, 10],
    ]
    times = [scalar[3] for scalar in scalars(tmp_path)]
    assert times[-1] - times[0] == pytest.approx(2.5)  # as the rows say, not when they were written again
    board.close(failed=False)


def test_wandb_gets_each_row_once_under_one_id(tmp_path, monkeypatch):
    there = server(monkeypatch)
    first = WeightsAndBiases(tmp_path, {"seed": 1}, [])
    for row in ROWS[:2]:
        first.write(row)  # killed: the evaluation row has not arrived
    second = WeightsAndBiases(tmp_path, {"seed": 1}, ROWS)
    second.write(LATER)
    second.close(failed=True)
    (history,) = there.histories.values()
    assert [row for _, row in history] == [*ROWS, LATER]
    assert [number for number, _ in history] == [2, 10, 11, 20]
    assert there.exit_codes == [1]
    assert there.options[0]["config"] == {"seed": 1}


def test_wandb_takes_no_row_twice_that_was_computed_twice(tmp_path, monkeypatch):
    there = server(monkeypatch)
    for kept in ([], ROWS[:1]):  # killed after ROWS, resumed from a checkpoint before them
        sink = WeightsAndBiases(tmp_path, {}, kept)
        for row in ROWS[len(kept) :]:
            sink.write(row)
    (history,) = there.histories.values()
    assert [row for _, row in history] == ROWS


def test_wandb_offline_keeps_one_folder_with_all_rows(tmp_path, monkeypatch):
    there = server(monkeypatch, offline=True)
    for row in ROWS:
        WeightsAndBiases(tmp_path, {}, []).write(row)
    WeightsAndBiases(tmp_path, {}, ROWS).write(LATER)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert [row for _, row in there.histories[folder.name]] == [*ROWS, LATER]


def test_a_sink_that_fails_later_is_left_out_and_the_others_go_on(tmp_path, tensorboard, monkeypatch):
    there, said = server(monkeypatch), []
    with Sinks(("tensorboard", "wandb"), tmp_path, {}, [], said.append) as both:
        both.write(ROWS[0])
        monkeypatch.setattr(Writer, "flush", lambda self: (tmp_path / "no" / "folder").write_text(""))
        for row in ROWS[1:]:
            both.write(row)
    (line,) = said
    assert line.startswith("--log tensorboard has failed ([Errno 2] No such file or directory")
    assert line.endswith("it gets no more rows; metrics.jsonl has them all")
    (history,) = there.histories.values()
    assert [row for _, row in history] == ROWS
    assert there.exit_codes == [0]


def test_unknown_sinks_and_missing_packages_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="log = 'mlflow' is unknown: choose one of tensorboard, wandb"):
        check_sinks(["mlflow"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        line = refused("train", "tiny", "--log", name)
        assert f"--log {name} needs the package {package}: pip install 'jaxlm[{name}]'" in line
    assert "tensorboard" in refused("train", "tiny", "--log", "mlflow")
    assert not [*(tmp_path / "runs").iterdir()]


def test_a_run_logs_its_rows_and_is_free_again_if_a_sink_cannot_start(tmp_path, tensorboard, monkeypatch, shakespeare):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: name)
    there = server(monkeypatch)
    (tmp_path / "text.txt").write_text(shakespeare.read_text()[:5_000])
    tiny, out = preset("tiny"), tmp_path / "run"
    config = dataclasses.replace(
        tiny,
        data=DataConfig(path=str(tmp_path / "text.txt")),
        model=ModelConfig(family="embedding_bigram", vocab_size=65, max_seq_len=32, embed_dim=8),
        optim=dataclasses.replace(tiny.optim, warmup_steps=0),
        train=dataclasses.replace(tiny.train, steps=4, log_every=2, eval_every=4),
    )
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "__init__", lambda *_: (tmp_path / "no" / "folder").write_text(""))
        with pytest.raises(UserError, match=r"--log tensorboard cannot start \(.*No such file.*\): leave it out$"):
            train(config, out, log=("tensorboard",))
    assert not out.exists()
    train(config, out, log=("tensorboard", "wandb"))
    rows = read_rows(out / "metrics.jsonl")
    (history,) = there.histories.values()
    assert [row for _, row in history] == rows
    assert len(scalars(out)) == sum(len(row.keys() - {"step", "elapsed_s"}) for row in rows)


# The real packages, where they are installed -------------------------------------------------------------------------


def read_events(folder):
    """(tag, value, step) of the scalars in TensorBoard's files: records of a length, a check, an event, a check."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (size,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + size])
            found += [(value.tag, value.simple_value, event.step) for value in event.summary.value]
            place += 16 + size
    return found


def test_real_tensorboard_holds_the_rows(tmp_path):
    pytest.importorskip("tensorboardX")
    killed = TensorBoard(tmp_path, {}, [])
    killed.write(ROWS[0])
    board = TensorBoard(tmp_path, {}, ROWS)
    board.write(LATER)
    expected = [("loss", 4.0, 1), ("loss", 3.0, 5), ("val_loss", 3.5, 5), ("loss", 2.0, 10)]
    assert read_events(tmp_path / "tensorboard") == expected  # on disk before it is closed
    board.close(failed=False)
    killed.close(failed=True)
    assert read_events(tmp_path / "tensorboard") == expected


def read_history(path):
    """The rows in an offline file of Weights & Biases."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole, rows = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:  # blocks of 32 KB, as in a log of LevelDB; the rest of one is empty
            place += 2**15 - place % 2**15
        _, size, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind not in (1, 4):  # the record goes on
            continue
        record, whole = Record.FromString(whole), b""
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in items.items() if not name.startswith("_")})
    return rows


@pytest.mark.filterwarnings("ignore")
def test_real_wandb_offline_holds_the_rows(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for earlier, rest in (([], ROWS[:2]), (ROWS, [LATER])):
        sink = WeightsAndBiases(tmp_path, {"seed": 1}, earlier)
        for row in rest:
            sink.write(row)
        sink.close(failed=False)
        time.sleep(1.1)  # it names its folders by the second
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert read_history(path) == [*ROWS, LATER]
