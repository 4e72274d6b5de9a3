"""The profile of a notebook's cell, and what shows itself with it."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest
from run_folders import HOSTILE, renamed, sick
from typed import net

from bpdiag import sketch
from bpdiag.config import Config, ModelConfig, TrainingConfig
from bpdiag.diagnosis import diagnose
from bpdiag.training import train


def bars(svg):
    """name -> (left end, width, color) of each bar, read from the picture."""
    root = ET.fromstring(svg)
    ns = "{http://www.w3.org/2000/svg}"
    found = {}
    for rect in root.iter(f"{ns}rect"):
        name = rect.find(f"{ns}title").text.partition(":")[0]
        found[name] = (float(rect.get("x")), float(rect.get("width")), rect.get("fill"))
    return found


def test_a_bar_is_as_long_as_what_is_lost():
    drawn = bars(sketch.profile(["a", "b", "c"], [-6.0, -3.0, 0.0], 100, 0))
    assert drawn["a"][1] == pytest.approx(2 * drawn["b"][1], abs=0.2)
    assert (drawn["a"][2], drawn["b"][2], drawn["c"][2]) == (sketch.DIES, sketch.DIES, sketch.PLAIN)


def test_what_is_no_number_is_told_and_not_drawn():
    drawn = sketch.profile(["a", "b", "c", "d"], [-math.inf, math.nan, math.inf, 0.0], 100, 0)
    assert bars(drawn).keys() == {"d"}
    assert all(word in drawn for word in ("exactly 0", "not measured", "infinite"))


def test_many_layers_stay_a_small_picture():
    drawn = sketch.profile([str(i) for i in range(1000)], [0.0] * 1000, 1000, 0)
    assert len(bars(drawn)) <= sketch.MOST


def test_a_trace_draws_its_last_step_without_a_nan():
    def blown(step, layer, row):
        if step >= 100 and "decades" in row:
            row["decades"] = math.nan

    drawn = net(5, edit=blown)._repr_html_()
    assert "step 90:" in drawn
    assert len(bars(drawn)) == 5
    assert net(steps=[])._repr_html_().startswith("<pre>Trace(")


def test_hostile_names_are_text():
    trace = renamed(sick(7), HOSTILE)
    (finding,) = diagnose(trace)
    for told in (trace._repr_html_(), finding._repr_html_()):
        assert "<img" not in told
        assert "</script>" not in told
    assert HOSTILE in set(bars(trace._repr_html_()))


def test_a_finding_and_a_result_show_themselves():
    config = Config(model=ModelConfig(activation="sigmoid", depth=8, width=16), training=TrainingConfig(steps=20))
    result = train(config)
    assert re.match(r"Result\(dies: The gradient dies .* Test accuracy \d+\.\d+%\)", repr(result))
    told = result._repr_html_()
    assert "<b>The gradient dies" in told
    assert "<svg" in told


def test_a_trace_says_what_reaches_its_lowest_layer():
    trace = sick(6)
    wanted = f"{trace.value('decades', 0, -1):.1f}".replace("-", "−")
    assert f"at step 190 z1 receives 10^{wanted} of what the output sends" in repr(trace)
    assert repr(net(steps=[])) == "Trace(9 layers, 0 sampled, no step; diagnose(trace) judges it)"
