"""What real training does, a line each: watched it ends in the same bits, leaves nothing behind, and is seen."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bpdiag import watch

torch.set_num_threads(1)

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 0, 1, 1, 0])


def small(*extra):
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(inplace=True), *extra, nn.Linear(8, 2))


class Put(nn.Module):
    """Modules a, b, c and how they are put together."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.put = forward

    def forward(self, x):
        return self.put(self, x)


def plain_step(model, optimizer, note, step):
    note(F.cross_entropy(model(X), Y)).backward()
    optimizer.step()
    optimizer.zero_grad()


def unfreezes(model, optimizer, note, step):
    model[0].requires_grad_(step > 0)
    plain_step(model, optimizer, note, step)


def lbfgs(model, optimizer, note, step):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    note(optimizer.step(closure))


def autocast(model, optimizer, note, step):
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(X), Y)
    note(loss).backward()
    optimizer.step()
    optimizer.zero_grad()


def retained(model, optimizer, note, step):
    loss = note(F.cross_entropy(model(X), Y))
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def penalized(model, optimizer, note, step):
    """A gradient of a gradient."""
    x = X.clone().requires_grad_()
    loss = F.cross_entropy(model(x), Y)
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    note(loss + g.square().sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


def evaluated(model, optimizer, note, step):
    plain_step(model, optimizer, note, step)
    model.eval()
    with torch.no_grad():
        model(X)
    with torch.inference_mode():
        model(X)
    model.train()


def accumulated(model, optimizer, note, step):
    for x, y in zip(X.split(2), Y.split(2), strict=True):
        (note(F.cross_entropy(model(x), y)) / 3).backward()
    optimizer.step()
    optimizer.zero_grad()


def copied(model, optimizer, note, step):
    """The model is copied and its state saved in the middle of a step."""
    loss = note(F.cross_entropy(model(X), Y))
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    twin(X)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def two_optimizers(model, optimizer, note, step):
    note(F.cross_entropy(model(X), Y)).backward()
    for one in optimizer:
        one.step()
        one.zero_grad()


def complex_step(model, optimizer, note, step):
    note(model(X.to(torch.complex64)).abs().square().mean()).backward()
    optimizer.step()
    optimizer.zero_grad()


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 4, dtype=torch.complex64)

    def forward(self, x):
        return self.a(x) * 1j


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@dataclass
class Cell:
    """How the model is made and trained, and what must stand in the trace."""

    make: Callable = small
    step: Callable = plain_step
    optimizer: Callable = sgd
    seen: set = field(default_factory=lambda: {"0", "1", "2", "3", "4"})
    measured: set = field(default_factory=lambda: {"0", "2", "4"})  # with a cotangent at the last sampled step


ABC = {"seen": {"a", "b", "c"}, "measured": {"a", "b", "c"}}
SUM = {"a", "b", "c", "a+"}
CELLS = {
    "in place after a module": Cell(),
    "a view of an output": Cell(lambda: Put(lambda m, x: m.c(m.b(m.a(x).view(2, 3, 8)).flatten(0, 1))), **ABC),
    "columns written in place": Cell(lambda: Put(lambda m, x: m.c(m.b(m.a(x).clone().index_fill_(1, Y, 0)))), **ABC),
    "a sum in place": Cell(lambda: Put(lambda m, x: m.c(m.b(m.a(x)).add_(m.a(x)))), seen=SUM, measured=SUM),
    "a sum of no module": Cell(
        lambda: Put(lambda m, x: m.c((h := torch.relu(m.a(x))) + F.dropout(m.b(h)))),
        seen={"a", "b", "c", "b+"},
        measured={"a", "b", "c", "b+"},
    ),
    "one module three times": Cell(lambda: Put(lambda m, x: m.c(m.a(m.a(m.b(m.a(x)))))), **ABC),
    "detached in the middle": Cell(
        lambda: Put(lambda m, x: m.c(m.b(m.a(x).detach()))), seen={"a", "b", "c"}, measured={"b", "c"}
    ),
    "frozen, unfrozen later": Cell(step=unfreezes),
    "evaluated between steps": Cell(
        lambda: small(nn.Dropout(0.5)), evaluated, seen=set("012345"), measured=set("0245")
    ),
    "micro-batches": Cell(step=accumulated),
    "a second backward": Cell(step=retained, measured=set()),
    "a gradient of a gradient": Cell(step=penalized, measured=set()),
    "autocast": Cell(step=autocast),
    "LBFGS": Cell(step=lbfgs, optimizer=lambda model: torch.optim.LBFGS(model.parameters(), max_iter=1)),
    "LBFGS, several evaluations a step": Cell(
        step=lbfgs, optimizer=lambda model: torch.optim.LBFGS(model.parameters(), max_iter=4)
    ),
    "two optimizers": Cell(
        step=two_optimizers,
        optimizer=lambda model: [
            torch.optim.SGD(model[:2].parameters(), 0.1),
            torch.optim.Adam(model[2:].parameters()),
        ],
    ),
    "copied and saved in a step": Cell(step=copied),
    "complex numbers": Cell(Complex, complex_step, seen={"a"}, measured={"a"}),
    "foreach and fused optimizers": Cell(optimizer=lambda model: torch.optim.AdamW(model.parameters(), fused=True)),
}


def train(cell, watched, every=1, times=1):
    """(bits of the parameters, losses and random state; trace)."""
    torch.manual_seed(3)
    model = cell.make()
    optimizer, losses, watches = cell.optimizer(model), [], []

    def note(loss):
        losses.append(float(loss.detach()))
        for one in watches:
            one.loss(loss)
        return loss

    def steps():
        for step in range(4):
            cell.step(model, optimizer, note, step)

    if not watched:
        steps()
    elif times == 1:
        with watch(model, optimizer, every=every) as one:
            watches.append(one)
            steps()
    else:
        with watch(model, optimizer, every=every) as one, watch(model, optimizer, every=every) as other:
            watches += [one, other]
            steps()
    bits = [*(p.detach().clone() for p in model.parameters()), torch.tensor(losses), torch.get_rng_state()]
    left = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]
    left += [p for p in model.parameters() if p._post_accumulate_grad_hooks]
    return bits, left, [one.trace for one in watches]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", CELLS)
def test_it_ends_in_the_same_bits_and_was_seen(name, every):
    cell = CELLS[name]
    expected, _, _ = train(cell, watched=False)
    bits, left, (trace,) = train(cell, watched=True, every=every)
    assert all(map(torch.equal, bits, expected))
    assert left == []
    assert {layer.name for layer in trace.layers} == cell.seen
    assert list(trace.sampled_steps) == list(range(0, 4, every))
    last = [r for r in trace.to_arrow().to_pylist() if r["step"] == trace.sampled_steps[-1]]
    assert {r["layer"] for r in last if r["g_z_norm"]} == cell.measured


@pytest.mark.parametrize("name", ["in place after a module", "one module three times", "micro-batches"])
def test_watched_twice_both_see_the_same(name):
    cell = CELLS[name]
    expected, _, _ = train(cell, watched=False)
    bits, left, (one, other) = train(cell, watched=True, times=2)
    assert all(map(torch.equal, bits, expected))
    assert left == []
    assert one.to_arrow().equals(other.to_arrow())


def test_a_part_is_watched_inside_the_whole():
    torch.manual_seed(3)
    model = nn.Sequential(small(), nn.ReLU(), nn.Linear(2, 2))
    optimizer = sgd(model)
    with watch(model, optimizer) as whole, watch(model[0], optimizer) as part:
        plain_step(model, optimizer, lambda loss: loss, 0)
    norms = [
        {r["layer"]: (r["g_z_norm"], r["g_a_norm"]) for r in w.trace.to_arrow().to_pylist()} for w in (whole, part)
    ]
    assert {f"0.{name}": told for name, told in norms[1].items()}.items() <= norms[0].items()
    assert len(norms[1]) == 5


def test_a_watcher_that_changes_a_bit_would_be_seen():
    """The twin of the first check."""
    cell = CELLS["in place after a module"]
    expected, _, _ = train(cell, watched=False)
    noisy = Cell(lambda: (small(), torch.rand(1))[0])  # draws a random number, as a bad watcher would
    bits, _, _ = train(noisy, watched=True)
    assert not all(map(torch.equal, bits, expected))
