"""Softmax, its logarithm and gates: the checks of every rule, and mutants of the source."""

from random import Random

import pytest
import torch
from rule_suite import (
    Case,
    apply_alone_casts_a_cotangent,
    draw,
    drawn,
    inputs_and_output_stay_apart,
    keeps_no_more_than_torch,
    narrow_numbers_are_as_near_as_torchs,
    refuses_by_name,
    second_gradient,
    standard,
    torchs_second_gradients_of_whatever_is_asked_for,
    vjp_alone_is_torchs_and_none_where_not_asked_for,
)
from rule_twins import coarse, doubled, greedy, mutant, sound, spoiled, twin, unchecked, unsteady, viewing
from torch.nn import functional as F

from bpdiag.rules.mixing import Glu, LogSoftmax, Softmax, Swiglu

ALL = (Softmax, LogSoftmax, Glu, Swiglu)
SOFT = (Softmax, LogSoftmax)


def swiglu_oracle(x, dim=-1):
    a, b = x.chunk(2, dim)
    return F.silu(a) * b


def shapes(halves):
    def generate(seed):
        r = Random(seed)
        n = r.choice((1, 2, 3) if halves else (0, 1, 2, 3))
        dim = r.randrange(n) if n else 0
        shape = [r.choice((0, 1, 2, 3, 5)) for _ in range(n)]
        if halves:
            shape[dim] = r.choice((2, 4, 6))
        return draw(shape, seed=seed), {"dim": r.choice((dim, dim - max(n, 1)))}

    return generate


CASES = {
    "softmax": Case(Softmax, torch.softmax, drawn((3, 4)), {"dim": -1}, shapes(False)),
    "log_softmax": Case(LogSoftmax, torch.log_softmax, drawn((3, 4)), {"dim": -1}, shapes(False)),
    "glu": Case(Glu, F.glu, drawn((3, 4)), {"dim": -1}, shapes(True)),
    "swiglu": Case(Swiglu, swiglu_oracle, drawn((3, 4)), {"dim": -1}, shapes(True)),
}


def unasked(rule):
    """Computes g_z whatever is asked for, of what is there."""
    return twin(
        rule,
        "unasked",
        lambda g, kept, dim, needs: rule.vjp(g, g if kept is None else kept, dim),
        keeps=lambda inputs, output, needs: rule.keeps(inputs, output, (True,)),
    )


WRONG = [spoiled(rule, "uphill", 0, lambda g: -g) for rule in ALL]
MUTANTS = [
    *WRONG,
    mutant("softmax", "the sum dropped", "gy - y * gy.sum(dim, keepdim=True)", "gy"),
    mutant("softmax", "as if each stood alone", "y * gy.sum(dim, keepdim=True)", "y * gy"),
    mutant("softmax", "another dimension", 'torch.softmax(z, _along("softmax", z, dim))', "torch.softmax(z, 0)"),
    mutant("log_softmax", "probability dropped", "torch.exp(wide(y)) * g.sum", "g.sum"),
    mutant("log_softmax", "logarithm for probability", "torch.exp(wide(y)) * g.sum", "wide(y) * g.sum"),
    mutant("log_softmax", "a mean", "g.sum(dim, keepdim=True),)", "g.mean(dim, keepdim=True),)"),
    mutant("glu", "the gate's slope dropped", "g_a * a * (1 - p)], dim)", "g_a * a], dim)"),
    mutant(
        "glu",
        "halves exchanged",
        "torch.cat([g_a, g_a * a * (1 - p)], dim)",
        "torch.cat([g_a * a * (1 - p), g_a], dim)",
    ),
    mutant("glu", "the wrong half gates", "p = torch.sigmoid(b)", "p = torch.sigmoid(a)"),
    mutant("swiglu", "silu's second term dropped", "p * (1 + a * (1 - p))", "p"),
    mutant("swiglu", "g_b without a", "g_y * (a * p)], dim)", "g_y * p], dim)"),
    mutant("swiglu", "a glu", "(a * torch.sigmoid(a) * b)", "(a * torch.sigmoid(b))"),
]

suite = standard(
    CASES,
    MUTANTS,
    wrong=WRONG,
    also={
        second_gradient: [unsteady(rule) for rule in ALL],
        torchs_second_gradients_of_whatever_is_asked_for: [
            twin(rule, "no graph", lambda *args, needs, rule=rule: (rule.vjp(*args)[0].detach(),)) for rule in ALL
        ],
        vjp_alone_is_torchs_and_none_where_not_asked_for: [unasked(rule) for rule in ALL],
        keeps_no_more_than_torch: [
            greedy(Glu),
            *[
                twin(
                    rule,
                    "keeps z too",
                    lambda g, y, dim, z, needs, rule=rule: rule.vjp(g, y, dim, needs),
                    lambda inputs, output, needs: (output, inputs[1], inputs[0]),
                )
                for rule in SOFT
            ],
        ],
        inputs_and_output_stay_apart: [viewing(rule) for rule in (Glu, Swiglu)],
        narrow_numbers_are_as_near_as_torchs: list(map(coarse, ALL)),
        apply_alone_casts_a_cotangent: list(map(doubled, ALL)),
        refuses_by_name: [unchecked(Softmax, lambda z, dim: torch.softmax(z * 1, dim))],
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


@pytest.mark.parametrize("rule", SOFT)
def test_what_is_added_to_all_changes_nothing(rule):
    """So the cotangent sums to 0; the twin: of a gate it does not."""
    z, g = draw((3, 5), (3, 5))
    for name, expected in ((rule, True), (Swiglu, False)):
        x = z.repeat(1, 2) if name is Swiglu else z
        kept = x if name is Swiglu else name.forward(x)
        g_z = name.vjp(g, kept)[0]
        assert (g_z.sum(-1).abs().max().item() < 1e-14) == expected
