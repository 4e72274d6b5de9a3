"""The tab's server: what it serves, what it keeps, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import sick, write_run
from tensorboard.plugins.base_plugin import TBContext
from typed import net
from werkzeug.test import Client

from bpdiag import views
from bpdiag.dashboard import plugin as module
from bpdiag.dashboard.plugin import STATIC, GradientFlow


@pytest.fixture
def served(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "AGAIN", 0.0)
    write_run(tmp_path / "sick", sick(5), activation="sigmoid")
    write_run(tmp_path / "deep" / "well", net(5))
    return GradientFlow(TBContext(logdir=str(tmp_path)))


def asked(plugin, route, **query):
    """The answer of a route, as a browser gets it."""
    return Client(plugin.get_plugin_apps()[route]).get("/", query_string=query)


def test_the_runs_are_told_without_a_trace(served, tmp_path):
    for part in tmp_path.rglob("part-*.parquet"):
        part.unlink()
    told = json.loads(asked(served, "/runs").data)
    assert [(run["id"], run["verdict"]) for run in told] == [("deep/well", "lives"), ("sick", "dies")]
    assert told[1]["config"]["model.activation"] == "sigmoid"


def test_a_run_is_told_in_detail(served, tmp_path):
    assert json.loads(asked(served, "/run", id="sick").data) == views.detail(tmp_path / "sick", "sick")


@pytest.mark.parametrize("name", ["../sick", "/etc", "", "sick/", "nothing"])
def test_only_runs_that_were_found_are_read(served, name):
    answer = asked(served, "/run", id=name)
    assert answer.status_code == 404
    assert "no run" in answer.text


def test_a_damaged_run_is_told_in_words(served, tmp_path):
    (tmp_path / "sick" / "trace" / "meta.json").write_text("{")
    answer = asked(served, "/run", id="sick")
    assert (answer.status_code, "damaged" in answer.text) == (500, True)


def test_a_run_is_read_again_only_when_it_has_changed(served, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(views, "detail", lambda run, name: read.append(name) or {"id": name})
    monkeypatch.setattr(views, "stamp", lambda run: stamps[run.name])
    stamps = {"sick": 1.0, "well": 1.0}
    for _ in range(3):
        asked(served, "/run", id="sick")
    assert read == ["sick"]
    stamps["sick"] = 2.0
    asked(served, "/run", id="sick")
    assert read == ["sick", "sick"]


def test_few_details_are_kept(served, monkeypatch):
    monkeypatch.setattr(module, "KEPT", 1)
    asked(served, "/run", id="sick")
    asked(served, "/run", id="deep/well")
    assert list(served._details) == ["deep/well"]


def test_a_new_run_appears(served, tmp_path):
    write_run(tmp_path / "later", net(3))
    assert "later" in {run["id"] for run in json.loads(asked(served, "/runs").data)}


def test_the_tab_is_there_when_a_run_is(served, tmp_path):
    assert served.is_active()
    assert not GradientFlow(TBContext(logdir=str(tmp_path / "deep" / "nothing"))).is_active()
    assert not GradientFlow(TBContext(logdir="")).is_active()
    assert served.frontend_metadata().tab_name == "Gradient flow"


def test_every_static_file_is_served_and_none_is_guessed_at(served):
    for path in STATIC.iterdir():
        answer = asked(served, f"/{path.name}")
        assert answer.text == path.read_text()
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.content_type.startswith({".js": "text/javascript", ".css": "text/css"}[path.suffix])


def test_the_static_files_are_small():
    sizes = {path.name: path.stat().st_size for path in STATIC.iterdir()}
    assert sum(sizes.values()) < 200_000
    assert sum(len(path.read_text().splitlines()) for path in STATIC.iterdir()) < 1_500


def test_nothing_static_names_another_machine():
    for path in STATIC.iterdir():
        told = path.read_text().replace("http://www.w3.org/2000/svg", "")  # a name, nothing that is fetched
        assert "http" not in told.replace("https", "http"), path.name


def test_tensorboard_finds_the_tab():
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert 'gradient_flow = "bpdiag.dashboard.plugin:GradientFlow"' in pyproject
