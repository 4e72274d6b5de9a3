"""Attention: the checks of every rule over its masks, dropout and grouped queries, and mutants of the source."""

import math
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
    keeps_what_entered,
    leaves,
    narrow_numbers_are_as_near_as_torchs,
    outcome,
    random,
    refuses_by_name,
    second_gradient,
    standard,
    torchs_second_gradients_of_whatever_is_asked_for,
    vjp_alone_is_torchs_and_none_where_not_asked_for,
)
from rule_twins import (
    coarse,
    doubled,
    mutant,
    severed,
    sound,
    spoiled,
    twin,
    unchecked,
    unsteady,
    viewing,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from bpdiag.rules.attention import Attention

INF = math.inf


def oracle(q, k, v, mask=None, dropout=None, p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Torch's own, in its plain form, which alone has a second gradient; dropout, given its mask, by torch's ops."""
    if dropout is None:
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // k.shape[-3], -3) for t in (k, v))
    S = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        mask = torch.ones(S.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        S = S.masked_fill(~mask, -INF) if mask.dtype == torch.bool else S + mask
    return (S.softmax(-1) * dropout / (1 - p)) @ v


def shapes(seed):
    """With each kind of mask; a bool one may hide a query from all keys, unless there is dropout beside it."""
    r = Random(seed)
    batch, L, S, E, V = [r.choice((1, 2))] * r.choice((0, 1)), *(r.choice((1, 2, 3, 4)) for _ in range(4))
    heads, grouped = r.choice(((), (1,), (2,), (4,))), False
    keys = heads
    if heads == (4,) and r.random() < 0.7:
        keys, grouped = (r.choice((1, 2)),), True
    tensors = draw((*batch, *heads, L, E), (*batch, *keys, S, E), (*batch, *keys, S, V), seed=seed)
    settings = {"scale": r.choice((None, 0.3, 2)), "enable_gqa": grouped}
    drops = seed % 4 == 0
    mask = (L, S) if r.random() < 0.5 else (*heads, L, r.choice((1, S)))
    kind = ("none", "bool", "causal", "bool", "float")[seed % 5]
    if kind == "causal":
        settings["is_causal"] = True
    if kind == "bool":
        settings["mask"] = torch.rand(mask, generator=random(seed)) < 0.6
        if drops:
            settings["mask"][..., 0] = True
    if kind == "float" and not drops and r.random() < 0.5:
        tensors = (*tensors, *draw(mask, seed=seed + 1))
    elif kind == "float":
        settings["mask"] = draw(mask, seed=seed + 1)[0]
        settings["mask"][..., -1] = -INF if mask[-1] > 1 else 0
    if drops:
        settings |= {"dropout": torch.rand((*batch, *heads, L, S), generator=random(seed + 1)) < 0.7, "p": 0.3}
    return tensors, settings


CASES = {"attention": Case(Attention, oracle, drawn((2, 3, 4), (2, 5, 4), (2, 5, 2)), {}, shapes, LOOSE)}

WRONG = [spoiled(Attention, f"uphill {name}", i, lambda g: -g) for i, name in enumerate("qkv")]
MUTANTS = [
    *WRONG,
    spoiled(Attention, "the mask's uphill", 3, lambda g: -g),
    mutant("attention", "softmax's slope dropped", "g_S = Pg - P * Pg.sum(-1, keepdim=True)", "g_S = Pg"),
    mutant("attention", "softmax along the queries", "Pg.sum(-1, keepdim=True)", "Pg.sum(-2, keepdim=True)"),
    mutant("attention", "g_q not scaled", "g_q = scale * torch", "g_q = torch"),
    mutant("attention", "g_k not scaled", "_over_heads(scale * torch", "_over_heads(torch"),
    mutant("attention", "g_v without dropout", "(P * kept).mT", "P.mT"),
    mutant("attention", "g_P without dropout", ".mT) * kept\n", ".mT)\n"),
    mutant("attention", "dropout does not grow", "(1 / (1 - p) if p < 1 else 0.0)", "1.0"),
    mutant("attention", "the mask inverted", "S.masked_fill(~mask, -math.inf)", "S.masked_fill(mask, -math.inf)"),
    mutant("attention", "not causal", ".tril()", ".tril(1)"),
    mutant("attention", "blind queries see all", "return P.masked_fill(blind, 0)", "return P"),
    mutant(
        "attention",
        "one head of a group",
        "unflatten(-3, (heads, -1)).sum(-3)",
        "unflatten(-3, (heads, -1))[..., 0, :, :]",
    ),
    mutant(
        "attention", "heads in turn", "t.repeat_interleave(groups, -3)", "t.repeat(*[1] * (t.dim() - 3), groups, 1, 1)"
    ),
    mutant("attention", "scale ignored", "    return float(scale)", "    return 1.0"),
]


suite = standard(
    CASES,
    MUTANTS,
    wrong=WRONG,
    also={
        second_gradient: [unsteady(Attention)],
        torchs_second_gradients_of_whatever_is_asked_for: [severed(Attention)],
        vjp_alone_is_torchs_and_none_where_not_asked_for: [
            twin(Attention, "eager", lambda *args, needs: Attention.vjp(*args, needs=(*needs[:2], True, *needs[3:]))),
            mutant("attention", "a mask's gradient not summed", "g_S.sum_to_size(mask.shape)", "g_S.expand_as(g_S)"),
        ],
        keeps_what_entered: [
            twin(
                Attention,
                "keeps P",
                lambda g, P, *kept, needs: Attention.vjp(g, *kept, needs=needs),
                lambda i, o, n: (torch.ones(64, 64), *Attention.keeps(i, o, n)),
            )
        ],
        inputs_and_output_stay_apart: [viewing(Attention)],
        narrow_numbers_are_as_near_as_torchs: [coarse(Attention)],
        apply_alone_casts_a_cotangent: [doubled(Attention)],
        refuses_by_name: [unchecked(Attention, lambda q, k, v, *_: torch.matmul(torch.matmul(q, k.mT), v))],
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
    suite.assert_sound(sound(Attention))


# ---- alone ----


@pytest.mark.parametrize(
    "mask", [torch.tensor([[True, False], [False, False]]), torch.tensor([[0.0, -INF], [-INF, -INF]]).double()]
)
@pytest.mark.parametrize("p", [None, 0.5])
def test_a_query_that_sees_no_key_gives_and_gets_nothing(mask, p):
    """The twin: torch's softmax of the same scores is nan."""
    q, k, v = leaves(draw((2, 3), (2, 3), (2, 1)))
    dropout = None if p is None else torch.ones(2, 2, dtype=torch.bool)
    y = Attention.apply(q, k, v, mask, dropout, p or 0.0)
    assert y[1].item() == 0
    grads = torch.autograd.grad(y.sum(), (q, k, v), create_graph=True)
    g_q, g_k, g_v = grads
    assert (g_q[1].tolist(), g_k[1].tolist(), g_v[1].tolist()) == ([0, 0, 0], [0, 0, 0], [0])
    assert all(t.isfinite().all() for t in torch.autograd.grad(sum(t.square().sum() for t in grads), (q, k, v)))
    assert ((q @ k.mT).masked_fill(mask != 0 if mask.dtype != torch.bool else ~mask, -INF)).softmax(-1)[1].isnan().all()


def test_grouped_queries_are_the_keys_repeated():
    q, k, v = leaves(draw((2, 6, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)))
    whole = [t.repeat_interleave(3, 1) for t in (k, v)]
    ours, theirs = Attention.apply(q, k, v, enable_gqa=True), Attention.apply(q, *whole)
    assert_close(ours, theirs, **LOOSE)
    g = torch.ones_like(ours)
    assert_close(*[torch.autograd.grad(y, (q, k, v), g) for y in (ours, theirs)], **LOOSE)


def test_a_causal_query_does_not_see_what_comes_later():
    """The twin: without the mask it does."""
    q, k, v = draw((4, 3), (4, 3), (4, 2))
    later = k + torch.tensor([0, 0, 0, 1.0])[:, None]
    assert_close(*[Attention.apply(q, t, v, is_causal=True)[:3] for t in (k, later)], rtol=0, atol=0)
    assert not torch.equal(*[Attention.apply(q, t, v)[:3] for t in (k, later)])


def test_the_fused_forward_is_the_plain_one():
    """Without a mask torch's fused kernel runs; with one that hides nothing, our own lines do."""
    q, k, v = draw((2, 3, 70, 8), (2, 3, 70, 8), (2, 3, 70, 8))
    ours, plain = (
        outcome(lambda *t, m=m: Attention.apply(*t, m), (q, k, v)) for m in (None, torch.ones(1, 1, dtype=torch.bool))
    )
    assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_a_mask_of_more_digits_than_the_queries_is_rounded_to_theirs():
    q, k, v = (t.float() for t in draw((2, 3, 4), (2, 5, 4), (2, 5, 2)))
    (mask,) = leaves(draw((3, 5)))
    y = Attention.apply(q, k, v, mask)
    assert torch.equal(y, Attention.apply(q, k, v, mask.float()))
    assert torch.autograd.grad(y.sum(), mask)[0].dtype == torch.float64
