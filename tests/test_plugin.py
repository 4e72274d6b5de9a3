"""The tab's server: what it serves, what it keeps, what it refuses."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path

import numpy as np
import pytest
from run_folders import sick, write_run
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from typed import net
from werkzeug.test import Client

from bpdiag import views
from bpdiag.dashboard import plugin as module
from bpdiag.dashboard.plugin import STATIC, GradientFlow
from bpdiag.dashboard.writer import TAGS, TensorBoardWriter
from bpdiag.trace import Sample


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


@pytest.fixture
def only_events(tmp_path):
    """An event file of ours without a trace, read by TensorBoard itself."""
    trace = sick(5, steps=range(0, 3000, 2), planned=3000)
    writer = TensorBoardWriter(tmp_path / "events")
    rows = {step: [] for step in trace.sampled_steps.tolist()}
    index = {layer.key: i for i, layer in enumerate(trace.layers)}
    for line in trace.table.to_pylist():
        told = {key: value for key, value in line.items() if value is not None and key in TAGS}
        rows[line["step"]].append((0, index[f"{line['layer']}#{line['call']}"], told))
    for step, told in rows.items():
        writer.write(Sample(step, trace.layers, told, [(step, 2.0)], 0.1))
    writer.close()
    events = EventMultiplexer(tensor_size_guidance={"scalars": 100}).AddRunsFromDirectory(str(tmp_path))
    events.Reload()
    return GradientFlow(TBContext(logdir=str(tmp_path), data_provider=MultiplexerDataProvider(events, str(tmp_path))))


def test_without_a_trace_the_event_file_is_drawn_and_says_of_how_many_steps(only_events):
    assert only_events.is_active()
    (told,) = json.loads(asked(only_events, "/runs").data)
    assert (told["id"], told["verdict"]) == ("events", "not judged")
    drawn = json.loads(asked(only_events, "/run", id="events").data)
    assert [layer["name"] for layer in drawn["layers"]] == [f"0{n}_linear" for n in range(1, 6)]
    assert f"{len(drawn['steps'])} of 2999 steps are drawn" in drawn["sentence"]
    assert 0 < len(drawn["steps"]) < 1500
    whole = np.frombuffer(base64.b64decode(drawn["series"]["gain"]["data"]), "<i2").reshape(-1, 5)
    assert whole[0, 0] * drawn["series"]["gain"]["scale"] == pytest.approx(math.log10(0.577 * 0.244), abs=1e-3)
    assert whole[0, 4] == views.CODES["missing"]


def test_a_run_with_a_trace_is_told_once(only_events, tmp_path):
    write_run(tmp_path / "events", net(3))
    only_events._found = (-1e9, {})
    assert [run["verdict"] for run in json.loads(asked(only_events, "/runs").data)] == ["lives"]


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


def test_a_run_that_is_slow_to_read_is_not_read_again_at_once_while_it_trains(tmp_path, monkeypatch):
    clock, read = [100.0], []

    def detail(run, name):
        read.append(clock[0])
        clock[0] += 3.0  # seconds that reading takes
        return {}

    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(module.views, "detail", detail)
    monkeypatch.setattr(module.views, "stamp", lambda run: clock[0])  # it grows all the time
    sick(4).save(tmp_path / "run")
    plugin = GradientFlow(TBContext(logdir=str(tmp_path)))
    for now in (100.0, 110.0, 130.0, 134.0):
        clock[0] = now
        plugin.detail("run")
    assert read == [100.0, 134.0]
    (tmp_path / "run" / "summary.json").write_text("{}")  # an end is seen at once
    clock[0] = 138.0
    plugin.detail("run")
    assert read == [100.0, 134.0, 138.0]
