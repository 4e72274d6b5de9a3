"""Judging, on traces typed by hand: each finding with a sick case and a healthy twin, each threshold with its line."""

import dataclasses
import json
import math
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
from typed import (
    CASES,
    DEAD,
    FAN_IN,
    GROW,
    HALF,
    HE,
    INF,
    NAN,
    RELU,
    SIGMOID,
    TORCH,
    VANISH,
    bracket,
    by,
    kinds,
    late,
    learning,
    nan_from,
    net,
    only,
    residual,
    spoil,
    started,
    stuck,
)

from bpdiag import diagnosis
from bpdiag.diagnosis import DIAGNOSES, dead_by_chance, diagnose, notes, profile
from bpdiag.trace import Missing, Trace

WARNINGS = ("dominating_layer", "chance_level", "too_few_steps")


def test_every_diagnosis_has_its_cases():
    assert CASES.keys() == DIAGNOSES.keys()


@pytest.mark.parametrize("kind", CASES)
def test_sick_and_healthy(kind, tmp_path):
    sick, healthy = (build() for build in CASES[kind])
    assert kinds(sick) == [(kind, "warning" if kind in WARNINGS else "harm")]
    assert kinds(healthy) == []
    finding = only(sick)
    assert 0 < finding.confidence <= 1
    assert all(
        (finding.layers, finding.cause, finding.remedy, finding.expected, finding.source, finding.sentence, finding.why)
    )
    sick.save(tmp_path)
    assert str(only(Trace.load(tmp_path))) == str(finding)  # the same from disk


def sigmoid_slope() -> float:
    """rms of a sigmoid's slope in a deep net at torch's default weights, by quadrature."""
    x = np.linspace(-10, 10, 20_001)
    weight, q = np.exp(-x * x / 2) / np.exp(-x * x / 2).sum(), 1.0
    for _ in range(50):
        q = (weight / (1 + np.exp(-math.sqrt(q) * x)) ** 2).sum() / 3
    y = 1 / (1 + np.exp(-math.sqrt(q) * x))
    return math.sqrt((weight * (y * (1 - y)) ** 2).sum())


@pytest.mark.parametrize(
    ("sig", "slope", "phi", "d_w", "d_s"),
    [(HE, HALF, RELU, 0.0, 0.0), (TORCH, HALF, RELU, -0.39, 0.0), (TORCH, sigmoid_slope(), SIGMOID, -0.24, -0.61)],
    ids=["He relu", "torch relu", "torch sigmoid"],
)
def test_blame_of_initializations(sig, slope, phi, d_w, d_s):
    ledger = profile(net(sig=sig, slope=slope, phi=phi)).ledger
    np.testing.assert_allclose(ledger["weights"][:, :-1], d_w, atol=5e-3)
    np.testing.assert_allclose(ledger["slopes"][:, :-1], d_s, atol=5e-3)
    np.testing.assert_allclose([ledger["alignment"][:, :-1], ledger["other"][:, :-1]], 0, atol=1e-12)


@pytest.mark.parametrize("layout", [{}, {"function": True}, {"between": [0.7, 1.3, 2.0, 0.01]}])
def test_ledger_sums_to_the_gain(layout):
    parts = {"sig": [1.0, 0.2, 3.0, HE], "A": [1.5, 0.9, 1, 1.1], "slope": [0.1, 0.5, 0.7, 0.9], "C": [1, 2, 1.2, 0.9]}
    p = profile(net(**parts, **layout))
    np.testing.assert_allclose(sum(p.ledger.values())[:, :-1], np.log10(p.gain[:, :-1]), rtol=0, atol=1e-12)
    owned = {"weights": np.log10(np.array(parts["sig"]) * HALF), "slopes": np.log10(np.array(parts["slope"]) / HALF)}
    owned |= {"alignment": np.log10(np.multiply(parts["A"], parts["C"])), "other": np.log10(layout.get("between", 1))}
    if "between" in layout:  # a normalization undoes the size of weights: the two are one owner
        owned |= {"weights": np.zeros(4), "other": owned["other"] + owned["weights"]}
    for owner, decades in owned.items():
        np.testing.assert_allclose(p.ledger[owner][0], [*np.broadcast_to(decades, 4), NAN], atol=1e-12)  # none above
    np.testing.assert_allclose(p.decades[0, 0], np.log10(p.gain[0, :-1]).sum(), atol=1e-12)


# ---- harm: the lines ---------------------------------------------------------------------------------


LINES = {  # name: (trace, what is found)
    "SGD beyond -log10 T": (lambda: by(-3.5, planned=2345), [VANISH]),
    "SGD within -log10 T": (lambda: by(-3.2, planned=2345), []),
    "the same over 1,000 steps": (lambda: by(-3.2, planned=1000), [VANISH]),
    "1,000 are assumed": (lambda: by(-3.2, planned=None), [VANISH]),
    "and no fewer": (lambda: by(-2.9, planned=None), []),
    "Adam learns all the same": (lambda: by(-3.5, planned=2345, adam=True), []),
    "Adam stuck": (lambda: by(-3.5, planned=2345, adam=True, loss=stuck), [VANISH]),
    "Adam stuck by something else": (lambda: by(-2.9, planned=2345, adam=True, loss=stuck), []),
    "travel": (lambda: by(-1.5, update=[9e-6] + [1e-3] * 4), [VANISH]),
    "travel enough": (lambda: by(-1.5, update=[1.1e-5] + [1e-3] * 4), []),
    "travel under Adam": (lambda: by(-1.5, update=[9e-6] + [1e-3] * 4, adam=True), [VANISH]),
    "luck": (lambda: by(-0.9, update=[1e-9] + [1e-3] * 4), []),
    "beyond luck": (lambda: by(-1.1, update=[1e-9] + [1e-3] * 4), [VANISH]),
    "no layer moves": (lambda: by(-1.5, update=1e-9), [("update_too_small", "harm")]),
    "no layer moves in a short run": (lambda: by(-1.5, update=1e-9, planned=50), []),
    "under a tenth of ln 10": (lambda: by(-5, loss=late), []),
    "under a tenth of the first loss": (lambda: by(-5, loss=lambda s: 15 if s == 0 else 1.1), []),
    "guessing after a wild start": (lambda: by(-5, loss=lambda s: 30 if s == 0 else 2.3), [VANISH]),
    "not converged yet": (lambda: by(-5, loss=lambda s: 2.3 if s == 0 else 0.24), [VANISH]),
    "growth SGD": (lambda: by(3.5, planned=2345), [GROW]),
    "less growth": (lambda: by(3.2, planned=2345), []),
    "growth Adam": (lambda: by(3.5, planned=2345, adam=True), []),
    "growth Adam stuck": (lambda: by(3.5, planned=2345, adam=True, loss=stuck), [GROW]),
    "growth converged": (lambda: by(5, loss=late), []),
    "the number format ends": (lambda: by(0.5, scale=1e38), [GROW]),
    "and has a decade left": (lambda: by(0.5, scale=1e36), []),
    "passed": (lambda: net(sig=lambda s: HE / 10 if s < 60 else HE), [("vanishing", "warning")]),
    "passed in a moment": (lambda: net(sig=lambda s: HE / 10 if s < 10 else HE), []),
    "dead, chance c = 1": (lambda: net(dead=0.55, cosine=1.0, loss=stuck), []),
    "dead, no chance": (lambda: net(dead=0.55, cosine=0.5, loss=stuck), [("dead_units", "harm")]),
    "dead, net learns": (lambda: net(dead=0.55, cosine=0.5), [("dead_units", "warning")]),
    "a step that overwrote, a loss that rose": (
        lambda: net(update=lambda s: 1e-3 if s else 0.2, loss=lambda s: 3.0 if s else 2.3),
        [("update_too_large", "harm")],
    ),
    "a step that overwrote, a loss that rose little": (
        lambda: net(update=lambda s: 1e-3 if s else 0.2, loss=lambda s: 2.8 if s else 2.3),
        [],
    ),
    "a loss that rose, under small steps": (lambda: net(loss=lambda s: 3.0 if s else 2.3), []),
    "a loss below 0 that falls, under large steps": (lambda: net(update=0.2, loss=lambda s: -2 - s / 100), []),
    "few are dead": (lambda: net(dead=0.45, cosine=0.5, loss=stuck), []),
    "dead, converged": (lambda: net(dead=0.9, loss=late), []),
    "few dead, vanishing by weights": (lambda: by(-4, dead=0.01), [VANISH]),
    "few dead sigmoids": (lambda: by(-4, "A", sig=TORCH, slope=0.24, phi=SIGMOID, dead=0.1), [VANISH]),
}


@pytest.mark.parametrize("name", LINES)
def test_line(name):
    build, expected = LINES[name]
    assert kinds(build()) == expected


def test_why_is_told_by_the_rule_that_found_it():
    """1/T is a limit of SGD's; Adam's finding rests on the loss."""
    assert "over 2,345 steps a layer must receive 10^−3.4 or more" in only(by(-3.5, planned=2345)).why
    assert (
        "the loss stands at 2.2 while so little comes this far"
        in only(by(-3.5, planned=2345, adam=True, loss=stuck)).why
    )


MOVED = [  # (threshold, moved to, the lines that must turn red)
    ("harm.LUCK", 0.5, "luck"),
    ("harm.LUCK", 1.2, "beyond luck"),
    ("harm.LEAST_TRAVEL", 0.05, "travel"),
    ("harm.LEAST_TRAVEL", 0.2, "travel enough"),
    ("harm.ADAM_DECADES", 4.0, "Adam stuck"),
    ("harm.ADAM_DECADES", 2.0, "Adam stuck by something else"),
    ("ledger.ASSUMED_STEPS", 3000, "1,000 are assumed"),
    ("ledger.ASSUMED_STEPS", 500, "and no fewer"),
    ("ledger.CONVERGED", 0.05, "under a tenth of ln 10"),
    ("ledger.CONVERGED", 0.2, "not converged yet"),
    ("ledger.FLAT", 0.9, "Adam learns all the same"),
    ("flow.FORMAT_END", 41.0, "the number format ends"),
    ("flow.FORMAT_END", 36.0, "and has a decade left"),
    ("units.MOST", 0.6, "dead, no chance"),
    ("units.MOST", 0.4, "few are dead"),
    ("units.SQUISHED", 0.0, "few dead, vanishing by weights"),
]


@pytest.mark.parametrize(("threshold", "value", "name"), MOVED)
def test_a_moved_threshold_is_noticed(threshold, value, name, monkeypatch):
    test_line(name)
    module, constant = threshold.split(".")
    monkeypatch.setattr(import_module(f"bpdiag.diagnosis.{module}"), constant, value)
    with pytest.raises(AssertionError):
        test_line(name)


def test_travel_allows_for_momentum_that_builds_up():
    p = profile(net(update=lambda s: 1e-3 * (1 - 0.9 ** (s + 1)), momentum=0.9))
    np.testing.assert_allclose(p.travel, 1000 * 1e-3 * math.sqrt(FAN_IN), rtol=1e-12)


OWNERS = {"sig": "weights", "slope": "slopes", "A": "alignment", "C": "alignment", "between": "normalization"}


@pytest.mark.parametrize("decades", [-4.0, 4.0])
@pytest.mark.parametrize("owner", OWNERS)
def test_cause_is_the_owner(owner, decades):
    finding = only(by(decades, owner))
    assert finding.kind == ("vanishing" if decades < 0 else "exploding")
    assert finding.cause == OWNERS[owner]
    shares = {k: v for k, v in finding.evidence.items() if k.startswith("share_")}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-12)
    assert max(shares.values()) == pytest.approx(1, abs=1e-9)
    assert finding.evidence["decades"] == pytest.approx(decades)
    assert finding.evidence["gain_per_layer"] == pytest.approx(10 ** (decades / 4))


@pytest.mark.parametrize("sign", [-1, 1])
def test_depth_alone(sign):
    finding = only(by(sign * 3.9, depth=40))  # a tenth of a decade a layer: no classical slip
    assert finding.cause == "depth"
    assert "residual" in finding.remedy
    assert "30 layers over 1,000 steps" in finding.expected
    assert only(by(sign * 3.9, depth=24)).cause == "weights"  # 0.17: beyond log10 sqrt 2


def test_shares_of_mixed_causes():
    finding = only(net(sig=TORCH, slope=0.245, phi=SIGMOID, depth=6))
    assert finding.cause == "slopes"
    assert finding.evidence["decades_weights"] == pytest.approx(5 * math.log10(TORCH))
    assert finding.evidence["decades_slopes"] == pytest.approx(5 * math.log10(0.245))
    assert finding.evidence["share_slopes"] == pytest.approx(0.61 / 0.85, abs=0.01)
    assert sum(finding.evidence[f"share_{k}"] for k in ("weights", "slopes", "alignment", "other")) == pytest.approx(1)


def test_layers_onset_and_horizon():
    finding = only(net(sig=lambda s: HE if s < 100 else [HE, HE, HE * 1e-4, HE]))
    assert finding.layers == ("z1#0", "z2#0", "z3#0")
    assert finding.onset_step == 100
    assert finding.evidence["planned_steps_given"] == 1
    assert only(by(-4, planned=None)).evidence["planned_steps_given"] == 0


@pytest.mark.parametrize("dead", [0.9, 1.0], ids=["nearly all", "all"])
def test_one_fault_one_finding(dead):
    """A dead layer is why the gradient vanishes below it, also where it is cut altogether."""
    slope = 0.0 if dead == 1 else 1e-3
    trace = net(dead=[0.0, dead, 0.0, 0.0], slope=[HALF, slope, HALF, HALF], planned=300)
    assert kinds(trace) == [("dead_units", "harm")]
    assert only(trace).layers == ("a2#0",)
    assert only(trace).evidence["dead_fraction"] == dead


def test_nothing_is_blamed_on_what_is_not_there():
    """Rounding in the ledger of a plain net is no normalization layer."""
    assert only(net(scale=1.3e38)).cause == "depth"


def test_a_cut_is_blamed_on_the_slopes_that_cut():
    finding = only(net(slope=[HALF, 0.0, HALF, HALF]))
    assert finding.evidence["decades"] == -INF
    assert finding.layers == ("z1#0", "z2#0")
    assert finding.cause == "slopes"


@pytest.mark.parametrize("kind", ["vanishing", "exploding", "dead_units"])
def test_findings_do_not_move_with_the_loss_scale(kind):
    options = (
        {**DEAD, "planned": 300} if kind == "dead_units" else {"sig": HE * 10 ** (-1 if kind == "vanishing" else 1)}
    )
    one, other = only(net(**options)), only(net(**options, scale=1e-6))
    assert one.kind == kind
    assert dataclasses.replace(one, evidence={}) == dataclasses.replace(other, evidence={})
    assert one.evidence == pytest.approx(other.evidence, nan_ok=True)


@pytest.mark.parametrize(
    ("cosine", "batch", "p"),
    [(0.954, 256, 0.268), (1.0, 256, 0.5), (1e-9, 3, 0.125), (1e-9, 256, 0), (0, 1, 0), (-0.2, 1, 0), (NAN, 1, 0)],
)
def test_dead_by_chance(cosine, batch, p):
    assert dead_by_chance(cosine, batch) == pytest.approx(p, abs=5e-4)


@pytest.mark.parametrize("cosine", [0.1, 0.5, 0.9, 0.99, 0.9999])
def test_dead_by_chance_closed_forms(cosine):
    # orthant probabilities of two and three Gaussians of equal correlation
    assert dead_by_chance(cosine, 2) == pytest.approx(1 / 4 + math.asin(cosine) / (2 * math.pi), abs=1e-4)
    assert dead_by_chance(cosine, 3) == pytest.approx(1 / 8 + 3 * math.asin(cosine) / (4 * math.pi), abs=1e-4)


def test_bracket_by_the_loss_of_unsampled_steps():
    finding = only(net(loss=nan_from(13), edit=spoil(20, "z3", W_rms=NAN, z_norm=NAN)))
    assert bracket(finding) == (12, 13)
    assert finding.onset_step == 13
    assert (finding.layers, finding.cause) == (("z3#0",), "weights")


def test_bracket_by_one_of_both():
    assert bracket(only(net(loss=None, edit=spoil(60, "z3", z_norm=NAN)))) == (50, 60)
    assert bracket(only(net(loss=None, edit=spoil(0, "z3", z_norm=NAN)))) == (-1, 0)
    unseen = only(net(loss=nan_from(187)))
    assert bracket(unseen) == (186, 187)
    assert (unseen.layers, unseen.cause) == ((), "not sampled")
    seen = only(net(loss=lambda s: NAN if s == 60 else learning(s)))  # the loss alone, in a step that was sampled
    assert bracket(seen) == (59, 60)
    assert "not sampled" not in (seen.cause + seen.sentence)


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        (
            {"x_rms": NAN, "z_norm": NAN, "nonfinite_sample": 17.0},
            "in the input of z1, in sample 17 of the batch alone.",
        ),
        ({"z_norm": INF, "nonfinite_sample": 0.0}, "in the output of z1, in sample 0 of the batch alone."),
        ({"z_norm": INF}, "in the output of z1."),
        ({"z_norm": NAN, "W_rms": NAN, "nonfinite_sample": 3.0}, "in the weights of z1."),
    ],
)
def test_the_sample_alone_in_it_is_named(numbers, told):
    finding = only(net(edit=spoil(60, "z1", **numbers)))
    assert finding.sentence == f"The numbers are not finite from step 60: first seen {told}"
    assert finding.evidence.get("sample") == (numbers["nonfinite_sample"] if "sample" in told else None)


BREAKS = {  # what broke: ({layer: numbers}, where)
    "input": ({"z1": {"x_rms": NAN, "z_norm": NAN}, "z2": {"z_norm": NAN}}, "z1#0"),
    "forward": ({"a2": {"a_norm": INF}, "z3": {"z_norm": INF}, "z5": {"g_z_norm": NAN}}, "a2#0"),
    "weights": ({"z2": {"W_rms": NAN, "z_norm": NAN}, "a2": {"a_norm": NAN}, "z4": {"z_norm": NAN}}, "z2#0"),
    "backward": (
        {"z3": {"g_z_norm": INF}, "a2": {"g_a_norm": NAN}, "z1": {"g_z_norm": NAN}},
        "a3#0",
    ),  # whose backward made it
}


@pytest.mark.parametrize("cause", BREAKS)
def test_first_call_that_broke(cause):
    values, layer = BREAKS[cause]
    finding = only(net(edit=lambda s, name, row: row.update(values.get(name, {})) if s >= 60 else None))
    assert (finding.layers, finding.cause) == ((layer,), cause)
    assert only(net(edit=spoil(60, "z2", g_W_norm=INF))).cause == "backward"


def test_what_a_function_between_two_layers_broke_is_not_the_datas_fault():
    finding = only(net(edit=spoil(60, "z3", x_rms=NAN, z_norm=NAN)))
    assert (finding.layers, finding.cause) == (("z3#0",), "forward")


PUBLIC = {"kind", "severity", "layers", "onset_step", "cause", "evidence", "confidence", "remedy", "expected", "source"}
WORDS = {
    "lives": lambda: net(),
    "weakened": LINES["passed"][0],
    "dies": lambda: by(-4),
    "dies later": lambda: net(sig=lambda s: HE if s < 100 else HE / 10),
    "blows up": lambda: by(4),
    "not finite": lambda: net(loss=nan_from(13)),
}


@pytest.mark.parametrize("word", WORDS)
def test_words_and_files(word, tmp_path):
    trace = WORDS[word]()
    findings = diagnose(trace)
    assert diagnosis.verdict(findings) == word
    diagnosis.write(trace, findings, tmp_path)
    strict = lambda name: pytest.fail(f"{name} is no JSON")  # noqa: E731
    told, summary = (
        json.loads((tmp_path / f"{name}.json").read_text(), parse_constant=strict) for name in ("findings", "summary")
    )
    assert told.keys() == {"schema", "findings", "notes"}
    assert (told["schema"], len(told["findings"])) == (1, len(findings))
    for line in told["findings"]:
        assert line.keys() >= PUBLIC
        assert line["severity"] in ("harm", "warning")
        assert all(isinstance(v, float) or v in ("NaN", "Infinity", "-Infinity") for v in line["evidence"].values())
    assert summary["verdict"] == word == diagnosis.summarize(trace, findings)["verdict"]
    assert summary["layers"] == [f"z{n}#0" for n in range(1, 6)]
    assert summary["first"]["step"] == 0
    assert len(summary["last"]["decades"]) == 5
    assert (findings[0].sentence if findings else "No fault found") in diagnosis.as_markdown(findings)


def test_notes():
    assert notes(net()) == []
    assert any("1000" in note.replace(",", "") for note in notes(net(planned=None)))
    trace = net(loss=None)
    trace.meta = {**trace.meta, "optimizer": {}}
    trace.missing = [Missing("z1", 0, "g_W_norm", 0, 190, "frozen")]
    told = " ".join(notes(trace))
    assert all(word in told for word in ("no optimizer", "no loss", "frozen", "z1"))
    with pytest.raises(ValueError, match="no sampled step"):
        diagnose(net(steps=()))


def test_judging_a_stored_run_costs_no_torch(tmp_path):
    by(-4).save(tmp_path)
    code = (
        "import sys; from bpdiag.trace import Trace; from bpdiag import diagnosis as d; t = Trace.load(sys.argv[1]);"
        "f = d.diagnose(t); d.write(t, f, sys.argv[1]); print(f[0].kind, 'torch' in sys.modules)"
    )
    line = [sys.executable, "-c", code, tmp_path]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["vanishing", "False"]
    assert (tmp_path / "findings.json").exists()


@pytest.mark.parametrize(("later", "severity"), [(1.5, "harm"), (1.1, "warning")])
def test_a_sum_of_branches_that_begins_too_large_is_overcome_at_half_of_guessing(later, severity):
    """Among ten classes guessing costs ln 10, half of it is 1.15.  The twin: too large weights, no sum."""
    (found,) = diagnose(residual(0.5, z=20.0, loss=lambda step: 9.0 if step == 0 else later))
    assert (found.kind, found.severity) == ("forward_scale", severity)
    assert found.remedy.startswith("scale the 20 branches by 1/sqrt(20)")
    (twin,) = diagnose(started(9.0, z=20.0, later=later))
    assert (twin.kind, twin.severity) == ("forward_scale", "harm")


@pytest.mark.parametrize(("reach", "told"), [(1.6, [("update_too_large", "harm")]), (1.4, [])])
def test_of_the_first_step_alone_a_reach_beyond_what_nets_got_over_is_too_large(reach, told):
    assert kinds(net(update=reach / math.sqrt(FAN_IN), steps=[0])) == told
    assert kinds(net(update=1.6 / math.sqrt(FAN_IN), steps=[0, 10])) == []  # the twin: it learns, and that is known


@pytest.mark.parametrize(("adam", "severity"), [(False, "harm"), (True, "warning")])
def test_a_bad_start_of_one_step_is_held_against_who_cannot_take_it_back(adam, severity):
    large = lambda step, name, row: row.update(z_rms=20.0) if name == "z5" else None  # noqa: E731
    (found,) = diagnose(net(edit=large, loss=lambda step: 9.0, steps=[0], adam=adam))
    assert (found.kind, found.severity) == ("forward_scale", severity)
