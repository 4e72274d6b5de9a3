"""Recurrence: the checks of every rule against torch's own cells, mutants of the source; layers against torch's own."""

from random import Random

import pytest
import torch
from rule_suite import (
    LOOSE,
    Case,
    apply_alone_casts_a_cotangent,
    draw,
    inputs_and_output_stay_apart,
    keeps_what_entered,
    leaves,
    narrow_numbers_are_as_near_as_torchs,
    refuses_by_name,
    second_gradient,
    standard,
    torchs_second_gradients_of_whatever_is_asked_for,
    vjp_alone_is_torchs_and_none_where_not_asked_for,
)
from rule_twins import coarse, doubled, eager, mutant, severed, sound, spoiled, twin, unchecked, unsteady, viewing
from torch import nn
from torch.testing import assert_close

from bpdiag.rules import RULES
from bpdiag.rules.recurrent import Gru, Lstm, Rnn, cotangents, layers

ALL = (Rnn, Lstm, Gru)


def rnn_oracle(x, h, W, U, b, c):
    steps = []
    for x_t in x:
        h = torch.rnn_tanh_cell(x_t, h, W, U, b, c)
        steps.append(h)
    return torch.stack(steps)


def gru_oracle(x, h, W, U, b, c):
    steps = []
    for x_t in x:
        h = torch.gru_cell(x_t, h, W, U, b, c)
        steps.append(h)
    return torch.stack(steps)


def lstm_oracle(x, h, s, W, U, b, c):
    steps = []
    for x_t in x:
        h, s = torch.lstm_cell(x_t, (h, s), W, U, b, c)
        steps.append(torch.stack([h, s]))
    return torch.stack(steps, 1)


def inputs(rule, T, B, N, H, seed=0, bias=True):
    n = rule.blocks
    states = [(B, H)] * rule.states
    tensors = draw((T, B, N), *states, (n * H, N), (n * H, H), (n * H,), (n * H,), seed=seed)
    return tensors if bias else (*tensors[:-2], None, None)


def shapes(rule):
    def generate(seed):
        r = Random(seed)
        sizes = [r.choice(of) for of in ((1, 2, 4), (1, 2, 3), (1, 2), (1, 2, 3))]
        return inputs(rule, *sizes, seed=seed, bias=r.random() < 0.7), {}

    return generate


def case(rule, oracle):
    def narrow(seed):  # of one step and sample, near 0: where 1 - h^2 and sums cancel no digit is left
        tensors = inputs(rule, 1, 1, *[Random(seed).choice((1, 2, 3))] * 2, seed=seed, bias=seed % 3 > 0)
        return tuple(t if t is None else t / 4 for t in tensors), {}

    return Case(rule, oracle, lambda seed: inputs(rule, 3, 2, 2, 2, seed), {}, shapes(rule), LOOSE, narrow)


CASES = {"rnn": case(Rnn, rnn_oracle), "lstm": case(Lstm, lstm_oracle), "gru": case(Gru, gru_oracle)}

WRONG = [spoiled(rule, "uphill", 1, lambda g: -g) for rule in ALL]
MUTANTS = [
    *WRONG,
    *[spoiled(rule, "g_x of another step", 0, lambda g: g.roll(1, 0)) for rule in ALL],
    mutant("rnn", "slope dropped", "g_u = g_h * slope", "g_u = g_h"),
    mutant("rnn", "no way back through time", "g_h if g_u is None else g_h + torch.matmul(g_u, U)", "g_h"),
    mutant("rnn", "U transposed", "else g_h + torch.matmul(g_u, U)", "else g_h + torch.matmul(g_u, U.t())"),
    mutant("rnn", "the state after for before", "return torch.cat([h.unsqueeze(0), y[:-1]])", "return y"),
    mutant(
        "rnn",
        "g_W of the states",
        "torch.matmul(_rows(g_a).t(), _rows(x))",
        "torch.matmul(_rows(g_a.flip(0)).t(), _rows(x))",
    ),
    mutant("rnn", "g_c a mean", "g_u.sum((0, 1)) if", "g_u.mean((0, 1)) if"),
    mutant("rnn", "g_b a mean", "g_a.sum((0, 1)) if", "g_a.mean((0, 1)) if"),
    mutant("lstm", "the cell forgets all", "g_s[t] = g_s[t] + f[t + 1] * g_s[t + 1]", "pass"),
    mutant("lstm", "the gate of another step", "f[t + 1] * g_s[t + 1]", "f[t] * g_s[t + 1]"),
    mutant("lstm", "state to cell dropped", "g_s[t] = g_s[t] + g_h[t] * to_s[t]", "pass"),
    mutant(
        "lstm",
        "gates exchanged",
        "torch.stack([k * i * (1 - i), _before(s, y[1]) * f * (1 - f),",
        "torch.stack([_before(s, y[1]) * f * (1 - f), k * i * (1 - i),",
    ),
    mutant("lstm", "g_k not squashed", "i * (1 - k * k)], 2)", "i], 2)"),
    mutant("lstm", "o's slope dropped", "of_h, to_s, f = squashed * o * (1 - o),", "of_h, to_s, f = squashed * o,"),
    mutant("lstm", "g_s of the first state", "f[0] * g_s[0])", "g_s[0])"),
    mutant("gru", "nothing passes as it is", "passed = z[t] * g_h + ", "passed = "),
    mutant("gru", "z for 1 - z", "g_n = (1 - z) * (1 - n * n)", "g_n = z * (1 - n * n)"),
    mutant("gru", "r dropped", "g_n * r], 2)", "g_n], 2)"),
    mutant("gru", "r before the product", "g_h * g_n], -1)", "g_u[..., -h.shape[-1] :]], -1)"),
    mutant("gru", "g_z of the wrong sign", "(before - n) * z", "(n - before) * z"),
]


suite = standard(
    CASES,
    MUTANTS,
    wrong=WRONG,
    also={
        second_gradient: [unsteady(rule) for rule in ALL],
        torchs_second_gradients_of_whatever_is_asked_for: [severed(rule) for rule in ALL],
        vjp_alone_is_torchs_and_none_where_not_asked_for: [eager(Lstm), eager(Gru)],
        keeps_what_entered: [
            twin(
                rule,
                "keeps gates",
                lambda g, gates, *kept, needs, rule=rule: rule.vjp(g, *kept, needs=needs),
                lambda i, o, n, rule=rule: (torch.ones(999), *rule.keeps(i, o, n)),
            )
            for rule in ALL
        ],
        inputs_and_output_stay_apart: [viewing(rule) for rule in ALL],
        narrow_numbers_are_as_near_as_torchs: list(map(coarse, ALL)),
        apply_alone_casts_a_cotangent: list(map(doubled, ALL)),
        refuses_by_name: [unchecked(Rnn, rnn_oracle)],
    },
)


@suite.rules
def test_rule(function, name):
    suite.run(function, name)


@suite.twins
def test_twin_is_caught(function, twin):
    suite.assert_caught(function, twin)


@suite.mutants
def test_mutants_are_caught(mutants):
    assert suite.missed(mutants) == []


@pytest.mark.parametrize("rule", ALL)
def test_a_sound_twin_passes(rule):
    suite.assert_sound(sound(rule))


# ---- through time ----


def by_autograd(rule, oracle, tensors, g):
    """dC/dh_t by torch alone: each state enters as a leaf of its own, of which C is a function."""
    tensors = leaves(tensors)
    x, states, weights = tensors[0], list(tensors[1 : 1 + rule.states]), tensors[1 + rule.states :]
    kept, cost = [], 0
    for x_t, g_t in zip(x, g.unbind(-3), strict=True):
        y = oracle(x_t[None], *states, *weights)
        h = y.unbind(0)[0][0] if rule.states > 1 else y[0]
        states = [h, y[1, 0]] if rule.states > 1 else [h]
        kept.append(h)
        cost = cost + (torch.stack(states) * g_t).sum()
    return torch.stack(torch.autograd.grad(cost, kept))


@pytest.mark.parametrize("rule", ALL)
def test_what_arrives_at_each_time_step(rule):
    """The twin: the cotangent of the output alone, without what comes from later steps, is another."""
    oracle, tensors = CASES[rule.name].oracle, inputs(rule, 5, 2, 3, 4)
    y = rule.apply(*tensors)
    g = draw(y.shape, seed=3)[0]
    ours = cotangents(rule, g, tensors, y)
    theirs = by_autograd(rule, oracle, tensors, g if rule.states > 1 else g[None])
    assert_close(ours, theirs, **LOOSE)
    assert not torch.allclose(ours, g[0] if rule.states > 1 else g)


def test_a_linear_recurrence_vanishes_as_the_power_of_its_weight():
    """Of small states tanh' is 1: each step takes a factor U = 1/2."""
    tensors = [torch.zeros(12, 1, 1), torch.zeros(1, 1), torch.ones(1, 1), torch.full((1, 1), 0.5), None, None]
    g = torch.zeros(12, 1, 1)
    g[-1] = 1
    arrived = cotangents(Rnn, g, tensors, Rnn.apply(*tensors)).flatten()
    assert arrived.tolist() == [0.5 ** (11 - t) for t in range(12)]


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_and_directions_are_torchs(kind, count, bidirectional, bias):
    torch.manual_seed(0)
    net = kind(3, 4, count, bias=bias, bidirectional=bidirectional).double()
    rule, D = RULES[kind.__name__.lower()], 1 + bidirectional
    x, *states = draw((5, 2, 3), *[(count * D, 2, 4)] * rule.states)
    per = 2 + 2 * bias
    weights = [(*net._flat_weights[i : i + per], None, None)[:4] for i in range(0, len(net._flat_weights), per)]
    asked = leaves((x, *states))
    y, last = layers(rule, asked[0], asked[1:], weights, bidirectional)
    theirs, theirs_last = net(asked[0], tuple(asked[1:]) if len(states) > 1 else asked[1])
    theirs_last = list(theirs_last) if len(states) > 1 else [theirs_last]
    assert_close((y, last), (theirs, theirs_last), **LOOSE)
    costs = [sum(t.pow(3).sum() for t in (out, *end)) for out, end in ((y, last), (theirs, theirs_last))]
    of = (*asked, *net.parameters())
    assert_close(*[torch.autograd.grad(cost, of) for cost in costs], **LOOSE)


def test_dropout_lies_between_layers():
    torch.manual_seed(0)
    net = nn.GRU(3, 4, 2, dropout=0.5).double()
    x, h = draw((5, 2, 3), (2, 2, 4))
    mask = torch.zeros(5, 2, 4, dtype=torch.bool)
    weights = [net._flat_weights[:4], net._flat_weights[4:]]
    y, _ = layers(Gru, x, [h], weights, dropout=[(mask, 0.5)])
    alone = nn.GRU(4, 4).double()
    alone.load_state_dict({k.replace("l1", "l0"): v for k, v in net.state_dict().items() if "l1" in k})
    assert_close(y, alone(torch.zeros(5, 2, 4).double(), h[1:])[0], **LOOSE)


@pytest.mark.parametrize("rule", ALL)
def test_a_batch_of_no_sample_gives_weights_0(rule):
    tensors = leaves(inputs(rule, 3, 0, 2, 4))
    grads = torch.autograd.grad(rule.apply(*tensors).sum(), tensors)
    assert [t.shape for t in grads] == [t.shape for t in tensors]
    assert all(t.count_nonzero() == 0 for t in grads)
