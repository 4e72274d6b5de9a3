from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bpdiag.config import ModelConfig, UsageError
from bpdiag.initialization import initialize
from bpdiag.model import build
from bpdiag.rules import ACTIVATIONS


def drawn(shape, **options):
    """A convolution's weight and bias."""
    W, b = torch.empty(shape), torch.empty(shape[0])
    initialize(W, b, ModelConfig(**options), torch.Generator().manual_seed(0))
    return W, b


@pytest.mark.parametrize(
    ("name", "variance", "bias"),
    [
        ("he", 2.0, 0.0),
        ("lecun", 1.0, 0.0),
        ("glorot", 2 * 400 / 900, 0.0),
        ("torch", 1 / 3, 1 / 3),
        ("orthogonal", 2.0, 0.0),
        ("1.7", 1.7, 0.0),
        ("0", 0.0, 0.0),
    ],
)
def test_weights_have_the_variance_they_claim(name, variance, bias):
    net = build(ModelConfig(depth=2, width=500, weight_variance=name), 400, 10, seed=0)
    W, b = net.linear1.weight, net.linear1.bias
    assert W.square().mean().item() * 400 == pytest.approx(variance, rel=0.02)
    assert b.square().mean().item() * 400 == pytest.approx(bias, rel=0.15, abs=1e-12)
    if name == "torch":
        assert W.abs().max().item() <= 1 / math.sqrt(400)


@pytest.mark.parametrize(("name", "times_fan_in"), [("0.05", 0.05 * 400), ("torch", 1 / 3), ("he", 0.0)])
def test_the_bias_has_a_variance_of_its_own(name, times_fan_in):
    net = build(ModelConfig(depth=2, width=2000, weight_variance="lecun", bias_variance=name), 400, 10, seed=0)
    assert net.linear1.bias.square().mean().item() * 400 == pytest.approx(times_fan_in, rel=0.1, abs=1e-12)


@pytest.mark.parametrize(("n_in", "n_out"), [(60, 40), (40, 60)])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_orthogonal_weights_have_equal_singular_values_of_the_critical_size(activation, n_in, n_out):
    W = build(
        ModelConfig(depth=1, weight_variance="orthogonal", activation=activation), n_in, n_out, seed=0
    ).linear1.weight
    values = torch.linalg.svdvals(W.detach().double())
    assert values.max().item() == pytest.approx(values.min().item(), rel=1e-5)
    sig = W.norm().item() / math.sqrt(n_out)
    assert sig * ACTIVATIONS[activation].r == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "hee", ""])
@pytest.mark.parametrize("key", ["weight_variance", "bias_variance"])
def test_a_variance_that_is_none_is_refused(key, value):
    with pytest.raises(UsageError, match=f"model.{key}={value}"):
        build(ModelConfig(**{key: value}), 6, 3, seed=0)


@pytest.mark.parametrize(
    ("name", "variance"),
    [("he", 2 / 300), ("lecun", 1 / 300), ("glorot", 2 / (300 + 500)), ("torch", 1 / 900), ("1.7", 1.7 / 300)],
)
def test_a_convolution_sums_over_channels_and_places(name, variance):
    """W (20, 12, 5, 5): fan_in 12 x 25, fan_out 20 x 25."""
    W, _ = drawn((20, 12, 5, 5), weight_variance=name)
    assert W.square().mean().item() == pytest.approx(variance, rel=0.05)


def test_torchs_preset_is_what_torch_does():
    W, b = drawn((400, 12, 5, 5), weight_variance="torch")
    theirs = nn.Conv2d(12, 400, 5)
    for ours, its in ((W, theirs.weight), (b, theirs.bias)):
        assert ours.abs().max().item() == pytest.approx(its.abs().max().item(), rel=0.02)
        assert ours.std().item() == pytest.approx(its.std().item(), rel=0.1)


@pytest.mark.parametrize("shape", [(8, 3, 5, 5), (100, 3, 5, 5)])
def test_an_orthogonal_convolution_is_so_as_a_matrix(shape):
    W, _ = drawn(shape, weight_variance="orthogonal", activation="tanh")
    values = torch.linalg.svdvals(W.flatten(1).double())
    assert values.max().item() == pytest.approx(values.min().item(), rel=1e-5)
    assert W.norm().item() / math.sqrt(shape[0]) == pytest.approx(1, rel=1e-5)


def test_a_matrix_of_ones_is_none():
    """The twin: what the test above measures tells a weight that is not orthogonal."""
    values = torch.linalg.svdvals(torch.ones(8, 75))
    assert values.max() > 10 * values.min()
