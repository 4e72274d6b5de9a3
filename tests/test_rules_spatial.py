"""Convolution, normalization, and rules that move numbers: torch's own op, finite differences, faulty twins."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from bpdiag.rules import Rule
from bpdiag.rules import conv as conv_file
from bpdiag.rules import norm as norm_file
from bpdiag.rules import shape as shape_file
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
    """A rule with all that it takes, and torch's own function of those tensors that have a gradient."""

    rule: type[Rule]
    inputs: tuple[Any, ...]  # of ``forward``, settings included
    theirs: Callable
    constants: tuple[int, ...] = ()  # the floating-point tensors among the inputs that have no gradient

    @property
    def places(self):
        """Where among the inputs the tensors with a gradient stand."""
        floats = [i for i, t in enumerate(self.inputs) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        return [i for i in floats if i not in self.constants]

    @property
    def tensors(self):
        return [self.inputs[i] for i in self.places]

    def ours(self, *tensors):
        given = dict(zip(self.places, tensors, strict=True))
        return self.rule.apply(*[given.get(i, t) for i, t in enumerate(self.inputs)])


def case(rule, theirs, *inputs, constants=(), **settings):
    bound = signature(rule.forward).bind(*inputs, **settings)
    bound.apply_defaults()
    return Case(rule, bound.args, theirs, constants)


def conv(x, W, pad=None, **settings):
    """``pad``: what the settings come to, where torch has no argument for it, or warns of it."""

    def oracle(x, W, b):
        rest = dict(settings)
        if pad is not None:
            del rest["padding"]
            x = F.pad(x, pad, rest.pop("padding_mode", "constant"))
        return (F.conv1d, F.conv2d, F.conv3d)[W.dim() - 3](x, W, b, **rest)

    return case(Conv, oracle, *draw(x, W, (W[0],)), **settings)


def transposed(x, W, **settings):
    oracle = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(W) - 3]
    bias = (W[1] * settings.get("groups", 1),)
    return case(ConvTranspose, lambda *t: oracle(*t, **settings), *draw(x, W, bias), **settings)


def norm(rule, oracle, x, affine, **settings):
    return case(rule, oracle, *draw(x, affine, affine), **settings)


def running_oracle(x, gamma, beta):
    return F.batch_norm(x, torch.full_like(gamma, 0.3), torch.full_like(gamma, 1.7), gamma, beta)


def training_oracle(x, gamma=None, beta=None):
    return F.batch_norm(x, None, None, gamma, beta, True)


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
        f"conv2d, {m}": conv((2, 2, 5, 4), (3, 2, 3, 3), (2, 2, 2, 2), padding=2, padding_mode=m)
        for m in ("reflect", "replicate", "circular")
    },
    "conv1d, same, even": conv((2, 2, 6), (3, 2, 4), (1, 2), padding="same"),
    "conv2d, same, even": conv((2, 2, 5, 6), (3, 2, 4, 2), (0, 1, 1, 2), padding="same"),
    "conv2d, sides differ": conv((2, 2, 4, 5), (3, 2, 3, 3), (2, 2, 1, 1), padding=(1, 2), padding_mode="circular"),
    "conv_transpose1d": transposed((2, 3, 4), (3, 2, 3), stride=2, output_padding=1),
    "conv_transpose2d": transposed((2, 4, 3, 4), (4, 3, 3, 2), stride=2, padding=1, groups=2),
    "conv_transpose2d, dilation": transposed((2, 2, 3, 3), (2, 3, 2, 2), dilation=2, output_padding=1),
    "conv_transpose3d": transposed((2, 2, 2, 2, 3), (2, 2, 2, 2, 2), stride=(2, 1, 1)),
    "batch_norm": norm(BatchNorm, training_oracle, (4, 3, 2, 2), (3,)),
    "batch_norm, flat": norm(BatchNorm, training_oracle, (5, 3), (3,)),
    "batch_norm, evaluation": case(
        BatchNorm,
        running_oracle,
        *draw((4, 3, 2), (3,), (3,)),
        *[torch.full((3,), n, dtype=torch.float64) for n in (0.3, 1.7)],
        constants=(3, 4),
    ),
    "batch_norm, empty": norm(BatchNorm, training_oracle, (0, 3, 2), (3,)),
    "batch_norm, empty and plain": case(BatchNorm, training_oracle, *draw((0, 3, 2)), None, None),
    "group_norm": norm(GroupNorm, lambda x, g, b: F.group_norm(x, 2, g, b), (3, 4, 3), (4,), num_groups=2),
    "instance_norm": norm(InstanceNorm, lambda x, g, b: F.instance_norm(x, weight=g, bias=b), (2, 3, 4), (3,)),
    "layer_norm": norm(LayerNorm, lambda x, g, b: F.layer_norm(x, (5,), g, b), (3, 2, 5), (5,)),
    "layer_norm, plain": case(
        LayerNorm, lambda x: F.layer_norm(x, (5,)), *draw((3, 2, 5)), None, None, normalized_shape=5
    ),
    "layer_norm, two dimensions": norm(LayerNorm, lambda x, g, b: F.layer_norm(x, (2, 5), g, b), (3, 2, 5), (2, 5)),
    "rms_norm": case(RMSNorm, lambda x, g: F.rms_norm(x, (5,), g), *draw((3, 2, 5), (5,))),
    **{
        f"pad, {m}": case(Pad, lambda x, m=m: F.pad(x, (2, 1, 1, 2), m), *draw((2, 2, 4, 5)), (2, 1, 1, 2), mode=m)
        for m in ("constant", "reflect", "replicate", "circular")
    },
    "pad, cropping": case(Pad, lambda x: F.pad(x, (-1, 2)), *draw((2, 4)), (-1, 2)),
    "flatten": case(Flatten, lambda x: torch.flatten(x, 1), *draw((2, 3, 4))),
    "concat": case(Concat, lambda *t: torch.cat(t, 1), 1, *draw((2, 3), (2, 1), (2, 4))),
    "concat, first dimension": case(Concat, lambda *t: torch.cat(t), 0, *draw((2, 3), (1, 3))),
    "add": case(Add, lambda a, f: a + 0.5 * f, *draw((2, 3), (2, 3)), 0.5),
    "add, beta learned": case(Add, lambda a, f, beta: a + beta * f, *draw((2, 3), (2, 3), (1,))),
    "dropout": case(Dropout, lambda x: x * MASK / 0.8, *draw((2, 3)), MASK, 0.2),
    "embedding": case(Embedding, lambda W: F.embedding(INDEX, W), INDEX, *draw((4, 3))),
    "embedding, padding": case(
        Embedding, lambda W: F.embedding(INDEX, W, padding_idx=3), INDEX, *draw((4, 3)), padding_idx=3
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


def finite_differences(case):
    torch.manual_seed(0)
    inputs = [t.clone().requires_grad_() for t in case.tensors]
    assert gradcheck(case.ours, inputs, fast_mode=True)
    assert gradgradcheck(case.ours, inputs, fast_mode=True)


def vjp_is_torchs(case):
    """Called by itself: autograd would sum a cotangent of a wrong shape to the right one."""
    out = case.rule.forward(*case.inputs)
    (g,) = draw(out.shape, seed=9)
    leaves = [t.clone().requires_grad_() for t in case.tensors]
    theirs = dict(zip(case.places, torch.autograd.grad(case.theirs(*leaves), leaves, g), strict=True))
    for asked in itertools.product((True, False), repeat=len(leaves)):
        wanted = {i for i, one in zip(case.places, asked, strict=True) if one}
        needs = tuple(i in wanted for i in range(len(case.inputs)))
        ours = case.rule.vjp(g, *case.rule.keeps(case.inputs, out, needs), needs=needs)
        for i, g_i in enumerate(ours):
            assert (g_i is not None) == needs[i], f"input {i} of {needs}"
            if needs[i]:
                assert_close(g_i, theirs[i], **TIGHT)
        assert wanted <= set(range(len(ours)))


@pytest.mark.parametrize("name", CASES)
def test_the_vjp_alone_is_torchs_and_none_where_not_asked_for(name):
    vjp_is_torchs(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_second_gradients_are_torchs(name):
    same_as_torch(CASES[name], CASES[name].tensors)


@pytest.mark.parametrize("name", [name for name in CASES if "padding" not in name and "empty" not in name])
def test_gradients_are_those_of_finite_differences(name):
    finite_differences(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_strided_and_expanded_inputs_are_as_any(name):
    case = CASES[name]
    same_as_torch(case, [torch.stack([t, t], -1)[..., 0] for t in case.tensors])
    if not name.startswith(
        ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")
    ):  # no variance there
        same_as_torch(case, [t[..., :1].expand_as(t) for t in case.tensors])


# ---- twins: one fault each ----


def twin(rule, vjp):
    return type(f"Twin{rule.__name__}", (rule,), {"forward": rule.forward, "vjp": vjp})


def spoiled(rule, place, fault):
    """The rule with a fault in one cotangent of several."""

    def vjp(*kept, needs):
        grads = rule.vjp(*kept, needs=needs)
        return tuple([fault(t) if i == place and t is not None else t for i, t in enumerate(grads)])

    return twin(rule, vjp)


def constant_batch_norm(g, x, gamma, mean, var, eps, needs):
    over = [0, *range(2, x.dim())]
    return BatchNorm.vjp(g, x, gamma, x.mean(over), x.var(over, correction=0), eps, needs)


def one_group(g, x, gamma, *kept, needs):
    return GroupNorm.vjp(g, x, gamma, 1, kept[-1], needs)


def meanless_layer_norm(g, x, gamma, dims, eps, needs):
    _, g_gamma, g_beta = LayerNorm.vjp(g, x, gamma, dims, eps, needs)
    return RMSNorm.vjp(g, x - x.mean(-1, keepdim=True), gamma, dims, eps)[0], g_gamma, g_beta


def once_embedding(g, index, V, padding_idx, needs):
    return None, g.new_zeros(V, g.shape[-1]).index_put((index,), g)


SoundConv = twin(Conv, Conv.vjp)  # no fault: it must pass, so that a twin fails by its fault and not by being a twin
TWINS = {
    "g_W uphill": (spoiled(Conv, 1, lambda g_W: -g_W), "conv2d"),
    "kernel mirrored": (spoiled(Conv, 1, lambda g_W: g_W.flip(-1)), "conv1d"),
    "kernel mirrored back": (spoiled(ConvTranspose, 1, lambda g_W: g_W.flip(-1)), "conv_transpose2d"),
    "statistics constant": (twin(BatchNorm, constant_batch_norm), "batch_norm"),
    "one group": (twin(GroupNorm, one_group), "group_norm"),
    "all channels at once": (twin(InstanceNorm, one_group), "instance_norm"),
    "term of the mean dropped": (twin(LayerNorm, meanless_layer_norm), "layer_norm"),
    "a mean taken away": (twin(RMSNorm, lambda *a, needs: LayerNorm.vjp(*a, (*needs[:2], False))[:2]), "rms_norm"),
    "edges from the next place": (twin(Pad, lambda g, *a, needs: Pad.vjp(g.roll(1, -1), *a)), "pad, reflect"),
    "wrong order": (twin(Flatten, lambda g, shape, needs: Flatten.vjp(g.flip(-1), shape, needs)), "flatten"),
    "one place too late": (twin(Concat, lambda g, *a, needs: Concat.vjp(g.roll(-1, a[0]), *a, needs)), "concat"),
    "beta dropped": (twin(Add, lambda g, f, beta, *kept, needs: Add.vjp(g, f, 1.0, *kept, needs=needs)), "add"),
    "division dropped": (twin(Dropout, lambda g, mask, p, needs: Dropout.vjp(g, mask, 0.0, needs)), "dropout"),
    "repeats dropped": (twin(Embedding, once_embedding), "embedding"),
}
FILES = (conv_file, norm_file, shape_file)
FAMILY = [
    t
    for file in FILES
    for t in vars(file).values()
    if isinstance(t, type) and issubclass(t, Rule) and t.__module__ == file.__name__
]
WITH_TWIN = [rule for rule in FAMILY if any(issubclass(faulty, rule) for faulty, _ in TWINS.values())]


@pytest.mark.parametrize(("faulty", "name"), TWINS.values(), ids=TWINS)
def test_a_faulty_twin_is_caught(faulty, name):
    case = replace(CASES[name], rule=faulty)
    with pytest.raises(AssertionError):
        same_as_torch(case, case.tensors)
    with pytest.raises(GradcheckError):
        finite_differences(case)
    with pytest.raises(AssertionError):
        vjp_is_torchs(case)


def test_a_sound_twin_passes():
    case = replace(CASES["conv2d"], rule=SoundConv)
    same_as_torch(case, case.tensors)
    finite_differences(case)
    vjp_is_torchs(case)


@pytest.mark.parametrize("rules", [pytest.param(WITH_TWIN, id=f"{len(WITH_TWIN)} of {len(FAMILY)}")])
def test_every_rule_has_a_faulty_twin(rules):
    assert rules == FAMILY
    assert {case.rule for case in CASES.values()} == set(FAMILY)


# ---- what autograd keeps, computes and casts ----


def kept_bytes(function, tensors, needs):
    sizes = []

    def pack(t):
        sizes.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(*[t.clone().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)])
    return sum(sizes)


def keeps_no_more_than_torch(case):
    for needs in itertools.product((True, False), repeat=len(case.tensors)):
        ours, theirs = (kept_bytes(f, case.tensors, needs) for f in (case.ours, case.theirs))
        assert ours <= theirs, needs


@pytest.mark.parametrize("name", [name for name in CASES if name != "batch_norm, empty"])  # there torch has a short cut
def test_no_more_is_kept_than_by_torch_whichever_inputs_are_frozen(name):
    keeps_no_more_than_torch(CASES[name])


def keeps_one_factor_for_the_other(case):
    """Less than torch, which keeps both."""
    x, W, _ = case.tensors
    for needs in itertools.product((True, False), repeat=3):
        assert kept_bytes(case.ours, case.tensors, needs) == needs[1] * x.nbytes + needs[0] * W.nbytes, needs


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_convolution_keeps_one_factor_for_the_cotangent_of_the_other(name):
    keeps_one_factor_for_the_other(CASES[name])


class GreedyConv(SoundConv):  # keeps x and W whatever is asked for
    @classmethod
    def keeps(cls, inputs, output, needs):
        return Conv.keeps(inputs, output, (True, True, True))


class GreedyConcat(Concat):  # keeps the numbers too
    forward = Concat.forward

    @classmethod
    def keeps(cls, inputs, output, needs):
        return *Concat.keeps(inputs, output, needs), output

    def vjp(g_y, dim, lengths, y, needs):
        return Concat.vjp(g_y, dim, lengths, needs)


def test_a_rule_that_keeps_too_much_is_caught():
    with pytest.raises(AssertionError):
        keeps_no_more_than_torch(replace(CASES["concat"], rule=GreedyConcat))
    with pytest.raises(AssertionError):
        keeps_one_factor_for_the_other(replace(CASES["conv2d"], rule=GreedyConv))


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


@pytest.mark.parametrize("name", ["conv2d, reflect", "conv2d, replicate", "conv2d, circular", "conv2d, same, even"])
def test_pads_are_checked_once(name, monkeypatch):
    calls = []
    for file in (conv_file, shape_file):
        monkeypatch.setattr(file, "check_pads", lambda *args, check=file.check_pads: (calls.append(args), check(*args)))
    leaves = [t.clone().requires_grad_() for t in CASES[name].tensors]
    CASES[name].ours(*leaves).sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("name", CASES)
def test_what_is_done_to_the_output_in_place_does_not_reach_the_inputs(name):
    tensors = [t.clone().requires_grad_() for t in CASES[name].tensors]
    out = CASES[name].ours(*tensors)
    expected = torch.autograd.grad(2 * CASES[name].theirs(*tensors), tensors, torch.ones_like(out))
    out.mul_(2)
    assert_close(torch.autograd.grad(out, tensors, torch.ones_like(out)), expected, **TIGHT)
    assert all(map(torch.equal, tensors, CASES[name].tensors))


def test_an_inplace_relu_may_follow_flatten():
    x, W = (t.requires_grad_() for t in draw((2, 3, 6), (4, 3, 3)))
    F.relu(Flatten.apply(Conv.apply(x, W, None)), inplace=True).sum().backward()
    ours = x.grad, W.grad
    theirs = torch.autograd.grad(F.conv1d(x, W).flatten(1).relu().sum(), (x, W))
    assert_close(ours, theirs, **TIGHT)


# ---- narrow numbers ----

NARROW = (torch.float16, torch.bfloat16)


def in_dtype(t, dtype):
    return t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t


def told_once(function, tensors, g):
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, g)


def spacings_off(ours, exact, dtype):
    """The largest distance, in spacings of the narrow numbers there."""
    most, info = 0.0, torch.finfo(dtype)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == dtype
        spacing = info.eps * 2.0 ** (b.abs().frexp().exponent - 1).clamp(min=math.log2(info.smallest_normal))
        most = max([most, *((a.double() - b).abs() / spacing).flatten().tolist()])
    return most


def narrow_errors(case, dtype):
    """Ours and torch's own, both of float64."""
    case = replace(case, inputs=tuple([in_dtype(t, dtype) for t in case.inputs]))
    exact_inputs = [t.double() for t in case.tensors]
    g = draw(case.theirs(*exact_inputs).shape, seed=9)[0].to(dtype)
    exact = told_once(case.theirs, exact_inputs, g.double())
    return [spacings_off(told_once(f, case.tensors, g), exact, dtype) for f in (case.ours, case.theirs)]


def as_near_as_torchs(case):
    for dtype in NARROW:
        ours, theirs = narrow_errors(case, dtype)
        assert ours <= max(2, 2 * theirs), f"{dtype}: {ours:.2f} spacings off, torch's own {theirs:.2f}"


def sums_of_repeats_are_exact():
    g_W = Embedding.vjp(torch.ones(257, 1).bfloat16(), torch.zeros(257, dtype=torch.int64), 1)[1]
    assert g_W.tolist() == [[257]]  # which is no number of bfloat16


def large_products_cancel():
    a, beta = torch.full((2,), 300.0).half(), torch.ones(1).half().requires_grad_()
    g = torch.tensor([300.0, -300.0]).half()  # 90000 is no number of float16
    assert torch.autograd.grad(Add.apply(a, a, beta), beta, g)[0].tolist() == [0]


def large_variances_are_followed():
    x = torch.tensor([[-300.0], [300.0]]).half()
    assert running_statistics(x, torch.zeros(1), torch.ones(1), 1.0)[1].tolist() == [180_000]


@pytest.mark.parametrize("name", CASES)
def test_narrow_numbers_are_as_near_as_torchs(name):
    as_near_as_torchs(CASES[name])


@pytest.mark.parametrize("check", [sums_of_repeats_are_exact, large_products_cancel, large_variances_are_followed])
def test_narrow_numbers_in_closed_form(check):
    check()


WIDE = [
    (conv_file, "conv2d, depthwise"),
    *[(norm_file, name) for name in ("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm")],
    (norm_file, large_variances_are_followed),
    (shape_file, "pad, circular"),
    (shape_file, sums_of_repeats_are_exact),
    (shape_file, large_products_cancel),
]


@pytest.mark.parametrize(("file", "check"), WIDE)
def test_sums_in_narrow_numbers_are_caught(file, check, monkeypatch):
    monkeypatch.setattr(file, "wide", lambda t: t)
    with pytest.raises(AssertionError):
        check() if callable(check) else as_near_as_torchs(CASES[check])


@pytest.mark.parametrize("name", CASES)
def test_apply_alone_casts_a_cotangent(name):
    case = replace(CASES[name], inputs=tuple([in_dtype(t, torch.bfloat16) for t in CASES[name].inputs]))
    needs = tuple(i in case.places for i in range(len(case.inputs)))
    out = case.rule.forward(*case.inputs)
    alone = case.rule.vjp(torch.ones_like(out), *case.rule.keeps(case.inputs, out, needs), needs=needs)
    assert {t.dtype for t in alone if t is not None} <= {torch.bfloat16, torch.float32}
    leaves = [t.clone().requires_grad_() for t in case.tensors]
    assert {t.dtype for t in torch.autograd.grad(case.ours(*leaves).sum(), leaves)} == {torch.bfloat16}


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
        (lambda: ConvTranspose.apply(*draw((3, 7), (3, 2, 4)), None, padding="same"), TypeError, "padding is 'same'"),
        (lambda: ConvTranspose.apply(*draw((3, 7), (3, 2, 4)), None, padding="valid"), TypeError, "padding is 'valid'"),
        (lambda: LayerNorm.apply(*draw((2, 4)), None, None, 2.0), TypeError, "normalized_shape is 2.0"),
        (lambda: BatchNorm.apply(*draw((4, 3)), None, None, eps="a"), TypeError, "batch_norm: eps is 'a'"),
        (lambda: GroupNorm.apply(*draw((4, 3)), None, None, 1, "a"), TypeError, "group_norm: eps is 'a'"),
        (lambda: InstanceNorm.apply(*draw((4, 3, 2)), None, None, "a"), TypeError, "instance_norm: eps is 'a'"),
        (lambda: LayerNorm.apply(*draw((4, 3)), None, None, 3, "a"), TypeError, "layer_norm: eps is 'a'"),
        (lambda: RMSNorm.apply(*draw((4, 3)), None, 3, "a"), TypeError, "rms_norm: eps is 'a'"),
        (lambda: running_statistics(*draw((4, 3), (3,), (3,)), None, 0), ValueError, "batches is 0; expected 1"),
        (lambda: running_statistics(*draw((4, 3), (3,), (3,)), "a"), TypeError, "momentum is 'a'"),
        (lambda: InstanceNorm.apply(*draw((2, 0, 3)), None, None), ValueError, "instance_norm: x is .* a channel"),
        (lambda: Add.apply(draw((2, 3))[0].float(), *draw((2, 3))), TypeError, "add: f is .* torch.float32, as a"),
        (lambda: Add.apply(*draw((2, 3), (2, 3)), torch.ones(1)), TypeError, "add: beta is .* torch.float64, as a"),
        (lambda: Concat.apply(0, draw((2,))[0].float(), *draw((2,))), TypeError, "tensor 1 is .* as tensor 0"),
        *[
            (
                lambda k=k: BatchNorm.apply(
                    *draw((4, 3)), None, None, *[torch.ones(3).double().requires_grad_(i == k) for i in (0, 1)]
                ),
                TypeError,
                f"batch_norm: {argument} is asked for a gradient",
            )
            for k, argument in enumerate(("mean", "var"))
        ],
    ],
)
def test_what_does_not_fit_is_named(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


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
