"""The README's commands run, its Python prints what it should, its keys and files exist."""

from __future__ import annotations

import io
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from bpdiag.__main__ import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    GlobalHydra.instance().clear()


def test_the_commands_run_in_their_order(capsys):
    ours = [c[1:] for c in commands() if c[0] == "bpdiag"]
    assert len(ours) >= 5
    for arguments in ours:
        quick = (
            []
            if arguments[0] in ("chain", "diagnose", "report", "plot", "--help")
            else ["training.steps=2", "model.width=8"]
        )
        assert main([*arguments, *quick]) == 0, arguments
    assert "Keys and their defaults" in capsys.readouterr().out


def test_the_lesson_prints_what_the_page_shows(capsys):
    assert main(["chain"]) == 0
    printed = capsys.readouterr().out.splitlines()
    (shown,) = [block for block in re.findall(r"^```\w*\n(.*?)^```", README, re.M | re.S) if "dC/dw1" in block]
    assert [line for line in shown.splitlines() if line not in printed] == ["..."]


def test_the_remedies_shown_are_those_that_a_run_prints(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "112")
    sick = ["model.activation=sigmoid", "model.depth=20", "model.weight_variance=torch"]
    assert main([*sick, "training.steps=200", "watch.every=50", "remedy.steps=50"]) == 0
    printed = [re.sub(r"[\d.]+", "", line).split() for line in capsys.readouterr().out.splitlines()]
    (shown,) = [b for b in re.findall(r"^```\w*\n(.*?)^```", README, re.M | re.S) if "remedies tried on copies" in b]
    told = [re.sub(r"[\d.]+", "", line).split() for line in shown.splitlines()]
    assert told[1] in printed  # the heading
    assert {" ".join(row[:2]) for row in told[2:5]} <= {" ".join(row[:2]) for row in printed}


def test_a_trained_net_is_written_out_as_the_page_shows(capsys):
    """Line by line, numbers and bars aside: those of the page are of 860 steps."""

    def form(line: str) -> str:
        return re.sub(r"[█▒]+|\s+|-?\d+(\.\d+)?(e-?\d+)?(?!\w)", "", line)

    asked = ["model.activation=sigmoid", "model.depth=10", "model.weight_variance=torch"]
    assert " ".join(["bpdiag", *asked]) in README
    assert main([*asked, "training.steps=2", "hydra.run.dir=run"]) == 0
    capsys.readouterr()
    assert main(["chain", "--run", "run", "--layer", "linear1"]) == 0
    printed = [form(line) for line in capsys.readouterr().out.splitlines()]
    (shown,) = [block for block in re.findall(r"^```\w*\n(.*?)^```", README, re.M | re.S) if "agreement" in block]
    assert [line for line in shown.splitlines() if form(line) not in printed] == ["..."]


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {c[1] for c in commands() if c[0] == "make"} | set(re.findall(r"`make (\w+)`", README))
    assert targets >= {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
    assert "bpdiag experiment=vanishing" in makefile


PRINTED = [
    "● works",
    "in 5 residual blocks the skip carries",
    "The gradient dies on its way down: 0 (linear) receives",
    "7",
    "tensor([0.4200, 0.7864, 0.0707])",
    "Unswapped(modules={}, functions=set())",
]


@pytest.mark.parametrize(("block", "printed"), list(zip(blocks("python"), PRINTED, strict=True)))
def test_the_python_runs(block, printed, monkeypatch):
    monkeypatch.setattr("bpdiag.training.load", lambda run: type("Kept", (), {"classify": lambda self, picture: 7})())
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(block, "README.md", "exec"), {})
    assert printed in out.getvalue()
    assert out.getvalue()


def test_the_files_it_names_exist():
    for name in re.findall(r"`(bpdiag/[\w/.]+|conf/|runs/)`", README) + re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / name).exists(), name


def test_ci_runs_the_test_command_and_lets_no_browser_test_skip():
    told = (ROOT / ".ci" / "run").read_text()
    assert told.index("export BPDIAG_BROWSER=required") < told.index("make test")
