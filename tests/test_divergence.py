"""Steps too large, under every optimizer: one finding, and the rate to take."""

import pytest
import torch
from test_findings import Case, G, T, adam, findings, fit, large, mlp, sgd, told_apart
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """A transformer's block by hand, before it a layer and behind it a head."""

    def __init__(self, d=32):
        super().__init__()
        self.first, self.head = nn.Linear(20, d), nn.Linear(d, 5)
        self.norm, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        h = self.first(x.view(16, 4, 20))
        u = self.norm(h)
        h = h + self.o(torch.softmax(self.q(u) @ self.k(u).mT / 32**0.5, -1) @ self.v(u))
        return self.head(h + self.down(F.gelu(self.up(self.norm2(h))))).flatten(0, 1)


class Next(nn.Module):
    """A recurrent language model whose head is its table of words."""

    def __init__(self):
        super().__init__()
        self.words, self.memory = nn.Embedding(50, 32), nn.LSTM(32, 32, batch_first=True)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words):
        return self.head(self.memory(self.words(words))[0])


WORDS = torch.randint(50, (8, 15), generator=G)


def next_word(out):
    return F.cross_entropy(out[:, :-1].flatten(0, 1), WORDS[:, 1:].flatten())


def regress(out):
    return F.mse_loss(out[:, 0], T)


CASES = {
    "a rate that drives a regression up": Case(
        ("update_too_large", "diverged"),
        fit(lambda: mlp(n_out=1), regress, lambda m: sgd(m, 1.0)),
        fit(lambda: mlp(n_out=1), regress),
        steps=60,
    ),
    "a rate that drives a regression to nan": Case(
        ("non_finite", "diverged"),
        fit(lambda: mlp(n_out=1), regress, lambda m: sgd(m, 10.0)),
        fit(lambda: mlp(n_out=1), regress),
    ),
    "attention under a rate a hundred times too large": Case(
        ("non_finite", "diverged"), fit(Attention, optimizer=lambda m: sgd(m, 10.0)), fit(Attention), steps=60
    ),
    "attention under Adam at .3": Case(
        ("update_too_large", "diverged"),
        fit(Attention, optimizer=lambda m: adam(m, 0.3)),
        fit(Attention, optimizer=lambda m: adam(m, 1e-3)),
        steps=60,
    ),
    "attention under Adam at 1": Case(
        ("update_too_large", "diverged"),
        fit(Attention, optimizer=lambda m: adam(m, 1.0)),
        fit(Attention, optimizer=lambda m: adam(m, 3e-3)),
        steps=60,
    ),
    "a language model under Adam at 1": Case(
        ("update_too_large", "diverged"),
        fit(Next, next_word, lambda m: adam(m, 1.0), x=WORDS),
        fit(Next, next_word, lambda m: adam(m, 1e-2), x=WORDS),
        steps=60,
    ),
    "gradients never cleared under momentum": Case(
        ("stale_gradient", "never cleared"),
        fit(mlp, optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9), clear=False),
        fit(mlp, optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)),
        steps=60,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_fault_is_named_and_its_twin_is_silent(name):
    told_apart(CASES[name])


@pytest.mark.parametrize("rate", [3.0, 10.0])
def test_the_rate_to_take_is_told_by_the_steps_before_the_loss_rose(rate):
    (found,) = findings(fit(lambda: mlp(n_out=1), regress, lambda m: sgd(m, rate)), 40)
    assert found.kind == "non_finite"
    told = float(found.remedy.split(" to ")[1])
    assert found.remedy.startswith(f"lower the learning rate from {rate:g} to ")
    assert 0.01 <= told <= 0.2
    assert findings(fit(lambda: mlp(n_out=1), regress, lambda m: sgd(m, told)), 40) == []


def test_a_net_that_begins_too_large_is_not_blamed_on_its_steps():
    (found,) = findings(fit(lambda: large(mlp(n_out=1), 1e26), regress), 10)
    assert found.cause.startswith("exploding")
    assert "critical weight variance" in found.remedy
