"""The pace against a clock of the test's own: which steps are sampled, and what that costs by the clock."""

import math

import pytest
import torch
from torch import nn

from bpdiag import watch
from bpdiag.config import UsageError
from bpdiag.hooks import Pace
from bpdiag.hooks.pace import FARTHEST, KEPT, TRIED


def run(pace_of, cost, steps):
    """Steps sampled, and the clock at the end; ``cost(step, sampled)`` is what a step takes."""
    now = [0.0]
    pace, sampled = pace_of(lambda: now[0]), []
    for step in range(steps):
        if pace.begins(step):
            sampled.append(step)
        now[0] += cost(step, step in sampled[-1:])
        pace.ended()
    return pace, sampled, now[0]


def limited(limit):
    return lambda clock: Pace(max_overhead=limit, clock=clock)


def constant(plain, sampled):
    return lambda step, is_sampled: sampled if is_sampled else plain


WARM = 2 * (TRIED + 1)


def test_without_a_limit_every_nth_and_the_clock_is_not_asked():
    def clock():
        raise AssertionError("asked")

    pace = Pace(every=3, clock=clock)
    fates = []
    for step in range(7):
        fates.append(pace.begins(step))
        pace.ended()
    assert fates == [True, False, False, True, False, False, True]


@pytest.mark.parametrize(
    ("limit", "sampled", "every"),
    [(0.02, 4.0, 150), (0.5, 1.4, 1), (0.5, 1.75, 2), (0.1, 1.05, 1), (0.1, 2.0, 10), (1.0, 0.9, 1)],
)
def test_the_least_n_whose_cost_is_under_the_limit(limit, sampled, every):
    """Closed form: N steps take N + (sampled - 1) where they would take N."""
    pace, steps, _ = run(limited(limit), constant(1.0, sampled), WARM + 5 * every)
    assert pace.every == every
    assert (sampled - 1) / every <= limit * (1 + 1e-12)
    assert every == 1 or (sampled - 1) / (every - 1) > limit
    assert steps[: TRIED + 1] == list(range(TRIED + 1))
    assert set(range(TRIED + 1, WARM)).isdisjoint(steps)
    gaps = [b - a for a, b in zip(steps[TRIED + 1 :], steps[TRIED + 2 :], strict=False)]
    assert gaps == [every] * len(gaps)
    assert len(gaps) >= 3


def test_the_limit_holds_by_the_clock_once_the_warm_up_is_spread():
    n = 20_000
    _, _, took = run(limited(0.02), constant(1.0, 4.0), n)
    assert took / n == pytest.approx(1.02, abs=0.001)


def test_what_warms_up_does_not_count():
    slow_once = lambda step, sampled: (1000.0 if step in (0, TRIED + 1) else 0) + (4.0 if sampled else 1.0)  # noqa: E731
    assert run(limited(0.1), slow_once, WARM + 1)[0].every == 30


def test_it_is_estimated_anew():
    def dearer_later(step, sampled):
        return 1.0 if not sampled else 2.0 if step < 500 else 4.0

    assert run(limited(0.1), dearer_later, 499)[0].every == 10
    pace, steps, _ = run(limited(0.1), dearer_later, 500 + 10 * KEPT + 200)
    assert pace.every == 30
    assert steps[-1] - steps[-2] == 30


def test_one_interrupted_step_does_not_move_it():
    def interrupted(step, sampled):
        return 1000.0 if step == 60 else 2.0 if sampled else 1.0

    assert run(limited(0.1), interrupted, 200)[0].every == 10


def test_a_clock_that_stands_still_samples_rarely_rather_than_always():
    pace, *_ = run(limited(0.1), constant(0.0, 1.0), WARM)
    assert pace.every == FARTHEST


# ---- through watch ------------------------------------------------------------------------------------


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


@pytest.mark.parametrize("wrong", [0, -0.1, 2, 1.01, math.nan, math.inf, "2%", True])
def test_what_is_no_share_is_refused(wrong):
    with pytest.raises(UsageError, match=r"a share of a step's time, above 0 and at most 1; 0\.02 is 2 %"):
        watch(mlp(), max_overhead=wrong)


def test_it_picks_every_by_itself_so_both_are_refused():
    with pytest.raises(UsageError, match="leave out every=4"):
        watch(mlp(), every=4, max_overhead=0.02)


def test_several_processes_must_not_each_choose(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UsageError, match="several processes must sample the same steps"):
        watch(mlp(), max_overhead=0.02)


def test_the_trace_says_what_was_chosen(monkeypatch):
    model, now = mlp(), [0.0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.ones(3, 4)
    watching = watch(model, optimizer, max_overhead=0.5)
    hooked = []
    with watching:
        monkeypatch.setattr(watching._recorder.pace, "_clock", lambda: now[0])
        for _ in range(40):
            hooked.append(len(model[0]._forward_hooks) > 0)
            model(x).square().mean().backward()
            now[0] += 3.0 if hooked[-1] else 1.0
            optimizer.step()
            optimizer.zero_grad()
        assert watching.trace.meta["every"] == 4
    steps = watching.trace.sampled_steps.tolist()
    assert steps == [step for step, on in enumerate(hooked) if on]
    assert steps == [*range(TRIED + 1), *range(steps[TRIED + 1], 40, 4)]
    assert (watching.trace.meta["every"], watching.trace.meta["max_overhead"]) == (4, 0.5)


def test_without_it_meta_has_what_was_asked():
    with watch(mlp(), every=7) as watching:
        pass
    assert watching.trace.meta["every"] == 7
    assert "max_overhead" not in watching.trace.meta
