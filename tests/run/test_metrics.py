"""The rows of metrics.jsonl."""

import dataclasses
import hashlib
import json
import re

import pytest

from jaxlm.config import DataConfig
from jaxlm.config.presets import preset
from jaxlm.errors import UserError
from jaxlm.run import metrics
from jaxlm.run.metrics import MetricsFile, check_log, read_rows
from jaxlm.run.training import train

ROWS = [{"step": 1, "loss": 4.0, "elapsed_s": 1.5}, {"step": 5, "loss": 3.0, "elapsed_s": 2.5}]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize("line", ["x{}", "5", '{"loss": 1}'])
def test_a_damaged_row_is_named_and_nothing_is_dropped(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line + "\n" + TEXT)
    with pytest.raises(UserError, match=r"metrics.jsonl line 1 is not a row"):
        MetricsFile(path, 5)
    assert path.read_text() == line + "\n" + TEXT


def test_a_last_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(TEXT + '{"step": 60, "lo')
    assert read_rows(path) == ROWS
    MetricsFile(path, 60).close()
    assert path.read_text() == TEXT


def test_resuming_drops_later_rows_and_goes_on_with_the_time(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(TEXT)
    file = MetricsFile(path, 4)
    assert path.read_text() == TEXT.splitlines(keepends=True)[0]
    file.write({"step": 5})
    (_, row) = read_rows(path)  # on disk at once
    assert 1.5 <= row["elapsed_s"] < 100
    file.close()
    MetricsFile(path, 0).close()
    assert path.read_text() == ""


def test_a_full_disk_is_named(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file._file.close()
    with open("/dev/full", "ab", buffering=0) as full:
        file._file = full
        with pytest.raises(UserError, match="cannot be written .No space left on device.: free some space"):
            file.write({"step": 1})


def test_the_start_of_the_file_is_known_by_its_sha256(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(TEXT)
    file = MetricsFile(path, 5)
    entry = file.entry()
    assert entry == {"bytes": len(TEXT), "sha256": hashlib.sha256(TEXT.encode()).hexdigest()}
    file.write({"step": 6})
    file.close()
    check_log(path, entry)  # rows that came later do not count
    check_log(path, None)  # an older version said nothing
    for content in (TEXT.replace("4.0", "4.5"), TEXT[:-1], TEXT.splitlines(keepends=True)[1], ""):
        path.write_text(content)
        with pytest.raises(UserError, match="was changed after it was written .*: put the old one back, or move it"):
            check_log(path, entry)
    path.unlink()
    with pytest.warns(UserWarning, match="is missing: the rows of the sessions before this one are lost"):
        check_log(path, entry)


def test_what_cannot_be_read_or_written_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.mkdir()
    for use in (lambda: read_rows(path), lambda: check_log(path, {"bytes": 1, "sha256": ""})):
        with pytest.raises(
            UserError, match=r"cannot be read \(Is a directory\): put the old one back, or move it away"
        ):
            use()


def listed_fields():
    """{field: which rows have it} of the module's docstring."""
    table = metrics.__doc__.split("meaning\n")[1].split("\n\n")[0]
    return {line[4:18].strip(): re.split(r"\s{2,}", line[4:].strip())[2] for line in table.splitlines()}


def test_the_docstring_lists_every_field_of_a_run(tmp_path, monkeypatch, shakespeare):
    (tmp_path / "text.txt").write_text(shakespeare.read_text()[:5_000])
    tiny = preset("tiny")
    config = dataclasses.replace(
        tiny,
        data=DataConfig(path=str(tmp_path / "text.txt")),
        model=dataclasses.replace(tiny.model, num_layers=1, embed_dim=8),
        optim=dataclasses.replace(tiny.optim, warmup_steps=0),
        train=dataclasses.replace(tiny.train, steps=6, log_every=3, eval_every=3, eval_batches=1),
    )
    train(config, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    fields = listed_fields()
    assert {*fields.values()} == {"all", "training", "evaluation"}
    assert [row["step"] for row in rows] == [1, 3, 3, 6, 6]
    for row in rows:
        kind = "evaluation" if "val_loss" in row else "training"
        expected = {name for name, of in fields.items() if of in ("all", kind)}
        assert row.keys() == expected - {"skipped", "mfu"}
