"""Several processes on loopback: they agree, refuse different values, and end together, with one line each."""

import os
import signal

import pytest
from process_group import ended, free_address, launch

from jaxlm.config import MeshConfig
from jaxlm.errors import UserError
from jaxlm.sharding import processes


def name(children, i):
    return f"process {i} of {len(children)} ({os.uname().nodename}, pid {children[i].pid})"


def test_two_processes_agree_and_refuse_different_values():
    children = launch("meet_and_agree")
    ends = [ended(child) for child in children]
    for i, end in enumerate(ends):
        assert end.out == ["2 2 " + str(i == 0), "[[10, 0], [11, 7]]", "written by 0", "same"]
        refusal = f"model.num_layers is 2 in {name(children, 0)} and 3 in {name(children, 1)}: start all with the same"
        assert end.err == [f"jaxlm: error: {refusal}"]
        assert end.code == 2


def test_one_process_needs_no_other(monkeypatch):
    monkeypatch.delattr(processes, "multihost_utils")  # nothing is asked
    with processes.joined(MeshConfig()):
        assert (processes.count(), processes.first()) == (1, True)
        assert processes.agree(3, True).tolist() == [[3, 1]]
        processes.check_same({"a": 1})
        processes.wait("here")
        processes.advise(lambda: "never said")
        with processes.first_before_others("there"):
            pass
    with pytest.raises(ZeroDivisionError), processes.joined(MeshConfig()):
        raise ZeroDivisionError


def test_a_coordinator_that_does_not_answer_is_a_mistake_of_the_user():
    mesh = MeshConfig(coordinator=free_address(), processes=2, process_id=1)
    with pytest.raises(UserError, match=rf"process 0 cannot be reached at {mesh.coordinator} within 0 s"):
        processes.start(mesh, patience=0.2)
    assert processes.count() == 1


CLUSTERS = ("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "JOB_COMPLETION")


@pytest.fixture
def no_cluster(monkeypatch):
    for variable in os.environ:
        if variable.startswith(CLUSTERS):
            monkeypatch.delenv(variable)


def test_auto_without_a_cluster_says_what_was_looked_for(no_cluster):
    with pytest.raises(UserError, match=r"auto: this process is in no cluster that JAX knows \(.*slurm.*\); give"):
        processes.start(MeshConfig(coordinator="auto"))


def test_auto_reads_slurm(no_cluster, monkeypatch):
    variables = {"JOB_ID": "3", "STEP_NODELIST": "node[07-09]", "NTASKS": "6", "PROCID": "4", "LOCALID": "0"}
    for key, value in variables.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    place = processes._detected(1.0)
    assert place == processes.Place("node07:61443", 6, 4, [0])
    monkeypatch.delenv("SLURM_PROCID")
    with pytest.raises(UserError, match="in no cluster"):
        processes._detected(1.0)


def test_auto_names_what_a_cluster_does_not_say(no_cluster, monkeypatch):
    for key in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID"):
        monkeypatch.setenv(f"SLURM_{key}", "many")
    with pytest.raises(UserError, match=r"auto: the cluster does not say where this process stands \(.*'many'\)"):
        processes._detected(1.0)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["step_for_ever", "wait_for_ever"])
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_dies_the_other_names_it(what, victim):
    children = launch(what)
    assert any(line == "step 0\n" for line in children[victim].stdout)
    children[victim].kill()
    end = ended(children[1 - victim], seconds=15)
    assert end.err == [f"jaxlm: error: {name(children, victim)} died: start all again with --resume"]
    assert end.code == 1
    ended(children[victim])


@pytest.mark.slow
def test_three_of_four_end_when_one_dies():
    children = launch("step_for_ever", count=4)
    assert any(line == "step 0\n" for line in children[2].stdout)
    children[2].kill()
    for i in (0, 1, 3):
        end = ended(children[i], seconds=15)
        assert end.err == [f"jaxlm: error: {name(children, 2)} died: start all again with --resume"]
        assert end.code == 1
    ended(children[2])


@pytest.mark.slow
def test_one_that_stops_answering_ends_the_others():
    children = launch("step_for_ever")
    assert any(line == "step 0\n" for line in children[1].stdout)
    children[1].send_signal(signal.SIGSTOP)
    try:
        end = ended(children[0], seconds=60)
    finally:
        children[1].kill()
    (line,) = end.err
    assert line.startswith(f"jaxlm: error: {name(children, 0)}: JAX's runtime has ended this process")
    assert end.code == 1
    ended(children[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "own", "others", "code"),
    [
        ("fail_in_one", "jaxlm: error: the disk is full: free some space", "the disk is full: free some space", 2),
        ("raise_in_one", "jaxlm: error: ZeroDivisionError 1/0", "ZeroDivisionError 1/0", 1),
    ],
)
def test_an_error_in_one_ends_the_other(what, own, others, code):
    children = launch(what)
    ends = [ended(child) for child in children]
    assert ends[1].err[-1] == own
    assert ends[0].err == [f"jaxlm: error: {name(children, 1)} ended: {others}"]
    assert [end.code for end in ends] == [code, code]


@pytest.mark.slow
def test_one_that_is_done_waits_for_the_others():
    ends = [ended(child) for child in launch("end_well", count=3)]
    assert [(end.code, end.err) for end in ends] == [(0, [])] * 3


@pytest.mark.slow
def test_a_process_that_does_not_come_is_named_by_all_that_did():
    children = launch("end_well", count=3, patience=8)
    children[2].kill()
    for child in children[:2]:
        end = ended(child, seconds=60)
        (line,) = end.err
        assert line.startswith("jaxlm: error: process 2 of 3 did not come to 127.0.0.1:")
        assert end.code == 2
    ended(children[2])


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_the_same_step():
    children = launch("train_until_signal")
    for _ in range(4):  # by then both would cut chunks as long as their own clock says
        assert any(line == "step 0\n" for line in children[1].stdout)
    children[1].send_signal(signal.SIGTERM)
    ends = [ended(child, seconds=60) for child in children]
    assert [end.code for end in ends] == [0, 0], ends
    assert ends[0].out[-1].startswith("ended at ")
    assert ends[0].out[-1] == ends[1].out[-1]
