"""The picture for a paper: what is drawn, against the trace; its kinds, its refusals."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from run_folders import renamed, sick, write_run
from typed import net

from bpdiag import diagnosis, figure
from bpdiag.__main__ import main
from bpdiag.config import UsageError


def lines(axis):
    return {line.get_label(): line.get_xydata() for line in axis.get_lines() if len(line.get_xydata()) > 2}


def test_the_line_is_the_traces_profile():
    trace = sick(6)
    (axis, owners) = figure.profiles({"one": trace}).axes
    drawn = lines(axis)["one"]
    wanted = [trace.value("decades", row, -1) for row in trace.weight_layers()]
    assert np.allclose(drawn[:, 0], wanted[::-1])
    p = diagnosis.profile(trace)
    total = sum(bar.get_width() for bar in owners.patches)
    assert total == pytest.approx(np.nansum([p.ledger[owner][-1] for owner in figure.OWNERS]))


def test_several_lie_over_each_other():
    (axis,) = figure.profiles({"sick": sick(6), "well": net(9)}).axes
    assert {name: len(line) for name, line in lines(axis).items()} == {"sick": 6, "well": 9}


def test_a_step_is_chosen():
    trace = net(4, sig=lambda step: 0.1 if step == 30 else 1.4)
    assert lines(figure.profiles({"one": trace}, 30).axes[0])["one"][-1, 0] < -2
    assert abs(lines(figure.profiles({"one": trace}, 40).axes[0])["one"][-1, 0]) < 0.1


@pytest.mark.parametrize(("ending", "begin"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_the_command_writes_every_kind(tmp_path, capsys, ending, begin):
    run = write_run(tmp_path / "run", sick(4))
    out = tmp_path / f"profile.{ending}"
    assert main(["plot", str(run), "-o", str(out)]) == 0
    assert out.read_bytes().startswith(begin)
    assert capsys.readouterr().out == f"{out}\n"
    assert main(["plot", str(run), "-o", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"picture": str(out), "runs": [str(run)]}


@pytest.mark.parametrize(
    ("out", "step", "trace", "told"),
    [
        ("a.gif", None, net(3), r"ends in \.svg, \.png, \.pdf"),
        ("a.svg", 7, net(3), "step 7 was not sampled; 20 were, 0 to 190"),
        ("a.svg", None, net(steps=[]), "nothing was measured"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, out, step, trace, told):
    with pytest.raises(UsageError, match=told):
        figure.write({"one": trace}, tmp_path / out, step)
    assert not (tmp_path / out).exists()


def waterfall(trace=None, **asked):
    factors, title = figure._of_run(trace, **asked) if trace else figure._of_lesson()
    (axis,) = figure.waterfall(factors, title).axes
    return axis, factors


def ends(axis):
    """Where the product stands after each column."""
    steps = [line.get_ydata() for line in axis.get_lines() if np.ptp(line.get_xdata()) == pytest.approx(1.0)]
    return [y[0] for y in steps if y[0] == y[1]][: len(axis.get_xticklabels())]


def test_the_lessons_chain_is_drawn_factor_by_factor():
    axis, factors = waterfall()
    assert [factor.value for factor in factors] == [2, 0.5, 3, 1]
    assert np.allclose(10 ** np.array(ends(axis)), [2, 1, 3, 3])
    assert axis.get_title().endswith("= 2 · 0.5 · 3 · 1 = 3")
    assert [text.get_text() for text in axis.texts] == ["2", "0.5", "3", "1"]


def test_the_chain_of_a_run_ends_at_its_gradient():
    trace = sick(6)
    axis, factors = waterfall(trace, layer="z2", step=None)
    last = trace.sampled_steps.tolist()[-1]
    assert len(factors) == 1 + 4 + 2  # the cotangent of z6, a gain a layer down to z2, input and agreement
    assert ends(axis)[-1] == pytest.approx(math.log10(trace.value("g_W_norm", trace.weight_layers()[1], -1)))
    assert axis.get_title().startswith(f"‖∂C/∂W‖ of z2, step {last}: ")
    told = [factor for factor in factors if factor.parts]
    assert [math.prod(x for _, x in f.parts) for f in told] == pytest.approx([f.value for f in told])


def test_a_factor_of_nothing_ends_the_picture_and_breaks_nothing(tmp_path):
    trace = net(4, slope=[1.0, 0.0, 1.0, 1.0])
    _, factors = waterfall(trace, layer="z1", step=None)
    assert factors[-1].value == 0
    assert figure.write_chain(trace, tmp_path / "chain.pdf").read_bytes().startswith(b"%PDF")


def test_a_layers_name_is_no_formula(tmp_path):
    figure.write_chain(renamed(sick(3), "$\\frac{"), tmp_path / "chain.svg")
    assert "frac" in (tmp_path / "chain.svg").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give a run folder, or --chain"),
        (["{run}", "--layer", "z1"], "--layer is of a chain"),
        (["{run}", "{run}", "--chain"], "one run at a time"),
        (["{run}", "--chain", "--layer", "z9"], "no such layer"),
        (["--chain", "-o", "a.gif"], r"ends in \.svg"),
    ],
)
def test_what_plot_cannot_draw_is_refused_in_one_line(tmp_path, capsys, words, told):
    run = write_run(tmp_path / "run", sick(4))
    assert main(["plot", *(word.format(run=run) for word in words)]) == 2
    assert re.match(f"bpdiag: .*{told}.*\n$", capsys.readouterr().err)


def test_the_command_draws_the_lessons_chain(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plot", "--chain"]) == 0
    assert capsys.readouterr().out == "chain.svg\n"
    assert (tmp_path / "chain.svg").stat().st_size > 1000
