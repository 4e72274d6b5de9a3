"""The launcher: names, what is cut and dealt, and real little grids beside Hydra's own launcher, failing and killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import engine_work
import pandas
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from bpdiag import dealing, engines, launcher
from bpdiag.__main__ import main
from bpdiag.config import Config, DataConfig, ModelConfig, TrainingConfig
from bpdiag.job import Member, Task
from bpdiag.launcher import LONGEST_NAME, _varying, job_folder
from bpdiag.trace import Trace

QUICK = ["model.depth=3", "model.width=8", "training.steps=4", "watch.every=2", "watch.pictures=false"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    yield
    GlobalHydra.instance().clear()


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["model.activation=relu", "model.depth=5"], "activation=relu,depth=5"),
        (["optimizer.name=adam", "optimizer.lr=1e-3"], "optimizer=adam,lr=1e-3"),
        (["data.root=a/../b c;d"], "root=a-..-b-c-d"),
        (["data.root=täglich/数字"], "root=t-glich-"),
        (["experiment=vanishing", "hydra.sweep.dir=x"], "job"),
        ([], "job"),
        (["+model.depth=3"], "depth=3"),
    ],
)
def test_a_jobs_folder_is_flat_and_plain(overrides, name):
    assert job_folder(overrides) == name


def test_a_long_name_is_cut_and_stays_its_own():
    long = [[f"data.root={'x' * 300}{end}"] for end in "ab"]
    names = {job_folder(o) for o in long}
    assert len(names) == 2
    assert all(len(n) == LONGEST_NAME for n in names)


def test_only_what_differs_is_told_of_a_job():
    jobs = [["experiment=e", "seed=0", "model.depth=3", f"model.width={w}"] for w in (8, 16)]
    assert _varying(jobs) == ["model.width"]
    assert _varying(jobs[:1]) == ["seed", "model.depth", "model.width"]


# ---- dealing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runs", "processes", "sizes"),
    [
        ({"a": 12}, 2, [6, 6]),
        ({"a": 16}, 1, [16]),
        ({"a": 17}, 1, [9, 8]),
        ({"a": 33}, 2, [9, 8, 8, 8]),  # not 11, 11, 11: the second process would wait
        ({"a": 100}, 2, [13, 12, 13, 12, 13, 12, 13, 12]),
        ({"a": 3}, 8, [1, 1, 1]),
        ({None: 2}, 2, [1, 1]),
        ({}, 2, []),
    ],
)
def test_stacks_are_of_eight_to_sixteen_and_every_process_has_work(runs, processes, sizes):
    groups = [group for group, count in runs.items() for _ in range(count)]
    stacks = dealing.deal(groups, [1.0] * len(groups), processes)
    assert sorted(len(stack.members) for stack in stacks) == sorted(sizes)
    assert sorted(n for stack in stacks for n in stack.members) == list(range(len(groups)))


def test_groups_are_never_mixed_and_the_longest_begins_first():
    groups = ["deep", "flat", None] * 10
    costs = [5.0 if group == "deep" else 1.0 for group in groups]
    stacks = dealing.deal(groups, costs, 2)
    assert all(len({groups[n] for n in stack.members}) == 1 for stack in stacks)
    assert [stack.cost for stack in stacks] == sorted((stack.cost for stack in stacks), reverse=True)
    assert all(stack.together == (groups[stack.members[0]] is not None) for stack in stacks)
    assert all(len(stack.members) == 1 for stack in stacks if not stack.together)


def test_ten_thousand_are_dealt():
    groups = [n % 40 for n in range(10_000)]
    stacks = dealing.deal(groups, [1.0 + n % 40 for n in range(10_000)], 64)
    assert all(8 <= len(stack.members) <= 16 for stack in stacks)


def test_what_takes_longer_costs_more():
    def config(depth=5, width=64, name="mlp", batch=64, steps=100):
        model, data = ModelConfig(name=name, depth=depth, width=width), DataConfig(batch_size=batch)
        return Config(model=model, data=data, training=TrainingConfig(steps=steps))

    small = dealing.cost(config())
    for more in ({"depth": 10}, {"width": 128}, {"name": "cnn"}, {"batch": 128}, {"steps": 200}):
        assert dealing.cost(config(**more)) > small, more


def test_a_lost_task_is_halved_until_a_member_is_alone():
    members = tuple(Member(n, Config(), "") for n in range(5))
    task = Task(members, together=True)
    assert [[m.number for m in half.members] for half in task.halves()] == [[0, 1, 2], [3, 4]]
    assert [[m.number for m in half.members] for half in task.without({0, 1, 2, 3}).halves()] == [[4]]


# ---- grids ------------------------------------------------------------------------------------------------


def content(folder):
    """What a run folder holds, without what no two runs share: times, its process and its place."""
    names = sorted(re.sub(r"tfevents.*", "tfevents", p.relative_to(folder).as_posix()) for p in folder.rglob("*"))
    hydra = {name: yaml.safe_load((folder / ".hydra" / f"{name}.yaml").read_text()) for name in ("config", "overrides")}
    hydra["choices"] = yaml.safe_load((folder / ".hydra" / "hydra.yaml").read_text())["hydra"]["runtime"]["choices"]
    hydra["choices"].pop("hydra/launcher")
    metrics = json.loads((folder / "metrics.json").read_text())
    findings = json.loads((folder / "findings.json").read_text())["findings"]
    return names, hydra, set(metrics) - {"stack"}, [finding["kind"] for finding in findings]


def numbers(folder):
    """Its trace, a line a layer and step."""
    return Trace.load(folder).table.to_pandas()


@pytest.mark.parametrize("theirs", ["basic", "joblib"])
def test_nothing_in_a_job_folder_tells_which_launcher_ran_it(theirs, capsys):
    if theirs == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="hydra-joblib-launcher is not installed")
    grid = ["-m", *QUICK, "model.activation=relu,sigmoid", "remedy.steps=0", "training.dtype=float64"]
    assert main([*grid, "hydra.sweep.dir=ours"]) == 0
    assert main([*grid, "hydra.sweep.dir=theirs", f"hydra/launcher={theirs}"]) == 0
    folders = sorted(path.name for path in Path("theirs").iterdir() if path.is_dir())
    assert len(folders) == 2
    assert sorted(path.name for path in Path("ours").iterdir() if path.is_dir()) == folders
    for name in folders:
        assert content(Path("ours", name)) == content(Path("theirs", name))
        told, right = numbers(Path("ours", name)), numbers(Path("theirs", name))
        pandas.testing.assert_frame_equal(told, right, rtol=1e-8, check_dtype=False)


def test_what_no_stack_can_take_runs_in_the_same_grid(capsys):
    assert main(["-m", *QUICK, "model.name=mlp,cnn", "model.activation=relu,prelu", "model.depth=4"]) == 0
    told = capsys.readouterr().out
    assert "4 of 4 jobs" in told
    table = told[told.index("gain at start") :].splitlines()[1:5]
    assert [line.split()[:2] for line in table] == [
        ["mlp", "relu"],
        ["mlp", "prelu"],
        ["cnn", "relu"],
        ["cnn", "prelu"],
    ]


def test_remedies_are_tried_in_a_sweep_that_asks():
    sick = ["-m", *QUICK[1:], "model.depth=8", "model.activation=sigmoid", "model.weight_variance=torch", "seed=0,1"]
    assert main([*sick, "training.steps=60", "remedy.steps=50", "hydra.sweep.dir=asked"]) == 0
    asked = [json.loads(path.read_text()) for path in Path("asked").rglob("findings.json")]
    assert [bool(told["remedies"]) for told in asked] == [True, True]


def test_two_jobs_of_one_folder_are_not_mixed(capsys):
    assert main(["-m", *QUICK, "seed=0,1", "hydra.sweep.dir=here", "hydra.sweep.subdir=same"]) == 1
    assert "another job is written there; hydra.sweep.subdir tells them apart" in capsys.readouterr().err
    table = pandas.read_csv("here/results.csv")
    assert list(table.status) == ["done", "failed"]
    assert Trace.load("here/same").meta["config"]["seed"] == 0


def test_memory_that_is_not_there_fails_its_own_job(capsys):
    assert main(["-m", *QUICK, "model.width=8,1000000", "model.depth=4", "hydra.sweep.dir=here"]) == 1
    table = pandas.read_csv("here/results.csv")
    assert list(table.status) == ["done", "failed"]
    assert "GB are free: 0 fit" in table.error[1]  # refused before it is asked for


def test_more_processes_than_jobs():
    assert main(["-m", *QUICK, "seed=0,1", "hydra.launcher.processes=50"]) == 0


def test_json_and_silence(capsys):
    assert main(["-m", *QUICK, "seed=0,1,2", "--json"]) == 0
    told = capsys.readouterr()
    assert [row["seed"] for row in json.loads(told.out)] == [0, 1, 2]
    assert told.err == ""
    assert main(["-m", *QUICK, "seed=0,1,2", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_sweeper_that_decides_as_it_goes_gets_what_each_job_came_to(monkeypatch):
    """In batches, as Optuna asks for them: every batch's values are returned, and all stand in the tables."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    whole, seen = BasicSweeper.sweep, []
    monkeypatch.setattr(BasicSweeper, "sweep", lambda self, arguments: seen.extend(whole(self, arguments)))
    assert main(["-m", *QUICK, "seed=0,1,2", "hydra.sweeper.max_batch_size=2", "hydra.sweep.dir=here"]) == 0
    assert [[job.return_value.config["seed"] for job in batch] for batch in seen] == [[0, 1], [2]]
    assert [[job.hydra_cfg.hydra.job.num for job in batch] for batch in seen] == [[0, 1], [2]]
    assert list(pandas.read_csv("here/results.csv").seed) == [0, 1, 2]


def running(folder, *arguments):
    """A sweep as a program of its own."""
    told = [sys.executable, "-m", "bpdiag", "-m", *QUICK[:2], "watch.every=50", "training.epochs=1000", *arguments]
    return subprocess.Popen(
        told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, start_new_session=True
    )


def trainers(folder):
    """The processes that write event files below, when there are some."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = {int(path.name.split(".")[-2]) for path in folder.rglob("events.out.tfevents.*")}
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("nothing was begun")


@pytest.mark.parametrize("whom", ["everyone, as a terminal does", "the parent alone"])
def test_ctrl_c_keeps_what_there_is_and_leaves_nothing_running(tmp_path, whom):
    sweep = running(tmp_path, "seed=0,1", "hydra.sweep.dir=here")
    pids = trainers(tmp_path)
    time.sleep(0.5)
    (os.killpg if whom.startswith("everyone") else os.kill)(sweep.pid, signal.SIGINT)
    out, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 130, err
    assert "Traceback" not in err
    assert "0 of 2 jobs" in out
    run = next(path.parent for path in tmp_path.rglob("findings.json"))
    assert (run / ".hydra" / "overrides.yaml").is_file()
    assert json.loads((run / "metrics.json").read_text())["stopped"] == "interrupted"
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_killed_parent_leaves_nothing_running(tmp_path):
    sweep = running(tmp_path, "seed=0,1", "hydra.sweep.dir=here")
    pids = trainers(tmp_path)
    sweep.kill()
    sweep.communicate(timeout=120)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_killed_process_costs_no_job(tmp_path):
    words = ["seed=0,1,2,3", "hydra.sweep.dir=here", "hydra.launcher.processes=1", "training.steps=300"]
    sweep = running(tmp_path, *words)
    (pid,) = trainers(tmp_path)
    os.kill(pid, signal.SIGKILL)
    out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, err
    assert re.search(r"a process was killed by SIGKILL \(out of memory\?\); its \d jobs are tried again in halves", err)
    assert "4 of 4 jobs" in out
    assert "0 failed" in out
    table = pandas.read_csv(tmp_path / "here" / "results.csv")
    assert list(table.seed) == [0, 1, 2, 3]
    assert list(table.steps) == [300] * 4


def test_a_job_whose_process_is_killed_twice_has_failed(monkeypatch, capsys):
    monkeypatch.setattr("bpdiag.job.train", engine_work.die)
    assert main(["-m", *QUICK, "seed=0,1", "hydra.sweep.dir=here", "hydra.launcher.processes=1"]) == 1
    assert "its 2 jobs are tried again in halves" in capsys.readouterr().err
    table = pandas.read_csv("here/results.csv")
    assert list(table.status) == ["failed", "failed"]
    assert set(table.error) == {"ProcessLost: the process that trained it was killed by SIGKILL (out of memory?)"}
    assert len(list(Path("here").rglob("error.log"))) == 2


def test_a_stack_that_fails_as_a_whole_fails_its_members(monkeypatch, capsys):
    monkeypatch.setattr("bpdiag.job.train", engine_work.fail_silently)
    assert main(["-m", *QUICK, "seed=0,1", "hydra.sweep.dir=here"]) == 1
    assert set(pandas.read_csv("here/results.csv").error) == {"ValueError: the whole stack"}
    assert "Traceback" in next(Path("here").rglob("error.log")).read_text()


# ---- many machines ----------------------------------------------------------------------------------------


@pytest.fixture
def _importable(monkeypatch):
    """The package is installed on every machine; here it is where it is."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


@pytest.mark.usefixtures("_importable")
def test_a_grid_on_ray_loses_nothing_when_a_worker_is_killed(tmp_path, capfd):
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'bpdiag[ray]'")
    import threading

    def kill_one():
        os.kill(trainers(tmp_path).pop(), signal.SIGKILL)

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        killer = threading.Thread(target=kill_one)
        killer.start()
        words = ["training.steps=300", "watch.every=1", f"hydra.sweep.dir={tmp_path / 'here'}"]
        assert main(["-m", *QUICK[:2], "seed=range(0,6)", "hydra.launcher.engine=ray", *words]) == 0
        killer.join()
    finally:
        ray.shutdown()
    assert "a process was lost (" in capfd.readouterr().err
    table = pandas.read_csv("here/results.csv")
    assert list(table.seed) == list(range(6))
    assert list(table.steps) == [300] * 6


@pytest.mark.usefixtures("_importable")
def test_a_grid_through_a_queue():
    pytest.importorskip("submitit", reason="submitit is not installed: pip install 'bpdiag[slurm]'")
    words = ["hydra.launcher.engine=submitit", "+hydra.launcher.submitit.cluster=local", "hydra.sweep.dir=here"]
    assert main(["-m", *QUICK, "seed=0,1,2", *words]) == 0
    assert list(pandas.read_csv("here/results.csv").status) == ["done"] * 3
    assert len(list(Path("here").rglob("findings.json"))) == 3


def test_what_an_engine_needs_is_asked_before_anything_is_written(monkeypatch, capsys):
    found = engines.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "ray" else found(name, *more))
    assert main(["-m", *QUICK, "seed=0,1", "hydra.launcher.engine=ray"]) == 2
    assert capsys.readouterr().err == (
        "bpdiag: hydra.launcher.engine=ray: ray is not installed; pip install 'bpdiag[ray]'\n"
    )
    assert not Path("runs").exists()


def test_outside_our_command_the_pool_is_closed_by_who_began_it():
    assert launcher._POOL.get() is None
    assert main(["-m", *QUICK, "seed=0,1"]) == 0
    assert launcher._POOL.get() is None


def test_a_stack_that_does_not_fit_is_tried_in_halves(monkeypatch, capsys):
    monkeypatch.setattr("bpdiag.job.train", engine_work.train_two_at_most)
    assert main(["-m", *QUICK, "seed=0,1,2,3", "hydra.sweep.dir=here", "hydra.launcher.processes=1"]) == 0
    assert "could not train them together (UsageError: too many)" in capsys.readouterr().err
    assert list(pandas.read_csv("here/results.csv").status) == ["done"] * 4
