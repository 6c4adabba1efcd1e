"""The report: means, targets, verdicts, what is kept of an earlier one."""

import csv
import dataclasses
import json

import pytest
from matplotlib.figure import Figure

from jaxlm.config.presets import preset
from jaxlm.errors import UserError
from jaxlm.reproduce.catalog import experiment
from jaxlm.reproduce.pictures import mean_curve
from jaxlm.reproduce.records import folder_of, records_of, settings_of, write_record
from jaxlm.reproduce.report import lines_of, write_report
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
MEASURED = Measurement(name="measured", label="times", measure=lambda quick: {}, measured={"sizes": [1]}, shown=("ms",))
EXPERIMENT = Experiment(
    name="stats305",
    title="An experiment",
    rows=(TRAINED, BETTER, MEASURED),
    side_by_side=False,
    draw=lambda records: None,
)


def record(row, seed, **numbers):
    made = {"date": "2026-01-02", "device": "a chip", "threads": 2, "versions": {"jax": "1", "optax": "2"}}
    losses = {"last_loss": 0.5, "train_loss": 1.25, "val_loss": 1.0, "best_val_loss": 1.0, "perplexity": 2.7}
    sizes = {"parameters": 10, "state_bytes": 80, "curve": [[6, 1.25, 1.0]], "samples": {"\n": "a|b\nc"}}
    return {
        "row": row.name, "seed": seed, "settings": settings_of(EXPERIMENT, row, seed, False), "wall_s": 3.0,
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
    line = by_name(lines_of(EXPERIMENT, records_of(EXPERIMENT, root, root / "none.json", False)[0]))[
        "trained", "val_loss"
    ]
    assert line.verdict == "reached (1 of 2 seeds)"


def test_other_seeds_count_as_well(root):
    write_record(folder_of(root, "trained", 7), record(TRAINED, 7, val_loss=1.6))
    line = by_name(lines_of(EXPERIMENT, records_of(EXPERIMENT, root, root / "none.json", False)[0]))[
        "trained", "val_loss"
    ]
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
    line = "| a training | val_loss | 2 | <= 1.5000 | 1.4500 | 0: 1.4000, 1: 1.5000 | reached | 3 | a chip, 2 threads |"
    assert f"{line} 2026-01-02 |" in page
    assert "a&#124;b<br>c" in page  # a sample's own bars would end the cell


def test_quick_versions_reach_nothing(root, tmp_path):
    assert {line.verdict for line in write_report(EXPERIMENT, root, tmp_path, quick=True)} == {"not run"}  # full ones
    quick = record(TRAINED, 0)
    quick["settings"] = settings_of(EXPERIMENT, TRAINED, 0, quick=True)
    write_record(folder_of(root, "trained", 0), quick)
    assert (
        by_name(write_report(EXPERIMENT, root, tmp_path, quick=True))["trained", "val_loss"].verdict == "quick version"
    )
    line = by_name(write_report(EXPERIMENT, root, tmp_path / "other"))["trained", "val_loss"]
    assert line.seeds == (1,)


def test_results_of_other_settings_are_kept_in_the_file(root, tmp_path):
    write_report(EXPERIMENT, root, tmp_path)
    file = tmp_path / "results/stats305.json"
    content = json.loads(file.read_text())
    content["records"][0]["settings"]["optim.learning_rate"] = 0.25
    file.write_text(json.dumps(content))
    for _ in range(2):
        write_report(EXPERIMENT, tmp_path / "empty", tmp_path)
        content = json.loads(file.read_text())
        assert [entry["settings"]["optim.learning_rate"] for entry in content["other_settings"]] == [0.25]
        assert len(content["records"]) == 2


def test_a_row_counts_only_with_the_rows_that_it_needs_as_they_are_today():
    exp = experiment("cmu10423")
    row, source = exp.row("rope-256"), exp.row("rope")
    before = settings_of(exp, row, 0, False)
    optim = dataclasses.replace(source.config.optim, learning_rate=0.5)
    other = dataclasses.replace(source, config=dataclasses.replace(source.config, optim=optim))
    changed = dataclasses.replace(exp, rows=tuple(other if r.name == "rope" else r for r in exp.rows))
    assert settings_of(changed, row, 0, False) != before


def test_what_is_missing_for_a_target_is_said(root):
    for seed in (0, 1):
        folder_of(root, "trained", seed).joinpath("record.json").unlink()
    line = by_name(lines_of(EXPERIMENT, records_of(EXPERIMENT, root, root / "none.json", False)[0]))[
        "better", "val_loss"
    ]
    assert line.verdict == "the target, row trained, is not run"


def test_a_picture_of_nothing_is_removed(root, tmp_path):
    figure = Figure()
    drawn = dataclasses.replace(EXPERIMENT, draw=lambda records: figure)
    write_report(drawn, root, tmp_path)
    assert (tmp_path / "results/stats305.png").exists()
    write_report(EXPERIMENT, root, tmp_path)
    assert not (tmp_path / "results/stats305.png").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "is not a report"),
        ('{"records": [5]}', "holds '5' in place of a record"),
        ('{"records": [{"row": "a"}]}', "its seed is None"),
        ("{", "cannot be read"),
    ],
)
def test_reports_that_are_none_are_refused(root, tmp_path, content, words):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/stats305.json").write_text(content)
    with pytest.raises(UserError, match=words):
        write_report(EXPERIMENT, root, tmp_path)


@pytest.mark.parametrize(("field", "value"), [("device", None), ("val_loss", None), ("date", 5), ("curve", 3)])
def test_records_with_wrong_fields_are_refused_by_name(root, tmp_path, field, value):
    write_record(folder_of(root, "trained", 0), {**record(TRAINED, 0), field: value})
    with pytest.raises(UserError, match=f"its {field} is {value}; remove it"):
        write_report(EXPERIMENT, root, tmp_path)


def test_other_folders_are_no_seeds(root, tmp_path):
    (root / "trained-seed-x").mkdir()
    (root / "trained-seed-9").mkdir()
    assert by_name(write_report(EXPERIMENT, root, tmp_path))["trained", "val_loss"].seeds == (0, 1)


def test_seeds_with_other_evaluations_are_averaged_where_all_have_one(root):
    records = [{"curve": [[3, 2.0, 3.0], [6, 1.0, 2.0]]}, {"curve": [[2, 9.0, 9.0], [6, 2.0, 4.0]]}]
    assert mean_curve(records) == ([6], [3.0])
    assert mean_curve(records, "train") == ([6], [1.5])
