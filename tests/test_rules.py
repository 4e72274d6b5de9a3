"""One suite over the table RULES, and twins (rules with one fault) that each check of it must catch."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.nn.functional import cross_entropy, linear
from torch.testing import assert_close

from bpdiag.rules import ACTIVATIONS, RULES, Activation, Rule
from bpdiag.rules.activation import LeakyRelu, Prelu, Relu, Sigmoid, Tanh
from bpdiag.rules.linear import Linear
from bpdiag.rules.loss import CrossEntropy

torch.set_num_threads(1)

INF, NAN = math.inf, math.nan
POINTS = [-43, -1, -0.0, 0, 1e-3, 1, 43, INF, -INF, NAN]
TIGHT = {"rtol": 1e-14, "atol": 1e-14, "equal_nan": True}
EXACT = {"rtol": 1e-15, "atol": 0, "equal_nan": True}  # the last bit: the order of two products


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)  # gradcheck draws from the global generator


@dataclass(frozen=True)
class Case:
    """A rule, torch's own function, and inputs for both, float64 and away from kinks."""

    rule: type[Rule]
    oracle: Callable
    inputs: Callable


def random(seed):
    return torch.Generator().manual_seed(seed)


def activation_inputs(seed=0, shape=(4, 3)):
    z = torch.randn(shape, generator=random(seed), dtype=torch.float64)
    return (z + 0.1 * z.sign(),)


def prelu_inputs(seed=0, shape=(4, 3)):
    return *activation_inputs(seed, shape), torch.full((1,), 0.2 + 0.1 * seed, dtype=torch.float64)


def linear_inputs(seed=0, shape=(4, 3)):
    one = random(seed)
    return tuple(torch.randn(s, generator=one, dtype=torch.float64) for s in (shape, (2, shape[-1]), (2,)))


def loss_inputs(seed=0):
    one = random(seed)
    return torch.randn(4, 5, generator=one, dtype=torch.float64), torch.randint(5, (4,), generator=one)


CASES = {
    **{name: Case(rule, rule.oracle(**rule.settings), activation_inputs) for name, rule in ACTIVATIONS.items()},
    # torch's own hardsigmoid takes 1/6 in float32: its other spelling is exact
    "hardsigmoid": Case(ACTIVATIONS["hardsigmoid"], lambda z: torch.nn.functional.relu6(z + 3) / 6, activation_inputs),
    # torch's module holds its slope in float32; without one given it begins at 1/4
    "prelu": Case(
        ACTIVATIONS["prelu"],
        lambda z, p=None: torch.nn.functional.prelu(z, z.new_full((1,), 0.25) if p is None else p),
        prelu_inputs,
    ),
    "linear": Case(Linear, linear, linear_inputs),
    "cross_entropy": Case(CrossEntropy, cross_entropy, loss_inputs),
}
OTHERS = [name for name in CASES if name not in ACTIVATIONS]


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


# ---- the suite: check -> the rules it holds for, the twins it catches ----

CHECKS = {}


def check(over, catches):
    def register(function):
        CHECKS[function] = (list(over), catches)
        return function

    return register


def leaves(inputs):
    return tuple(t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs)


def floats(tensors):
    return tuple(t for t in tensors if t.is_floating_point())


def cotangent_of(out, seed=7):
    return torch.randn(out.shape, generator=random(seed), dtype=torch.float64).to(out.dtype)


def outcome(function, inputs, cotangent=None):
    """Output and gradients; of the floating-point inputs as they are, strides included."""
    inputs = tuple(t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs)
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(
        out, floats(inputs), cotangent_of(out) if cotangent is None else cotangent
    )


def assert_same(case, inputs, cotangent=None, **tolerance):
    ours, theirs = (outcome(f, inputs, cotangent) for f in (case.rule.apply, case.oracle))
    assert_close(ours, theirs, **(tolerance or TIGHT))


@check(CASES, catches=WRONG)
def gradient(case):
    assert gradcheck(case.rule.apply, leaves(case.inputs()), check_batched_grad=True)


@check(CASES, catches=[SignTanh, DroppedSigmoid])
def second_gradient(case):
    assert gradgradcheck(case.rule.apply, leaves(case.inputs()), check_batched_grad=True)


@check(CASES, catches=WRONG)
def torchs_values_and_gradients(case):
    for seed in range(3):
        assert_same(case, case.inputs(seed))


@check(CASES, catches=[SignTanh, DroppedSigmoid, SignLinear, DroppedLinear, SignCrossEntropy, DroppedCrossEntropy])
def torchs_second_gradients(case):
    def twice(function):
        inputs = leaves(case.inputs())
        out = function(*inputs)
        g = cotangent_of(out).requires_grad_()
        once = torch.autograd.grad(out, floats(inputs), g, create_graph=True)
        loss = sum((t * cotangent_of(t)).sum() for t in once) + (out * cotangent_of(out)).sum()
        return torch.autograd.grad(loss, (*floats(inputs), g))

    assert_close(twice(case.rule.apply), twice(case.oracle), **TIGHT)


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


def kept_bytes(function, inputs):
    sizes = []

    def pack(t):
        sizes.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(*inputs)
    return sum(sizes)


@check(CASES, catches=[GreedyTanh, GreedyLinear])
def keeps_no_more_than_torch(case):
    assert kept_bytes(case.rule.apply, leaves(case.inputs())) <= kept_bytes(case.oracle, leaves(case.inputs()))


@check(CASES, catches=[GreedyTanh, GreedyLinear])
def keeps_no_more_than_torch_when_inputs_are_frozen(case):
    inputs = case.inputs()
    for needs in itertools.product((False, True), repeat=len(floats(inputs))):
        some = tuple(t.clone().requires_grad_(n) for t, n in zip(floats(inputs), needs, strict=True))
        some += inputs[len(some) :]
        assert kept_bytes(case.rule.apply, some) <= kept_bytes(case.oracle, some), needs


@check(CASES, catches=WRONG)
def vmap_equals_a_loop(case):
    members = [case.inputs(seed) for seed in range(3)]
    stack = tuple(torch.stack(ts, 0) for ts in zip(*members, strict=True))
    argnums = tuple(i for i, t in enumerate(stack) if t.is_floating_point())

    def loss(function):
        return lambda *inputs: function(*inputs).square().sum()

    def loop(inputs, dims):
        one = [tuple(t if d is None else t.select(d, k) for t, d in zip(inputs, dims, strict=True)) for k in range(3)]
        out = torch.stack([case.oracle(*member) for member in one])
        grads = []
        for member in map(leaves, one):
            grads.append(torch.autograd.grad(loss(case.oracle)(*member), floats(member)))
        return out, tuple(torch.stack(g) for g in zip(*grads, strict=True))

    def mapped(inputs, dims):
        vmap, grad = torch.func.vmap, torch.func.grad
        return (
            vmap(case.rule.apply, in_dims=dims)(*inputs),
            vmap(grad(loss(case.rule.apply), argnums=argnums), in_dims=dims)(*inputs),
        )

    last = tuple(t.movedim(0, -1) for t in stack)  # the members' dimension may stand anywhere
    shared = (stack[0], *(t[0] for t in stack[1:]))  # ... and be missing from all inputs but one
    n = len(stack)
    for inputs, dims in ((stack, (0,) * n), (last, (-1,) * n), (shared, (0,) + (None,) * (n - 1))):
        assert_close(mapped(inputs, dims), loop(inputs, dims), **TIGHT)


@check(CASES, catches=WRONG)
def autocast_keeps_gradients_float32(case):
    inputs = tuple(t.float() if t.is_floating_point() else t for t in case.inputs())
    eye = torch.eye(inputs[0].shape[-1])

    def after_a_product(function):  # bfloat16 enters a rule, whose other inputs stay float32
        return lambda x, *rest: function(x @ eye, *rest)

    exact = outcome(case.oracle, inputs)
    for wrap, inside in itertools.product((lambda f: f, after_a_product), (False, True)):

        def cast(function, wrap=wrap, inside=inside):
            own = leaves(inputs)
            with torch.autocast("cpu", torch.bfloat16):
                out = wrap(function)(*own)
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):  # the backward is run outside, as a rule
                return out.detach(), *torch.autograd.grad(out, floats(own), cotangent_of(out))

        ours, theirs = cast(case.rule.apply), cast(case.oracle)
        assert [t.dtype for t in ours] == [t.dtype for t in theirs]
        assert all(t.dtype == torch.float32 for t in ours[1:])
        assert_close(tuple(t.float() for t in ours), exact, rtol=0.02, atol=0.02)


@check(CASES, catches=WRONG)
def any_layout(case):
    inputs = case.inputs()
    for layout in (
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: t.mT.contiguous().mT if t.dim() == 2 else t,
        lambda t: t[:1].expand_as(t),
        lambda t: t[..., :1].expand_as(t) if t.is_floating_point() else t,
    ):
        assert_same(case, tuple(layout(t) for t in inputs))
    out = case.oracle(*inputs)
    assert_same(case, inputs, cotangent_of(out[..., :1] if out.dim() else out).expand_as(out))


@check(ACTIVATIONS, catches=WRONG_ACTIVATIONS)
def any_shape(case):
    for shape in ((), (0,), (2, 0, 3), (7,), (2, 3, 4, 5)):
        assert_same(case, case.inputs(shape=shape))


@check(CASES, catches=WRONG)
def any_precision(case):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)):
        inputs = tuple(t.to(dtype) if t.is_floating_point() else t for t in case.inputs())
        assert_same(case, inputs, rtol=tolerance, atol=tolerance)


@check(CASES, catches=[InPlaceRelu])
def inputs_and_output_stay_apart(case):
    inputs = leaves(case.inputs())
    before = [t.clone() for t in inputs]
    out = case.rule.apply(*inputs)
    with torch.no_grad():
        out.add_(1)
    assert all(map(torch.equal, inputs, before))


@check(["linear"], catches=[SignLinear, DroppedLinear])
def every_batch_dimension_counts_and_may_be_empty(case):
    for shape in ((3,), (5, 3), (2, 5, 3), (2, 3, 4, 3), (0, 3), (2, 0, 3)):
        assert_same(case, case.inputs(shape=shape))


@check(["linear"], catches=[SignLinear])
def the_bias_may_be_absent(case):
    x, W, _ = case.inputs()
    ours, theirs = (outcome(lambda x, W, f=f: f(x, W, None), (x, W)) for f in (case.rule.apply, case.oracle))
    assert_close(ours, theirs, **TIGHT)


@check(OTHERS, catches=[EagerLinear, SignCrossEntropy])
def vjp_honours_needs(case):
    inputs = case.inputs()
    g = cotangent_of(case.oracle(*inputs))
    whole = outcome(case.oracle, inputs, g)[1:]
    whole += (None,) * (len(inputs) - len(whole))
    for needs in itertools.product((False, True), repeat=len(inputs)):
        some = case.rule.vjp(g, *inputs[:2], needs=needs)  # x and W, or z and y
        assert len(some) == len(inputs)
        for ours, theirs, needed in zip(some, whole, needs, strict=True):
            if needed and theirs is not None:
                assert_close(ours, theirs, **TIGHT)
            else:
                assert ours is None


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

CAUGHT = (AssertionError, GradcheckError, pytest.fail.Exception)


def grid(column):
    return [
        pytest.param(function, entry, id=f"{function.__name__}-{getattr(entry, '__name__', entry)}")
        for function, columns in CHECKS.items()
        for entry in columns[column]
    ]


@pytest.mark.parametrize(("function", "name"), grid(0))
def test_rule(function, name):
    function(CASES[name])


@pytest.mark.parametrize(("function", "twin"), grid(1))
def test_twin_is_caught(function, twin):
    sound = CASES[twin.name]
    with pytest.raises(CAUGHT):
        function(replace(sound, rule=twin))


@pytest.mark.parametrize("function", [f for f, (over, _) in CHECKS.items() if "tanh" in over], ids=lambda f: f.__name__)
def test_a_sound_twin_passes(function):
    function(replace(CASES["tanh"], rule=SoundTanh))


def test_the_table_is_whole_and_every_check_catches_a_twin():
    assert all(catches for _, catches in CHECKS.values())
    assert CASES.keys() == RULES.keys()
    assert all(case.rule is RULES[name] and case.rule.name == name for name, case in CASES.items())
    assert all(issubclass(rule, Activation) for rule in ACTIVATIONS.values())
