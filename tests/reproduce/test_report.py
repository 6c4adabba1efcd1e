"""The report: means, targets, verdicts, what is kept of an earlier one."""

import csv
import json

import pytest

from jaxlm.config.presets import preset
from jaxlm.errors import UserError
from jaxlm.reproduce.records import folder_of, records_of, settings_of, write_record
from jaxlm.reproduce.report import lines_of, table, write_report
from jaxlm.reproduce.rows import Experiment, Measurement, Training

TRAINED = Training(
    name="trained",
    label="a training",
    config=preset("tiny"),
    published={"val_loss": 2.0, "train_loss": 1.9},
    targets={"val_loss": 1.5},
    seeds=(0, 1),
)
BETTER = Training(name="better", label="better", config=preset("tiny"), below=("trained", -0.1))
MEASURED = Measurement(name="measured", label="times", measure=lambda quick: {}, shown=("ms",))
EXPERIMENT = Experiment(
    name="stats305",
    title="An experiment",
    rows=(TRAINED, BETTER, MEASURED),
    side_by_side=False,
    draw=lambda records: None,
)


def record(row, seed, **numbers):
    made = {"date": "2026-01-02", "device": "a chip", "threads": 2, "versions": {"jax": "1", "optax": "2"}}
    losses = {"last_loss": 0.5, "train_loss": 1.25, "val_loss": 1.0, "best_val_loss": 1.0}
    sizes = {"parameters": 10, "state_bytes": 80, "samples": {"\n": "a|b\nc"}}
    return {
        "row": row.name, "seed": seed, "settings": settings_of(row, seed), "wall_s": 3.0,
        **made, **losses, **sizes, **numbers,
    }  # fmt: skip


@pytest.fixture
def root(tmp_path):
    for seed, loss in ((0, 1.4), (1, 1.5)):
        write_record(folder_of(tmp_path, "trained", seed), record(TRAINED, seed, val_loss=loss))
    write_record(folder_of(tmp_path, "better", 0), record(BETTER, 0, val_loss=1.36))
    return tmp_path


def by_name(lines):
    return {(line.row, line.quantity): line for line in lines}


def test_a_line_holds_the_mean_of_the_seeds_and_the_target(root, tmp_path):
    lines = by_name(write_report(EXPERIMENT, root, tmp_path / "report"))
    line = lines["trained", "val_loss"]
    assert (line.published, line.target, line.by_seed, line.seeds) == (2.0, 1.5, (1.4, 1.5), (0, 1))
    assert line.ours == pytest.approx(1.45)
    assert line.verdict == "reached"
    assert line.command == "jaxlm reproduce stats305 --row trained"
    assert lines["trained", "train_loss"].verdict == ""
    assert lines["measured", "ms"].verdict == "not run"


def test_a_target_that_is_missed_says_so(root, tmp_path):
    line = by_name(write_report(EXPERIMENT, root, tmp_path / "report"))["better", "val_loss"]
    assert line.target == pytest.approx(1.35)  # the other row's mean, less 0.1
    assert line.verdict == "**not reached**"


def test_seeds_that_are_missing_are_counted(root):
    folder_of(root, "trained", 1).joinpath("record.json").unlink()
    line = by_name(lines_of(EXPERIMENT, records_of(EXPERIMENT, root, root / "none.json")))["trained", "val_loss"]
    assert line.verdict == "reached (1 of 2 seeds)"


def test_other_seeds_count_as_well(root):
    write_record(folder_of(root, "trained", 7), record(TRAINED, 7, val_loss=1.6))
    line = by_name(lines_of(EXPERIMENT, records_of(EXPERIMENT, root, root / "none.json")))["trained", "val_loss"]
    assert line.seeds == (0, 1, 7)
    assert line.ours == pytest.approx(1.5)


def test_results_of_an_earlier_report_are_kept_until_they_are_measured_again(root, tmp_path):
    report, empty = tmp_path / "report", tmp_path / "empty"
    write_report(EXPERIMENT, root, report)
    assert by_name(write_report(EXPERIMENT, empty, report))["trained", "val_loss"].ours == pytest.approx(1.45)
    write_record(folder_of(empty, "trained", 0), record(TRAINED, 0, val_loss=1.2))
    assert by_name(write_report(EXPERIMENT, empty, report))["trained", "val_loss"].by_seed == (1.2, 1.5)


def test_results_of_other_settings_do_not_count(root, tmp_path):
    report = tmp_path / "report"
    write_report(EXPERIMENT, root, report)
    content = json.loads((report / "results/stats305.json").read_text())
    for entry in content["records"]:
        entry["settings"]["optim.learning_rate"] = 0.25
    (report / "results/stats305.json").write_text(json.dumps(content))
    assert by_name(write_report(EXPERIMENT, tmp_path / "empty", report))["trained", "val_loss"].verdict == "not run"


def test_files_hold_the_same_numbers(root, tmp_path):
    lines = write_report(EXPERIMENT, root, tmp_path)
    with (tmp_path / "results/stats305.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["ours"] for row in rows] == ["" if line.ours is None else str(line.ours) for line in lines]
    assert json.loads((tmp_path / "results/stats305.json").read_text())["table"][0]["by_seed"] == [1.4, 1.5]
    page = (tmp_path / "results.md").read_text()
    assert "| a training | val_loss | 2 | <= 1.5000 | 1.4500 | 1.4000, 1.5000 | reached | 3 | 2026-01-02 |" in page
    assert "a chip, 2 threads" in page
    assert "a&#124;b<br>c" in page  # a sample's own bars would end the cell


def test_quick_versions_reach_nothing(root, tmp_path):
    lines = write_report(EXPERIMENT, root, tmp_path, quick=True)
    assert {line.verdict for line in lines if line.ours is not None} == {"quick version"}


def test_a_table_of_one_quantity_does_not_name_it():
    lines = [line for line in lines_of(EXPERIMENT, {row.name: [] for row in EXPERIMENT.rows}) if line.row == "better"]
    assert table(lines)[0].startswith("| row | published | target |")


def test_files_that_are_not_ours_are_refused(root, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/stats305.json").write_text("[]")
    with pytest.raises(UserError, match=r"stats305.json is not a report .*: move it away"):
        write_report(EXPERIMENT, root, tmp_path)
    folder_of(root, "trained", 0).joinpath("record.json").write_text("{")
    (tmp_path / "results/stats305.json").unlink()
    with pytest.raises(UserError, match=r"record.json is not a record .*: remove it"):
        write_report(EXPERIMENT, root, tmp_path)
