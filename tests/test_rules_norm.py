"""Normalization: the checks of every rule, running statistics, what is not computed, mutants of the source."""

from functools import partial
from random import Random

import pytest
import torch
from rule_suite import (
    LOOSE,
    Case,
    apply_alone_casts_a_cotangent,
    draw,
    drawn,
    inputs_and_output_stay_apart,
    keeps_no_more_than_torch,
    narrow_numbers_are_as_near_as_torchs,
    outcome,
    refuses_by_name,
    second_gradient,
    standard,
    torchs_second_gradients_of_whatever_is_asked_for,
    vjp_alone_is_torchs_and_none_where_not_asked_for,
)
from rule_twins import (
    coarse,
    doubled,
    eager,
    greedy,
    mutant,
    narrow_sums,
    severed,
    sound,
    spoiled,
    twin,
    unchecked,
    unsteady,
    viewing,
)
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from bpdiag.rules import norm as norm_file
from bpdiag.rules.norm import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm, running_statistics

ALL = (BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm)


def batch_oracle(x, gamma=None, beta=None, mean=None, var=None, eps=1e-5):
    return F.batch_norm(x, mean, var, gamma, beta, training=mean is None, eps=eps)


def group_oracle(x, gamma=None, beta=None, num_groups=1, eps=1e-5):
    return F.group_norm(x, num_groups, gamma, beta, eps)


def instance_oracle(x, gamma=None, beta=None, eps=1e-5):
    if not len(x):  # torch's own has no gradient there
        return F.group_norm(x, x.shape[1], gamma, beta, eps)
    return F.instance_norm(x, None, None, gamma, beta, eps=eps)


def layer_oracle(x, gamma=None, beta=None, normalized_shape=None, eps=1e-5):
    return F.layer_norm(x, gamma.shape if normalized_shape is None else normalized_shape, gamma, beta, eps)


def rms_oracle(x, gamma=None, normalized_shape=None, eps=None):
    shape = gamma.shape if normalized_shape is None else normalized_shape
    if gamma is not None and gamma.dtype != x.dtype:  # torch warns that this is slow
        return F.rms_norm(x.to(gamma.dtype), shape, gamma, eps).to(x.dtype)
    return F.rms_norm(x, shape, gamma, eps)


# ---- shapes ----


def with_affine(x, shape, r, seed, shift=True):
    """x, and a gamma and beta that may be absent."""
    affine = draw(*[shape] * (1 + shift), seed=seed + 1000)
    return (x, *affine) if r.random() < 0.7 else (x, *[None] * len(affine))


def eps(r):
    return {"eps": r.choice((1e-5, 1e-3))}


def channels(r, seed, C):
    """(B, C, ...): no sample, one, several."""
    return draw(((0, 1, 2, 4)[seed % 4], C, *(r.choice((2, 3, 4)) for _ in range(1 + seed % 3))), seed=seed)[0]


def batch_shapes(seed):
    r = Random(seed)
    C = r.choice((1, 3))
    x, settings = channels(r, seed, C), eps(r)
    if seed // 4 % 2:
        mean, var = draw((C,), (C,), seed=seed)
        settings |= {"mean": mean, "var": var.square() + 0.1}
    return with_affine(x, (C,), r, seed), settings


def group_shapes(seed):
    r = Random(seed)
    groups = r.choice((1, 2, 3))
    x = channels(r, seed, groups * r.choice((1, 2)))
    return with_affine(x, x.shape[1:2], r, seed), {"num_groups": groups, **eps(r)}


def instance_shapes(seed):
    r = Random(seed)
    x = channels(r, seed, r.choice((1, 3)))
    return with_affine(x, x.shape[1:2], r, seed), eps(r)


def last_shapes(seed, shift=True, sizes=(1, 2, 5)):
    r = Random(seed)
    shape = tuple(r.choice(sizes) for _ in range(r.choice((1, 1, 2))))
    (x,) = draw((*((3,), (0,), (2, 1), ())[seed % 4], *shape), seed=seed)
    tensors = with_affine(x, shape, r, seed, shift)
    return tensors, {"normalized_shape": shape if tensors[1] is None or r.random() < 0.5 else None, **eps(r)}


def case(rule, oracle, tensors, shapes, narrow=None, **settings):
    return Case(rule, oracle, drawn(*tensors), settings, shapes, LOOSE, narrow=narrow)


MANY = partial(last_shapes, sizes=(5, 8))  # of one or two numbers nothing is left but eps, far below a narrow spacing
CASES = {
    "batch_norm": case(BatchNorm, batch_oracle, ((4, 3, 2, 2), (3,), (3,)), batch_shapes),
    "group_norm": case(GroupNorm, group_oracle, ((3, 4, 3), (4,), (4,)), group_shapes, num_groups=2),
    "instance_norm": case(InstanceNorm, instance_oracle, ((2, 3, 4), (3,), (3,)), instance_shapes),
    "layer_norm": case(LayerNorm, layer_oracle, ((3, 2, 5), (2, 5), (2, 5)), last_shapes, MANY),
    "rms_norm": case(
        RMSNorm, rms_oracle, ((3, 2, 5), (2, 5)), partial(last_shapes, shift=False), partial(MANY, shift=False)
    ),
}


# ---- mutants and twins ----


def constant_batch_norm(g, x, gamma, mean, var, eps, needs):
    over = [0, *range(2, x.dim())]
    m = x.mean(over, keepdim=True)
    return BatchNorm.vjp(g, x, gamma, m.flatten(), (x - m).square().mean(over), eps, needs)


def of_each_sample(g, x, gamma, mean, var, eps, needs):
    if var is not None:
        return BatchNorm.vjp(g, x, gamma, mean, var, eps, needs)
    return GroupNorm.vjp(g, x, gamma, g.shape[1], eps, needs)


def one_group(g, x, gamma, *kept, needs):
    return GroupNorm.vjp(g, x, gamma, 1, kept[-1], needs)


def meanless_layer_norm(g, x, gamma, dims, eps, needs):
    over = tuple(range(-dims, 0))
    _, g_gamma, g_beta = LayerNorm.vjp(g, x, gamma, dims, eps, needs)
    return RMSNorm.vjp(g, x - x.mean(over, keepdim=True), gamma, dims, eps)[0], g_gamma, g_beta


def a_mean_taken_away(*kept, needs):
    return LayerNorm.vjp(*kept, (*needs[:2], False))[:2]


GAMMAS = "(g, gxn) if gamma is None else (wide(gamma) * g, wide(gamma) * gxn)"
LAYER, RMS = "_pulled(h, centered, r, r, h.mean", "r * torch.addcmul(h, xn, -hxn.mean(over, keepdim=True))"
MUTANTS = [
    twin(BatchNorm, "statistics constant", constant_batch_norm),
    twin(GroupNorm, "one group", one_group),
    twin(BatchNorm, "the wrong axes", of_each_sample),
    twin(InstanceNorm, "all channels at once", one_group),
    twin(LayerNorm, "term of the mean dropped", meanless_layer_norm),
    twin(RMSNorm, "a mean taken away", a_mean_taken_away),
    *[spoiled(rule, f"{name} uphill", i, lambda g: -g) for rule in ALL for i, name in enumerate(("g_x", "g_gamma"))],
    *[spoiled(rule, "g_beta uphill", 2, lambda g: -g) for rule in ALL[:-1]],
    mutant("batch_norm", "the mean's part kept", "per * g_beta, per", "0 * g_beta, per"),
    mutant("batch_norm", "sign of the part along xn", "per * g_gamma)", "-per * g_gamma)"),
    mutant("batch_norm", "gamma dropped from the means", "per = gamma / (", "per = 1 / ("),
    mutant(
        "batch_norm", "not divided by n", "per = gamma / (math.prod([g.shape[d] for d in over]) or 1)", "per = gamma"
    ),
    mutant("batch_norm", "r dropped from g_gamma", "g_gamma = r * (g * centered)", "g_gamma = (g * centered)"),
    mutant("batch_norm", "r dropped in evaluation", "g_gamma = r * (g * (wide", "g_gamma = (g * (wide"),
    mutant("batch_norm", "the running mean dropped", "(wide(x) - mean.reshape(channel))", "wide(x)"),
    mutant("batch_norm", "eps dropped in evaluation", "torch.rsqrt(wide(var) + eps)", "torch.rsqrt(wide(var))"),
    mutant("batch_norm", "gamma dropped in evaluation", "g_x = gamma * r * g if", "g_x = r * g if"),
    mutant("batch_norm", "gamma dropped in training", "r, gamma * r, per * g_b", "r, r, per * g_b"),
    mutant("batch_norm", "nan of no numbers", "r if g.numel() else torch.zeros_like(r)", "r"),
    mutant("group_norm", "divided by the places only", "/ (split[2] * split[3])", "/ split[3]"),
    mutant(
        "group_norm", "gamma dropped from the means", "[(gamma * t).sum(2, keepdim=True)", "[t.sum(2, keepdim=True)"
    ),
    mutant(
        "group_norm",
        "gamma transposed",
        "reshape(num_groups, -1, 1)",
        "reshape(-1, num_groups).T.reshape(num_groups, -1, 1)",
    ),
    mutant("group_norm", "statistics of a channel", "x.reshape(split), (2, 3), eps", "x.reshape(split), (3,), eps"),
    mutant("group_norm", "the means change places", "gamma * r, h, hxn)", "gamma * r, hxn, h)"),
    mutant("group_norm", "gamma dropped from g_y", "centered, r, gamma * r, h, hxn)", "centered, r, r, h, hxn)"),
    mutant("group_norm", "r dropped from g_gamma", "gxn_sum = r * (g", "gxn_sum = (g"),
    mutant("instance_norm", "eps dropped", "g_y.shape[1], eps, needs)", "g_y.shape[1], 0.0, needs)"),
    mutant("instance_norm", "gamma dropped", "GroupNorm.vjp(g_y, x, gamma, g_y", "GroupNorm.vjp(g_y, x, None, g_y"),
    mutant("layer_norm", "over the wrong end", "tuple(range(-dims, 0)), list(r", "tuple(range(dims)), list(r"),
    mutant("layer_norm", "r dropped from g_gamma", "(g * centered).mul_(r)", "g * centered"),
    mutant("layer_norm", "the mean's part kept", LAYER, LAYER.replace("h.mean", "0 * h.mean")),
    mutant("layer_norm", "g_y for h", LAYER, LAYER.replace("(h", "(g")),
    mutant("layer_norm", "variance without the mean", "centered = x - x.mean(over, keepdim=True)", "centered = x"),
    mutant(
        "layer_norm",
        "a sum for a mean",
        "hxn.mean(over, keepdim=True))\n        return g_x, g_gamma",
        "hxn.sum(over, keepdim=True))\n        return g_x, g_gamma",
    ),
    mutant("rms_norm", "sign of the part along xn", RMS, RMS.replace("-hxn", "hxn")),
    mutant("rms_norm", "a sum for a mean", RMS, RMS.replace("hxn.mean", "hxn.sum")),
    mutant("rms_norm", "r dropped", RMS, RMS.removeprefix("r * ")),
    mutant("rms_norm", "gamma dropped", RMS, RMS.replace("(h, xn", "(g, xn")),
    mutant("rms_norm", "eps dropped", "(x * x).mean(over, keepdim=True) + eps)", "(x * x).mean(over, keepdim=True))"),
]


suite = standard(
    CASES,
    MUTANTS,
    wrong=MUTANTS[:6],
    also={
        second_gradient: [unsteady(rule) for rule in ALL],
        torchs_second_gradients_of_whatever_is_asked_for: [*map(severed, ALL)],
        vjp_alone_is_torchs_and_none_where_not_asked_for: [eager(rule) for rule in ALL],
        keeps_no_more_than_torch: [greedy(rule) for rule in ALL],
        inputs_and_output_stay_apart: [viewing(rule) for rule in ALL],
        narrow_numbers_are_as_near_as_torchs: [*map(coarse, ALL), *[narrow_sums(name) for name in CASES]],
        apply_alone_casts_a_cotangent: [doubled(rule) for rule in ALL],
        refuses_by_name: [unchecked(LayerNorm, lambda x, gamma, beta, *_: F.layer_norm(x, gamma.shape, gamma, beta))],
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


def test_a_sound_twin_passes():
    suite.assert_sound(sound(BatchNorm))


# ---- normalization alone ----


@pytest.mark.parametrize("name", CASES)
def test_far_from_zero_the_variance_does_not_cancel(name):
    case = CASES[name]
    x, *affine = case.inputs(0)
    for ours, theirs in zip(*[outcome(f, (x + 1e6, *affine)) for f in (case.ours, case.theirs)], strict=True):
        assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


class Calls(TorchDispatchMode):
    """The names of all operations done inside, and their arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append((function.overloadpacket.__name__, args))
        return function(*args, **(kwargs or {}))


def test_what_nobody_asked_for_is_not_computed():
    x, gamma, mean, var = draw((4, 3, 2), (3,), (3,), (3,))
    with Calls() as calls:
        BatchNorm.vjp(x, None, gamma, None, var.abs(), 1e-5, (True, False, False))
    assert "sum" not in [name for name, _ in calls.seen]
    with Calls() as calls:
        BatchNorm.vjp(x, x, gamma, mean, var.abs(), 1e-5, (False, True, False))
    assert [name for name, _ in calls.seen].count("sum") == 1
    with Calls() as calls:
        GroupNorm.vjp(x, x, None, 1, 1e-5, (False, True, False))
    assert [name for name, _ in calls.seen].count("sum") == 2  # over the places, over the samples
    with Calls() as calls:
        LayerNorm.vjp(x, x, None, 1, 1e-5, (True, False, False))
    assert not [args for name, args in calls.seen if name == "mul" and 1 in [t for t in args if isinstance(t, int)]]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_torchs(momentum):
    theirs = torch.nn.BatchNorm1d(3, momentum=momentum).double()
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for batch in range(1, 4):
        (x,) = draw((6, 3, 2), seed=batch)
        theirs(x)
        mean, var = running_statistics(x, mean, var, momentum, batch)
    assert_close((mean, var), (theirs.running_mean, theirs.running_var), **LOOSE)


def large_variances_are_followed():
    x = torch.tensor([[-300.0], [300.0]]).half()
    assert running_statistics(x, torch.zeros(1), torch.ones(1), 1.0)[1].tolist() == [180_000]


def test_large_variances_are_followed(monkeypatch):
    large_variances_are_followed()
    monkeypatch.setattr(norm_file, "wide", lambda t: t)
    with pytest.raises(AssertionError):
        large_variances_are_followed()
