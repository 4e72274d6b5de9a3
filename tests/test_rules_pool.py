"""Pooling: the checks of every rule, kinks, windows that overlap or leave places out, mutants of the source."""

import math
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
    kept_bytes,
    leaves,
    narrow_numbers_are_as_near_as_torchs,
    refuses_by_name,
    second_gradient,
    some,
    standard,
    vjp_alone_is_torchs_and_none_where_not_asked_for,
)
from rule_twins import (
    coarse,
    doubled,
    eager,
    greedy,
    mutant,
    sound,
    spoiled,
    unchecked,
    unsteady,
    viewing,
)
from torch.nn import functional as F
from torch.testing import assert_close

from bpdiag.rules import pool as pool_file
from bpdiag.rules.pool import AdaptiveAvgPool, AdaptiveMaxPool, AvgPool, GlobalAvgPool, GlobalMaxPool, MaxPool

ALL = (MaxPool, AvgPool, AdaptiveMaxPool, AdaptiveAvgPool, GlobalMaxPool, GlobalAvgPool)
MEANS = (AvgPool, AdaptiveAvgPool, GlobalAvgPool)


def pool_oracle(kind):
    def oracle(x, kernel_size, stride, **settings):
        n = len(kernel_size)
        if kind == "avg" and n == 3 and x.element_size() < 4:  # torch has none
            return oracle(x.float(), kernel_size, stride, **settings).to(x.dtype)
        if kind == "avg" and n == 1 and settings.pop("divisor_override", None):  # torch has none
            flat = [(1, *kernel_size), (1, *stride), (0, *settings.pop("padding"))]
            return F.avg_pool2d(x.unsqueeze(-2), *flat, **settings, divisor_override=3).squeeze(-2)
        return getattr(F, f"{kind}_pool{n}d")(x, kernel_size, stride, **settings)

    return oracle


def adaptive_oracle(kind):
    return lambda x, output_size: getattr(F, f"adaptive_{kind}_pool{len(output_size)}d")(x, output_size)


def global_oracle(kind):
    return lambda x: getattr(F, f"adaptive_{kind}_pool{x.dim() - 2}d")(x, 1).flatten(1)


def batch(seed):
    """No sample, one, several, or one without its dimension."""
    return ((0,), (1,), (), (2,), (3,), (2,))[seed % 6]


def tied(x, seed):
    """At times rounded, so that the largest is there twice."""
    return (x.mul(2).round() if seed % 3 == 0 else x,)


def pool_shapes(kind):
    def shapes(seed):
        r = Random(seed)
        n = r.choice((1, 2, 2, 3))
        kernel, stride = some(r, n, 1, 2, 3), some(r, n, 1, 2, 3)
        dilation = some(r, n, 1, 1, 2) if kind == "max" else (1,) * n
        padding = tuple(r.randint(0, k // 2) for k in kernel)
        size = [d * (k - 1) + 1 + r.choice((0, 1, 3)) for k, d in zip(kernel, dilation, strict=True)]
        settings = {"kernel_size": kernel, "stride": stride, "padding": padding, "ceil_mode": r.random() < 0.5}
        if kind == "max":
            settings["dilation"] = dilation
        else:
            settings |= {"count_include_pad": r.random() < 0.5, "divisor_override": r.choice((None, None, 3))}
        return tied(*draw((*batch(seed), 2, *size), seed=seed), seed), settings

    return shapes


def adaptive_shapes(seed):
    r = Random(seed)
    n = r.choice((1, 2, 2, 3))
    (x,) = draw((*batch(seed), 2, *some(r, n, 1, 2, 3, 5, 6)), seed=seed)
    return tied(x, seed), {"output_size": some(r, n, 1, 2, 3, 4)}


def global_shapes(seed):
    r = Random(seed)
    (x,) = draw((r.choice((0, 1, 3)), r.choice((1, 2)), *some(r, r.choice((1, 2, 3)), 1, 2, 3)), seed=seed)
    return tied(x, seed), {}


WINDOW = {"kernel_size": (2, 3), "stride": (1, 2), "padding": (1, 0)}
SIZE = {"output_size": (3, 2)}
INPUTS = drawn((2, 2, 4, 5))
CASES = {
    "max_pool": Case(MaxPool, pool_oracle("max"), INPUTS, WINDOW, pool_shapes("max")),
    "avg_pool": Case(AvgPool, pool_oracle("avg"), INPUTS, WINDOW, pool_shapes("avg")),
    "adaptive_max_pool": Case(AdaptiveMaxPool, adaptive_oracle("max"), INPUTS, SIZE, adaptive_shapes),
    "adaptive_avg_pool": Case(AdaptiveAvgPool, adaptive_oracle("avg"), INPUTS, SIZE, adaptive_shapes),
    "global_max_pool": Case(GlobalMaxPool, global_oracle("max"), INPUTS, {}, global_shapes),
    "global_avg_pool": Case(GlobalAvgPool, global_oracle("avg"), INPUTS, {}, global_shapes),
}


# ---- mutants and twins ----

MUTANTS = [
    *[spoiled(rule, "uphill", 0, lambda g_x: -g_x) for rule in ALL],
    *[spoiled(rule, "mirrored", 0, lambda g_x: g_x.flip(-1)) for rule in ALL[:-1]],
    mutant("max_pool", "the last writes over", "g_x.scatter_add(-1,", "g_x.scatter(-1,"),
    mutant("max_pool", "the largest of -x", "= MAX[n](x, kernel_size, stride", "= MAX[n](-x, kernel_size, stride"),
    mutant(
        "adaptive_max_pool",
        "the largest of -x",
        "= ADAPTIVE_MAX[n](x, output_size, r",
        "= ADAPTIVE_MAX[n](-x, output_size, r",
    ),
    mutant(
        "global_max_pool",
        "of the first place",
        "x.flatten(2), (1,), needs)",
        "torch.zeros_like(x.flatten(2)), (1,), needs)",
    ),
    mutant(
        "global_max_pool",
        "over the channels too",
        "x.amax(tuple(range(2, x.dim())))",
        "x.amax(tuple(range(1, x.dim()))).unsqueeze(1).expand(x.shape[:2])",
    ),
    mutant("avg_pool", "not divided", "g = g / _along(end - start, dim)\n", "pass\n"),
    mutant("avg_pool", "padding never counted", "if not count_include_pad:", "if True:"),
    mutant("avg_pool", "padding always counted", "if not count_include_pad:", "if False:"),
    mutant("avg_pool", "what ceil_mode adds counted", "(start + k).clamp(max=n + p)", "(start + k)"),
    mutant("avg_pool", "divisor dropped", "wide(g_y) if divisor is None else wide(g_y) / divisor", "wide(g_y)"),
    mutant(
        "avg_pool",
        "padding dropped",
        "i = torch.arange(n, device=g.device) + p",
        "i = torch.arange(n, device=g.device)",
    ),
    mutant("avg_pool", "a window too many", '"floor") + 1  # the', '"floor")  # the'),
    mutant("avg_pool", "a window too few", "first, last, -(-k // s))", "first, last, k // s or 1)"),
    mutant(
        "adaptive_avg_pool",
        "not divided",
        "g / _along(ends - starts, dim), dim, first, last, most",
        "g, dim, first, last, most",
    ),
    mutant("adaptive_avg_pool", "ends rounded down", "-(-(j + 1) * n).div(m", "((j + 1) * n).div(m"),
    mutant("adaptive_avg_pool", "windows disjoint", "1 if n % m == 0 else -(-m // n) + 1", "1"),
    mutant(
        "adaptive_avg_pool",
        "last window dropped",
        '(-(i + 1) * m).div(n, rounding_mode="floor") - 1',
        '(-(i + 1) * m).div(n, rounding_mode="floor") - 2',
    ),
    mutant("global_avg_pool", "not divided", "g = g_y / math.prod(size)", "g = g_y"),
    mutant("global_avg_pool", "divided by one size", "g = g_y / math.prod(size)", "g = g_y / size[-1]"),
]


def twice_greedy(rule):
    """Keeps its output twice: of one place that is more than the x that torch keeps."""
    return greedy(greedy(rule))


def keeps_x_for_its_largest_and_nothing_for_a_mean(case):
    """Less than torch, which keeps indices of 8 bytes besides, and x for a mean."""
    (x,) = case.inputs(0)
    assert kept_bytes(case.ours, leaves((x,))) == (0 if "avg" in case.rule.name else x.nbytes)


suite = standard(
    CASES,
    MUTANTS,
    wrong=MUTANTS[:6],
    also={
        second_gradient: [unsteady(rule) for rule in ALL],
        vjp_alone_is_torchs_and_none_where_not_asked_for: [eager(rule) for rule in ALL],
        keeps_no_more_than_torch: [twice_greedy(rule) for rule in MEANS],
        keeps_x_for_its_largest_and_nothing_for_a_mean: [greedy(rule) for rule in ALL],
        inputs_and_output_stay_apart: [
            *map(viewing, ALL),
            *[
                mutant(name, "torch's view", "y.clone() if n == 1 else y", "y")
                for name in ("avg_pool", "adaptive_max_pool")
            ],
        ],
        narrow_numbers_are_as_near_as_torchs: [*map(coarse, ALL)],
        apply_alone_casts_a_cotangent: [doubled(rule) for rule in ALL],
        refuses_by_name: [unchecked(MaxPool, lambda x, *settings: F.max_pool2d(x, (2, 3)))],
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


# ---- pooling alone ----


@pytest.mark.parametrize("name", ["max_pool", "adaptive_max_pool", "global_max_pool"])
def test_the_first_of_equal_largest_takes_all(name):
    (g_x,) = torch.autograd.grad(CASES[name].ours(x := torch.ones(1, 1, 4, 5).requires_grad_()).sum(), x)
    (theirs,) = torch.autograd.grad(CASES[name].theirs(x).sum(), x)
    assert torch.equal(g_x, theirs)
    assert g_x.flatten()[0] > 0


@pytest.mark.parametrize("name", CASES)
def test_every_dimension_may_be_named_by_a_number(name):
    for n in (1, 2, 3):
        (x,) = draw((2, 3, *[4] * n))
        if "global" in name:
            assert_close(CASES[name].rule.apply(x), x.flatten(2).amax(2) if "max" in name else x.flatten(2).mean(2))
        else:
            assert_close(CASES[name].rule.apply(x, 2), getattr(F, f"{name}{n}d")(x, 2))


def test_none_keeps_a_size():
    (x,) = draw((2, 3, 4, 6))
    for rule, oracle in ((AdaptiveMaxPool, F.adaptive_max_pool2d), (AdaptiveAvgPool, F.adaptive_avg_pool2d)):
        assert_close(rule.apply(x, (None, 2)), oracle(x, (None, 2)))


def large_windows_are_summed_in_float32():
    x = torch.full((1, 1, 4096), 16.0).half()  # whose sum, 65536, is no number of float16
    assert AvgPool.apply(x, 4096).item() == GlobalAvgPool.apply(x).item() == AdaptiveAvgPool.apply(x, 1).item() == 16
    x, g_y = torch.zeros(1, 1, 513).bfloat16(), torch.ones(1, 1, 513).bfloat16()
    (g_x,) = MaxPool.vjp(g_y, x, (513,), (1,), (256,), (1,), False)
    assert g_x[0, 0, 0].item() == 257  # no number of bfloat16


def test_large_windows_are_summed_in_float32(monkeypatch):
    large_windows_are_summed_in_float32()
    monkeypatch.setattr(pool_file, "wide", lambda t: t)
    with pytest.raises(AssertionError):
        large_windows_are_summed_in_float32()


def test_nan_is_the_largest_and_no_other_window_sees_it():
    x = torch.tensor([[[1.0, math.nan, 2.0, 3.0]]], dtype=torch.float64)
    y = MaxPool.apply(x.requires_grad_(), 2)
    assert y[0, 0, 0].isnan()
    assert y[0, 0, 1] == 3
    assert torch.autograd.grad(y, x, torch.tensor([[[5.0, 7.0]]]))[0].tolist() == [[[0, 5, 0, 7]]]
