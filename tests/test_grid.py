"""What a sweep says in the terminal, of rows typed by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bpdiag.results import Outcome, Row
from bpdiag.terminal import MOST_LOOKS, Grid


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def grid():
    return Grid(["model.activation", "seed"], 2, Path("runs/there"))


def row(activation, accuracy=0.5):
    outcome = Outcome(accuracy, 1.0, 0.9, -3.0, "lives", "lives", "", "", 0, 10, 1.0)
    return Row({"model.activation": activation, "seed": "0"}, f"runs/there/{activation}", outcome)


def test_a_look_before_training_has_a_line_for_each_job(capsys):
    grid().look(
        [("sigmoid 0", -16.2, -16.04), ("relu 0", 0.0, 0.42), ("cnn 0", None, -0.31), ("tanh [b]", -0.5, math.inf)]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a look before training: decades of the first layer"
    assert [line.split() for line in lines[1:6]] == [
        ["job", "predicted", "measured"],
        ["sigmoid", "0", "−16.2", "−16.0"],
        ["relu", "0", "0.0", "0.4"],
        ["cnn", "0", "–", "−0.3"],
        ["tanh", "[b]", "−0.5", "inf"],
    ]


def test_of_very_many_jobs_the_furthest_are_shown(capsys):
    grid().look([(f"job {n}", 0.0, (-1) ** n * n / 10) for n in range(1000)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"a look before training: decades of the first layer, the {MOST_LOOKS} furthest from 0 of 1000"
    assert [line.split()[1] for line in lines[2 : MOST_LOOKS + 2]] == [str(999 - n) for n in range(MOST_LOOKS)]


def test_the_table_is_in_the_order_of_the_jobs_whichever_ended_first(capsys):
    rows = [row("sigmoid"), row("relu")]
    sweep = grid()
    for one in reversed(rows):
        sweep.job(one, 1.0)
    sweep.end(rows, 2.0)
    told = capsys.readouterr().out
    assert told.index("1/2  relu") < told.index("2/2  sigmoid")
    table = told[told.index("gain at start") :]
    assert table.index("sigmoid") < table.index("relu")


def test_what_was_killed_is_told_on_one_line(capsys):
    grid().lost(6, "was killed by SIGKILL (out of memory?)")
    grid().lost(1, "ended with exit code 3")
    assert capsys.readouterr().err.splitlines() == [
        "a process was killed by SIGKILL (out of memory?); its 6 jobs are tried again in halves",
        "a process ended with exit code 3; its job is tried again",
    ]
