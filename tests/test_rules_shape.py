"""What moves, joins, adds, picks and masks numbers: the checks of every rule, and mutants of the source."""

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

from bpdiag.rules import shape as shape_file
from bpdiag.rules.conv import Conv
from bpdiag.rules.shape import Add, Concat, Dropout, Embedding, Flatten, Pad

ALL = (Pad, Flatten, Concat, Add, Dropout, Embedding)


class DimensionFirst(Case):
    """``Concat`` takes the dimension before the tensors."""

    def arguments(self, tensors):
        return (self.settings["dim"], *tensors)

    def names(self, tensors):
        return [f"tensor {k}" for k in range(len(tensors))]


def pad_oracle(x, pad, mode="constant", value=0.0):
    return F.pad(x, pad, mode, value if mode == "constant" else None)


def add_oracle(a, f, beta=1.0):
    return a + beta * f if isinstance(beta, torch.Tensor) else torch.add(a, f, alpha=beta)


def dropout_oracle(x, mask, p=0.5):
    return x * mask * (0.0 if p == 1 else 1 / (1 - p))


def embedding_oracle(index, W, padding_idx=None):
    return (
        F.embedding(index, W, padding_idx) if index.numel() else W[index.long()]
    )  # torch has no second gradient there


# ---- shapes ----


def size(r, n):
    return [r.choice((0, 1, 2, 3, 3)) for _ in range(n)]


def pad_shapes(seed):
    r = Random(seed)
    mode = ("constant", "reflect", "replicate", "circular")[seed // 2 % 4]
    n = r.choice((1, 2, 3))
    places = [r.choice((3, 4) if mode != "constant" else (0, 1, 3)) for _ in range(n)]
    low = -1 if mode == "constant" and min(places) > 1 else 0
    pad = tuple(r.randint(low, 2) for _ in range(2 * n))
    (x,) = draw((*r.choice(((2,), (0, 2), (2, 1))), *places), seed=seed)
    return (x,), {"pad": pad, "mode": mode, "value": 1.5 if mode == "constant" else 0.0}


def add_shapes(seed):
    r = Random(seed)
    shape = size(r, r.choice((1, 2, 3)))
    tensors = draw(shape, shape, [r.choice((1, m)) for m in shape[r.choice((0, 1)) :]], seed=seed)
    return (tensors, {}) if seed % 2 else (tensors[:2], {"beta": r.choice((1.0, 0.5, 0, -2))})


def concat_shapes(seed):
    r = Random(seed)
    shape = size(r, r.choice((1, 2, 3)))
    dim = r.randrange(len(shape))
    shapes = [[r.choice((0, 1, 3)) if i == dim else m for i, m in enumerate(shape)] for _ in range(r.choice((1, 2, 4)))]
    return draw(*shapes, seed=seed), {"dim": r.choice((dim, dim - len(shape)))}


def flatten_shapes(seed):
    r = Random(seed)
    n = r.choice((1, 2, 3, 4))
    start = r.randrange(n)
    end = r.randrange(start, n)
    return draw(size(r, n), seed=seed), {"start_dim": r.choice((start, start - n)), "end_dim": r.choice((end, end - n))}


def mask_of(shape, seed, p=0.4):
    return torch.rand(shape, generator=random(seed)) >= p


def dropout_inputs(seed):
    return *draw((2, 3, 4), seed=seed), mask_of((2, 3, 4), seed)


def dropout_shapes(seed):
    r = Random(seed)
    shape = size(r, r.choice((1, 2, 3)))
    masked = [m if r.random() < 0.7 else 1 for m in shape]  # whole rows, whole channels
    return (*draw(shape, seed=seed), mask_of(masked, seed)), {"p": r.choice((0, 0.25, 0.5, 1))}


def embedding_inputs(seed):
    return torch.randint(5, (2, 3), generator=random(seed)), *draw((5, 4), seed=seed)


def embedding_shapes(seed):
    r = Random(seed)
    V = r.choice((1, 4, 7))
    index = torch.randint(V, size(r, r.choice((0, 1, 2, 3))), generator=random(seed))
    index = index.int() if seed % 3 == 0 else index
    return (index, *draw((V, r.choice((1, 3))), seed=seed)), {"padding_idx": r.choice((None, None, r.randrange(V)))}


CASES = {
    "pad": Case(
        Pad, pad_oracle, drawn((2, 2, 3, 4)), {"pad": (1, 2, 2, 1), "mode": "reflect"}, pad_shapes, any_dtype=True
    ),
    "flatten": Case(Flatten, torch.flatten, drawn((2, 3, 4)), {"start_dim": 1}, flatten_shapes, any_dtype=True),
    "concat": DimensionFirst(
        Concat, lambda *t, dim: torch.cat(t, dim), drawn((2, 1, 4), (2, 3, 4)), {"dim": 1}, concat_shapes
    ),
    "add": Case(Add, add_oracle, drawn((2, 3, 4), (2, 3, 4), (3, 1)), {}, add_shapes),
    "dropout": Case(Dropout, dropout_oracle, dropout_inputs, {"p": 0.4}, dropout_shapes),
    "embedding": Case(Embedding, embedding_oracle, embedding_inputs, {"padding_idx": 2}, embedding_shapes),
}


# ---- mutants and twins ----


def once_embedding(g, index, V, padding_idx, needs):
    return None, g.new_zeros(V, g.shape[-1]).index_put((index,), g)


REFLECTED = "to_before, to_after = (1, left), (n - 1 - right, right)"
CIRCLED = "to_before, to_after = (n - left, left), (0, right)"
MUTANTS = [
    twin(Pad, "edges from the next place", lambda g, *kept, needs: Pad.vjp(g.roll(1, -1), *kept)),
    twin(Flatten, "wrong order", lambda g, shape, needs: Flatten.vjp(g.flip(-1), shape, needs)),
    twin(Concat, "one place too late", lambda g, *kept, needs: Concat.vjp(g.roll(-1, kept[0]), *kept, needs)),
    twin(Add, "beta dropped", lambda g, f, beta, *kept, needs: Add.vjp(g, f, 1.0, *kept, needs=needs)),
    twin(Dropout, "division dropped", lambda g, mask, p, needs: Dropout.vjp(g, mask, 0.0, needs)),
    twin(Embedding, "repeats dropped", once_embedding),
    *[spoiled(rule, "uphill", rule in (Concat, Embedding), lambda g: -g) for rule in ALL],
    mutant("pad", "not mirrored", "before, after = before.flip(dim), after.flip(dim)", "pass"),
    mutant("pad", "the edge repeated", REFLECTED, "to_before, to_after = (0, left), (n - right, right)"),
    mutant("pad", "sides exchanged", CIRCLED, "to_before, to_after = (0, left), (n - right, right)"),
    mutant(
        "pad", "a mean at the edge", "before.sum(dim, keepdim=True), after", "before.mean(dim, keepdim=True), after"
    ),
    mutant("pad", "what lies after dropped", "g_x.narrow(dim, *to_after).add_(after)", "pass"),
    mutant("pad", "a cotangent for what was cropped", "[-p for p in pad])", "[-p for p in pad], value=1.0)"),
    mutant(
        "flatten",
        "transposed",
        "g_y.reshape(shape) if",
        "g_y.reshape(shape[::-1]).permute(*range(len(shape))[::-1]) if",
    ),
    mutant("concat", "lengths reversed", "g_y.split(lengths, dim)", "g_y.split(lengths[::-1], dim)[::-1]"),
    mutant(
        "concat",
        "the wrong axis",
        "return torch.cat(tensors, dim)",
        "return torch.cat([t.flip(dim) for t in tensors], dim)",
    ),
    mutant("add", "g_a scaled too", "g_a = g_y if", "g_a = beta * g_y if"),
    mutant("add", "a for f", "(wide(g_y) * wide(f))", "(wide(g_y) * wide(g_y))"),
    mutant("add", "g_beta of the wrong sign", "(wide(g_y) * wide(f)).sum", "(-wide(g_y) * wide(f)).sum"),
    mutant(
        "add",
        "g_beta a mean",
        "(wide(g_y) * wide(f)).sum_to_size(shape)",
        "(wide(g_y) * wide(f)).sum_to_size(shape) / 2",
    ),
    mutant("add", "f dropped", "a + beta * f", "a + 0 * beta * f"),
    mutant("dropout", "the mask inverted", "g_y * mask *", "g_y * ~mask *"),
    mutant("dropout", "p for 1 - p", "(1 / (1 - p) if p < 1", "(1 / p if 0 < p < 1"),
    mutant("dropout", "multiplied", "(1 / (1 - p) if p < 1", "((1 - p) if p < 1"),
    mutant(
        "embedding", "the padding learns", "if padding_idx is not None:\n            g_y", "if False:\n            g_y"
    ),
    mutant("embedding", "the next row", "index.reshape(-1), rows)", "(index.reshape(-1) + 1) % V, rows)"),
    mutant("embedding", "the padding alone learns", "(index == padding_idx).uns", "(index != padding_idx).uns"),
    mutant(
        "embedding", "divided by the batch", "g_W = rows.new_zeros", "g_W = 1 / (index.numel() or 1) * rows.new_zeros"
    ),
]


def keeps_the_least(case):
    """Of all tensors of the call only these: a learned beta and its f, the mask, the indices."""
    tensors = leaves(case.inputs(0))
    kept = {"add": tensors[1:], "dropout": tensors[1:], "embedding": tensors[:1]}.get(case.rule.name, ())
    assert kept_bytes(case.ours, tensors) == sum(t.nbytes for t in kept)


suite = standard(
    CASES,
    MUTANTS,
    wrong=MUTANTS[:6],
    also={
        second_gradient: [unsteady(rule) for rule in ALL],
        torchs_second_gradients_of_whatever_is_asked_for: [*map(severed, (Concat, Add))],
        vjp_alone_is_torchs_and_none_where_not_asked_for: [eager(rule) for rule in ALL],
        keeps_no_more_than_torch: [greedy(rule) for rule in ALL],
        keeps_the_least: [greedy(rule) for rule in ALL],
        inputs_and_output_stay_apart: [
            *map(viewing, ALL),
            mutant("flatten", "torch's view", "end_dim).clone()", "end_dim)"),
        ],
        narrow_numbers_are_as_near_as_torchs: [*map(coarse, ALL), narrow_sums("pad")],
        apply_alone_casts_a_cotangent: [doubled(rule) for rule in ALL],
        refuses_by_name: [unchecked(Add, lambda a, f, beta: a + beta * f)],
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


def test_an_inplace_relu_may_follow_flatten():
    x, W = leaves(draw((2, 3, 6), (4, 3, 3)))
    F.relu(Flatten.apply(Conv.apply(x, W, None)), inplace=True).sum().backward()
    assert_close((x.grad, W.grad), torch.autograd.grad(F.conv1d(x, W).flatten(1).relu().sum(), (x, W)))


def sums_of_repeats_are_exact():
    g_W = Embedding.vjp(torch.ones(257, 1).bfloat16(), torch.zeros(257, dtype=torch.int64), 1)[1]
    assert g_W.tolist() == [[257]]  # which is no number of bfloat16


def large_products_cancel():
    a, beta = torch.full((2,), 300.0).half(), torch.ones(1).half().requires_grad_()
    g = torch.tensor([300.0, -300.0]).half()  # 90000 is no number of float16
    assert torch.autograd.grad(Add.apply(a, a, beta), beta, g)[0].tolist() == [0]


@pytest.mark.parametrize("check", [sums_of_repeats_are_exact, large_products_cancel])
def test_narrow_numbers_in_closed_form(check, monkeypatch):
    check()
    monkeypatch.setattr(shape_file, "wide", lambda t: t)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize(
    ("ours", "theirs"), [(Add.apply, torch.add), (lambda *t: Concat.apply(1, *t), lambda *t: torch.cat(t, 1))]
)
def test_autocast_may_mix_precisions(ours, theirs):
    a, f = draw((2, 3), (2, 3))
    leaves = [a.bfloat16().requires_grad_(), f.float().requires_grad_()]

    def told(function):
        with torch.autocast("cpu", torch.bfloat16):
            out = function(*leaves)
        return out, *torch.autograd.grad(out.sum(), leaves)

    assert_close(told(ours), told(theirs), rtol=0, atol=0)
