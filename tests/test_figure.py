"""The picture for a paper: what is drawn, against the trace; its kinds, its refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
from run_folders import sick, write_run
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
