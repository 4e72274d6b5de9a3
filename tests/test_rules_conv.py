"""Convolution and its transpose: the checks of every rule, mutants of the source, what is kept, what is refused."""

import itertools
import warnings
from dataclasses import replace
from random import Random

import pytest
import torch
from rule_suite import (
    LOOSE,
    Case,
    apply_alone_casts_a_cotangent,
    draw,
    drawn,
    gradient,
    inputs_and_output_stay_apart,
    keeps_no_more_than_torch,
    kept_bytes,
    leaves,
    narrow_numbers_are_as_near_as_torchs,
    refuses_by_name,
    second_gradient,
    some,
    standard,
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
from torch import nn
from torch.nn import functional as F

from bpdiag.rules import conv as conv_file
from bpdiag.rules import shape as shape_file
from bpdiag.rules.conv import Conv, ConvTranspose

LAYERS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MODES = ("zeros", "reflect", "replicate", "circular")


def conv_oracle(x, W, b=None, groups=1, **settings):
    """A layer of torch's with this W and b, padding included."""
    layer = LAYERS[W.dim() - 2](W.shape[1] * groups, W.shape[0], W.shape[2:], groups=groups, device="meta", **settings)
    with warnings.catch_warnings(action="ignore"):  # an even kernel with "same" makes a copy
        return layer._conv_forward(x, W, b)


def transpose_oracle(x, W, b=None, **settings):
    return TRANSPOSED[W.dim() - 2](x, W, b, **settings)


def sizes(r, seed):
    """Dimensions, groups and batch: no sample, one, several, or one without its dimension."""
    batch = ((0,), (1,), (), (2,), (3,), (2,))[seed % 6]
    return r.choice((1, 2, 2, 3)), r.choice((1, 1, 2, 3)), r.choice((1, 2)), r.choice((1, 2)), batch


def conv_shapes(seed):
    r = Random(seed)
    n, groups, channels, out, batch = sizes(r, seed)
    mode = MODES[seed // 2 % 4]
    kernel, dilation = some(r, n, 1, 2, 3), some(r, n, 1, 1, 2)
    stride, padding = ((1,) * n, "same") if r.random() < 0.25 else (some(r, n, 1, 2, 3), some(r, n, 0, 1, 2))
    size = [d * (k - 1) + r.choice((1, 2, 4)) + (padding == "same" or 2) for k, d in zip(kernel, dilation, strict=True)]
    if padding != "same" and r.random() < 0.1:
        padding, mode = "valid", "zeros"
    channels_in, channels_out = groups * channels, groups * out
    x, W, b = draw((*batch, channels_in, *size), (channels_out, channels, *kernel), (channels_out,), seed=seed)
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "padding_mode": mode}
    return (x, W, b if r.random() < 0.7 else None), settings


def transpose_shapes(seed):
    r = Random(seed)
    n, groups, channels, out, batch = sizes(r, seed)
    kernel, dilation, stride = some(r, n, 1, 2, 3), some(r, n, 1, 1, 2), some(r, n, 1, 2, 3)
    extra = tuple(r.randrange(max(s, d)) for s, d in zip(stride, dilation, strict=True))
    padding = tuple(r.randint(0, d * (k - 1) // 2) for k, d in zip(kernel, dilation, strict=True))
    channels_in, channels_out = groups * channels, groups * out
    size = some(r, n, 1, 2, 4)
    x, W, b = draw((*batch, channels_in, *size), (channels_in, out, *kernel), (channels_out,), seed=seed)
    settings = {"stride": stride, "padding": padding, "output_padding": extra, "groups": groups, "dilation": dilation}
    return (x, W, b if r.random() < 0.7 else None), settings


def conv(*shapes, **settings):
    return Case(Conv, conv_oracle, drawn(*shapes), settings, conv_shapes, LOOSE)


def transposed(*shapes, **settings):
    return Case(ConvTranspose, transpose_oracle, drawn(*shapes), settings, transpose_shapes, LOOSE)


CASES = {
    "conv": conv((2, 4, 5, 6), (6, 2, 2, 3), (6,), stride=(2, 1), padding=(1, 2), dilation=(2, 1), groups=2),
    "conv_transpose": transposed(
        (2, 4, 3, 2), (4, 2, 2, 3), (4,), stride=(2, 1), padding=(1, 0), output_padding=(1, 0), groups=2
    ),
}
OTHERS = {
    **{mode: conv((2, 2, 5, 4), (3, 2, 3, 3), (3,), padding=2, padding_mode=mode) for mode in MODES},
    "same, even": conv((2, 2, 5, 6), (3, 2, 4, 2), (3,), padding="same"),
    "sides differ": conv((2, 2, 4, 5), (3, 2, 3, 3), (3,), padding=(1, 2), padding_mode="circular"),
    "depthwise": conv((2, 3, 5, 5), (6, 1, 3, 3), (6,), groups=3, padding=1),
}


# ---- mutants and twins ----

GROUPED = "at.groups, C // at.groups, *size).transpose"
EMPTY = "*at.kernel) + x.sum() + g.sum()"
G_X = "torch.convolution(g, W, None, at.stride, at.padding, at.dilation, False"
MUTANTS = [
    spoiled(Conv, "g_W uphill", 1, lambda g_W: -g_W),
    spoiled(Conv, "kernel mirrored", 1, lambda g_W: g_W.flip(-1)),
    spoiled(Conv, "channels in another order", 1, lambda g_W: g_W.flip(0)),
    spoiled(Conv, "g_b dropped", 2, lambda g_b: 0 * g_b),
    spoiled(Conv, "g_x uphill", 0, lambda g_x: -g_x),
    spoiled(Conv, "g_x transposed", 0, lambda g_x: g_x.flip(-1)),
    mutant("conv", "g_b a mean", "return g.sum((0, *range(2, g.dim())))", "return g.mean((0, *range(2, g.dim())))"),
    mutant("conv", "edges dropped", "Pad.vjp(g_x, at.pad, at.mode)[0]", 'Pad.vjp(g_x, at.pad, "constant")[0]'),
    mutant("conv", "zeros for edges", "functional.pad(x, at.pad, at.mode) if", "functional.pad(x, at.pad) if"),
    mutant("conv", "depthwise a mean", ".sum(0) if at.groups == C", ".mean(0) if at.groups == C"),
    mutant("conv", "b dropped", "CONV[len(at.kernel)](x, W, b,", "CONV[len(at.kernel)](x, W, None,"),
    mutant("conv", "same on the other side", "sides = [(t // 2, t - t // 2)", "sides = [(t - t // 2, t // 2)"),
    mutant("conv", "groups interleaved", GROUPED, "C // at.groups, at.groups, *size).transpose(1, 2).transpose"),
    spoiled(ConvTranspose, "g_W uphill", 1, lambda g_W: -g_W),
    spoiled(ConvTranspose, "kernel mirrored", 1, lambda g_W: g_W.flip(-1)),
    spoiled(ConvTranspose, "g_x uphill", 0, lambda g_x: -g_x),
    spoiled(ConvTranspose, "g_b dropped", 2, lambda g_b: 0 * g_b),
    mutant("conv_transpose", "W mirrored", G_X, G_X.replace("g, W", "g, W.flip(-1)")),
]


def keeps_one_factor_for_the_other(case):
    """Less than torch, which keeps both."""
    x, W, _ = tensors = case.inputs(0)
    for needs in itertools.product((True, False), repeat=3):
        assert kept_bytes(case.ours, leaves(tensors, needs)) == needs[1] * x.nbytes + needs[0] * W.nbytes, needs


def keeps_both(inputs, output, needs):
    return Conv.keeps(inputs, output, (True, True, True))


suite = standard(
    CASES,
    MUTANTS,
    wrong=[MUTANTS[0], MUTANTS[1], MUTANTS[-1]],
    also={
        second_gradient: [unsteady(Conv), unsteady(ConvTranspose)],
        torchs_second_gradients_of_whatever_is_asked_for: [
            severed(Conv),
            severed(ConvTranspose),
            *[mutant(name, "of an empty batch no graph", EMPTY, "*at.kernel)") for name in CASES],
        ],
        vjp_alone_is_torchs_and_none_where_not_asked_for: [eager(Conv), eager(ConvTranspose), MUTANTS[4]],
        keeps_no_more_than_torch: [greedy(Conv), greedy(ConvTranspose)],
        keeps_one_factor_for_the_other: [twin(Conv, "keeps both", keeps=keeps_both), greedy(ConvTranspose)],
        inputs_and_output_stay_apart: [
            viewing(ConvTranspose),
            mutant("conv", "torch's view", "y.clone() if y.dim() == len(at.kernel) + 1 else y", "y"),
        ],
        narrow_numbers_are_as_near_as_torchs: [coarse(Conv), coarse(ConvTranspose)],
        apply_alone_casts_a_cotangent: [doubled(Conv), doubled(ConvTranspose)],
        refuses_by_name: [unchecked(Conv, lambda x, W, b, *settings: F.conv2d(x, W, b))],
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
    suite.assert_sound(sound(Conv))


# ---- convolution alone ----


@pytest.mark.parametrize(
    "check", [gradient, second_gradient, torchs_values_and_gradients, torchs_second_gradients, vmap_equals_a_loop]
)
@pytest.mark.parametrize("name", OTHERS)
def test_every_padding_and_depthwise(check, name):
    torch.manual_seed(0)
    check(OTHERS[name])


def test_sums_in_narrow_numbers_are_caught():
    with pytest.raises(AssertionError, match="spacings off"):
        narrow_numbers_are_as_near_as_torchs(replace(OTHERS["depthwise"], rule=narrow_sums("conv")))


@pytest.mark.parametrize("name", ["reflect", "replicate", "circular", "same, even", "sides differ"])
def test_pads_are_checked_once(name, monkeypatch):
    calls = []
    for file in (conv_file, shape_file):
        monkeypatch.setattr(file, "check_pads", lambda *args, check=file.check_pads: (calls.append(args), check(*args)))
    case = OTHERS[name]
    case.ours(*leaves(case.inputs(0))).sum().backward()
    assert len(calls) == 1
