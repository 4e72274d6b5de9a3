"""How a rule is called: by position or by name, with numpy's whole numbers; how often it can be differentiated."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rule_suite import EXAMPLES, assert_close, caught, draw, outcome
from rule_twins import with_signature
from test_rules import SUITES

from bpdiag.rules import RULES, Rule, arguments
from bpdiag.rules.linear import Linear

CASES = {name: case for suite in SUITES for name, case in suite.cases.items()}
WHOLE = {"stride", "padding", "output_padding", "dilation", "groups", "num_groups", "normalized_shape", "kernel_size"}
WHOLE |= {"output_size", "divisor_override", "pad", "start_dim", "end_dim", "dim", "padding_idx"}


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"concat"}))
def test_every_input_may_be_given_by_name(name):
    case = CASES[name]
    values = case.arguments(case.inputs(0))
    names = list(inspect.signature(case.rule.forward).parameters)
    expected = case.rule.apply(*values)
    for k in range(len(values)):
        assert torch.equal(case.rule.apply(*values[:k], **dict(zip(names[k:], values[k:], strict=True))), expected)


T = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("name", "inputs", "named", "told"),
    [
        ("tanh", (T,), {"inplace": True}, r"inplace unknown or given twice; expected \(z\)"),
        ("tanh", (T,), {"z": T}, r"z unknown or given twice; expected \(z\)"),
        ("tanh", (), {}, r"z missing; expected \(z\)"),
        ("tanh", (T, T), {}, r"2 inputs; expected \(z\)"),
        ("prelu", (T, 0.1, T), {}, r"3 inputs; expected \(z, p\)"),
        ("linear", (T,), {"W": T, "bias": None}, r"bias unknown or given twice; expected \(x, W, b\)"),
        ("linear", (T,), {"W": T}, r"b missing; expected \(x, W, b\)"),
        ("conv", (T,), {"stride": 2}, r"W, b missing; expected \(x, W, b, stride, padding, dilation, groups"),
        ("flatten", (T, 0, 1, 1), {}, r"4 inputs; expected \(x, start_dim, end_dim\)"),
        ("global_avg_pool", (), {"z": T}, r"z unknown or given twice; expected \(x\)"),
        ("concat", (T, T), {"dim": 0}, r"dim unknown or given twice; expected \(dim, \*tensors\)"),
        ("concat", (), {}, r"dim missing; expected \(dim, \*tensors\)"),
    ],
)
def test_inputs_that_are_missing_or_unknown_are_named(name, inputs, named, told):
    with pytest.raises(TypeError, match=rf"^{name}: {told}"):
        RULES[name].apply(*inputs, **named)


def in_numpy(value, kind):
    """The same setting in numpy's whole numbers; words, None and True stay."""
    if isinstance(value, tuple | list):
        return type(value)([in_numpy(v, kind) for v in value])
    return kind(value) if type(value) is int else value


def takes_numpys_whole_numbers(name):
    case, some = CASES[name], 0
    for one, tensors in [(case, case.inputs(0)), *map(case.example, EXAMPLES)]:
        for kind in (np.int64, np.int8):
            settings = {k: in_numpy(v, kind) if k in WHOLE else v for k, v in one.settings.items()}
            some += any(type(t) is kind for v in settings.values() for t in (v if isinstance(v, tuple) else (v,)))
            ours = [type(one)(one.rule, one.oracle, one.inputs, s).ours for s in (settings, one.settings)]
            assert_close(*[outcome(f, tensors) for f in ours], rtol=0, atol=0, equal_nan=True)
    assert some


WITH_WHOLE = sorted(
    name for name, case in CASES.items() if WHOLE & (case.settings | case.example(1)[0].settings).keys()
)


@pytest.mark.parametrize("name", WITH_WHOLE)
def test_numpys_whole_numbers_are_whole_numbers(name):
    takes_numpys_whole_numbers(name)


@pytest.mark.parametrize("name", WITH_WHOLE)
def test_a_rule_that_takes_an_int_only_is_caught(name, monkeypatch):
    monkeypatch.setattr(arguments, "operator", SimpleNamespace(index=lambda value: len(value)))  # a TypeError
    with pytest.raises(TypeError, match="expected a whole number"):
        takes_numpys_whole_numbers(name)


def test_a_group_counted_in_a_byte_does_not_overflow():
    """100 channels for each of 2 groups are 200, which is no number of int8."""
    x, W = draw((1, 200, 3), (2, 100, 3))
    y = RULES["conv"].apply(x, W, None, groups=np.int8(2))
    assert_close(y, torch.nn.functional.conv1d(x, W, groups=2))


def hessian_is_torchs(case):
    """In reverse mode, twice over."""
    tensors = case.inputs(0)

    def loss(function):
        return lambda x: function(x, *tensors[1:]).pow(3).sum()

    ours = torch.func.jacrev(torch.func.jacrev(loss(case.ours)))(tensors[0])
    assert_close(ours, torch.autograd.functional.hessian(loss(case.theirs), tensors[0]), rtol=1e-9, atol=1e-9)


class Severed(Linear):
    """The twin: a vjp of the right value and no graph."""

    forward = with_signature(Linear, Linear.forward)

    def vjp(g_z, x, W, needs=(True, True, True)):
        return tuple([t if t is None else t.detach() for t in Linear.vjp(g_z, x, W, needs)])


@pytest.mark.parametrize("name", ["tanh", "linear", "layer_norm", "cross_entropy", "conv"])
def test_the_hessian_in_reverse_mode_is_torchs(name):
    hessian_is_torchs(CASES[name])


def test_a_hessian_without_a_graph_is_caught():
    case = CASES["linear"]
    assert caught(hessian_is_torchs, type(case)(Severed, case.oracle, case.inputs))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own
@pytest.mark.parametrize(
    "forward_mode", [lambda f, x: torch.func.jvp(f, (x,), (x,)), lambda f, x: torch.func.hessian(f)(x)]
)
def test_forward_mode_is_not_there(forward_mode):
    assert not hasattr(Rule, "jvp")
    with pytest.raises(RuntimeError, match="jvp"):
        forward_mode(lambda z: RULES["tanh"].apply(z).sum(), torch.ones(3))
