"""What the table says beside the maths: which module and which node of torch's a rule stands for."""

from __future__ import annotations

import pytest
import torch

from bpdiag.rules import ACTIVATIONS, RULES, Rule
from bpdiag.rules.activation import LeakyRelu, Relu, Tanh


def gradient(function, z):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(function(z).sum(), z)[0]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_torchs_own_module_and_node_are_recognized(name):
    module = ACTIVATIONS[name].oracle(**ACTIVATIONS[name].settings)
    out = module(torch.ones(2, requires_grad=True))
    assert [n for n, rule in ACTIVATIONS.items() if rule.is_done_by(module)] == [name]
    if ACTIVATIONS[name].node:
        assert out.grad_fn.name() == ACTIVATIONS[name].node
        assert [n for n, rule in ACTIVATIONS.items() if rule.made(out.grad_fn)] == [name]


def test_a_leaky_relu_of_another_slope_is_not_ours():
    module = torch.nn.LeakyReLU(0.2)
    assert not LeakyRelu.is_done_by(module)
    assert not LeakyRelu.made(module(torch.ones(2, requires_grad=True)).grad_fn)


def test_a_subclass_with_a_vjp_of_its_own_is_differentiated_by_it():
    class Doubled(Tanh):
        def vjp(g_a, a):
            return 2 * g_a * (1 - a * a)

    z = torch.tensor([0.5], dtype=torch.float64)
    torch.testing.assert_close(gradient(Doubled.apply, z), 2 * gradient(torch.tanh, z))


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 2), (5, 3, 2, 4)])
def test_a_prelu_may_learn_one_slope_a_channel(shape):
    generator = torch.Generator().manual_seed(0)
    z, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    p = torch.tensor([0.1, -0.5, 2.0], dtype=torch.float64)

    def told(function):
        inputs = [t.clone().requires_grad_() for t in (z, p)]
        out = function(*inputs)
        return out, *torch.autograd.grad(out, inputs, g)

    torch.testing.assert_close(told(RULES["prelu"].apply), told(torch.nn.functional.prelu), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_switch_is_what_has_no_slope_but_0_and_1(name):
    rule = ACTIVATIONS[name]
    z = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    kept = rule.forward(z) if rule.saves == "output" else z
    slopes = set(rule.slope(kept).unique().tolist())
    assert rule.is_switch == (slopes == {0.0, 1.0})


def test_a_rule_derived_from_a_switch_with_a_slope_of_its_own_is_none():
    class Leaking(Relu):
        def vjp(g_a, a):
            return torch.where(a > 0, g_a, 0.5 * g_a)

    assert Relu.is_switch
    assert not Leaking.is_switch
    assert Leaking.slope(torch.tensor([-1.0, 2.0])).tolist() == [0.5, 1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_relus_slope_in_one_pass_is_its_vjp_of_ones(dtype):
    a = torch.tensor([-1.0, -0.0, 0.0, 1e-30, 3.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    assert Relu.slope(a).tolist() == Relu.vjp(torch.ones_like(a), a).tolist()
    assert Relu.slope(a).dtype == dtype


def test_softsigns_slope_at_the_infinities_is_its_limit():
    z = torch.tensor([torch.inf, -torch.inf])
    assert ACTIVATIONS["softsign"].slope(z).tolist() == [0, 0]


def test_identitys_output_may_be_changed_in_place():
    z = torch.ones(3, requires_grad=True)
    out = RULES["identity"].apply(z)
    out.mul_(2)
    assert torch.autograd.grad(out.sum(), z)[0].tolist() == [2, 2, 2]


def test_a_rule_that_does_not_say_what_it_keeps_is_refused():
    class Silent(Rule):
        name = "silent"

        def forward(x):
            return x.clone()

    with pytest.raises(NotImplementedError, match="Silent does not say what its backward needs"):
        Silent.apply(torch.ones(1, requires_grad=True))


@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inf_and_nan_are_selected_not_multiplied(name, dtype):
    """In stretches as long as a kernel's vectors too; what nobody may see through 0 stays there."""
    z = torch.tensor([-1.0, 0.0, 1.0, torch.nan, torch.inf, -torch.inf], dtype=dtype).repeat_interleave(64)
    g = torch.tensor([torch.inf, torch.nan, 2.0], dtype=dtype).repeat(128)
    rule, z = ACTIVATIONS[name], z.requires_grad_()
    ours, theirs = (torch.autograd.grad(f(z), z, g)[0] for f in (rule.apply, getattr(torch.nn.functional, name)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
