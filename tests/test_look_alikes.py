"""What passes a cotangent on unchanged, has rows that are alike, or runs through time: sick, and what looks so."""

import pytest
import torch
from test_findings import Case, X, adam, findings, fit, sgd, silent, told_apart
from torch import Tensor, nn
from torch.nn import functional as F

from bpdiag.config import Config, ModelConfig, TrainingConfig
from bpdiag.training import train


class Norms(nn.Module):
    """Three layers and what keeps the norm of a cotangent, linear or not."""

    def __init__(self, way, wide=1):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(20, 32 * wide), nn.Linear(32, 32 * wide), nn.Linear(32, 5)
        self.way = way

    def forward(self, x):
        return self.head(self.way(self.second(self.way(self.first(x)))))


PICTURES = F.pad(X, (0, 44)).view(64, 1, 8, 8)


def pooled(pool, places):
    """Convolutions, what is done with their pictures, a head."""
    last = nn.Linear(8 * places, 5)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), pool, nn.Conv2d(8, 8, 3, padding=1), pool, nn.Flatten(), last)


def in_groups(groups):
    """A convolution of one kernel, in groups: of eight a frozen blur, of two in a net whose weights are all alike."""
    inner = nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), inner, nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))
    for p in [inner.weight] if groups == 8 else model.parameters():
        nn.init.constant_(p, 1 / 9)
    inner.requires_grad_(groups < 8)
    return model


class Places(nn.Module):
    """A learned table of places, of which some are used."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64, 32))

    def forward(self, x):
        return x + self.weight[: len(x) // 2].repeat(2, 1)


class Unrolled(nn.Module):
    """A cell called for each of so many steps, the label to be kept from the first; or fused in one call."""

    def __init__(self, cell, draw=None, steps=30, fused=False):
        super().__init__()
        self.cell, self.head, self.steps, self.fused = cell(20, 24), nn.Linear(24, 5), steps, fused
        for name, weight in self.cell.named_parameters():
            if draw and name.startswith("weight_hh"):
                draw(weight)

    def forward(self, x):
        x = torch.cat([x[None], torch.zeros(self.steps - 1, *x.shape)])
        if self.fused:
            return self.head(self.cell(x)[0][-1])
        state = None
        for now in x:
            state = self.cell(now, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


def forgetful(weight):
    nn.init.normal_(weight, 0, 0.03)


def faded(cell):
    """Thirty steps of a cell that forgets, and two."""
    return Case(
        ("vanishing", "time"),
        fit(lambda: Unrolled(cell, forgetful), optimizer=lambda m: sgd(m, 0.1)),
        fit(lambda: Unrolled(cell, nn.init.orthogonal_, steps=2), optimizer=lambda m: sgd(m, 0.1)),
        steps=60,
    )


CASES = {
    "a shape changed between layers": Case(
        ("linear_stack", "no activation"), fit(lambda: Norms(Tensor.clone)), fit(lambda: Norms(Tensor.abs))
    ),
    "halves laid side by side again": Case(
        ("linear_stack", "no activation"),
        fit(lambda: Norms(lambda h: h.view(-1, 2, 16).transpose(1, 2).flatten(1))),
        fit(lambda: Norms(lambda h: h.view(-1, 32, 2).amax(-1), wide=2)),
    ),
    "convolutions with nothing between": Case(
        ("linear_stack", "no activation"),
        fit(lambda: pooled(nn.Identity(), 64), x=PICTURES),
        fit(lambda: pooled(nn.MaxPool2d(2), 4), x=PICTURES),
    ),
    "filters that are alike within each of two groups": Case(
        ("symmetric_initialization", "constant"),
        fit(lambda: in_groups(2), optimizer=lambda m: sgd(m, 1e-3), x=PICTURES),
        fit(lambda: in_groups(8), x=PICTURES),
    ),
    "an RNNCell that forgets": faded(nn.RNNCell),
    "an LSTMCell that forgets": faded(nn.LSTMCell),
    "a GRUCell that forgets": faded(nn.GRUCell),
}


@pytest.mark.parametrize("name", CASES)
def test_the_fault_is_named_and_its_twin_is_silent(name):
    told_apart(CASES[name])


def test_a_low_rank_that_is_meant_is_a_warning():
    factors = lambda: nn.Sequential(nn.Linear(20, 8, bias=False), nn.Linear(8, 5))  # noqa: E731
    code = lambda: nn.Sequential(nn.Linear(20, 4), nn.Linear(4, 20))  # noqa: E731
    for make in (fit(factors), fit(code, lambda out: F.mse_loss(out, X))):
        assert [(f.kind, f.severity) for f in findings(make, 30)] == [("linear_stack", "warning")]


def test_early_steps_that_receive_little_and_a_cell_that_learns_all_the_same():
    assert findings(fit(lambda: Unrolled(nn.LSTMCell, steps=16), optimizer=lambda m: adam(m, 3e-2)), 80) == []


def test_a_table_of_places_at_0_has_no_units():
    silent(fit(lambda: nn.Sequential(nn.Linear(20, 32), Places(), nn.ReLU(), nn.Linear(32, 5))), steps=60)


def test_guessing_says_what_was_not_seen():
    """A fused recurrent net that forgets is one call; a cell called by hand is judged."""
    fused = fit(lambda: Unrolled(nn.RNN, forgetful, fused=True), lambda out: F.cross_entropy(out, torch.arange(64) % 5))
    (found,) = findings(fused, 60)
    assert found.kind == "chance_level"
    assert "cell runs through time in one call" in found.why
    assert "Of 1 weight layers' calls" in found.why


def test_units_that_die_of_a_signal_that_is_gone_are_no_fault_of_their_own():
    """Where nothing comes through, biases alone move, and what they silence comes later."""
    model = ModelConfig(depth=20, width=64, activation="relu", weight_variance="0.5")
    result = train(Config(model=model, training=TrainingConfig(steps=160)))
    assert [(f.kind, f.cause, f.onset_step) for f in result.findings] == [("vanishing", "weights", 0)]
    assert result.trace.value("a_dead_fraction", 37, -1) > 0.5
