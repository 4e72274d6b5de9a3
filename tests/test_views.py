"""What the pictures are given, against the trace itself."""

from __future__ import annotations

import base64
import json
import math

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from run_folders import HOSTILE, renamed, sick, write_run
from typed import net

from bpdiag import views, watch
from bpdiag.trace import COLUMNS, Layer, Sample, Trace, TraceError, TraceWriter

SPECIAL = {-32768: None, -32767: math.nan, -32766: -math.inf, 32767: math.inf}


def numbers(block, layers):
    """A block read as the browser reads it: (C, L) with None for what is missing."""
    whole = np.frombuffer(base64.b64decode(block["data"]), "<i2").tolist()
    told = [SPECIAL[x] if x in SPECIAL else x * block["scale"] for x in whole]
    return [told[i : i + layers] for i in range(0, len(told), layers)]


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "runs" / "sick", sick(6))


def test_every_number_is_the_traces(run):
    trace, told = Trace.load(run), views.detail(run, "sick")
    for key, (column, log, whose) in views.SERIES.items():
        block = numbers(told["series"][key], 6)
        for at in range(len(trace.sampled_steps)):
            for layer, row in enumerate(trace.weight_layers()):
                own = row + 1 if whose == "activation" and layer < 5 else row
                value = trace.value(column, own, at)
                if value is None:
                    assert block[at][layer] is None, (key, at, layer)
                else:
                    wanted = math.log10(value) if log else value
                    assert block[at][layer] == pytest.approx(wanted, abs=told["series"][key]["scale"]), key


def test_the_owners_add_up_to_the_gain(run):
    told = views.detail(run, "sick")["series"]
    owners = [np.array(numbers(told[f"takes_{owner}"], 6))[:, :5].astype(float) for owner in views.OWNERS]
    gain = np.array(numbers(told["gain"], 6))[:, :5].astype(float)
    assert np.allclose(sum(owners), gain, atol=1e-3)


def test_what_is_no_number_stays_what_it_is():
    values = np.array([[1.0, math.nan, math.inf, -math.inf, 5.0]])
    there = np.array([[True, True, True, True, False]])
    told = numbers(views.packed(values, there), 5)[0]
    assert told[0] == pytest.approx(1.0)
    assert math.isnan(told[1])
    assert told[2:] == [math.inf, -math.inf, None]


def test_a_spike_between_two_columns_is_drawn(tmp_path):
    def spiked(step):
        return [3.0 if step == 777 else 1e-3] * 5

    run = write_run(tmp_path / "long", net(update=spiked, steps=range(1000)))
    told = views.detail(run, "long", columns=50)
    peak, kept = (np.array(numbers(told[which]["update_ratio"], 5), float) for which in ("peaks", "series"))
    assert len(peak) == len(told["steps"]) == 50
    assert peak.max() == pytest.approx(math.log10(3), abs=1e-3)
    assert kept.max() < 0  # the twin: of the steps shown none is the spike
    assert sum(count for _, _, count in told["spans"]) == 1000


def test_a_columns_factors_are_of_one_step(tmp_path):
    def wild(step):
        return [1.4 * (1 + 0.3 * math.sin(step * (n + 1))) for n in range(5)]

    run = write_run(tmp_path / "wild", net(sig=wild, steps=range(400)))
    trace, told = Trace.load(run), views.detail(run, "wild", columns=20)
    w, s, g = (
        np.array(numbers(told["series"][k], 5))[:, :4].astype(float) for k in ("weight_factor", "slope_factor", "gain")
    )
    assert np.allclose(w + s, g, atol=1e-3)
    at = [trace.sampled_steps.tolist().index(step) for step in told["steps"]]
    lowest = np.array([trace.value("decades", 0, i) for i in at])
    assert np.allclose(lowest, np.array(numbers(told["series"]["decades"], 5), float)[:, 0], atol=1e-3)


@pytest.mark.parametrize(("sampled", "columns"), [(1, 240), (239, 240), (240, 240), (241, 240), (10_000, 240), (7, 1)])
def test_the_spans_hold_every_step_once(sampled, columns):
    starts = views._starts(sampled, columns)
    spans = views._spans(starts, sampled)
    assert len(spans) == min(sampled, columns)
    assert [a for a, _ in spans[1:]] == [b for _, b in spans[:-1]]
    assert all(a < b for a, b in spans)
    assert (spans[0][0], spans[-1][1]) == (0, sampled)


def test_names_from_outside_are_data(tmp_path):
    run = write_run(tmp_path / "run", renamed(sick(4), HOSTILE))
    told = json.loads(json.dumps(views.detail(run, HOSTILE)))
    assert told["id"] == HOSTILE
    assert told["layers"][0]["name"] == HOSTILE


def test_an_unfinished_run_is_judged_when_it_is_opened(tmp_path):
    sick(6).save(tmp_path / "run")
    assert views.overview(tmp_path / "run", "run")["verdict"] == "running"
    told = views.detail(tmp_path / "run", "run")
    assert told["verdict"] == "dies"
    assert told["findings"][0]["kind"] == "vanishing"


def test_what_was_measured_of_nothing_is_nothing(tmp_path):
    net(steps=[]).save(tmp_path / "run")
    told = views.detail(tmp_path / "run", "run")
    assert (told["steps"], told["verdict"]) == ([], "not measured")


def test_a_damaged_trace_is_refused_in_words(run):
    (run / "trace" / "meta.json").write_text("{")
    with pytest.raises(TraceError, match="damaged"):
        views.detail(run, "sick")
    assert views.overview(run, "sick")["verdict"] == "dies"  # what its summary says


def test_runs_are_found_in_natural_order_and_not_looked_into(tmp_path):
    for name in ("b/depth=10", "b/depth=5", "a"):
        write_run(tmp_path / name, sick(3))
    (tmp_path / "a" / "trace" / "trace").mkdir()
    (tmp_path / "a" / "trace" / "trace" / "meta.json").write_text("{}")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "empty").mkdir()
    assert [str(p.relative_to(tmp_path)) for p in views.find(tmp_path)] == ["a", "b/depth=5", "b/depth=10"]
    assert views.find(tmp_path / "a") == [tmp_path / "a"]
    assert views.find(tmp_path / "nowhere") == []


def test_a_long_run_that_a_recorder_wrote_is_read_in_part(tmp_path):
    """Its meta.json tells how many rows there are; a reader of some steps does not miss the others."""
    trace = net(3, steps=range(30))
    writer = TraceWriter(tmp_path / "run", trace.meta, part_samples=7)
    index = {layer.key: i for i, layer in enumerate(trace.layers)}
    for step in range(30):
        lines = trace.table.filter(pc.equal(trace.table["step"], step)).to_pylist()
        rows = [(0, index[f"{line['layer']}#{line['call']}"], {c: line[c] for c in COLUMNS}) for line in lines]
        writer.write(Sample(step, trace.layers, rows, [(step, 1.0)], 0.1))
    writer.close()
    told = views.detail(tmp_path / "run", "run", columns=4)
    assert (len(told["steps"]), told["sampled"]) == (4, 30)


def test_what_is_kept_of_a_long_run_is_what_is_read_of_it(tmp_path, monkeypatch):
    run = write_run(tmp_path / "long", sick(5, steps=range(400)))
    wanted = views.detail(run, "long")
    views.keep(run, 400)
    monkeypatch.setattr(views, "_thinned", lambda run, columns: pytest.fail("the trace is read again"))
    assert {**views.detail(run, "long"), "stamp": 0} == {**wanted, "stamp": 0}
    with pytest.raises(pytest.fail.Exception, match="read again"):  # the twin: of other columns nothing is kept
        views.detail(run, "long", columns=100)


def test_what_was_kept_of_a_trace_that_has_grown_is_not_shown(tmp_path):
    run = write_run(tmp_path / "long", sick(5, steps=range(400)))
    views.keep(run, 400)
    grown = sick(5, steps=range(400, 500)).save(tmp_path / "more")
    (grown / "part-00000.parquet").rename(run / "trace" / "part-00001.parquet")
    assert views.detail(run, "long")["sampled"] == 500


def test_of_a_short_run_nothing_is_kept(run):
    views.keep(run, 240)
    assert not (run / "trace" / views.KEPT).exists()


def test_a_view_that_cannot_be_kept_costs_no_run(tmp_path):
    run = write_run(tmp_path / "long", sick(5, steps=range(400)))
    (run / "trace" / views.KEPT).mkdir()  # in the way
    views.keep(run, 400)
    assert views.detail(run, "long")["sampled"] == 400


def test_a_watched_run_keeps_its_view(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
    with watch(model, log=tmp_path / "run") as watching:
        for _ in range(241):
            watching.loss(model(torch.ones(1, 2)).sum()).backward()
            watching.step()
    told = json.loads((tmp_path / "run" / "trace" / views.KEPT).read_text())
    assert (len(told["steps"]), told["sampled"]) == (240, 241)


def test_a_skip_is_a_way_around_the_layers_of_its_block():
    """x + f(x) twice, f two layers deep; the second block's skip goes through a layer of its own."""
    linear = {"kind": "linear", "fan_in": 4, "units": 4}
    layers = [
        Layer("stem", 0, **linear),
        Layer("a", 0, parents=(0,), **linear),
        Layer("b", 0, parents=(1,), **linear),
        Layer("b+", 0, "add", parents=(0, 2)),
        Layer("c", 0, parents=(3,), **linear),
        Layer("d", 0, parents=(4,), **linear),
        Layer("short", 0, parents=(3,), **linear),
        Layer("short+", 0, "add", parents=(5, 6)),
        Layer("head", 0, parents=(7,), **linear),
    ]
    edges = {3: [0.5, 1.0], 6: [0.25], 1: [1.0], 4: [1.0]}
    rows = [(0, i, {"g_z_norm": 1.0, **({"edge_gain": edges[i]} if i in edges else {})}) for i in range(9)]
    trace = Trace.build(layers, [Sample(0, layers, rows, [])])
    ways = views._ways_around(trace, trace.weight_layers())
    assert [(way.rows, way.edge) for way in ways] == [((0, 2), (3, 0)), ((2, 5), (6, 3))]
    values, there = views._carried(trace, ways)
    assert (10 ** values[0]).tolist() == pytest.approx([0.5, 0.25])
    assert there.all()
    assert views._ways_around(sick(6), sick(6).weight_layers()) == []  # the twin: a plain stack has none
