"""What a verdict must not depend on, for traces drawn at random: the scale of the loss, a rescaling of weights."""

import math

import pytest
from typed import HE, by, net, stuck

from bpdiag.diagnosis import diagnose, profile

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

decades = st.floats(-6, 6).filter(lambda d: all(abs(abs(d) - line) > 0.01 for line in (1, 3)))
scales = st.integers(-6, 6).map(lambda n: 10.0**n)
factors = st.lists(st.floats(0.2, 5), min_size=4, max_size=4)
quick = settings(max_examples=25, deadline=None)


def said(trace):
    """Kind, severity, place, onset and cause."""
    return [(f.kind, f.severity, f.layers, f.onset_step, f.cause) for f in diagnose(trace)]


@quick
@given(decades, scales, st.booleans())
def test_a_verdict_does_not_move_with_the_scale_of_all_cotangents(d, scale, adam):
    """Under Adam, or under SGD with a rate divided by as much: updates are what they were."""
    assert said(by(d, adam=adam)) == said(by(d, adam=adam, scale=scale))


@quick
@given(factors, factors, factors, factors, scales)
def test_gains_and_owners_do_not_move_with_the_loss_scale(sig, A, slope, C, scale):
    one, other = (profile(net(sig=sig, A=A, slope=slope, C=C, scale=s)) for s in (1.0, scale))
    assert one.gain == pytest.approx(other.gain, rel=1e-12, nan_ok=True)
    assert one.decades == pytest.approx(other.decades, abs=1e-9)
    for owner in one.ledger:
        assert one.ledger[owner] == pytest.approx(other.ledger[owner], abs=1e-9, nan_ok=True)
    total = sum(one.ledger.values())[:, :-1]
    assert 10**total == pytest.approx(one.gain[:, :-1], rel=1e-9)


@quick
@given(decades)
def test_a_loss_scaled_alone_under_sgd_is_another_training(d):
    """Updates shrink with it: travel is no invariant, and harm is then the truth."""
    one, other = (profile(by(d, update=u)) for u in (1e-3, 1e-7))
    assert one.travel == pytest.approx(1e4 * other.travel, rel=1e-9)
    assert any(f.kind in ("update_too_small", "vanishing") for f in diagnose(by(min(d, 0.0), update=1e-7, loss=stuck)))


@quick
@given(decades, st.floats(0.1, 10))
def test_a_relu_net_rescaled_between_two_layers_is_judged_alike(d, t):
    """(t W_l, W_{l+1}/t): the two cancel in every decade but those of the layer between."""
    rate = HE * 10 ** (d / 4)
    plain, rescaled = net(sig=rate), net(sig=[rate, rate * t, rate / t, rate])
    (one, other) = (profile(trace).decades[0, [0, 1, 3, 4]] for trace in (plain, rescaled))
    assert one == pytest.approx(other, abs=1e-9)
    if abs(math.log10(t)) < 0.5 and abs(abs(d) - 3) > 0.5:
        assert [(f.kind, f.severity) for f in diagnose(plain)] == [(f.kind, f.severity) for f in diagnose(rescaled)]
