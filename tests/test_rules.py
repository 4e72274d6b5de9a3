"""One suite over the table RULES, and twins (rules with one fault) that each check of it must catch."""

import itertools
import math
from random import Random

import pytest
import torch
from rule_suite import (
    TIGHT,
    Case,
    Suite,
    any_layout,
    any_precision,
    apply_alone_casts_a_cotangent,
    assert_same,
    autocast_keeps_gradients_float32,
    draw,
    finite_differences_on_generated_shapes,
    gradient,
    inputs_and_output_stay_apart,
    keeps_no_more_than_torch,
    keeps_what_entered,
    nan_and_infinity_go_where_torchs_go,
    narrow_numbers_are_as_near_as_torchs,
    outcome,
    random,
    refuses_by_name,
    second_gradient,
    some,
    torch_on_generated_shapes,
    torchs_second_gradients,
    torchs_second_gradients_of_whatever_is_asked_for,
    torchs_values_and_gradients,
    vjp_alone_is_torchs_and_none_where_not_asked_for,
    vmap_equals_a_loop,
)
from rule_twins import (
    coarse,
    doubled,
    eager,
    mutant,
    severed,
    sound,
    spoiled,
    twin,
    unchecked,
    unsteady,
    viewing,
)
from test_rules_attention import suite as attention_suite
from test_rules_conv import suite as conv_suite
from test_rules_loss import suite as loss_suite
from test_rules_mixing import suite as mixing_suite
from test_rules_norm import suite as norm_suite
from test_rules_pool import suite as pool_suite
from test_rules_recurrent import suite as recurrent_suite
from test_rules_shape import suite as shape_suite
from torch.nn.functional import cross_entropy, linear
from torch.testing import assert_close

from bpdiag.rules import ACTIVATIONS, RULES, Activation
from bpdiag.rules.activation import LeakyRelu, Prelu, Relu, Sigmoid, Tanh
from bpdiag.rules.linear import Linear
from bpdiag.rules.loss import CrossEntropy

INF, NAN = math.inf, math.nan
POINTS = [-43, -1, -0.0, 0, 1e-3, 1, 43, INF, -INF, NAN]
EXACT = {"rtol": 1e-15, "atol": 0, "equal_nan": True}  # the last bit: the order of two products


def activation_inputs(seed=0, shape=(4, 3)):
    z = torch.randn(shape, generator=random(seed), dtype=torch.float64)
    return (z + 0.1 * z.sign(),)


def prelu_inputs(seed=0, shape=(4, 3)):
    return *activation_inputs(seed, shape), torch.full((1,), 0.2 + 0.1 * seed, dtype=torch.float64)


def linear_inputs(seed=0, shape=(4, 3)):
    one = random(seed)
    return tuple(torch.randn(s, generator=one, dtype=torch.float64) for s in (shape, (2, shape[-1]), (2,)))


def loss_inputs(seed=0, shape=(4, 5)):
    one = random(seed)
    return torch.randn(shape, generator=one, dtype=torch.float64), torch.randint(shape[1], shape[:1], generator=one)


def size(seed):
    r = Random(seed)
    return some(r, seed % 5, 0, 1, 2, 3, 3)


def activation_shapes(seed):
    return draw(size(seed), seed=seed), {}


def prelu_shapes(seed):
    shape = size(seed)
    channels = shape[1] if len(shape) > 1 and shape[1] and seed % 3 == 0 else 1
    return draw(shape, (channels,), seed=seed), {}


def linear_shapes(seed):
    r = Random(seed)
    n_in, n_out = r.choice((1, 2, 5)), r.choice((1, 2, 4))
    x, W, b = draw((*size(seed), n_in), (n_out, n_in), (n_out,), seed=seed)
    return (x, W, b if r.random() < 0.7 else None), {}


def loss_shapes(seed):
    r = Random(seed)
    return loss_inputs(seed, (r.choice((0, 1, 2, 5)), r.choice((1, 2, 5)))), {}


CASES = {
    **{
        name: Case(rule, rule.oracle(**rule.settings), activation_inputs, generate=activation_shapes)
        for name, rule in ACTIVATIONS.items()
    },
    # torch's own hardsigmoid takes 1/6 in float32: its other spelling is exact
    "hardsigmoid": Case(
        ACTIVATIONS["hardsigmoid"],
        lambda z: torch.nn.functional.relu6(z + 3) / 6,
        activation_inputs,
        generate=activation_shapes,
    ),
    # torch's module holds its slope in float32; without one given it begins at 1/4
    "prelu": Case(
        ACTIVATIONS["prelu"],
        lambda z, p=None: torch.nn.functional.prelu(z, z.new_full((1,), 0.25) if p is None else p),
        prelu_inputs,
        generate=prelu_shapes,
    ),
    "linear": Case(Linear, linear, linear_inputs, generate=linear_shapes),
    "cross_entropy": Case(CrossEntropy, cross_entropy, loss_inputs, generate=loss_shapes),
}


# ---- twins: one fault each ----


class SoundTanh(Tanh):  # no fault: it must pass, so that a twin fails by its fault and not by being a twin
    forward = Tanh.forward
    vjp = Tanh.vjp


class SignTanh(Tanh):
    forward = Tanh.forward

    def vjp(g_a, a):
        return g_a * (1 + a * a)


class DroppedSigmoid(Sigmoid):
    forward = Sigmoid.forward

    def vjp(g_a, a):
        return g_a * a  # (1 - a) is dropped


class SignLeakyRelu(LeakyRelu):
    forward = LeakyRelu.forward

    def vjp(g_a, a):
        return torch.where(a > 0, g_a, -0.01 * g_a)


class SignPrelu(Prelu):  # what it learns goes uphill
    forward = Prelu.forward
    vjp = Prelu.vjp

    @classmethod
    def pull_back(cls, g, kept, needs):
        g_z, *g_p = Prelu.pull_back.__func__(cls, g, kept, needs)
        return g_z, *(t if t is None else -t for t in g_p)


class ProductPrelu(Prelu):  # g_p a product where torch selects: inf * 0
    forward = Prelu.forward
    vjp = Prelu.vjp

    @classmethod
    def pull_back(cls, g, kept, needs):
        z, p = kept
        return cls.vjp(g, z, p), (g * torch.clamp_max(z, 0)).sum().view_as(p) if needs[1] else None


class OpenRelu(Relu):  # the other side's slope at the kink
    forward = Relu.forward

    def vjp(g_a, a):
        return torch.where(a < 0, 0.0, g_a)


class ProductRelu(Relu):  # a product where torch selects: inf * 0
    forward = Relu.forward

    def vjp(g_a, a):
        return g_a * (a > 0)


class UndeclaredRelu(Relu):  # neither kink nor r said
    forward = Relu.forward
    kinks = {}  # noqa: RUF012
    r = 1.0


class GreedyTanh(Tanh):  # keeps z without need
    forward = Tanh.forward

    @classmethod
    def keeps(cls, inputs, output, *needs):
        return output, inputs[0]

    def vjp(g_a, a, z=None):
        return g_a * (1 - a * a)


class InPlaceRelu(Relu):
    def forward(z):
        return z.detach().clamp_min_(0)

    vjp = Relu.vjp


class SignLinear(Linear):
    forward = Linear.forward

    def vjp(g_z, x, W, needs=(True, True, True)):
        g_x, g_W, g_b = Linear.vjp(g_z, x, W, needs)
        return g_x, g_W if g_W is None else -g_W, g_b


class DroppedLinear(Linear):  # the sum over the batch became a mean
    forward = Linear.forward

    def vjp(g_z, x, W, needs=(True, True, True)):
        g_x, g_W, _ = Linear.vjp(g_z, x, W, needs)
        return g_x, g_W, g_z.reshape(-1, g_z.shape[-1]).mean(0) if needs[2] else None


class EagerLinear(Linear):  # computes what nobody asked for
    forward = Linear.forward

    def vjp(g_z, x, W, needs=(True, True, True)):
        return Linear.vjp(g_z, x, W)


class GreedyLinear(Linear):
    forward = Linear.forward

    @classmethod
    def keeps(cls, inputs, output, *needs):
        return inputs[0], inputs[1], output

    def vjp(g_z, x, W, z, needs=(True, True, True)):
        return Linear.vjp(g_z, x, W, needs)


class SignCrossEntropy(CrossEntropy):
    forward = CrossEntropy.forward

    def vjp(g_C, z, y, needs=(True, False)):
        onehot = y.unsqueeze(-1) == torch.arange(z.shape[-1])
        return g_C * (torch.softmax(z, -1) + onehot.to(z.dtype)) / len(z), None


class DroppedCrossEntropy(CrossEntropy):
    forward = CrossEntropy.forward

    def vjp(g_C, z, y, needs=(True, False)):
        return g_C * torch.softmax(z, -1) / len(z), None


class NaiveCrossEntropy(CrossEntropy):  # overflows, broadcasts, and takes any class for the nearest
    def forward(z, y):
        right = z.gather(-1, y.clamp(0, z.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
        return (z.exp().sum(-1).log() - right).mean()

    vjp = CrossEntropy.vjp


WRONG_ACTIVATIONS = [SignTanh, DroppedSigmoid, SignLeakyRelu]
WRONG = [*WRONG_ACTIVATIONS, SignPrelu, SignLinear, DroppedLinear, SignCrossEntropy, DroppedCrossEntropy]


def flipped(rule):
    return twin(rule, "uphill", vjp=lambda g, *kept: -rule.vjp(g, *kept))


def tilted(rule):
    """A slope off by a factor that grows with what was kept."""
    return twin(rule, "tilted", vjp=lambda g, *kept: rule.vjp(g, *kept) * (1 + kept[0] / 8))


def unasked(rule):
    """Computes g_z whatever is asked for."""
    return type(
        "Unasked",
        (rule,),
        {"forward": rule.forward, "pull_back": classmethod(lambda cls, g, kept, needs: (cls.vjp(g, *kept),))},
    )


LINEAR = [
    mutant("linear", "g_x transposed", "torch.matmul(g_z, W) if", "torch.matmul(g_z, W.flip(0)) if"),
    mutant("linear", "g_x of the wrong sign", "torch.matmul(g_z, W) if", "torch.matmul(-g_z, W) if"),
    mutant(
        "linear", "samples in another order", "torch.matmul(rows.t(), x_rows)", "torch.matmul(rows.t(), x_rows.flip(0))"
    ),
    mutant("linear", "g_b of one sample", "rows.sum(0) if", "rows[:1].sum(0) if"),
    mutant("linear", "b dropped", "nn.functional.linear(x, W, b)", "nn.functional.linear(x, W)"),
]
LOSS = [
    mutant("cross_entropy", "a sum", "gather(1, y.unsqueeze(1)).mean()", "gather(1, y.unsqueeze(1)).sum()"),
    mutant("cross_entropy", "not divided", "to(z.dtype)) / z.shape[0]", "to(z.dtype))"),
    mutant("cross_entropy", "divided by the classes", "to(z.dtype)) / z.shape[0]", "to(z.dtype)) / z.shape[1]"),
    mutant("cross_entropy", "softmax over the batch", "torch.softmax(z, -1) - onehot", "torch.softmax(z, 0) - onehot"),
    mutant("cross_entropy", "g_C dropped", "return g_C * (torch", "return (torch"),
]
MUTANTS = [
    *map(flipped, ACTIVATIONS.values()),
    *[tilted(rule) for name, rule in ACTIVATIONS.items() if name != "identity"],
    *[*WRONG, spoiled(Linear, "g_W mirrored", 1, lambda g: g.flip(-1)), *LINEAR, *LOSS],
]


# ---- the suite: check -> the rules it holds for, the twins it catches ----

suite = Suite(CASES, MUTANTS)
check = suite.check
FAULTY = [SignTanh, DroppedSigmoid, SignLinear, DroppedLinear, SignCrossEntropy, DroppedCrossEntropy]
UNASKED, GREEDY = [unasked(Tanh), EagerLinear, eager(CrossEntropy)], [GreedyTanh, GreedyLinear]
for function, twins in {
    gradient: WRONG,
    second_gradient: [SignTanh, DroppedSigmoid, unsteady(Linear), unsteady(CrossEntropy)],
    torchs_values_and_gradients: WRONG,
    torchs_second_gradients: FAULTY,
    torch_on_generated_shapes: WRONG,
    torchs_second_gradients_of_whatever_is_asked_for: [*WRONG, severed(Linear)],
    finite_differences_on_generated_shapes: WRONG,
    vjp_alone_is_torchs_and_none_where_not_asked_for: [*WRONG, *UNASKED],
    keeps_no_more_than_torch: GREEDY,
    vmap_equals_a_loop: WRONG,
    autocast_keeps_gradients_float32: WRONG,
    any_layout: WRONG,
    any_precision: WRONG,
    narrow_numbers_are_as_near_as_torchs: [coarse(Linear), coarse(CrossEntropy)],
    apply_alone_casts_a_cotangent: [doubled(Linear), doubled(CrossEntropy)],
    inputs_and_output_stay_apart: [InPlaceRelu, viewing(Linear)],
    refuses_by_name: [unchecked(Linear, linear), unchecked(CrossEntropy, cross_entropy)],
}.items():
    check(CASES, catches=twins)(function)
SUITES = (
    suite, conv_suite, norm_suite, pool_suite, shape_suite, loss_suite, mixing_suite, attention_suite, recurrent_suite,
)  # fmt: skip
CHECKS = (suite.checks.keys() | {nan_and_infinity_go_where_torchs_go}) - {keeps_no_more_than_torch}
check(["linear", "cross_entropy"], catches=WRONG[-4:])(nan_and_infinity_go_where_torchs_go)


@check(ACTIVATIONS, catches=[*WRONG_ACTIVATIONS, OpenRelu])
def torchs_at_kinks_zero_and_infinity(case):
    z = torch.tensor([*POINTS, *case.rule.kinks], dtype=torch.float64)
    tolerance = EXACT
    if case.rule.name == "softsign":  # torch composes it: inf/inf is nan, and its sum cancels; ours has the limit
        z, tolerance = z[~z.isinf()], {**EXACT, "rtol": 1e-14}
    for g in (1.0, -2.5, 0.0):
        assert_same(case, (z,), torch.full_like(z, g), **tolerance)


@check(
    [name for name in ACTIVATIONS if ACTIVATIONS[name].kinks],
    catches=[SignLeakyRelu, OpenRelu, ProductRelu, ProductPrelu],
)
def torchs_select_for_a_cotangent_not_finite(case):
    z = torch.tensor([*POINTS, *case.rule.kinks], dtype=torch.float64)
    learned = [z.new_full((1,), start) for start in case.rule.learnable.values()]
    for g in (INF, -INF, NAN):
        assert_same(case, (z,), torch.full_like(z, g), **EXACT)
        for point in z.split(1) if learned else ():  # one by one: in a sum one nan would hide the others
            assert_same(case, (point, *learned), torch.full_like(point, g), **EXACT)


def oracle_slope(case, z):
    return outcome(case.oracle, (z,), torch.ones_like(z))[1]


@check(ACTIVATIONS, catches=[SignLeakyRelu, OpenRelu])
def slope_at_a_kink_is_the_tables(case):
    for z, slope in case.rule.kinks.items():
        for zero in {z, -z} if z == 0 else {z}:
            point = torch.tensor([zero], dtype=torch.float64)
            out, g_z = outcome(case.rule.apply, (point,), torch.ones(1, dtype=torch.float64))
            assert g_z.item() == slope
            assert case.rule.slope(out if case.rule.saves == "output" else point).item() == slope


@check(ACTIVATIONS, catches=[UndeclaredRelu])
def the_table_has_every_kink_and_no_other(case):
    z = torch.linspace(-8, 8, 16_001, dtype=torch.float64) + 0.5e-3  # never on a round number
    slope = oracle_slope(case, z)
    jumps = z[:-1][slope.diff().abs() > 0.05]
    assert [round(z.item(), 2) + 0 for z in jumps] == sorted(case.rule.kinks)


@check(ACTIVATIONS, catches=[SignTanh, DroppedSigmoid])
def largest_slope_is_the_supremum(case):
    z = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    ours = outcome(case.rule.apply, (z,), torch.ones_like(z))[1]
    for slope in (ours, oracle_slope(case, z)):
        assert slope.abs().max().item() == pytest.approx(case.rule.largest_slope, rel=1e-6)
        assert slope.abs().max().item() <= case.rule.largest_slope * (1 + 1e-15)


@check(ACTIVATIONS, catches=[UndeclaredRelu])
def r_is_of_the_relu_kind_or_one(case):
    # of the relu kind: about half of a gradient passes at a small preactivation, all of it at a large one of one sign
    left, right, *large = oracle_slope(case, torch.tensor([-1e-9, 1e-9, 4.5, -4.5], dtype=torch.float64)).tolist()
    relu_kind = abs((left + right) / 2 - 0.5) < 0.15 and abs(max(large) - 1) < 0.05
    assert case.rule.r == pytest.approx(1 / math.sqrt(2) if relu_kind else 1.0, abs=1e-15)


@check(ACTIVATIONS, catches=WRONG_ACTIVATIONS)
def any_shape(case):
    for shape in ((), (0,), (2, 0, 3), (7,), (2, 3, 4, 5)):
        assert_same(case, case.inputs(shape=shape))


@check(["linear"], catches=[SignLinear, DroppedLinear])
def every_batch_dimension_counts_and_may_be_empty(case):
    for shape in ((3,), (5, 3), (2, 5, 3), (2, 3, 4, 3), (0, 3), (2, 0, 3)):
        assert_same(case, case.inputs(shape=shape))


@check(["linear"], catches=[SignLinear])
def the_bias_may_be_absent(case):
    x, W, _ = case.inputs()
    ours, theirs = (outcome(lambda x, W, f=f: f(x, W, None), (x, W)) for f in (case.rule.apply, case.oracle))
    assert_close(ours, theirs, **TIGHT)


@check(["cross_entropy"], catches=[SignCrossEntropy, DroppedCrossEntropy])
def rows_of_the_cotangent_sum_to_zero(case):
    _, g_z = outcome(case.rule.apply, case.inputs(), torch.tensor(1.0, dtype=torch.float64))
    assert_close(g_z.sum(-1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-15)


@check(["cross_entropy"], catches=[SignCrossEntropy, DroppedCrossEntropy])
def norm_of_the_cotangent_when_nothing_is_known(case):
    for B, K in ((1, 2), (6, 10), (64, 10)):
        z, y = torch.full((B, K), 3.0, dtype=torch.float64), torch.arange(B) % K
        C, g_z = outcome(case.rule.apply, (z, y), torch.tensor(1.0, dtype=torch.float64))
        assert C.item() == pytest.approx(math.log(K), rel=1e-14)
        assert g_z.norm().item() == pytest.approx(math.sqrt((K - 1) / K) / math.sqrt(B), rel=1e-14)


@check(["cross_entropy"], catches=[NaiveCrossEntropy])
def large_logits_stay_finite(case):
    for z in ([[1e4, -1e4, 0.0]], [[1e4, 1e4, 1e4]], [[-1e4, -1e4, -1e4]]):
        for y in range(3):
            inputs = torch.tensor(z, dtype=torch.float64), torch.tensor([y])
            assert all(t.isfinite().all() for t in outcome(case.rule.apply, inputs))
            assert_same(case, inputs)


@check(["cross_entropy"], catches=[NaiveCrossEntropy])
def infinite_logits_as_in_torch(case):
    for row in itertools.product((0.0, 1e4, INF, -INF, NAN), repeat=3):
        inputs = torch.tensor([row], dtype=torch.float64), torch.tensor([0])
        assert_same(case, inputs, torch.tensor(1.0, dtype=torch.float64))


@check(["cross_entropy"], catches=[NaiveCrossEntropy])
def a_class_out_of_range_is_an_index_error(case):
    for y in (5, -1, -100, 2**40):
        with pytest.raises(IndexError):
            case.rule.apply(torch.zeros(2, 5), torch.tensor([0, y]))


@check(["cross_entropy"], catches=[NaiveCrossEntropy])
def shapes_that_do_not_fit_are_refused_or_meant_as_in_torch(case):
    for logits, classes in (((2, 4), (1,)), ((3, 4), (2,)), ((4,), ()), ((2, 4, 5), (2, 4)), ((2, 4), (2, 1))):
        inputs = activation_inputs(shape=logits)[0], torch.ones(classes, dtype=torch.int64)
        try:
            theirs = outcome(case.oracle, inputs)
        except (ValueError, RuntimeError):
            with pytest.raises((ValueError, RuntimeError, IndexError)):
                case.rule.apply(*inputs)
            continue
        try:
            ours = outcome(case.rule.apply, inputs)
        except (ValueError, RuntimeError, IndexError):
            continue
        assert_close(ours, theirs, **TIGHT)


# ---- the suite is run ----


@suite.rules
def test_rule(function, name):
    suite.run(function, name)


@suite.twins
def test_twin_is_caught(function, twin):
    suite.assert_caught(function, twin)


@suite.mutants
def test_mutants_are_caught(mutants):
    assert suite.missed(mutants) == []


@pytest.mark.parametrize("rule", [SoundTanh, sound(Linear), sound(CrossEntropy)])
def test_a_sound_twin_passes(rule):
    suite.assert_sound(rule)


def test_every_check_catches_a_twin():
    for one in SUITES:
        assert all(catches for _, catches in one.checks.values())
        assert one.checks.keys() >= CHECKS
        assert one.checks.keys() & {keeps_no_more_than_torch, keeps_what_entered}


def test_the_table_is_whole():
    cases = [(name, case.rule) for one in SUITES for name, case in one.cases.items()]
    assert dict(cases) == RULES
    assert len(cases) == len(RULES) + 1  # cross_entropy has two: plain, and with all its settings
    assert all(rule.name == name for name, rule in cases)
    assert all(issubclass(rule, Activation) for rule in ACTIVATIONS.values())


ALL_MUTANTS = [mutant for one in SUITES for mutant in one.all_mutants]


@pytest.mark.parametrize("mutants", [pytest.param(ALL_MUTANTS, id=f"{len(ALL_MUTANTS)} of {len(RULES)} rules")])
def test_every_rule_has_mutants(mutants):
    assert {mutant.name for mutant in mutants} == RULES.keys()
    assert len({mutant.__name__ for mutant in mutants}) == len(mutants)
