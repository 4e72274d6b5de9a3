"""What each edge of a graph carries, against autograd asked for the parts one by one; and what is said of it."""

import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from bpdiag import diagnose, diagnosis, watch
from bpdiag.diagnosis import blocks
from bpdiag.trace import Layer, Sample, Trace

torch.set_num_threads(1)

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Sum(nn.Module):
    def forward(self, skip, branch):
        return skip + branch


class NormedSum(nn.LayerNorm):
    def forward(self, skip, branch):
        return super().forward(skip + branch)


class Residual(nn.Module):
    """first -> x -> x + f(x) -> head; ``read`` says how x is read: (skip, what the branch gets)."""

    def __init__(self, read=lambda x: (x, x), shift=0.0):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.inner, self.outer, self.head = (nn.Linear(6, n) for n in (6, 6, 6, 2))
        self.squish, self.sum = nn.Tanh(), Sum()
        self.read, self.shift = read, shift
        self.double()

    def forward(self, x):
        skip, below = self.read(self.first(x))
        return self.head(self.sum(skip, self.outer(self.squish(self.inner(below)))))


def one_step(model, loss=lambda out: out.square().sum()):
    """A watched step, after which the weights are as they were."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer) as watching:
        loss(model(X)).backward()
        optimizer.step()
    return watching.trace


def edges(trace, at=0):
    return {(trace.layers[r].short, trace.layers[p].short): gain for (r, p), gain in trace.edges(at).items()}


def asked(model, change=lambda z: z):
    """|v| of skip and branch over |g| of the sum: x twice, as two leaves of their own."""
    with torch.no_grad():
        x = change(model.first(X))
    skip, below = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = skip + model.outer(model.squish(model.inner(below)))
    out.retain_grad()
    model.head(out).square().sum().backward()
    return skip.grad, below.grad, out.grad


# ---- measured ---------------------------------------------------------------------------------------------


def test_skip_and_branch_are_told_apart():
    model = Residual()
    trace = one_step(model)
    skip, branch, g = asked(model)
    inner = trace.value("g_z_norm", [layer.name for layer in trace.layers].index("inner"), 0)
    told = edges(trace)
    assert told["sum", "first"] == pytest.approx(float(skip.norm() / g.norm()), rel=1e-12)
    assert told["sum", "first"] == 1.0
    assert told["inner", "first"] * inner == pytest.approx(float(branch.norm()), rel=1e-12)
    assert told["sum", "outer"] == 1.0  # read by the sum alone: its whole cotangent
    assert set(told) == {("sum", "first"), ("sum", "outer"), ("inner", "first")}


def test_the_parts_add_up_to_what_arrives_below():
    """G^2 = 1 + beta^2 + 2 beta cos(g, J_f^T g)."""
    model = Residual()
    trace = one_step(model)
    (block,) = blocks.blocks(trace, 0)
    _, branch, g = asked(model)
    cos = float((branch * g).sum() / branch.norm() / g.norm())
    first, total = (
        trace.value("g_z_norm", [layer.name for layer in trace.layers].index(name), 0) for name in ("first", "sum")
    )
    whole = block.skip**2 + block.branch**2 + 2 * block.skip * block.branch * cos
    assert math.sqrt(whole) == pytest.approx(first / total, rel=1e-12)
    assert abs(cos) > 0.01  # else the cross term would go unseen


def test_ways_that_part_behind_a_function():
    """x = relu(z), a function call, is read twice; z, which the watcher sees, once."""
    model = Residual(lambda z: (torch.relu(z),) * 2)
    trace = one_step(model)
    skip, branch, g = asked(model, torch.relu)
    (block,) = blocks.blocks(trace, 0)
    assert (block.skip, block.branch) == pytest.approx(
        (float(skip.norm() / g.norm()), float(branch.norm() / g.norm())), rel=1e-12
    )


def test_a_way_that_is_not_one_layers_alone_has_no_gain():
    """The branch reads x in two places: what each sends has a norm, their sum has another."""
    model = Residual(lambda x: (x, x * x.detach() + x))
    trace = one_step(model)
    assert ("inner", "first") not in edges(trace)
    assert edges(trace)["sum", "first"] == 1.0
    (gap,) = [m for m in trace.missing if m.column == "edge_gain"]
    assert gap.layer == "inner"
    assert blocks.blocks(trace, 0) == []


def test_one_weight_in_two_ways_is_no_place_where_ways_part():
    class Siamese(Residual):
        def forward(self, x):
            x = self.first(x)
            return self.head(self.sum(self.inner(x), self.inner(torch.tanh(x))))

    told = edges(one_step(Siamese()))
    assert set(told) == {("inner", "first"), ("inner#1", "first")}


def test_two_backwards_through_an_edge_are_told_as_missing():
    def twice(out):
        out.square().sum().backward(retain_graph=True)
        return out.sum()

    trace = one_step(Residual(), twice)
    assert edges(trace) == {}


def test_what_the_loss_reads_too_is_a_fork():
    class Early(Residual):
        def forward(self, x):
            x = self.first(x)
            return self.head(x), x

    model = Early()
    trace = one_step(model, lambda out: out[0].square().sum() + 3 * out[1].sum())
    with torch.no_grad():
        g = 2 * model.head(model.first(X))
        expected = float((g @ model.head.weight).norm() / g.norm())
    assert edges(trace)["head", "first"] == pytest.approx(expected, rel=1e-12)


def test_every_sampled_step_has_its_own_and_they_survive_the_disk(tmp_path):
    model = Residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, every=2, log=tmp_path / "run") as watching:
        for _ in range(5):
            model(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    trace = watching.trace
    assert list(trace.sampled_steps) == [0, 2, 4]
    assert len({edges(trace, at)["inner", "first"] for at in range(3)}) == 3
    loaded = Trace.load(tmp_path / "run")
    assert [loaded.edges(at) for at in range(3)] == [trace.edges(at) for at in range(3)]


def test_tensorboard_shows_every_edge(tmp_path):
    model = Residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, log=tmp_path / "run") as watching:
        model(X).square().mean().backward()
        optimizer.step()
    board = EventAccumulator(str(tmp_path / "run")).Reload()
    shown = {tag: board.Scalars(tag)[0].value for tag in board.Tags()["scalars"] if tag.startswith("gain/edge/")}
    told = {f"gain/edge/{r}_from_{p}": gain for (r, p), gain in edges(watching.trace).items()}
    assert shown == pytest.approx(told)
    assert len(told) == 3


# ---- where ways meet --------------------------------------------------------------------------------------


def rows(*parents):
    return [Layer(f"l{i}", 0, "linear", parents=p) for i, p in enumerate(parents)]


JOINS = {
    "chain": ([(), (0,), (1,)], [1, 2, 3]),
    "block": ([(), (0,), (0, 1), (2,)], [2, 2, 3, 4]),
    "two branches": ([(), (0,), (0,), (0, 1, 2)], [3, 3, 3, 4]),
    "a block in a branch": ([(), (0,), (1,), (1, 2), (0, 3)], [4, 3, 3, 4, 5]),
    "two heads": ([(), (0,), (0,)], [3, 3, 3]),
    "nothing": ([], []),
}


@pytest.mark.parametrize("name", JOINS)
def test_joins(name):
    parents, expected = JOINS[name]
    assert blocks.joins_of(rows(*parents)) == expected


def test_two_branches_are_not_told_as_one():
    """Their norms do not tell the norm of their sum: aligned branches carry 1.37, opposed ones nothing."""

    class Three(Residual):
        def forward(self, x):
            x = self.first(x)
            return self.head(self.sum(x, self.inner(x) + self.outer(x)))

    trace = one_step(Three())
    assert set(edges(trace)) >= {("sum", "first"), ("inner", "first"), ("outer", "first")}
    assert blocks.blocks(trace, 0) == []


def test_a_weight_layer_that_reads_both_ways_is_no_sum():
    class Dense(Residual):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(12, 2).double()

        def forward(self, x):
            x = self.first(x)
            return self.head(torch.cat([x, self.inner(x)], 1))

    trace = one_step(Dense())
    assert len(edges(trace)) == 3
    assert blocks.blocks(trace, 0) == []


def test_behind_a_norm_the_words_say_so():
    class PostNorm(Residual):
        def __init__(self):
            super().__init__()
            self.norm = NormedSum(6).double()

        def forward(self, x):
            x = self.first(x)
            return self.head(self.norm(x, self.inner(x)))

    words = blocks.in_words(one_step(PostNorm()), 0)
    assert " of what arrives at norm, the branch " in words
    assert "orthogonal" not in words


def test_a_walk_that_is_given_up_says_so(monkeypatch):
    monkeypatch.setattr("bpdiag.hooks.graph.MOST_NODES", 3)

    class Long(Residual):
        def forward(self, x):
            x = self.first(x)
            for _ in range(10):
                x = x * 1.1
            return self.head(x)

    trace = one_step(Long())
    told = {m.reason for m in trace.missing if (m.layer, m.column) == ("first", "backward_gain")}
    assert told == {"too many operations between layers to follow the way up"}


# ---- in words ---------------------------------------------------------------------------------------------


def typed(*branches, skip=1.0):
    """A trace of blocks x + f(x) whose branches have these gains, typed by hand; |g| is 3 everywhere."""
    layers, told = [Layer("x0", 0, "linear", fan_in=4, units=4)], [{}]
    for n, branch in enumerate(branches, start=1):
        below = len(layers) - 1
        layers += [
            Layer(f"f{n}", 0, "linear", parents=(below,), fan_in=4, units=4),
            Layer(f"x{n}", 0, "sum", parents=(below, below + 1)),
        ]
        told += [{"edge_gain": [branch]}, {"edge_gain": [skip, 1.0]}]
    sample = Sample(0, layers, [(0, i, {"g_z_norm": 3.0, **more}) for i, more in enumerate(told)], [])
    return Trace.build(layers, [sample])


def test_the_words():
    one = "the skip carries 1.00 of what arrives at the sum, the branch 0.58: 1.16 a block where they are orthogonal"
    assert blocks.in_words(typed(0.58), 0).startswith(one)
    three = "in 3 residual blocks the skip carries 1.00 of what arrives at the sum, the branch 0.58 (0.50 to 0.70)"
    assert blocks.in_words(typed(0.5, 0.58, 0.7), 0).startswith(three)
    behind = "the skip carries 0.30 of what arrives at x1 (sum), the branch 0.58"
    assert blocks.in_words(typed(0.58, skip=0.3), 0) == behind.replace("x1 (sum)", "x1")
    assert "of what arrives at the sum behind the sum" in blocks.in_words(typed(0.5, 0.5, skip=0.3), 0)


def test_a_chain_is_told_nothing_of_blocks():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    trace = one_step(model)
    assert blocks.in_words(trace, 0) == ""
    assert trace.edges(0) == {}


def test_the_notes_of_a_run_tell_it():
    trace = one_step(Residual())
    diagnose(trace)
    (told,) = [note for note in diagnosis.notes(trace) if "the skip carries 1.00" in note]
    (block,) = blocks.blocks(trace, 0)
    assert f"the branch {block.branch:.2f}" in told
    assert told.startswith("at step 0 the skip carries 1.00 of what arrives at the sum")


def test_the_gain_of_a_residual_net_is_that_of_its_cotangents():
    """Chains keep the mean of their gains, which comes to the same."""

    class Deep(nn.Module):
        def __init__(self, residual):
            super().__init__()
            torch.manual_seed(2)
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))
            self.sums, self.head, self.residual = nn.ModuleList(Sum() for _ in range(6)), nn.Linear(6, 2), residual
            self.double()

        def forward(self, x):
            for layer, total in zip(self.layers, self.sums, strict=True):
                x = total(x, layer(x)) if self.residual else layer(x)
            return self.head(x)

    for residual in (True, False):
        p = diagnosis.profile(one_step(Deep(residual)))
        norms = [p.trace.value("g_z_norm", i, 0) for i in p.lines]
        assert p.hidden_gain(0) == pytest.approx((norms[0] / norms[-2]) ** (1 / 5), rel=1e-12)
