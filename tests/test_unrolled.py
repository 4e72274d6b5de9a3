"""Through time, in words: a recurrence whose gain is known in closed form."""

import re

import pytest
import torch
from torch import nn

from bpdiag import diagnosis, watch
from bpdiag.diagnosis import unrolled

torch.set_num_threads(1)


class Chain(nn.Module):
    """h_t = tanh(u h_{t-1}) from a small state: each step passes on u, and what lies below an exact 0 nothing."""

    def __init__(self, u, steps, cut=None):
        super().__init__()
        self.cell, self.steps, self.cut = nn.RNNCell(1, 1, bias=False), steps, cut
        nn.init.zeros_(self.cell.weight_ih)
        nn.init.constant_(self.cell.weight_hh, u)
        self.head = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.head.weight)

    def forward(self, h):
        for t in range(self.steps):
            h = self.cell(torch.zeros(1, 1), h)
            if t == self.cut:
                h = h * 0
        return self.head(h)


def told(u, steps, cut=None):
    net = Chain(u, steps, cut)
    with watch(net) as watching:
        watching.loss(net(torch.full((1, 1), 1e-6)).sum()).backward()
        watching.step()
    return watching.trace


@pytest.mark.parametrize(("u", "steps"), [(0.5, 8), (0.9, 5), (1.25, 12)])
def test_the_gain_of_a_time_step_is_the_weight(u, steps):
    sentence = unrolled.in_words(told(u, steps), 0)
    gain, share = re.match(
        rf"through time: cell runs {steps} times, and a step passes on (\S+) of what arrives; "
        r"the first receives (\S+) of what the last does$",
        sentence,
    ).groups()
    assert float(gain) == pytest.approx(u, rel=5e-3)
    assert float(share) == pytest.approx(u ** (steps - 1), rel=0.05)


def test_what_is_forgotten_is_counted():
    """Between the third and the fourth of eight calls the state is multiplied by 0."""
    sentence = unrolled.in_words(told(0.5, 8, cut=2), 0)
    assert sentence.endswith(
        "passes on 0.5 of what arrives; the first 3 (38 %) receive exactly 0: what they read is forgotten"
    )


def test_two_calls_are_no_time():
    assert unrolled.in_words(told(0.5, 2), 0) == ""


def test_it_stands_among_the_notes():
    notes = diagnosis.notes(told(0.5, 8))
    assert any(note.startswith("at step 0 through time: cell runs 8 times") for note in notes)


class Shared(nn.Module):
    """A deep sigmoid encoder that reads three pictures: its layers are called thrice, one beside the other."""

    def __init__(self, reads):
        super().__init__()
        self.reads = reads
        self.encode = nn.Sequential(*[m for _ in range(12) for m in (nn.Linear(16, 16), nn.Sigmoid())])
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        return sum(self.head(self.encode(x + shift)) for shift in self.reads)


@pytest.mark.parametrize("reads", [(0,), (0, 1, -1)])
def test_what_several_inputs_share_is_no_time(reads):
    """One picture or three: the gradient dies in the depth of the encoder, and no call follows from the one before."""
    torch.manual_seed(0)
    net = Shared(reads)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    with watch(net, optimizer) as watching:
        for _ in range(60):
            optimizer.zero_grad()
            watching.loss(net(torch.randn(32, 16)).square().mean()).backward()
            optimizer.step()
    found = {f.kind: f.cause for f in diagnosis.diagnose(watching.trace)}
    assert found.get("vanishing") not in (None, "time")
    assert not [note for note in diagnosis.notes(watching.trace) if "through time" in note]


def test_a_cell_that_reads_two_sequences_has_the_time_of_one():
    net = Chain(0.5, 6)
    with watch(net) as watching:
        watching.loss((net(torch.full((1, 1), 1e-6)) + net(torch.full((1, 1), 2e-6))).sum()).backward()
        watching.step()
    assert "cell runs 6 times" in unrolled.in_words(watching.trace, 0)
