from __future__ import annotations

import math

import pytest
from hydra.core.global_hydra import GlobalHydra

from bpdiag.__main__ import main
from bpdiag.difference import COLUMNS, ORDER, compare
from bpdiag.trace import Layer, Sample, Trace

LAYERS = [Layer("a", 0, "linear", fan_in=3), Layer("b", 0, "linear", (), (0,), fan_in=3)]


def trace(change=None, layers=LAYERS, steps=3, losses=True, **meta):
    """Equal numbers everywhere, but for (step, line, column) -> value in ``change``."""
    samples = []
    for step in range(steps):
        rows = []
        for line in range(len(layers)):
            values = {"z_norm": 1.0 + step, "g_z_norm": 2.0, "W_rms": 1.0, "g_W_norm": 3.0, "a_norm": math.nan}
            values |= {c: v for (s, i, c), v in (change or {}).items() if (s, i) == (step, line)}
            rows.append((0, line, {k: v for k, v in values.items() if v is not None}))
        samples.append(Sample(step, layers, rows, [(step, 1.0)] if losses else []))
    return Trace.build(layers, samples, meta)


def test_equal_runs_do_not_part():
    difference = compare(trace(), trace())
    assert difference.parting is None
    assert difference.common_steps == 3
    assert not difference.asked
    assert not difference.layers


@pytest.mark.parametrize(
    ("changes", "step", "layer", "column"),
    [
        ({(2, 0, "z_norm"): 9.0}, 2, "a#0", "z_norm"),
        ({(1, 1, "z_norm"): 9.0, (2, 0, "z_norm"): 9.0}, 1, "b#0", "z_norm"),
        ({(1, 0, "g_z_norm"): 9.0, (1, 1, "g_z_norm"): 9.0}, 1, "b#0", "g_z_norm"),  # backwards b comes first
        ({(1, 1, "g_z_norm"): 9.0, (1, 1, "z_norm"): 9.0}, 1, "b#0", "z_norm"),  # forward before backward
        ({(0, 0, "g_W_norm"): 9.0, (0, 1, "g_z_norm"): 9.0}, 0, "b#0", "g_z_norm"),
        ({(1, 0, "z_norm"): None}, 1, "a#0", "z_norm"),  # missing is not equal to a number
        ({(1, 0, "z_norm"): math.nan}, 1, "a#0", "z_norm"),
    ],
)
def test_the_first_number_that_parts_in_the_order_of_a_step(changes, step, layer, column):
    parting = compare(trace(), trace(changes)).parting
    assert (parting.step, parting.layer, parting.column) == (step, layer, column)


def test_a_loss_parts_between_samples():
    other = trace()
    table = other.steps_table.to_pydict()
    table["loss"][1] = 1.5
    other.steps_table = other.steps_table.from_pydict(table, schema=other.steps_table.schema)
    parting = compare(trace(), other).parting
    assert str(parting) == "step 1, loss: 1 against 1.5"


def test_what_was_asked_and_other_layers_are_told():
    a = trace(config={"seed": 0, "model": {"depth": 5}}, versions={"torch": "2.9"})
    b = trace(
        layers=[*LAYERS, Layer("c", 0, "linear")], config={"seed": 1, "model": {"depth": 5}}, versions={"torch": "3"}
    )
    difference = compare(a, b)
    assert difference.asked == {"config.seed": (0, 1), "versions.torch": ("2.9", "3")}
    assert difference.layers == "2 layers against 3; only in the second: c#0"


def test_every_measured_column_has_its_place():
    derived = {
        "W_rms",
        "backward_gain",
        "weight_factor",
        "slope_factor",
        "decades",
        "nonfinite_sample",
        "nan_samples",
        "inf_samples",
        "W_distinct_rows",
    }
    assert sorted(ORDER) == sorted(set(COLUMNS) - derived)


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = ["model.depth=3", "model.width=8", "training.steps=4", "watch.every=2", "--quiet"]
    for name, more in (("one", []), ("same", []), ("other", ["model.backward=autograd"]), ("seed", ["seed=1"])):
        assert main([*quick, *more, f"hydra.run.dir={name}"]) == 0
        GlobalHydra.instance().clear()
    capsys.readouterr()
    assert main(["diff", "one", "same"]) == 0
    assert capsys.readouterr().out == "no number parts in 2 sampled steps\n"
    assert main(["diff", "one", "seed"]) == 0
    out = capsys.readouterr().out
    assert "config.seed: 0 against 1" in out
    assert "the numbers part at step 0, " in out
    assert main(["diff", "one", "nowhere"]) == 2
