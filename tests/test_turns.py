"""When a step ends where several optimizers take turns, against loops whose rounds are counted by hand."""

import pytest
import torch
from torch import nn

from bpdiag import watch
from bpdiag.hooks import turns

torch.set_num_threads(1)

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Gan(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.g, self.d = nn.Linear(4, 3), nn.Linear(3, 1)

    def forward(self, noise):
        return self.d(self.g(noise))


def turn(model, optimizer):
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


def play(order, rounds, given="gd", every=1):
    """(steps counted after each turn, trace, updates of both weights in each round) of a loop ``order``."""
    model = Gan()
    optimizers = {name: torch.optim.SGD(getattr(model, name).parameters(), lr=0.1) for name in "gd"}
    counted, updates = [], []
    with watch(model, [optimizers[name] for name in given], every=every) as watching:
        for _ in range(rounds):
            before = {name: getattr(model, name).weight.detach().clone() for name in "gd"}
            for name in order:
                turn(model, optimizers[name])
                counted.append(watching.steps)
            after = {name: getattr(model, name).weight.detach() for name in "gd"}
            updates.append({n: float((after[n] - before[n]).norm() / before[n].norm()) for n in "gd"})
    return counted, watching.trace, updates


@pytest.mark.parametrize("given", ["gd", "dg"])
@pytest.mark.parametrize("order", ["dg", "gd", "ddg", "dddddg"])
def test_a_round_is_a_step_in_whatever_order_they_are_given(order, given):
    counted, trace, updates = play(order, 3, given)
    assert counted == [n + (i == len(order) - 1) for n in range(3) for i in range(len(order))]
    for step, of_round in enumerate(updates):
        rows = {r["layer"]: r for r in trace.to_arrow().to_pylist() if (r["step"], r["backward"]) == (step, 0)}
        for name, expected in of_round.items():
            assert rows[name]["update_ratio"] == pytest.approx(expected, rel=1e-5), (step, name)
    passes = {(r["step"], r["backward"]) for r in trace.to_arrow().to_pylist()}
    assert passes == {(step, n) for step in range(3) for n in range(len(order))}


def test_rounds_whose_seldom_one_steps_first_are_counted_as_often():
    """No end of a round can be known there: a step ends with each turn of the seldom one, and one more is under way."""
    counted, _, _ = play("gdd", 4)
    assert counted == [0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]


@pytest.mark.parametrize("given", ["gd", "dg"])
def test_one_that_never_steps_is_waited_for_once(given):
    counted, trace, updates = play("g", 12, given)
    assert counted == [0] * 8 + [9, 10, 11, 12]
    assert list(trace.sampled_steps) == [0, 9, 10, 11]
    rows = {r["layer"]: r for r in trace.to_arrow().to_pylist() if r["step"] == 10}
    assert rows["d"]["update_ratio"] == 0
    assert rows["g"]["update_ratio"] == pytest.approx(updates[10]["g"], rel=1e-5)


def test_one_that_begins_later_is_waited_for_from_its_second_turn_on():
    model = Gan()
    g, d = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model.g, model.d))
    counted = []
    with watch(model, [g, d]) as watching:
        for order in (*[[g]] * 10, *[[g, d]] * 4):
            for one in order:
                turn(model, one)
            counted.append(watching.steps)
    assert counted == [*[0] * 8, 9, 10, 11, 12, 13, 14]


def test_every_counts_rounds():
    _, trace, _ = play("dg", 5, every=2)
    assert list(trace.sampled_steps) == [0, 2, 4]


def test_the_twin_that_ends_with_the_last_of_the_list(monkeypatch):
    """What was done before: given the other way round, the generator's turn fell into the next step."""
    monkeypatch.setattr(turns.Turns, "taken_by", lambda self, one: int(one is list(self._taken)[-1]))
    counted, _, _ = play("dg", 3, "gd")
    assert counted == [1, 1, 2, 2, 3, 3]
