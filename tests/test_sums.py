"""Sums that no module computes, against autograd asked at the tensors themselves in a second run."""

import copy
import gc
import weakref

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bpdiag import diagnose, watch
from bpdiag.diagnosis import blocks
from bpdiag.hooks import graph

torch.set_num_threads(1)

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Sum(nn.Module):
    def forward(self, x, y):
        return 1 * (x + y)


class Net(nn.Module):
    """Linear layers a, b, c, d and a head; ``put(net, x, note)`` puts them together and notes tensors by name."""

    def __init__(self, put):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.norm, self.head, self.put = nn.LayerNorm(6), nn.Linear(6, 2), put
        self.noted = {}
        self.double()

    def note(self, name, t):
        """The oracle's: in a watched run nothing is noted."""
        if self.noted is not None:
            self.noted[name] = t
            t.retain_grad()
        return t

    def forward(self, x):
        return self.put(self, x, self.note)


def step(model, x=X, steps=1):
    """The trace of watched steps that change no weight."""
    model.noted = None
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, optimizer) as watching:
        for _ in range(steps):
            model(x).square().sum().backward()
            optimizer.step()
    return watching.trace


def norms(model, x=X):
    """|dL/dt| of every noted tensor, from a run of its own."""
    model.noted = {}
    torch.manual_seed(3)
    model(x).square().sum().backward()
    return {name: float(t.grad.norm()) for name, t in model.noted.items()}


def rows(trace):
    return {r["layer"]: r for r in trace.to_arrow().to_pylist() if r["step"] == trace.sampled_steps[-1]}


def edges(trace, at=0):
    return {(trace.layers[r].short, trace.layers[p].short): gain for (r, p), gain in trace.edges(at).items()}


def parents(trace):
    return {la.short: [trace.layers[p].short for p in la.parents] for la in trace.layers}


def residual(net, x, note, branch=lambda net, x: net.c(torch.tanh(net.b(x)))):
    x = net.a(x)
    return net.head(note("sum", note("skip", x * 1) + note("branch", branch(net, note("below", x * 1)))))


def in_place(net, x, note):
    x = note("skip", net.a(x))
    h = net.c(torch.tanh(net.b(x)))
    h += x
    return net.head(note("sum", h))


def with_dropout(net, x, note):
    return residual(net, x, note, lambda net, x: F.dropout(net.c(torch.tanh(net.b(x))), 0.5))


SAME = {"plain": residual, "dropout": with_dropout}


@pytest.mark.parametrize("name", SAME)
def test_skip_and_branch_of_a_sum_are_told_apart(name):
    model = Net(SAME[name])
    true, trace = norms(model), step(model)
    assert parents(trace) == {"a": [], "b": ["a"], "c": ["b"], "c+": ["a", "c"], "head": ["c+"]}
    assert trace.layers[3].kind == "add"
    told, row = edges(trace), rows(trace)
    assert row["c+"]["g_z_norm"] == pytest.approx(true["sum"], rel=1e-12)
    assert told["c+", "a"] == pytest.approx(true["skip"] / true["sum"], rel=1e-12)
    assert told["b", "a"] * row["b"]["g_z_norm"] == pytest.approx(true["below"], rel=1e-12)
    assert told["c+", "c"] == pytest.approx(row["c"]["g_z_norm"] / true["sum"], rel=1e-12)
    assert (told["c+", "c"] == 1) == (name == "plain")  # of a dropped half the rest is doubled
    (block,) = blocks.blocks(trace, 0)
    assert (block.skip, block.branch) == pytest.approx(
        (true["skip"] / true["sum"], true["below"] / true["sum"]), rel=1e-12
    )


def test_the_words_are_those_of_a_sum_that_is_a_module():
    trace = step(Net(residual))
    words = blocks.in_words(trace, 0)
    assert words.startswith("the skip carries 1.00 of what arrives at the sum, the branch ")


class Deep(nn.Module):
    """Forty blocks whose branches are as large as their skips; the sums are modules, or not."""

    def __init__(self, are_modules):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.are_modules = nn.Linear(6, 32), nn.Linear(32, 2), are_modules
        self.blocks, self.sums = (nn.ModuleList(make() for _ in range(40)) for make in (lambda: nn.Linear(32, 32), Sum))
        for block in self.blocks:
            nn.init.orthogonal_(block.weight)
        self.double()

    def forward(self, x):
        x = self.first(x)
        for block, total in zip(self.blocks, self.sums, strict=True):
            x = total(x, block(x)) if self.are_modules else x + block(x)
        return self.head(x)


def test_it_is_judged_and_shown_as_if_the_sums_were_modules(tmp_path):
    findings, gains, shown = [], [], []
    for are_modules in (False, True):
        model = Deep(are_modules)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
        with watch(model, optimizer, log=tmp_path / f"{are_modules}", planned_steps=100) as watching:
            for _ in range(3):
                optimizer.zero_grad()
                watching.loss(model(X).square().mean()).backward()
                optimizer.step()
        findings.append({f.kind: (f.cause, f.sentence, f.evidence) for f in diagnose(watching.trace)})
        gains.append(list(watching.trace.edges(0).values()))
        board = EventAccumulator(str(tmp_path / f"{are_modules}")).Reload()
        shown.append([board.Scalars(t)[0].value for t in board.Tags()["scalars"] if t.startswith("gain/edge/")])
    assert "residual_mismatch" in findings[0]
    assert findings[0] == findings[1]
    assert gains[0] == gains[1] != []
    assert shown[0] == shown[1] != []
    assert len(shown[0]) == len(gains[0])


def test_a_sum_in_place():
    model = Net(in_place)
    trace = step(model)
    assert parents(trace)["c+"] == ["a", "c"]
    assert rows(trace)["c+"]["g_z_norm"] == pytest.approx(norms(model)["sum"], rel=1e-12)
    assert edges(trace)["c+", "a"] == edges(trace)["c+", "c"] == 1


class Block(nn.Module):
    """Of a ResNet, written as its authors do, but for the functions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)
        self.norm, self.last_norm, self.noted = nn.BatchNorm2d(4), nn.BatchNorm2d(4), []
        self.double()

    def forward(self, x):
        identity = F.relu(self.first(x))
        out = self.last_norm(self.last(F.relu(self.norm(identity), inplace=True)))
        out += identity
        if self.noted is not None:  # the oracle's: put on before the sum is overwritten
            out.register_hook(lambda g: self.noted.append(float(g.norm())))
        F.relu_(out)
        return self.head(out.mean((2, 3)))


def test_a_residual_block_of_functions_with_relu_in_place():
    model = Block()
    model(IMAGES).square().sum().backward()
    (true,) = model.noted
    trace = step(model, IMAGES)
    row = rows(trace)["last_norm+"]
    assert row["g_z_norm"] == pytest.approx(true, rel=1e-12)
    assert edges(trace)["last_norm+", "first"] == edges(trace)["last_norm+", "last_norm"] == 1
    assert row["z_norm"] is None
    reasons = {m.column: m.reason for m in trace.missing if m.layer == "last_norm+"}
    assert reasons["z_norm"] == "a sum between modules, read by none as it is"


class PreNorm(nn.Module):
    """A transformer's block written out: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, blocks=3):
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.head, self.noted = nn.Linear(6, 8), nn.Linear(8, 3), {}
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(8),
                    "qkv": nn.Linear(8, 24),
                    "out": nn.Linear(8, 8),
                    "norm2": nn.LayerNorm(8),
                    "up": nn.Linear(8, 16),
                    "down": nn.Linear(16, 8),
                }
            )
            for _ in range(blocks)
        )
        self.double()

    def note(self, name, t):
        if self.noted is not None:
            self.noted[name] = t
            t.retain_grad()
        return t

    def forward(self, x):
        x = self.embed(x)
        for n, block in enumerate(self.blocks):
            for part, branch in ((".out+", self.attend), (".down+", self.think)):
                x = self.note(f"blocks.{n}{part}", x + branch(block, self.note(f"into blocks.{n}{part}", x * 1)))
        return self.head(x)

    def attend(self, block, x):
        q, k, v = block["qkv"](block["norm1"](x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return block["out"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def think(self, block, x):
        return block["down"](F.gelu(block["up"](block["norm2"](x))))


TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_transformer_written_as_functions_has_its_residual_blocks():
    model = PreNorm()
    true, trace = norms(model, TOKENS), step(model, TOKENS)
    sums = [name for name in true if not name.startswith("into")]
    assert [la.short for la in trace.layers if la.kind == "add"] == sums
    row = rows(trace)
    for name in sums:
        assert row[name]["g_z_norm"] == pytest.approx(true[name], rel=1e-12), name
        assert row[name]["z_norm"] is None or row[name]["z_norm"] > 0
    found = blocks.blocks(trace, 0)
    assert [trace.layers[b.join].short for b in found] == sums
    for block, name in zip(found, sums, strict=True):
        assert block.skip == 1
        assert block.branch == pytest.approx(true[f"into {name}"] / true[name], rel=1e-12), name
    assert blocks.in_words(trace, 0).startswith("in 6 residual blocks the skip carries 1.00 of what arrives at the sum")


def test_a_walk_looks_at_a_sum_once(monkeypatch):
    """Twice the depth, twice the nodes: not four times, as when every layer's walk went down to the first block."""
    looked = []
    is_checkpoint = graph.is_checkpoint  # asked of every node
    monkeypatch.setattr(graph, "is_checkpoint", lambda node: looked.append(1) or is_checkpoint(node))

    def nodes(depth):
        looked.clear()
        step(PreNorm(depth), TOKENS)
        return len(looked)

    assert 0 < nodes(24) - nodes(16) == nodes(16) - nodes(8)


def test_the_names_are_the_same_at_every_step_and_pass():
    model = PreNorm(1)
    model.noted = None
    with watch(model) as watching:
        for _ in range(3):
            for _ in range(2):
                model(TOKENS).square().sum().backward()
            watching.step()
    table = watching.trace.to_arrow().to_pylist()
    told = {(r["step"], r["backward"]): [] for r in table}
    for r in table:
        told[r["step"], r["backward"]].append((r["layer"], r["call"]))
    assert len(told) == 6
    assert len({tuple(names) for names in told.values()}) == 1
    assert ("blocks.0.down+", 0) in told[0, 0]


# ---- forms ------------------------------------------------------------------------------------------------


def forms(net, x, note):
    """a + b + c, and one layer in two sums."""
    a = net.a(x)
    one = note("b+", a + net.b(a))
    two = note("c+", one + net.c(a))
    return net.head(note("d-", two - net.d(torch.tanh(two))))


def test_sums_of_sums():
    model = Net(forms)
    true, trace = norms(model), step(model)
    told = parents(trace)
    assert (told["b+"], told["c+"], told["d-"]) == (["a", "b"], ["b+", "c"], ["c+", "d"])
    assert [la.kind for la in trace.layers if la.short in true] == ["add", "add", "sub"]
    for name, g in true.items():
        assert rows(trace)[name]["g_z_norm"] == pytest.approx(g, rel=1e-12)


def weighted(net, x, note):
    x = net.a(x)
    return net.head(note("sum", torch.add(note("skip", x * 1), net.b(x), alpha=0.5)))


def test_an_edge_carries_what_the_sum_multiplies_it_by():
    model = Net(weighted)
    trace = step(model)
    assert edges(trace)["b+", "a"] == 1
    assert edges(trace)["b+", "b"] == pytest.approx(0.5, rel=1e-12)


def repeated(net, x, note):
    x = net.a(x)
    for n in range(3):
        x = note(f"b+{f'#{n}' if n else ''}", x + net.b(torch.tanh(x)))
    return net.head(x)


def test_a_layer_that_is_called_again_has_a_sum_again():
    model = Net(repeated)
    true, trace = norms(model), step(model)
    told = {la.short: rows for la, rows in zip(trace.layers, trace.column("g_z_norm")[0][0], strict=True)}
    assert {name: told[name] for name in true} == pytest.approx(true, rel=1e-12)
    assert parents(trace)["b+#2"] == ["b+#1", "b#2"]


NO_SUM = {
    "a constant": lambda net, x, note: net.head(net.a(x) + torch.ones(6)),
    "a number": lambda net, x, note: net.head(1 + net.a(x) - 2),
    "the data": lambda net, x, note: net.head(net.a(x) + x),
    "a parameter": lambda net, x, note: net.head(net.a(x) + net.b.bias),
    "no gradient": lambda net, x, note: net.head(net.a(x) + net.b(x).detach()),
    "itself": lambda net, x, note: net.head((y := net.a(x)) + y),
    "a function of itself": lambda net, x, note: net.head((y := net.a(x)) + 0.04 * y**3),
    "numbers of no dimension": lambda net, x, note: net.head(net.a(x)) * (net.b(x).sum() + net.c(x).sum()),
}


@pytest.mark.parametrize("name", NO_SUM)
def test_a_sum_in_which_no_ways_meet_is_none(name):
    trace = step(Net(NO_SUM[name]))
    assert [la.short for la in trace.layers if la.kind in ("add", "sub")] == []


def test_the_twin_in_which_ways_meet():
    trace = step(Net(lambda net, x, note: net.head(net.a(x) + net.b(x))))
    assert [la.short for la in trace.layers] == ["a", "b", "b+", "head"]


def test_what_a_module_adds_inside_is_its_own():
    model = Net(lambda net, x, note: net.head(net.both(net.a(x), net.b(x))))
    model.both = Sum()
    assert [la.short for la in step(model).layers] == ["a", "b", "both", "head"]


def test_a_sum_that_the_model_gives_out():
    """The loss alone reads it."""
    model = Net(lambda net, x, note: (y := net.a(x)) + net.b(y))
    trace = step(model)
    with torch.no_grad():
        y = model.a(X)
        g = 2 * (y + model.b(y)).norm()
    assert parents(trace) == {"a": [], "b": ["a"], "b+": ["a", "b"]}
    assert rows(trace)["b+"]["g_z_norm"] == pytest.approx(float(g), rel=1e-12)
    assert edges(trace)["b+", "a"] == 1


def test_an_activation_that_is_a_function_of_a_sum_stands_on_its_row():
    """As on the row of a layer: the ledger finds it there."""
    model = Net(lambda net, x, note: net.head(note("a", torch.relu(note("z", (y := net.a(x)) + net.b(y))))))
    true, trace = norms(model), step(model)
    row, layer = rows(trace)["b+"], next(la for la in trace.layers if la.short == "b+")
    assert layer.activation == "relu"
    assert (row["g_z_norm"], row["g_a_norm"]) == pytest.approx((true["z"], true["a"]), rel=1e-12)
    assert trace.layers[1].next == 3
    assert trace.layers[1].via == (2,)


def test_the_size_of_a_sum_is_that_of_the_tensor():
    trace = step(Net(lambda net, x, note: net.head(net.norm((y := net.a(x)) + net.b(y)))))
    model = Net(residual)
    with torch.no_grad():
        y = model.a(X)
        true = (y + model.b(y)).norm()
    assert rows(trace)["b+"]["z_norm"] == pytest.approx(float(true), rel=1e-12)


# ---- surviving --------------------------------------------------------------------------------------------


def checkpointed(use_reentrant):
    def put(net, x, note):
        x = net.a(x)
        x = x + checkpoint(lambda t: net.c(torch.tanh(net.b(t))), x, use_reentrant=use_reentrant)
        x = checkpoint(lambda t: net.d(note("inner", t + net.b(torch.tanh(t)))), x, use_reentrant=use_reentrant)
        return net.head(x)

    return put


def straight(net, x, note):
    x = net.a(x)
    x = x + net.c(torch.tanh(net.b(x)))
    return net.head(net.d(x + net.b(torch.tanh(x))))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_sums_around_checkpoints_and_in_them(use_reentrant):
    """Oracle: the same without checkpoints.  What a reentrant one is added to is known by its last call."""
    truth, trace = step(Net(straight)), step(Net(checkpointed(use_reentrant)))
    one, other = (
        sorted(r["g_z_norm"] for r in t.to_arrow().to_pylist() if r["layer"].endswith("+")) for t in (truth, trace)
    )
    assert len(one) == 2
    assert other == pytest.approx(one, rel=1e-12)
    if not use_reentrant:
        assert trace.layers == truth.layers
        assert edges(trace) == edges(truth)


def test_a_compiled_model():
    model = PreNorm(1)
    truth = step(copy.deepcopy(model), TOKENS)
    compiled = torch.compile(model)
    compiled.noted = None
    with watch(compiled) as watching:
        compiled(TOKENS).square().sum().backward()
        watching.step()
    trace = watching.trace
    assert [la.short for la in trace.layers] == [la.short for la in truth.layers]
    assert edges(trace) == pytest.approx(edges(truth), rel=1e-12)


def test_nothing_is_held_after_the_step():
    """The graph of a step is gone when its loss is, though hooks stood on its nodes."""
    model = Net(residual)
    model.noted = None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = []
    with watch(model, optimizer):
        for _ in range(2):
            out = model(X)
            held.append(weakref.ref(out))
            out.square().sum().backward()
            optimizer.step()
            del out
            gc.collect()
            assert [ref() for ref in held] == [None] * len(held)


def test_two_backwards_through_a_sum_are_told_as_missing():
    model = Net(residual)
    model.noted = None
    with watch(model) as watching:
        out = model(X).square().sum()
        out.backward(retain_graph=True)
        out.backward()
        watching.step()
    reasons = {(m.layer, m.column): m.reason for m in watching.trace.missing}
    assert reasons["c+", "g_z_norm"] == "several backwards went through it"
    assert rows(watching.trace)["c+"]["g_z_norm"] is None


def test_the_shape_of_a_sum_may_be_ragged():
    model = Net(lambda net, x, note: net.head((y := net.a(x)) + net.b(y)))
    model.noted = None
    ragged = torch.nested.nested_tensor([X[:3], X[:2]], layout=torch.jagged)
    with watch(model) as watching:
        model(ragged).values().square().mean().backward()
        watching.step()
    assert [la.short for la in watching.trace.layers] == ["a", "b", "b+", "head"]
    assert rows(watching.trace)["b+"]["g_z_norm"] > 0


def test_a_sum_in_place_of_a_view_is_not_seen_but_named():
    """Autograd shows a copy into a view there, and not what was done to it."""

    def put(net, x, note):
        x = net.a(x.view(1, 5, 6))
        y = net.b(x)
        y += x
        return net.head(y)

    trace = step(Net(put))
    assert parents(trace)["head"] == ["a", "b"]
    assert trace.layers[-1].gap == (("copy_slices", "as_strided"),) * 2
