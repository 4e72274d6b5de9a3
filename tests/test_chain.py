"""The chain rule in scalars against published and hand-computed numbers, finite differences, and exact arithmetic."""

from __future__ import annotations

import itertools
import math
import random
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest

from bpdiag.chain import SQUISHES, Chain, descend, sigmoid
from bpdiag.config import UsageError

# squish, last -> a_l, C, dC/da_l, dC/dw_l of the lesson's weights; computed by hand and again in 50 digits
TRACES = {
    ("none", "squish"): ([2, 6, 3], 1, [3, 1, 2], [3, 2, 12]),
    ("relu", "squish"): ([2, 6, 3], 1, [3, 1, 2], [3, 2, 12]),
    ("sigmoid", "squish"): (
        [0.8807971, 0.9335405, 0.6146190],
        1.919280,
        [-0.06107692, -0.3281448, -2.770762],
        [-0.006412685, -0.01793212, -0.6126728],
    ),
    ("sigmoid", "linear"): (
        [0.8807971, 0.9335405, 0.4667702],
        2.350794,
        None,
        [-0.02996275, -0.08378639, -2.862664],
    ),
    ("tanh", "squish"): (
        [0.9640276, 0.9938671, 0.4597021],
        2.372517,
        [-0.04456406, -1.214793, -3.080596],
        [-0.003148487, -0.01432033, -2.414685],
    ),
    ("tanh", "linear"): (
        [0.9640276, 0.9938671, 0.4969336],
        2.259209,
        None,
        [-0.003895632, -0.01771858, -2.987697],
    ),
}


def six_digits(x):
    return pytest.approx(x, rel=5e-7)


def some_chains(count=40, seed=0):
    """Chains of one to eight layers, of every squish, both kinds of last layer, with and without biases."""
    draw = random.Random(seed)
    for squish, last, biased in itertools.islice(
        itertools.cycle(itertools.product(SQUISHES, ("squish", "linear"), (False, True))), count
    ):
        w = [draw.uniform(-1.5, 1.5) for _ in range(draw.randint(1, 8))]
        b = [draw.uniform(-1, 1) for _ in w] if biased else ()
        yield Chain(draw.uniform(-2, 2), w, draw.uniform(-2, 2), squish, last, b)


def cost(chain, layer, by):
    w = [x + by * (i == layer) for i, x in enumerate(chain.w, 1)]
    return Chain(chain.a0, w, chain.y, chain.squish, chain.last, chain.b).forward()["C"]


def wrong(chain, swept, h=1e-5):
    """The dC/dw of a sweep that central differences do not confirm."""
    slopes = {f"dC/dw{i}": (cost(chain, i, h) - cost(chain, i, -h)) / (2 * h) for i in range(1, chain.depth + 1)}
    return [name for name, slope in slopes.items() if swept[name] != pytest.approx(slope, rel=1e-6, abs=1e-8)]


@pytest.mark.parametrize(("form", "numbers"), TRACES.items(), ids=str)
def test_the_lessons_numbers_to_six_digits(form, numbers):
    chain = Chain(squish=form[0], last=form[1])
    v, g = chain.forward(), chain.backward()
    a, C, g_a, g_w = numbers
    assert [v[f"a{i}"] for i in (1, 2, 3)] == six_digits(a)
    assert v["C"] == six_digits(C)
    assert [g[f"dC/dw{i}"] for i in (1, 2, 3)] == six_digits(g_w)
    assert g_a is None or [g[f"dC/da{i}"] for i in (1, 2, 3)] == six_digits(g_a)


def test_two_steps_of_gradient_descent():
    (_, first, second), costs, foretold = zip(*descend(Chain(), 0.01, 2), strict=True)
    g = first.backward()
    assert first.w == six_digits((1.97, 2.98, 0.38))
    assert first.forward()["C"] == six_digits(0.0532815656)
    assert [g[f"dC/dw{i}"] for i in (1, 2, 3)] == six_digits([0.522779254, 0.345595682, 2.71019771])
    assert second.w == six_digits((1.96477221, 2.97654404, 0.352898023))
    assert second.forward()["C"] == six_digits(0.00407416177)
    assert costs == six_digits((1, 0.0532815656, 0.00407416177))
    assert foretold == tuple(chain.foretold(0.01) for chain in (Chain(), first, second))


def test_a_step_takes_one_sweep(monkeypatch):
    done = {"forward": 0, "backward": 0}

    def counted(name, way):
        def counting(self, *given):
            done[name] += 1
            return way(self, *given)

        return counting

    for name in done:
        monkeypatch.setattr(Chain, name, counted(name, getattr(Chain, name)))
    assert len([*descend(Chain(), 0.01, 5)]) == 6
    assert done == {"forward": 6, "backward": 6}
    Chain().remarks(Chain().values())
    assert done == {"forward": 7, "backward": 7}
    Chain().step(0.01)  # without what is at hand: computed anew
    assert done == {"forward": 8, "backward": 8}


def test_the_sweep_agrees_with_finite_differences():
    for chain in some_chains():
        assert wrong(chain, chain.backward()) == []


@pytest.mark.parametrize("dropped", ["dC/da4", "da3/dz3", "da3/da2", "da1/dw1"])
def test_a_factor_dropped_or_a_sign_turned_is_caught(dropped, monkeypatch):
    chain = Chain(w=[1.1, -0.7, 0.9, 0.6], squish="tanh")
    factors = chain.factors()
    for mutant in (1.0, -factors[dropped]):
        f = {**factors, dropped: mutant}
        if "/dz" in dropped:  # the slope's own product
            f["da3/da2"] = mutant * chain.w[2]
        monkeypatch.setattr(Chain, "factors", lambda self, f=f: f)
        swept = chain.backward()
        monkeypatch.undo()
        assert wrong(chain, swept)


def test_the_sweep_is_each_weights_product_bit_for_bit():
    for chain in some_chains():
        f, g = chain.factors(), chain.backward()
        for layer in range(1, chain.depth + 1):
            assert g[f"dC/dw{layer}"] == math.prod(f[name] for name in chain.path(layer))


def test_the_multiplications_are_counted_as_they_are_done(monkeypatch):
    done = []

    class Counting(float):
        def __mul__(self, other):
            done.append(1)
            return Counting(float(self) * other)

    for depth in (1, 2, 3, 10):
        chain = Chain(w=[1.5] * depth)
        f = {name: Counting(x) for name, x in chain.factors().items()}
        monkeypatch.setattr(Chain, "factors", lambda self, f=f: f)
        once, apart = chain.multiplications()
        done.clear()
        chain.backward()
        assert len(done) == once
        done.clear()
        for layer in range(1, depth + 1):
            first, *rest = chain.path(layer)
            math.prod((f[name] for name in rest), start=f[first])
        assert len(done) == apart
        monkeypatch.undo()


def test_a_hundred_sigmoids_vanish_by_the_sum_of_their_logs():
    chain = Chain(w=[1.0] * 100, squish="sigmoid")
    f, g, decades = chain.factors(), chain.backward(), chain.decades()
    between = [f[f"da{k}/da{k - 1}"] for k in range(100, 1, -1)]
    assert g["dC/da1"] / g["dC/da100"] == pytest.approx(math.prod(between), rel=1e-12)
    assert decades["a1"] == pytest.approx(math.fsum(map(math.log10, between)), rel=1e-12)
    assert decades["a1"] == pytest.approx(math.log10(abs(g["dC/da1"] / g["dC/da100"])), rel=1e-12)
    assert 10 ** decades["a1"] < 1e-60


def test_the_logs_know_a_product_that_no_double_holds():
    chain = Chain(w=[1.0] * 1000, squish="sigmoid")
    f = chain.factors()
    exact = math.prod(Decimal(f[f"da{k}/da{k - 1}"]) for k in range(1000, 1, -1))
    assert chain.backward()["dC/da1"] == 0
    assert chain.decades()["a1"] == pytest.approx(float(exact.log10()), rel=1e-12)
    (told,) = chain.remarks()
    assert told.startswith("Underflow: dC/da500 is 0 though no factor is")


@pytest.mark.parametrize(
    ("chain", "told"),
    [
        (Chain(), []),
        (Chain(w=[1e200, 1e200]), ["Overflow: z2 is beyond the largest double"]),
        (Chain(w=[1e200, 1.0], squish="sigmoid", a0=1e200), ["Overflow: z1 is beyond", "Cut: da1/dz1 is exactly 0"]),
        (Chain(a0=0.0, w=[1e200] * 3), ["Overflow: dC/da1 is beyond", "a1 is 0: w2 gets nothing; likewise 1 of"]),
        (Chain(a0=0.0), ["a0 is 0: w1 gets nothing; likewise 2 of the weights above it."]),
        (Chain(a0=0.0, squish="sigmoid"), ["a0 is 0: w1 gets nothing."]),
        (Chain(a0=0.0, squish="relu", b=(0.0, 1.0, 1.0)), ["Cut: da1/dz1 is exactly 0", "a1 is 0: w2 gets nothing."]),
        (Chain(a0=1e-200, w=[-460.0, 1.0], squish="sigmoid", b=(-460.0, 0.0)), ["da1/dw1 is 0: w1 gets nothing."]),
        (Chain(a0=-1.0, w=[1.0], squish="relu"), ["Cut: da1/dz1 is exactly 0: nothing of the cost reaches w1."]),
        (
            Chain(w=[1.0, 0.0, 1.0]),
            ["Cut: da2/da1 is exactly 0: nothing of the cost reaches w1.", "a2 is 0: w3 gets nothing."],
        ),
        (Chain(w=[1.0, 1.0, 0.0]), ["Cut: da3/da2 is exactly 0: nothing of the cost reaches w2 or any"]),
        (Chain(w=[1.0, 60.0], squish="sigmoid"), []),  # a2 rounds to 1, its slope does not to 0
        (Chain(w=[1.0, 1100.0], squish="sigmoid"), ["Cut: da2/dz2 is exactly 0"]),  # e^-804 is no double
        (Chain(y=3.0), ["a3 is what it should be"]),
    ],
    ids=lambda x: "" if isinstance(x, list) else None,
)
def test_what_leaves_a_doubles_range_or_lets_nothing_pass_is_told(chain, told):
    remarks = chain.remarks()
    assert len(remarks) == len(told)
    assert all(remark.startswith(start) for remark, start in zip(remarks, told, strict=True))


@pytest.mark.parametrize(("squish", "slope"), [("none", 1.0), ("sigmoid", 0.25), ("tanh", 1.0), ("relu", 0.0)])
def test_slopes_at_zero_and_far_out(squish, slope):
    rule = SQUISHES[squish]
    assert rule.slope(0.0) == slope
    for z in (-800.0, -43.0, -1.0, -0.0, 1e-3, 1.0, 43.0, 800.0, math.inf, -math.inf):
        assert 0 <= rule.slope(z) <= 1
    assert math.isnan(rule.forward(math.nan))


def to_350_digits(squish, z):
    """a (1 - a) of sigmoid, 1 - a^2 of tanh: as written, with digits to spare for what 1 - a loses up to e^-700."""
    with localcontext() as context:
        context.prec = 350
        if squish == "sigmoid":
            a = 1 / (1 + Decimal(-z).exp())
            return float(a * (1 - a))
        e = Decimal(-2 * z).exp()
        a = (1 - e) / (1 + e)
        return float(1 - a * a)


@pytest.mark.parametrize(("squish", "far"), [("sigmoid", 700.0), ("tanh", 350.0)])
def test_slopes_of_saturated_units_to_the_last_digits(squish, far):
    rule = SQUISHES[squish]
    draw = random.Random(0)
    for z in (1e-9, 0.5, 1.0, 3.0, 18.0, 19.0, 30.0, 37.0, 60.0, far, *(draw.uniform(0, far) for _ in range(20))):
        assert rule.slope(z) == rule.slope(-z) == pytest.approx(to_350_digits(squish, z), rel=1e-14, abs=0)
    a = rule.forward(30.0)  # told from what came out, few digits are right
    assert (a * (1 - a) if squish == "sigmoid" else 1 - a * a) != pytest.approx(rule.slope(30.0), rel=1e-4, abs=0)


def test_a_saturated_units_number_is_the_same_on_either_side():
    for w, slope in ((30.0, 9.357623e-14), (60.0, 8.756511e-27)):
        for sign in (1, -1):
            factors = Chain(w=[sign * w], squish="sigmoid").factors()
            assert factors["da1/dw1"] == pytest.approx(slope, rel=5e-7, abs=0)


def test_sigmoid_in_exact_arithmetic():
    for z in (-3, -1, 0, 1, 3):
        assert sigmoid(z) == pytest.approx(float(1 / (1 + Fraction(math.exp(-z)))), rel=1e-15)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"squish": "tanhh"}, "did you mean 'tanh'"),
        ({"last": "linaer"}, "did you mean 'linear'"),
        ({"w": ()}, "no weight"),
        ({"b": (1.0,)}, "b: 1 numbers for 3 layers"),
        ({"w": "2,3"}, "w: '2,3' is not a list of numbers"),
        ({"w": 2.0}, "w: 2.0 is not a list of numbers"),
        ({"w": (2.0, "3")}, "w: '3' is not a number"),
        ({"a0": None}, "a0: None is not a number"),
    ],
)
def test_a_chain_that_cannot_be_is_refused(asked, message):
    with pytest.raises(UsageError, match=message):
        Chain(**asked)


@pytest.mark.parametrize("layer", [0, -1, 4])
def test_a_path_from_no_layer_is_refused(layer):
    with pytest.raises(UsageError, match=f"layer={layer}: the chain has layers 1 to 3"):
        Chain().path(layer)


def test_chains_of_the_same_numbers_are_equal_and_keep_theirs():
    w = [2, 3, 0.5]
    chain = Chain(w=w)
    w[0] = 7
    assert chain == Chain()
    assert hash(chain) == hash(Chain())
    assert chain.w == (2.0, 3.0, 0.5)


# ---- nets of several units: a sum of paths, and each path is a chain ----------------------------------------


class Mazur:
    """Two inputs, two hidden, two outputs, sigmoid; E = 1/2 sum of (t - o)^2; biases fixed.

    Every path x_i -> h_j -> o_k is a Chain whose b brings what the other paths bring.  Source: M. Mazur, A Step by
    Step Backpropagation Example, 2015.
    """

    x, t, b1, b2, lr = (0.05, 0.10), (0.01, 0.99), 0.35, 0.60, 0.5
    W1, W2 = ((0.15, 0.20), (0.25, 0.30)), ((0.40, 0.45), (0.50, 0.55))

    def path(self, W1, W2, i, j, k):
        h = [sigmoid(W1[n][0] * self.x[0] + W1[n][1] * self.x[1] + self.b1) for n in (0, 1)]
        others = W1[j][1 - i] * self.x[1 - i] + self.b1, W2[k][1 - j] * h[1 - j] + self.b2
        return Chain(self.x[i], (W1[j][i], W2[k][j]), self.t[k], "sigmoid", b=others)

    def error(self, W1, W2):
        return sum(self.path(W1, W2, 0, 0, k).forward()["C"] for k in (0, 1)) / 2

    def g_W2(self, W1, W2):
        return [[self.path(W1, W2, 0, j, k).backward()["dC/dw2"] / 2 for j in (0, 1)] for k in (0, 1)]

    def g_W1(self, W1, W2):
        """Paths that part at h_j add."""

        def through(i, j, k):
            return self.path(W1, W2, i, j, k).backward()["dC/dw1"] / 2

        return [[through(i, j, 0) + through(i, j, 1) for i in (0, 1)] for j in (0, 1)]

    def step(self, W, g):
        return [[w - self.lr * d for w, d in zip(row, row_g, strict=True)] for row, row_g in zip(W, g, strict=True)]


def flat(W):
    return [w for row in W for w in row]


def nine_places(x):
    return pytest.approx(x, abs=5e-10)


def test_mazurs_net_forwards():
    net = Mazur()
    paths = [net.path(net.W1, net.W2, 0, j, k).forward() for j, k in ((0, 0), (1, 1))]
    assert [v["a1"] for v in paths] == six_digits([0.593269992, 0.596884378])
    assert [v["a2"] for v in paths] == six_digits([0.751365070, 0.772928465])
    assert net.error(net.W1, net.W2) == six_digits(0.298371109)


def test_mazurs_gradients_and_step():
    net = Mazur()
    g_W1, g_W2 = net.g_W1(net.W1, net.W2), net.g_W2(net.W1, net.W2)
    assert flat(g_W2) == six_digits([0.08216704, 0.08266763, -0.02260254, -0.02274024])
    assert flat(g_W1) == nine_places([0.000438568, 0.000877135, 0.000497713, 0.000995425])
    W1, W2 = net.step(net.W1, g_W1), net.step(net.W2, g_W2)
    assert flat(W2) == six_digits([0.35891648, 0.40866619, 0.51130127, 0.56137012])
    assert flat(W1) == six_digits([0.14978072, 0.19956143, 0.24975114, 0.29950229])
    assert net.error(W1, W2) == nine_places(0.291027774)


def test_the_error_he_printed_comes_of_hidden_gradients_through_weights_already_updated():
    net = Mazur()
    W2 = net.step(net.W2, net.g_W2(net.W1, net.W2))

    def through(i, j, k):
        f = net.path(net.W1, net.W2, i, j, k).factors()
        return f["dC/da2"] * f["da2/dz2"] * W2[k][j] * f["da1/dw1"] / 2

    late = [[through(i, j, 0) + through(i, j, 1) for i in (0, 1)] for j in (0, 1)]
    assert net.error(net.step(net.W1, late), W2) == nine_places(0.291027924)
    assert flat(late) != nine_places(flat(net.g_W1(net.W1, net.W2)))


def test_mazurs_error_after_ten_thousand_steps():
    net = Mazur()
    W1, W2 = net.W1, net.W2
    for _ in range(10_000):
        W1, W2 = net.step(W1, net.g_W1(W1, W2)), net.step(W2, net.g_W2(W1, W2))
    assert net.error(W1, W2) == six_digits(3.51018778e-5)


def test_micrograds_neuron():
    """o = tanh(x1 w1 + x2 w2 + b), x = (2, 0), w = (-3, 1), from micrograd's demo notebook."""
    x, w, bias = (2.0, 0.0), (-3.0, 1.0), 6.8813735870195432
    told = []
    for i in (0, 1):
        chain = Chain(x[i], (w[i],), squish="tanh", b=(w[1 - i] * x[1 - i] + bias,))
        assert chain.forward()["a1"] == six_digits(0.70710678)
        told.append((chain.factors()["da1/da0"], chain.factors()["da1/dw1"]))
    assert told == [six_digits((-1.5, 1.0)), pytest.approx((0.5, 0.0), rel=5e-7)]


class Micrograd:
    """The expression of micrograd's README at a = -4, b = 2, with g = f / 2 + 10 / f and f = e^2.

    c = 2 (2 (a + b) + 1) + 1 - a;  d = 4 (3 (a b + b^3) + relu(b + a)) + relu(b - a);  e = c - d.  Every path from a
    or b up to e is a Chain with y = 0, so that its C is f; its last bias brings what the other paths bring.
    """

    a, b, e = -4.0, 2.0, -7.0

    def path(self, x, *w, squish="none", bias=0.0):
        enters = [bias, *[0.0] * (len(w) - 1)]
        rest = self.e - Chain(x, w, 0.0, squish, "linear", enters).forward()[f"a{len(w)}"]
        return Chain(x, w, 0.0, squish, "linear", [*enters[:-1], rest])

    def from_a(self):
        a, b = self.a, self.b
        yield from (self.path(a, 2.0, 2.0), self.path(a, 1.0, -1.0))
        yield self.path(a, b, 3.0, 4.0, -1.0)
        yield self.path(a, 1.0, 4.0, -1.0, squish="relu", bias=b)
        yield self.path(a, -1.0, -1.0, squish="relu", bias=b)

    def from_b(self):
        a, b = self.a, self.b
        yield self.path(b, 2.0, 2.0)
        yield self.path(b, a, 3.0, 4.0, -1.0)
        yield from [self.path(b, b * b, 3.0, 4.0, -1.0)] * 3  # b^3: any of the three may be the one that moves
        yield self.path(b, 1.0, 4.0, -1.0, squish="relu", bias=a)
        yield self.path(b, 1.0, -1.0, squish="relu", bias=-a)

    def slope(self, paths):
        """dg/df df/dx: paths that meet at e add."""
        f = self.e**2
        g, factors = zip(*((chain.backward(), chain.factors()) for chain in paths), strict=True)
        return (0.5 - 10 / f**2) * sum(s["dC/da1"] * f["da1/da0"] for s, f in zip(g, factors, strict=True))


def test_micrograds_graph_is_a_sum_of_paths():
    """g = 24.7041, dg/da = 138.8338, dg/db = 645.5773."""
    net = Micrograd()
    for chain in (*net.from_a(), *net.from_b()):
        f = chain.forward()["C"]
        assert f / 2 + 10 / f == pytest.approx(24.7041, abs=5e-5)
    assert net.slope(net.from_a()) == pytest.approx(138.8338, abs=5e-5)
    assert net.slope(net.from_b()) == pytest.approx(645.5773, abs=5e-5)
