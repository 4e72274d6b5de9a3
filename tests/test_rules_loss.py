"""Losses: the checks of every rule, with every reduction and setting, and mutants of the source."""

from random import Random

import pytest
import torch
from rule_suite import (
    Case,
    apply_alone_casts_a_cotangent,
    draw,
    inputs_and_output_stay_apart,
    keeps_no_more_than_torch,
    narrow_numbers_are_as_near_as_torchs,
    random,
    refuses_by_name,
    second_gradient,
    standard,
    torchs_second_gradients_of_whatever_is_asked_for,
    vjp_alone_is_torchs_and_none_where_not_asked_for,
)
from rule_twins import coarse, doubled, eager, greedy, mutant, severed, sound, spoiled, twin, unchecked, unsteady
from torch.nn import functional as F

from bpdiag.rules.loss import L1, REDUCTIONS, BceWithLogits, CrossEntropy, Huber, KlDiv, Mse, Nll, SmoothL1

PAIRS = (Mse, L1, Huber, SmoothL1)
ALL = (CrossEntropy, Nll, *PAIRS, BceWithLogits, KlDiv)


def cross_entropy_oracle(z, y, weight=None, reduction="mean", label_smoothing=0.0, ignore_index=None):
    ignored = -100 if ignore_index is None else ignore_index
    kind = {"reduction": reduction, "label_smoothing": label_smoothing}
    return F.cross_entropy(z, y, weight, ignore_index=ignored, **kind)


def nll_oracle(x, y, weight=None, reduction="mean", ignore_index=None):
    return F.nll_loss(x, y, weight, ignore_index=-100 if ignore_index is None else ignore_index, reduction=reduction)


def bce_oracle(z, y, weight=None, pos_weight=None, reduction="mean"):
    return F.binary_cross_entropy_with_logits(z, y, weight, pos_weight=pos_weight, reduction=reduction)


def kl_oracle(x, y, reduction="mean", log_target=False):
    cost = F.kl_div(x, y, reduction="none", log_target=log_target)  # torch's own mean warns
    last = {"mean": torch.mean, "sum": torch.sum, "none": lambda c: c, "batchmean": lambda c: c.sum() / len(c)}
    return last[reduction](cost)


# ---- inputs ----


def size(r):
    return [r.choice((1, 2, 3, 3)) for _ in range(r.randrange(4))]


def reduction(r, *more):
    return r.choice((*REDUCTIONS, *more))


def by_class_inputs(seed, shape=(4, 5)):
    one = random(seed)
    return torch.randn(shape, generator=one, dtype=torch.float64), torch.randint(shape[1], shape[:1], generator=one)


def class_settings(r, seed, shape):
    """Weights, and a class that does not count: one of the classes or none of them; not all samples have it."""
    weight = draw((shape[1],), seed=seed + 1)[0].abs() + 0.1 if r.random() < 0.6 else None
    return {"weight": weight, "reduction": reduction(r, "mean"), "ignore_index": r.choice((None, -100, -100, 0))}


def some_ignored(y, settings):
    if settings["ignore_index"] == -100:
        y[1::2] = -100
    if settings["ignore_index"] == 0:
        y[:1] = 1
    return y


def cross_entropy_shapes(seed):
    r = Random(seed)
    shape = r.choice((1, 3, 5)), r.choice((2, 5))
    z, y = by_class_inputs(seed, shape)
    settings = class_settings(r, seed, shape) | {"label_smoothing": r.choice((0.0, 0.1, 1.0))}
    if seed % 3 == 0:
        settings.pop("ignore_index")
        return (z, draw(shape, seed=seed + 2)[0].softmax(1)), settings
    return (z, some_ignored(y, settings)), settings


def nll_shapes(seed):
    r = Random(seed)
    shape = r.choice((1, 3, 5)), r.choice((2, 5))
    z, y = by_class_inputs(seed, shape)
    settings = class_settings(r, seed, shape)
    return (z.log_softmax(1), some_ignored(y, settings)), settings


def apart(seed, shape):
    """Two tensors whose differences are not near 0, nor near 1/2, 1 or 2."""
    r = random(seed)
    of = torch.tensor([0.2, 0.7, 1.4, 3.0], dtype=torch.float64)[torch.randint(4, shape, generator=r)]
    sign = torch.randint(2, shape, generator=r) * 2.0 - 1
    x = torch.randn(shape, generator=r, dtype=torch.float64)
    return x, x - sign * of * (1 + 0.1 * torch.rand(shape, generator=r, dtype=torch.float64))


def pair_shapes(**settings):
    def shapes(seed):
        r = Random(seed)
        chosen = {k: r.choice(of) for k, of in settings.items()}
        return apart(seed, size(r)), {"reduction": reduction(r), **chosen}

    return shapes


def bce_inputs(seed, shape=(3, 4)):
    z, y = draw(shape, shape, seed=seed)
    return 3 * z, y.sigmoid()


def bce_shapes(seed):
    r = Random(seed)
    shape = size(r)
    weights = [draw([r.choice((1, n)) for n in shape[r.choice((0, 1)) :]], seed=seed + k)[0].abs() for k in (1, 2)]
    weight, pos_weight = (w + 0.1 if r.random() < 0.6 else None for w in weights)
    return bce_inputs(seed, shape), {"weight": weight, "pos_weight": pos_weight, "reduction": reduction(r)}


def kl_inputs(seed, shape=(3, 4)):
    x, y = draw(shape, shape, seed=seed)
    return x, y.sigmoid()


def kl_shapes(seed):
    r = Random(seed)
    shape = size(r)
    log_target = seed % 2 == 0
    x, y = kl_inputs(seed, shape)
    how = {"reduction": reduction(r, *["batchmean"] * bool(shape)), "log_target": log_target}
    return (x, y.log() if log_target else y), how


WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.1, 3.0], dtype=torch.float64)
GENERAL = {"label_smoothing": 0.1, "ignore_index": 0}
CASES = {
    "cross_entropy": Case(CrossEntropy, cross_entropy_oracle, by_class_inputs, GENERAL, cross_entropy_shapes),
    "nll": Case(Nll, nll_oracle, by_class_inputs, {"ignore_index": 0}, nll_shapes),
    "mse": Case(Mse, F.mse_loss, lambda seed: apart(seed, (3, 4)), {}, pair_shapes()),
    "l1": Case(L1, F.l1_loss, lambda seed: apart(seed, (3, 4)), {}, pair_shapes()),
    "huber": Case(Huber, F.huber_loss, lambda seed: apart(seed, (3, 4)), {}, pair_shapes(delta=(0.5, 1.0, 2))),
    "smooth_l1": Case(
        SmoothL1, F.smooth_l1_loss, lambda seed: apart(seed, (3, 4)), {}, pair_shapes(beta=(0.5, 1.0, 2))
    ),
    "bce_with_logits": Case(BceWithLogits, bce_oracle, bce_inputs, {"reduction": "sum"}, bce_shapes),
    "kl_div": Case(KlDiv, kl_oracle, kl_inputs, {"reduction": "sum"}, kl_shapes),
}


# ---- mutants and twins ----

WRONG = [
    twin(
        CrossEntropy,
        "uphill",
        lambda *args, needs: tuple(t if t is None else -t for t in CrossEntropy.vjp(*args, needs=needs)),
    ),
    twin(Nll, "uphill", lambda *args, needs: tuple(t if t is None else -t for t in Nll.vjp(*args, needs=needs))),
    *[spoiled(rule, "uphill", 0, lambda g: -g) for rule in (*PAIRS, BceWithLogits, KlDiv)],
]
CE, P = "cross_entropy", "softmax(z, -1) * q.sum(-1, keepdim=True) - q)"
MUTANTS = [
    *WRONG,
    mutant(CE, "weights dropped from q", "return q if weight is None else weight * q", "return q"),
    mutant(CE, "smoothing dropped", "* t + label_smoothing / classes", "* t"),
    mutant(CE, "smoothed only", "q = (1 - label_smoothing) * t", "q = t"),
    mutant(CE, "the ignored are smoothed", "g_z.masked_fill(~counts, 0)", "g_z"),
    mutant(CE, "the ignored count", "cost if counts is None else cost.masked_fill(~counts, 0)", "cost"),
    mutant(CE, "a mean over the samples", "(w * t).sum() if reduction", "len(z) if reduction"),
    mutant(CE, "a mean over all that is smoothed", "total if counts is None else total * counts", "total"),
    mutant(CE, "q taken to sum to 1", P, "softmax(z, -1) - q)"),
    mutant(CE, "g_y without the weights", "label_smoothing) * w * torch.log", "label_smoothing) * torch.log"),
    mutant(CE, "g_y without smoothing", "((1 - label_smoothing) * w * torch", "(w * torch"),
    mutant(CE, "weights dropped", "cost if weight is None else cost * weight[right]", "cost"),
    mutant(CE, "a class too far", "log_p if weight is None else log_p * weight).sum(1)", "log_p).sum(1)"),
    mutant("nll", "weights dropped", "if weight is None else wide(weight)[right]", "if True else wide(weight)[right]"),
    mutant("nll", "the ignored learn", "w if counts is None else w * counts", "w"),
    mutant(
        "nll",
        "a mean over the samples",
        "_each(g_C, reduction, w.sum(), counts)",
        "_each(g_C, reduction, len(y), counts)",
    ),
    mutant("nll", "another class", "1, right.unsqueeze(1), g_right", "1, (right + 1).unsqueeze(1) % K, g_right"),
    mutant("mse", "half", "2 * (wide(x)", "(wide(x)"),
    mutant(
        "mse", "a sum", "functional.mse_loss(x, y, reduction=reduction)", "functional.mse_loss(x, y, reduction='sum')"
    ),
    mutant("l1", "no sign", "return torch.sign(x - y), red", "return torch.ones_like(x - y), red"),
    mutant("huber", "always one", "wide(y), -delta, delta)", "wide(y), -1, 1)"),
    mutant("huber", "one side", "wide(y), -delta, delta)", "wide(y), None, delta)"),
    mutant("huber", "delta dropped", "reduction=reduction, delta=delta)", "reduction=reduction)"),
    mutant("smooth_l1", "not divided", "torch.clamp(d / beta, -1, 1)", "torch.clamp(d, -1, 1)"),
    mutant("smooth_l1", "beta dropped", "reduction=reduction, beta=beta)", "reduction=reduction)"),
    mutant("bce_with_logits", "pos_weight dropped", "(1 - y) - v * y *", "(1 - y) - y *"),
    mutant("bce_with_logits", "pos_weight everywhere", "p * (1 - y) - v", "v * p * (1 - y) - v"),
    mutant("bce_with_logits", "weight dropped", "g_c if weight is None else", "g_c if True else"),
    mutant("bce_with_logits", "g_y of the wrong sign", "is not None else -z)", "is not None else z)"),
    mutant("bce_with_logits", "g_y without pos_weight", "- v * functional.logsig", "- functional.logsig"),
    mutant("kl_div", "1 dropped", "log_p + 1 - wide(x)", "log_p - wide(x)"),
    mutant("kl_div", "1 dropped from the logarithms", "(y - wide(x) + 1)", "(y - wide(x))"),
    mutant("kl_div", "logarithms for probabilities", "(torch.exp(y), y) if", "(y, y) if"),
    mutant("kl_div", "a mean over all", "else reduction, n)", "else reduction, y.numel())"),
    *[spoiled(rule, "g_y forgotten", 1, lambda g: 0 * g) for rule in (*PAIRS, BceWithLogits)],
]


suite = standard(
    CASES,
    MUTANTS,
    wrong=WRONG,
    also={
        second_gradient: [unsteady(rule) for rule in ALL],
        torchs_second_gradients_of_whatever_is_asked_for: [
            severed(CrossEntropy),
            severed(BceWithLogits),
            severed(KlDiv),
        ],
        vjp_alone_is_torchs_and_none_where_not_asked_for: [eager(rule) for rule in (Nll, *PAIRS, BceWithLogits)],
        keeps_no_more_than_torch: [greedy(rule) for rule in (BceWithLogits, Mse)],
        inputs_and_output_stay_apart: [
            mutant(
                "mse",
                "x changed",
                "    return functional.mse_loss(x",
                "    x.detach().add_(1)\n        return functional.mse_loss(x",
            )
        ],
        narrow_numbers_are_as_near_as_torchs: list(map(coarse, ALL)),
        apply_alone_casts_a_cotangent: list(map(doubled, ALL)),
        refuses_by_name: [unchecked(Mse, lambda x, y, reduction: (x - y).square().mean())],
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


# ---- alone ----


def test_a_smooth_l1_of_beta_0_is_the_l1():
    x, y = draw((3, 4), (3, 4))
    g = torch.tensor(1.0).double()
    assert torch.equal(SmoothL1.apply(x, y, beta=0), L1.apply(x, y))
    assert torch.equal(SmoothL1.vjp(g, x, y, beta=0)[0], L1.vjp(g, torch.sign(x - y))[0])


@pytest.mark.parametrize("rule", [CrossEntropy, Nll])
def test_where_no_row_counts_the_mean_is_nan_and_nothing_learns(rule):
    z, y = draw((3, 4))[0].requires_grad_(), torch.full((3,), -100)
    cost = rule.apply(z, y, ignore_index=-100)
    assert cost.isnan()
    assert torch.autograd.grad(cost, z)[0].abs().max() == 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_wrong_class_at_minus_infinity_costs_nothing_with_weights_too(reduction):
    z = torch.tensor([[0.0, -torch.inf, 1.0]]).double().requires_grad_()
    y, weight = torch.tensor([2]), torch.tensor([1.0, 2.0, 3.0]).double()
    ours, theirs = (f(z, y, weight, reduction=reduction) for f in (CrossEntropy.apply, F.cross_entropy))
    assert torch.equal(ours, theirs)
    g = torch.ones_like(ours)
    assert torch.allclose(*[torch.autograd.grad(cost, z, g)[0] for cost in (ours, theirs)], rtol=1e-14, atol=0)


@pytest.mark.parametrize(("rule", "oracle"), [(CrossEntropy, F.cross_entropy), (Nll, F.nll_loss)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("y", [[0, 1], [0, -100], [-100, -100]])
def test_weights_that_are_0_are_no_rows_that_do_not_count(rule, oracle, reduction, y):
    """Torch's mean over a weight of 0 is nan, and so is what it asks for."""
    z, y, weight = draw((2, 3))[0].requires_grad_(), torch.tensor(y), torch.zeros(3).double()
    costs = [f(z, y, weight, reduction=reduction, ignore_index=-100) for f in (rule.apply, oracle)]
    torch.testing.assert_close(*costs, equal_nan=True)
    torch.testing.assert_close(*[torch.autograd.grad(cost.sum(), z)[0] for cost in costs], equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_ignored_row_gets_nothing_whatever_its_logits(reduction):
    """Torch's own gets nan."""
    z, y = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf]], requires_grad=True), torch.tensor([1, -100])
    g, theirs = (
        torch.autograd.grad(f(z, y, reduction=reduction, ignore_index=-100).sum(), z)[0]
        for f in (CrossEntropy.apply, F.cross_entropy)
    )
    assert g[1].tolist() == [0, 0]
    torch.testing.assert_close(g[0], theirs[0])


def test_where_infinity_meets_a_probability_of_0_the_cost_is_nan_as_torchs():
    x, zero = torch.tensor([-torch.inf]), torch.zeros(1)
    assert KlDiv.apply(x, zero, "sum").isnan()
    assert F.kl_div(x, zero, reduction="sum").isnan()
    assert KlDiv.apply(zero, x, "sum", True).isnan()
    assert F.kl_div(zero, x, reduction="sum", log_target=True).isnan()
