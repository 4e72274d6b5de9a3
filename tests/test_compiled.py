"""Compiled models: every layer seen on sampled steps, which run as written; the same numbers within rounding."""

import pytest
import torch
from torch import nn

from bpdiag import watch

torch.set_num_threads(1)

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
BACKEND = "aot_eager"  # as compiled as any to us, without a C++ compiler
CLOSE = {"rtol": 1e-6, "atol": 1e-7}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


class Counted:
    """A backend that counts what it compiles."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def trained(watched, called, model, every=2, steps=5):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(watched, optimizer, every=every) as watching:
        for _ in range(steps):
            watching.loss(called(X).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return watching.trace


def alike(trace, other):
    assert [layer.key for layer in trace.layers] == [layer.key for layer in other.layers]
    for one, two in zip(trace.to_arrow().to_pylist(), other.to_arrow().to_pylist(), strict=True):
        assert one.pop("layer") == two.pop("layer")
        missing = {name for name, value in two.items() if value is None}
        assert {name for name, value in one.items() if value is None} == missing
        for name in one.keys() - missing:
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-6), name


@pytest.fixture
def plain():
    model = net()
    return trained(model, model, model), model


@pytest.mark.parametrize("way", ["the compiled one is watched", "compiled before", "compiled in place"])
def test_every_layer_is_seen_under_its_own_name(way, plain):
    model = net()
    called = torch.compile(model, backend=BACKEND)
    if way == "compiled in place":
        model.compile(backend=BACKEND)
        called = model
    if way == "compiled before":
        called(X).sum().backward()
        model.zero_grad()
    trace = trained(called if way == "the compiled one is watched" else model, called, model)
    alike(trace, plain[0])
    for p, q in zip(model.parameters(), plain[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, **CLOSE)


def test_nothing_is_compiled_for_the_watchers_sake():
    """Sampled steps compile nothing; the others what they would without a watcher."""
    counts = []
    for watched in (False, True):
        model, backend = net(), Counted()
        called = torch.compile(model, backend=backend)
        if watched:
            trained(called, called, model)
        else:
            for _ in range(5):
                called(X).square().mean().backward()
        counts.append(backend.graphs)
    assert counts == [1, 1]


def test_a_compiled_model_is_compiled_again_after_the_block():
    model, backend = net(), Counted()
    called = torch.compile(model, backend=backend)
    trained(called, called, model, every=1)
    assert backend.graphs == 0
    called(X)
    assert backend.graphs == 1


def test_an_exception_gives_the_compiler_back():
    model, backend = net(), Counted()
    called = torch.compile(model, backend=backend)
    with pytest.raises(KeyboardInterrupt), watch(called):
        raise KeyboardInterrupt
    called(X)
    assert backend.graphs == 1
