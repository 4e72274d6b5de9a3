from __future__ import annotations

import math
import re

import pandas
import pytest

from bpdiag.config import Expectation, UsageError
from bpdiag.results import Outcome, Row, check, half_a_line, require, write


def outcome(**more):
    told = {
        "test_accuracy": 0.5,
        "train_loss": 1.0,
        "gain_per_layer": 0.25,
        "decades_first_layer": -3.0,
        "verdict": "dies",
        "told": "vanishing by slopes 72 %",
        "kind": "vanishing",
        "cause": "slopes",
        "findings": 1,
        "steps": 10,
        "seconds": 0.5,
        "config": {"model.depth": 5, "optimizer.lr": 0.01},
    }
    return Outcome(**{**told, **more})


def both(folder):
    return pandas.read_parquet(folder / "results.parquet"), pandas.read_csv(folder / "results.csv")


def test_one_row_a_job_with_its_whole_configuration(tmp_path):
    write([Row({"model.depth": "5"}, "a", outcome()), Row({"model.depth": "5"}, "b", outcome())], tmp_path)
    for table in both(tmp_path):
        assert list(table["model.depth"]) == [5, 5]
        assert list(table.run) == ["a", "b"]
        assert list(table.verdict) == ["dies", "dies"]
        assert "told" not in table


def test_a_failed_job_is_a_row_too(tmp_path):
    write(
        [Row({"model.depth": "5"}, "a", outcome()), Row({"model.depth": "9"}, "b", None, "MemoryError: no")], tmp_path
    )
    for table in both(tmp_path):
        assert list(table.status) == ["done", "failed"]
        assert [str(v) for v in table["model.depth"]] == ["5", "9"]
        assert table.error[1] == "MemoryError: no"
        assert math.isnan(table.test_accuracy[1])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_a_number(tmp_path, value):
    write([Row({}, "a", outcome(decades_first_layer=value))], tmp_path)
    for table in both(tmp_path):
        assert table.decades_first_layer[0] == pytest.approx(value, nan_ok=True)


def test_names_with_commas_quotes_and_other_scripts(tmp_path):
    name = 'a,"b"\n数字'
    write([Row({}, name, outcome(config={"data.root": name}))], tmp_path)
    for table in both(tmp_path):
        assert table.run[0] == table["data.root"][0] == name


def test_nothing_torn_is_left(tmp_path, monkeypatch):
    write([Row({}, "a", outcome())], tmp_path)
    kept = (tmp_path / "results.csv").read_bytes()
    monkeypatch.setattr("csv.DictWriter.writerows", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write([Row({}, "a", outcome()), Row({}, "b", outcome())], tmp_path)
    assert (tmp_path / "results.csv").read_bytes() == kept
    assert {p.name for p in tmp_path.iterdir()} == {"results.csv", "results.parquet"}


def test_a_healthy_run_is_told_in_a_word():
    assert half_a_line("lives", []) == "lives"


def test_an_expectation_is_held_against_the_jobs_it_is_about():
    rows = [
        Row({}, "a", outcome(config={"model.depth": 5}, gain_per_layer=0.98)),
        Row({}, "b", outcome(config={"model.depth": 9}, gain_per_layer=1.20)),
        Row({}, "c", None, "failed"),
    ]
    asked = [
        Expectation("gain_per_layer", "model.depth=5", "", "1", 0.05, "He et al. 2015"),
        Expectation("gain_per_layer", "", "", "1", 0.05),
        Expectation("cause", "model.depth=9", "", "slopes"),
        Expectation("cause", "model.depth=9", "", "weights"),
        Expectation("cause", "model.depth=77", "", "weights"),
    ]
    told = check(asked, rows)
    assert [one.holds for one in told] == [True, False, True, False, None]
    assert str(told[0]) == "gain_per_layer 1 ± 5 % where depth=5: measured 0.98 (He et al. 2015)"
    assert "measured 0.98 to 1.2" in str(told[1])
    assert "no job was of that kind" in str(told[4])


def test_what_is_not_finite_meets_no_expectation():
    rows = [Row({}, "a", outcome(gain_per_layer=math.nan))]
    assert check([Expectation("gain_per_layer", "", "", "1", 9.0)], rows)[0].holds is False


def test_an_expectation_may_be_about_the_jobs_together():
    rows = [Row({}, str(i), outcome(decades_first_layer=value)) for i, value in enumerate([-1.0, 0.0, 1.0, 2.0])]
    asked = [
        Expectation("decades_first_layer", "", "spread", "1.29", 0.01),  # sqrt(5/3)
        Expectation("decades_first_layer", "", "mean", "0.5", 0.01),
        Expectation("decades_first_layer", "", "spread", "0.5", 0.01),
    ]
    told = check(asked, rows)
    assert [one.holds for one in told] == [True, True, False]
    assert str(told[0]) == "spread of decades_first_layer 1.29 ± 1 %: measured 1.29"


def test_what_has_no_mean_or_spread_is_open_and_not_refuted():
    spread, mean = (Expectation("decades_first_layer", "", over, "1", 0.01) for over in ("spread", "mean"))
    one, sick = Row({}, "a", outcome(decades_first_layer=1.0)), Row({}, "b", outcome(decades_first_layer=-math.inf))
    assert check([mean], [one])[0].holds is True
    for asked, rows in ((spread, [one]), (spread, [one, sick]), (mean, [one, sick])):
        told = check([asked], rows)[0]
        assert told.holds is None
        assert "all finite" in str(told)
    assert check([Expectation("verdict", "", "mean", "lives")], [one])[0].holds is None


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Expectation("test_accuracy", "", "median", "1"), "expect.over=median: unknown; known: mean, spread"),
        (Expectation("tets_accuracy", "", "", "1"), "did you mean 'test_accuracy'"),
        (Expectation("verdict", "model.dpth=5", "", "lives"), "did you mean 'model.depth'"),
    ],
)
def test_an_expectation_of_nothing_is_refused(asked, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        require([asked])
    require([Expectation("test_accuracy", "model.depth=5", "mean", "1")])
