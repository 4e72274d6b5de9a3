"""The command line as its users meet it: mostly in this process, twice as a program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from typed import HE, by, net

from bpdiag.__main__ import conf, main
from bpdiag.config import Config, ModelConfig, TrainingConfig
from bpdiag.trace import Trace
from bpdiag.training import train

QUICK = ["model.depth=3", "model.width=8", "training.steps=4", "watch.every=2"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    yield
    GlobalHydra.instance().clear()


def runs() -> list[Path]:
    return sorted(p.parent for p in Path().rglob("findings.json"))


def test_a_run_ends_in_words(capsys):
    assert main([*QUICK, "model.activation=sigmoid", "model.depth=10", "model.weight_variance=torch"]) == 0
    out = capsys.readouterr().out
    for words in ("linear10", "linear1 ", "gain per hidden layer: 0.1", "▼ The gradient dies", "vanishing by slopes"):
        assert words in out
    (run,) = runs()
    assert f"tensorboard --logdir {run}" in out
    assert json.loads((run / "findings.json").read_text())["findings"][0]["cause"] == "slopes"
    assert (run / ".hydra" / "overrides.yaml").exists()
    assert run.parent == Path("runs/mnist")


def test_a_healthy_run_is_told_so(capsys):
    assert main(QUICK) == 0
    assert "● The gradient lives" in capsys.readouterr().out


def test_a_multirun_streams_and_ends_in_one_table(capsys):
    assert main(["-m", *QUICK, "model.activation=relu,tanh", "seed=0,1"]) == 0
    out = capsys.readouterr().out
    assert [line[:3] for line in out.splitlines() if line[1:2] == "/"] == ["1/4", "2/4", "3/4", "4/4"]
    table = out[out.index("seeds") :]
    assert "±" in table
    assert table.count("relu") == 1  # two seeds of one cell are one line
    names = sorted(run.name for run in runs())
    assert names[0].startswith("depth=3,width=8,steps=4,every=2,activation=relu,seed=0")
    assert len(names) == 4


def test_the_experiment_is_the_grid(capsys):
    assert main(["experiment=vanishing", *QUICK[1:], "model.depth=2,4"]) == 0
    assert "12 of 12 jobs" in capsys.readouterr().out
    assert {r.parent.parent.name for r in runs()} == {"vanishing"}


def test_hydra_mode_run_runs_one():
    assert main(["experiment=vanishing", "hydra.mode=RUN", *QUICK]) == 0
    assert len(runs()) == 1


def test_a_failing_job_is_told_at_once_and_stops_no_other(capsys):
    sick = Path("sweep") / "depth=3,width=8,steps=4,every=2,activation=tanh"
    assert main([*QUICK, "seed=5", f"hydra.run.dir='{sick}'"]) == 0  # a run lies where one of the jobs would write
    kept = {path: path.read_bytes() for path in (sick / "trace").iterdir()}
    capsys.readouterr()
    assert main(["-m", *QUICK, "model.activation=relu,tanh,sigmoid", "hydra.sweep.dir=sweep"]) == 1
    told = capsys.readouterr()
    assert "/3  tanh  FAILED: TraceError: " in told.err
    assert "already holds a run" in told.err
    assert "/3  sigmoid" in told.out
    assert "Traceback" not in told.err
    assert len(runs()) == 3
    assert {path: path.read_bytes() for path in (sick / "trace").iterdir()} == kept
    (log,) = Path().rglob("error.log")
    assert log.parent == sick
    assert "Traceback" in log.read_text()
    assert str(log) in told.err.replace(str(Path.cwd()) + "/", "")
    table = pandas.read_csv("sweep/results.csv")
    assert list(table.status) == ["done", "failed", "done"]
    assert table.error[1].startswith("TraceError: ")


def test_a_sweep_as_tables_and_as_json(capsys):
    assert main(["-m", *QUICK, "model.activation=relu,tanh", "seed=0,1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (sweep,) = {run.parent for run in runs()}
    for table in (pandas.read_parquet(sweep / "results.parquet"), pandas.read_csv(sweep / "results.csv")):
        assert len(table) == len(told) == 4
        assert list(table["model.activation"]) == ["relu", "relu", "tanh", "tanh"]
        assert list(table.test_accuracy) == pytest.approx([row["test_accuracy"] for row in told])
        assert {Path(run).name for run in table.run} == {run.name for run in runs()}


def test_a_seed_is_the_same_run_wherever_it_stands_in_a_sweep():
    told = []
    for folder, seeds in (("up", "0,1,2"), ("down", "2,1,0"), ("alone", "1")):
        assert main(["-m", f"seed={seeds}", f"hydra.sweep.dir={folder}", *QUICK]) == 0
        table = pandas.read_csv(f"{folder}/results.csv").set_index("seed")
        told.append(table[["train_loss", "test_accuracy", "decades_first_layer"]].sort_index())
    assert told[0].equals(told[1])
    assert told[2].loc[1].equals(told[0].loc[1])
    assert told[0].train_loss.nunique() == 3


def test_a_run_as_json_and_in_silence(capsys):
    assert main([*QUICK, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["steps"] == 4
    assert main([*QUICK, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(QUICK) == 0
    assert "lives" in capsys.readouterr().out


def test_an_interrupted_run_exits_130_and_is_kept(capsys, monkeypatch):
    from bpdiag import session

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(session.Watch, "steps", property(interrupt))
    assert main(QUICK) == 130
    assert "Traceback" not in capsys.readouterr().err


LONG = "a" * 300

BAD = [
    (["model.activation=thanh"], "did you mean 'tanh'"),
    (["model.dpth=3"], "did you mean 'model.depth'"),
    (["depth=3"], "did you mean 'model.depth'"),
    (["+foo=1"], "foo: unknown key"),
    (["++foo.bar=1"], "foo.bar: unknown key"),
    (["seed=1", "~model.depth"], "no key can be taken away"),
    (["model.depth=0"], "model.depth=0: must be from 1"),
    (["model.depth=5.5"], "could not be converted to Integer"),
    (["model.depth=null"], "model.depth"),
    (["model.width=-1"], "model.width=-1"),
    (["optimizer.lr=nan"], "optimizer.lr=nan"),
    (["optimizer.lr=inf"], "optimizer.lr=inf"),
    (["optimizer.lr=abc"], "could not be converted to Float"),
    (["optimizer.momentum=1.5"], "optimizer.momentum=1.5: must be from 0 to 1"),
    (["data.batch_size=1000000"], "55000 samples"),
    (["data.name=mnits"], "did you mean 'mnist'"),
    (["data.root=/nonsuch"], "no such folder"),
    (["training.device=abacus"], "training.device=abacus"),
    (["experiment=vanish"], "did you mean 'vanishing'"),
    (["model.depth=5,10"], "add -m"),
    (["model.depth=5", "20"], "20: not KEY=VALUE"),
    (["-m", "seed=0,0"], "asked for twice in one sweep"),
    (["~seed"], "no key can be taken away"),
    (["hydra.run.dir=/dev/null/run"], "cannot be written"),
    (["-m", "seed=0,1", "hydra.sweep.dir=/dev/null/runs"], "cannot be written"),
    (["-m", "model.depth=5,0"], "job model.depth=0"),
    (["-m", "experiment=vanishing", "model.depth=5,x"], "could not be converted"),
    (["model={depth:3,foo:1}"], "foo"),
    (["optimizer=adam"], "did you mean optimizer.name=adam"),
    (["--cfg", "job", "+unknown=1"], "unknown key"),
    (["training.epochs=0"], "training.epochs=0: must be from 1"),
    (["'model.depth=[1'"], "model.depth"),
    (["model.depth=[1"], "Hydra cannot read it (no viable alternative at input '[1')"),
    (["experiment=sick", "--config-dir", "own"], "expect.over=median: unknown; known: mean, spread"),
    (["experiment=typo", "--config-dir", "own"], "did you mean 'test_accuracy'"),
    (["experiment=headless", "--config-dir", "own"], "its first line must be '# @package _global_'"),
    (["experiment=key", "--config-dir", "own"], "model.dept: unknown key; did you mean 'model.depth'?"),
    (["experiment=word", "--config-dir", "own"], "experiment/word.yaml: model.depth: Value 'three'"),
    (["experiment=half", "--config-dir", "own"], "half.yaml"),
    (["seed=1", "--nope"], "--nope: unknown option; bpdiag --help"),
    (["seed=1", "--config-dir"], "argument --config-dir/-cd: expected one argument"),
    (["experiment=key", "--config-dir", "absent"], "--config-dir absent: no such folder"),
    (["-m", "experiment=vanishing,width"], "one experiment at a time"),
    (["experiment=number", "--config-dir", "own"], "expect.equals='one': test_accuracy is a number"),
    (["experiment=verdict", "--config-dir", "own"], "expect.equals=dead: unknown"),
    (["experiment=single", "--config-dir", "own"], "no 'mode: MULTIRUN'"),
    (["hydra.launcher.nonsuch=1"], "nonsuch"),
    (["-m", "seed=0,1", "hydra.launcher.engine=slurm"], "hydra.launcher.engine=slurm: unknown; known: local, ray"),
    (["-m", "seed=0,1", "hydra.launcher.engine=rya"], "did you mean 'ray'"),
    (["-m", "seed=0,1", "hydra.launcher.processes=0"], "hydra.launcher.processes=0: must be 1 or more, or cores"),
    (["-m", "seed=0,1", "hydra.launcher.processes=many"], "hydra.launcher.processes=many: must be"),
    (["-m", "seed=0,1", "hydra.launcher.processes=1.5"], "hydra.launcher.processes=1.5: must be"),
    (["nonsense"], "unknown command"),
    (["diagnoze", "x"], "did you mean 'diagnose'"),
    (["diagnose", "nowhere"], "no such folder"),
    (
        ["diagnose", "half", "--fail-on", "harms"],
        "--fail-on=harms: unknown; known: harm, warning; did you mean 'harm'?",
    ),
    (["diagnose", "."], "no trace here"),
    (["diagnose", "half"], "half"),
    (["diff", "half", "half"], "half"),
    (["diff", "nowhere", "nowhere"], "no such folder"),
    (["diagnose", "file"], "file"),
    (["chain", "w=abc"], "w: 'abc' is not a number"),
    (["chain", "--run", "half", "--layer", "x"], "half"),
    (["data.root=file"], "data.root=file: no such folder"),
    (["data.root=half"], "no train-images-idx3-ubyte"),
    (["hydra.run.dir=" + LONG], "cannot be written"),
    (["-m", "seed=0,1", "hydra.sweep.dir=" + LONG], "cannot be written"),
    (["data.root=" + LONG], "no such folder"),
    (["model.activation=" + LONG], "unknown"),
    ([LONG + "=1"], "unknown key"),
    (["diagnose", LONG], "no such folder"),
    (["model.activation='größe'"], "größe"),
    (["数字=1"], "'数字=1': Hydra cannot read it"),
    (["data.root=/数字"], "\"data.root='...'\""),
    (["data.root='/数字'"], "data.root=/数字: no such folder"),
    (["model.activation="], "unknown"),
    (["model.width=true"], "model.width"),
    (["seed=-1"], "seed=-1: must be 0 or more"),
    (["watch.histograms=maybe"], "watch.histograms"),
    (["optimizer.eps=-1"], "optimizer.eps=-1"),
    (["optimizer.warmup=-1"], "optimizer.warmup=-1: must be from 0"),
    (["optimizer.warmup=2.5"], "optimizer.warmup"),
    (["optimizer.clip=-0.5"], "optimizer.clip=-0.5: must be from 0"),
    (["optimizer.clip=nan"], "optimizer.clip=nan"),
    (["model.weight_variance=-2"], "must be 0 or more"),
    (["model.bias_variance=hee"], "model.bias_variance=hee"),
    (["model.residual=identify"], "did you mean 'identity'"),
    (["model.normalization=bach"], "did you mean 'batch'"),
    (["model.branch_scale=0.5"], "add model.residual=identity"),
    (["model.branch_scale=1/sqrt(blocks)"], "goes into quotes: \"model.branch_scale='...'\""),
    (["model.branch_scale='1/sqrt'", "model.residual=identity"], "did you mean '1/sqrt(blocks)'"),
    (["model.branch_scale=-1", "model.residual=identity"], "model.branch_scale=-1: must be 0 or more"),
    (["model.name=cnn", "model.residual=identity"], "of model.name=mlp only"),
    (["model.name=cnn", "model.depth=2"], "too few for model.name=cnn"),
    (["model.name=cn"], "did you mean 'cnn'"),
    (["model.normalization=batch", "data.batch_size=1"], "batch normalization needs two or more"),
    (["data.name=cifar10", "data.root=file"], "data.root=file: no such folder"),
    (["predict", "model.activation=thanh"], "did you mean 'tanh'"),
    (["predict", "model.dpth=3"], "did you mean 'model.depth'"),
    (["predict", "model.depth=5.5"], "could not be converted to Integer"),
    (["predict", "model.depth=0"], "model.depth=0: must be from 1"),
    (["predict", "model.depth=5,10"], "model.depth=5,10: one value at a time"),
    (["predict", "model.name=cnn"], "the theory covers mlp only"),
    (["predict", "+foo=1"], "foo: unknown key"),
    (["predict", "30"], "30: not KEY=VALUE"),
    (["predict", "model.weight_variance=hee"], "did you mean 'he'"),
    (["predict", "model.depth=[1"], "Hydra cannot read it"),
    (["predict", "data.name=cifar10", "data.root=file"], "data.root=file: no such folder"),
    (["predict", "optimizer.name=sdg"], "did you mean 'sgd'"),
    (["predikt"], "did you mean 'predict'"),
    (["expect=3"], "expect"),
    ([""], "unknown command"),
]


def half_a_run(folder):
    """What a killed copy leaves: a trace whose Parquet stops in the middle."""
    train(Config(model=ModelConfig(depth=2, width=4), training=TrainingConfig(steps=1)), folder)
    (part,) = (folder / "trace").glob("part-*.parquet")
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])


def experiments_of_ones_own(folder):
    """Each with one mistake: in what it expects, or in its keys, or in its YAML."""
    (folder / "experiment").mkdir(parents=True)
    for name, text in (
        ("sick", "# @package _global_\nexpect:\n  - {what: test_accuracy, over: median, equals: '1'}"),
        ("typo", "# @package _global_\nexpect:\n  - {what: tets_accuracy, equals: '1'}"),
        ("number", "# @package _global_\nexpect:\n  - {what: test_accuracy, equals: one}"),
        ("verdict", "# @package _global_\nexpect:\n  - {what: verdict, equals: dead}"),
        ("single", "# @package _global_\nhydra:\n  sweeper:\n    params:\n      seed: 0,1"),
        ("headless", "model:\n  depth: 3"),
        ("key", "# @package _global_\nmodel:\n  dept: 3"),
        ("word", "# @package _global_\nmodel:\n  depth: three"),
        ("half", "# @package _global_\nmodel: ["),
    ):
        (folder / "experiment" / f"{name}.yaml").write_text(f"{text}\n")


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a)[:60] for a, _ in BAD])
def test_bad_input_gets_one_clear_message_and_exit_2_and_leaves_nothing(arguments, message, capsys):
    Path("file").write_text("no folder")
    if "half" in " ".join(arguments):
        half_a_run(Path("half"))
    if "own" in arguments:
        experiments_of_ones_own(Path("own"))
    before = sorted(Path().rglob("*"))
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert "Traceback" not in told.err + told.out
    assert len(told.err.splitlines()) <= 6
    assert sorted(Path().rglob("*")) == before


def test_a_corrupt_data_file_is_named(tmp_path, capsys):
    raw = tmp_path / "digits" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"\0" * 1000)
    assert main([f"data.root={tmp_path / 'digits'}"]) == 2
    assert "train-images-idx3-ubyte is damaged or not MNIST: 1000 bytes" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_used_folder_is_refused_and_untouched(capsys):
    assert main([*QUICK, "hydra.run.dir=here"]) == 0
    kept = {path: path.read_bytes() for path in Path("here").rglob("*") if path.is_file()}
    assert main([*QUICK, "model.depth=7", "hydra.run.dir=here"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("here").rglob("*") if path.is_file()} == kept


def test_stored_runs_are_judged_again_without_torch(capsys):
    assert main([*QUICK, "model.activation=sigmoid", "model.depth=8"]) == 0
    (run,) = runs()
    capsys.readouterr()
    probe = (
        "import sys; from bpdiag.__main__ import main; "
        f"code = main(['diagnose', {str(run)!r}]); sys.exit(code or 3 * ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "The gradient dies" in done.stdout
    assert main(["diagnose", "runs", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["run"] == str(run)
    assert told["findings"][0]["kind"] == "vanishing"


def test_a_run_that_cannot_be_read_stops_no_other(capsys):
    assert main([*QUICK, "hydra.run.dir=runs/one"]) == 0
    damaged = Path("runs/two/trace")
    damaged.mkdir(parents=True)
    (damaged / "meta.json").write_text("{")
    Path("file").write_text("no folder")
    capsys.readouterr()
    assert main(["diagnose", "runs", "file"]) == 2
    told = capsys.readouterr()
    assert "lives" in told.out
    assert "runs/two" in told.err
    assert "file: a file, not a run folder" in told.err


@pytest.mark.parametrize("columns", ["40", "60", "80", "100", "130"])
def test_no_number_is_cut_in_a_narrow_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    assert main([*QUICK, "model.activation=sigmoid"]) == 0
    table = capsys.readouterr().out.partition("gain per hidden")[0]
    assert "linear1 " in table
    assert "…" not in table
    assert main(["-m", *QUICK[1:], "model.depth=3,10", "model.activation=sigmoid,relu"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("    3 ", "   10 "))]
    assert len(lines) == 4 or columns == "40"
    assert columns == "40" or all("%" in line for line in lines)


def test_options_may_stand_between_overrides(capsys):
    assert main([QUICK[0], "-m", *QUICK[1:], "seed=0,1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_reader_who_has_seen_enough_ends_no_sweep(tmp_path, flags):
    told = [sys.executable, "-m", "bpdiag", "-m", "seed=0,1,2", "hydra.sweep.dir=sweep", *QUICK, *flags]
    sweep = subprocess.Popen(told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    sweep.stdout.close()
    assert sweep.stderr.read() == ""
    sweep.stderr.close()
    assert sweep.wait(timeout=120) == 0
    assert len(pandas.read_csv(tmp_path / "sweep" / "results.csv")) == 3


def test_a_terminal_without_unicode_gets_no_traceback(tmp_path):
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    arguments = [sys.executable, "-m", "bpdiag", *QUICK]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_users_own_experiments_are_found(tmp_path):
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "deep.yaml").write_text("# @package _global_\nmodel:\n  depth: 7\n")
    assert main(["--config-dir", str(tmp_path / "mine"), "experiment=deep", *QUICK[1:]]) == 0
    (run,) = runs()
    assert len(Trace.load(run).weight_layers()) == 7


def test_help_and_version_are_quick_to_say(capsys):
    assert main(["--help"]) == 0
    assert "model.depth=5" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("bpdiag 0.")
    probe = "import sys; from bpdiag.__main__ import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode == 0


def test_hydra_shows_its_configuration(capsys):
    assert main(["--cfg", "job", "model.depth=9"]) == 0
    assert "depth: 9" in capsys.readouterr().out


def test_conf_lies_beside_the_package():
    assert (conf() / "config.yaml").is_file()


def test_the_program_runs_as_a_module(tmp_path):
    arguments = [sys.executable, "-W", "error::FutureWarning", "-m", "bpdiag", *QUICK]
    env = os.environ | {"NO_COLOR": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert torch.load(runs()[0] / "model.pt", weights_only=True)["config"]["model"]["width"] == 8


@pytest.mark.parametrize(
    ("trace", "codes"),
    [(by(-4), (0, 1, 1)), (net(sig=lambda s: HE / 10 if s < 60 else HE), (0, 0, 1)), (net(), (0, 0, 0))],
    ids=["harm", "warning", "healthy"],
)
def test_a_finding_can_fail_a_build(trace, codes, capsys):
    trace.save("run")
    for options, code in zip(([], ["--fail-on", "harm"], ["--fail-on=warning"]), codes, strict=True):
        assert main(["diagnose", "run", *options]) == code
    assert main(["diagnose", "run", "nowhere", "--fail-on", "warning"]) == 2


def test_lines_end_where_their_words_do(capsys):
    assert main(["predict", "model.depth=3", "training.steps=5"]) == 0
    told = capsys.readouterr().out
    assert "step 0, expected" in told
    assert not [line for line in told.splitlines() if line.endswith(" ")]


@pytest.mark.parametrize("line", [["diagnose"], ["chain", "-w"], ["predict", "-m"], ["diff", "one"]])
def test_a_sub_commands_mistakes_are_one_line(line, capsys):
    assert main(line) == 2
    told = capsys.readouterr()
    assert len(told.err.splitlines()) == 1
    assert told.err.startswith(f"bpdiag: {line[0]}: ")
    assert told.err.strip().endswith(f"see bpdiag {line[0]} --help")
