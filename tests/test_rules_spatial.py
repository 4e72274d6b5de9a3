"""Convolution, normalization, and rules that move numbers: torch's own op, finite differences, faulty twins."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.nn import functional as F
from torch.testing import assert_close

from bpdiag.rules.conv import Conv, ConvTranspose
from bpdiag.rules.norm import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm, running_statistics
from bpdiag.rules.shape import Add, Concat, Dropout, Embedding, Flatten, Pad

torch.set_num_threads(1)
TIGHT = {"rtol": 1e-10, "atol": 1e-11}


def draw(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@dataclass(frozen=True)
class Case:
    """Ours, torch's own, and the tensors both take."""

    ours: Any
    theirs: Any
    tensors: list


def conv_oracle(x, W, b, padding_mode="zeros", padding=0, **settings):
    n = W.dim() - 2
    if padding_mode != "zeros":
        x, padding = F.pad(x, [padding] * 2 * n, padding_mode), 0
    return (F.conv1d, F.conv2d, F.conv3d)[n - 1](x, W, b, padding=padding, **settings)


def conv(x, W, **settings):
    bias = (W[0],)
    return Case(partial(Conv.apply, **settings), partial(conv_oracle, **settings), draw(x, W, bias))


def transposed(x, W, **settings):
    n, bias = len(W) - 2, (W[1] * settings.get("groups", 1),)
    oracle = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
    return Case(partial(ConvTranspose.apply, **settings), partial(oracle, **settings), draw(x, W, bias))


def norm(rule, oracle, x, affine):
    return Case(rule, oracle, draw(x, affine, affine))


def running(x, gamma, beta):
    mean, var = torch.full_like(gamma, 0.3), torch.full_like(gamma, 1.7)
    return BatchNorm.apply(x, gamma, beta, mean, var)


def running_oracle(x, gamma, beta):
    return F.batch_norm(x, torch.full_like(gamma, 0.3), torch.full_like(gamma, 1.7), gamma, beta)


MASK = torch.tensor([[True, False, True], [True, True, False]])
INDEX = torch.tensor([[1, 0, 3], [3, 3, 1]])

CASES = {
    "conv1d": conv((2, 3, 7), (4, 3, 3)),
    "conv1d, one sample": conv((3, 7), (4, 3, 3), stride=2),
    "conv2d": conv((2, 2, 5, 6), (3, 2, 3, 2), padding=1),
    "conv2d, stride leaves a rest": conv((2, 2, 6, 7), (3, 2, 3, 3), stride=(2, 3), padding=(1, 0)),
    "conv2d, dilation": conv((2, 2, 7, 6), (2, 2, 2, 3), dilation=2, padding=1),
    "conv2d, groups": conv((2, 4, 5, 5), (6, 2, 3, 3), groups=2, stride=2, padding=1),
    "conv2d, depthwise": conv((2, 3, 5, 5), (6, 1, 3, 3), groups=3, padding=1),
    "conv2d, same": conv((2, 2, 5, 5), (3, 2, 3, 5), padding="same"),
    "conv2d, valid": conv((2, 2, 5, 5), (3, 2, 4, 3), padding="valid"),
    "conv2d, empty batch": conv((0, 2, 5, 5), (3, 2, 3, 3)),
    "conv3d": conv((2, 2, 3, 4, 3), (2, 2, 2, 2, 2), stride=(1, 2, 1), padding=1),
    **{
        f"conv2d, {m}": conv((2, 2, 5, 4), (3, 2, 3, 3), padding=2, padding_mode=m)
        for m in ("reflect", "replicate", "circular")
    },
    "conv_transpose1d": transposed((2, 3, 4), (3, 2, 3), stride=2, output_padding=1),
    "conv_transpose2d": transposed((2, 4, 3, 4), (4, 3, 3, 2), stride=2, padding=1, groups=2),
    "conv_transpose2d, dilation": transposed((2, 2, 3, 3), (2, 3, 2, 2), dilation=2, output_padding=1),
    "conv_transpose3d": transposed((2, 2, 2, 2, 3), (2, 2, 2, 2, 2), stride=(2, 1, 1)),
    "batch_norm": norm(BatchNorm.apply, lambda x, g, b: F.batch_norm(x, None, None, g, b, True), (4, 3, 2, 2), (3,)),
    "batch_norm, flat": norm(BatchNorm.apply, lambda x, g, b: F.batch_norm(x, None, None, g, b, True), (5, 3), (3,)),
    "batch_norm, evaluation": norm(running, running_oracle, (4, 3, 2), (3,)),
    "group_norm": norm(
        partial(GroupNorm.apply, num_groups=2), lambda x, g, b: F.group_norm(x, 2, g, b), (3, 4, 3), (4,)
    ),
    "instance_norm": norm(InstanceNorm.apply, lambda x, g, b: F.instance_norm(x, weight=g, bias=b), (2, 3, 4), (3,)),
    "layer_norm": norm(LayerNorm.apply, lambda x, g, b: F.layer_norm(x, (5,), g, b), (3, 2, 5), (5,)),
    "layer_norm, two dimensions": norm(
        LayerNorm.apply, lambda x, g, b: F.layer_norm(x, (2, 5), g, b), (3, 2, 5), (2, 5)
    ),
    "rms_norm": Case(RMSNorm.apply, lambda x, g: F.rms_norm(x, (5,), g), draw((3, 2, 5), (5,))),
    **{
        f"pad, {m}": Case(
            lambda x, m=m: Pad.apply(x, (2, 1, 1, 2), mode=m),
            lambda x, m=m: F.pad(x, (2, 1, 1, 2), m),
            draw((2, 2, 4, 5)),
        )
        for m in ("constant", "reflect", "replicate", "circular")
    },
    "pad, cropping": Case(lambda x: Pad.apply(x, (-1, 2)), lambda x: F.pad(x, (-1, 2)), draw((2, 4))),
    "flatten": Case(Flatten.apply, lambda x: torch.flatten(x, 1), draw((2, 3, 4))),
    "concat": Case(lambda *t: Concat.apply(1, *t), lambda *t: torch.cat(t, 1), draw((2, 3), (2, 1), (2, 4))),
    "add": Case(lambda a, f: Add.apply(a, f, 0.5), lambda a, f: a + 0.5 * f, draw((2, 3), (2, 3))),
    "add, beta learned": Case(Add.apply, lambda a, f, beta: a + beta * f, draw((2, 3), (2, 3), (1,))),
    "dropout": Case(lambda x: Dropout.apply(x, MASK, 0.2), lambda x: x * MASK / 0.8, draw((2, 3))),
    "embedding": Case(lambda W: Embedding.apply(INDEX, W), lambda W: F.embedding(INDEX, W), draw((4, 3))),
    "embedding, padding": Case(
        lambda W: Embedding.apply(INDEX, W, 3), lambda W: F.embedding(INDEX, W, padding_idx=3), draw((4, 3))
    ),
}


def told(function, tensors):
    """Output, gradients, and the gradients of a scalar made of both."""
    inputs = [t.clone().requires_grad_() for t in tensors]
    out = function(*inputs)
    (g,) = draw(out.shape, seed=9)
    g.requires_grad_()
    once = torch.autograd.grad(out, inputs, g, create_graph=True)
    scalar = sum((t * t).sum() for t in once) + (out * out).sum()
    twice = torch.autograd.grad(scalar, [*inputs, g], allow_unused=True)
    return out, once, [torch.zeros(()) if t is None else t for t in twice]


def same_as_torch(case, tensors):
    assert_close(told(case.ours, tensors), told(case.theirs, tensors), **TIGHT)


@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_second_gradients_are_torchs(name):
    same_as_torch(CASES[name], CASES[name].tensors)


@pytest.mark.parametrize("name", [name for name in CASES if "padding" not in name and "empty" not in name])
def test_gradients_are_those_of_finite_differences(name):
    torch.manual_seed(0)
    inputs = [t.clone().requires_grad_() for t in CASES[name].tensors]
    assert gradcheck(CASES[name].ours, inputs, fast_mode=True)
    assert gradgradcheck(CASES[name].ours, inputs, fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_strided_and_expanded_inputs_are_as_any(name):
    case = CASES[name]
    same_as_torch(case, [torch.stack([t, t], -1)[..., 0] for t in case.tensors])
    if not name.startswith(
        ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")
    ):  # no variance there
        same_as_torch(case, [t[..., :1].expand_as(t) for t in case.tensors])


class SignConv(Conv):
    forward = Conv.forward

    def vjp(g_y, x, W, at, needs=(True, True, True)):
        g_x, g_W, g_b = Conv.vjp(g_y, x, W, at, needs)
        return g_x, g_W if g_W is None else -g_W, g_b


class FlippedConv(Conv):  # the kernel mirrored along its last axis
    forward = Conv.forward

    def vjp(g_y, x, W, at, needs=(True, True, True)):
        g_x, g_W, g_b = Conv.vjp(g_y, x, W, at, needs)
        return g_x, g_W if g_W is None else g_W.flip(-1), g_b


class MeanlessLayerNorm(LayerNorm):  # the term of the mean dropped
    forward = LayerNorm.forward

    def vjp(g_y, x, gamma, dims, eps, needs=(True, True, True)):
        _, g_gamma, g_beta = LayerNorm.vjp(g_y, x, gamma, dims, eps, needs)
        return RMSNorm.vjp(g_y, x - x.mean(-1, keepdim=True), gamma, dims, eps)[0], g_gamma, g_beta


class SumlessAdd(Add):
    forward = Add.forward

    def vjp(g_y, f, beta, shape=(), needs=(True, True, False)):
        return g_y, g_y, None  # beta dropped


class ShiftedPad(Pad):
    forward = Pad.forward

    def vjp(g_y, pad, mode="constant", needs=(True,)):
        return (Pad.vjp(g_y.roll(1, -1), pad, mode)[0],)


TWINS = [
    (SignConv.apply, "conv2d"),
    (FlippedConv.apply, "conv1d"),
    (MeanlessLayerNorm.apply, "layer_norm"),
    (lambda a, f: SumlessAdd.apply(a, f, 0.5), "add"),
    (lambda x: ShiftedPad.apply(x, (2, 1, 1, 2), mode="reflect"), "pad, reflect"),
]


@pytest.mark.parametrize(("faulty", "name"), TWINS)
def test_a_faulty_twin_is_caught(faulty, name):
    case = Case(partial(faulty, padding=1) if name == "conv2d" else faulty, CASES[name].theirs, CASES[name].tensors)
    with pytest.raises(AssertionError):
        same_as_torch(case, case.tensors)
    with pytest.raises(GradcheckError):
        gradcheck(case.ours, [t.clone().requires_grad_() for t in case.tensors], fast_mode=True)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_torchs(momentum):
    theirs = torch.nn.BatchNorm1d(3, momentum=momentum).double()
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for batch in range(1, 4):
        (x,) = draw((6, 3, 2), seed=batch)
        theirs(x)
        mean, var = running_statistics(x, mean, var, momentum, batch)
    assert_close((mean, var), (theirs.running_mean, theirs.running_var), **TIGHT)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: Conv.apply(*draw((2, 3, 7), (4, 2, 3)), None), ValueError, "conv: x is"),
        (
            lambda: Conv.apply(*draw((2, 3, 7), (4, 3, 3)), None, stride=0),
            ValueError,
            "stride is 0; expected 1 or more",
        ),
        (lambda: Conv.apply(draw((2, 3, 7))[0].float(), *draw((4, 3, 3)), None), TypeError, "conv: W is"),
        (lambda: Conv.apply(*draw((2, 3, 7), (4, 3, 3)), None, padding="sam"), ValueError, "one of same, valid"),
        (lambda: BatchNorm.apply(*draw((1, 3)), None, None), ValueError, "more than one number for each channel"),
        (
            lambda: GroupNorm.apply(*draw((2, 4, 3)), None, None, num_groups=3),
            ValueError,
            "a divisor of the 4 channels",
        ),
        (lambda: LayerNorm.apply(*draw((2, 4), (3,)), None), ValueError, "layer_norm: gamma is"),
        (lambda: Add.apply(*draw((2, 3), (3,))), ValueError, "add: f is"),
        (lambda: Embedding.apply(INDEX + 9, *draw((4, 3))), IndexError, "rows of W, 0 to 3"),
        (lambda: Dropout.apply(*draw((2, 3), (2, 3))), TypeError, "torch.bool"),
        (lambda: Pad.apply(*draw((2, 2, 3)), (3, 0), mode="reflect"), ValueError, "at most 2 in mode reflect"),
        (lambda: Concat.apply(0, *draw((2, 3), (2, 4))), ValueError, "concat: tensor 1 is"),
    ],
)
def test_what_does_not_fit_is_named(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
