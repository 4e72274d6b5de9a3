"""Torch's functions by rule, on samples of their arguments from OpInfo, the database that torch tests itself with."""

import sys
import types
import unittest
import warnings
from random import Random

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from bpdiag.rules import RULES
from bpdiag.swapping import ByRule

torch.set_num_threads(1)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own, of its test tools
    # of a package that the samples do not need
    sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
    from torch.testing._internal.common_methods_invocations import op_db

MOST = 16
# torch's name -> the rule that some of its samples run by
OPERATIONS = {
    "add": "add", "cat": "concat", "flatten": "flatten", "sigmoid": "sigmoid", "tanh": "tanh", "softmax": "softmax",
    "log_softmax": "log_softmax",
    **{f"nn.functional.{name}": rule for name, rule in {
        "relu": "relu", "relu6": "relu6", "selu": "selu", "silu": "silu", "mish": "mish", "hardswish": "hardswish",
        "softsign": "softsign", "logsigmoid": "log_sigmoid", "leaky_relu": "leaky_relu",
        "elu": "elu", "hardtanh": "hardtanh", "gelu": "gelu", "prelu": "prelu", "glu": "glu",
        "linear": "linear", "conv1d": "conv", "conv2d": "conv", "conv3d": "conv", "conv_transpose1d": "conv_transpose",
        "conv_transpose2d": "conv_transpose", "conv_transpose3d": "conv_transpose", "embedding": "embedding",
        "layer_norm": "layer_norm", "rms_norm": "rms_norm", "group_norm": "group_norm", "batch_norm": "batch_norm",
        "instance_norm": "instance_norm", "max_pool1d": "max_pool", "max_pool2d": "max_pool", "max_pool3d": "max_pool",
        "avg_pool1d": "avg_pool", "avg_pool2d": "avg_pool", "avg_pool3d": "avg_pool",
        "adaptive_avg_pool1d": "adaptive_avg_pool", "adaptive_avg_pool2d": "adaptive_avg_pool",
        "adaptive_avg_pool3d": "adaptive_avg_pool", "adaptive_max_pool1d": "adaptive_max_pool",
        "adaptive_max_pool2d": "adaptive_max_pool", "adaptive_max_pool3d": "adaptive_max_pool", "pad": "pad",
        "dropout": "dropout", "dropout2d": "dropout", "dropout3d": "dropout",
        "cross_entropy": "cross_entropy", "nll_loss": "nll", "mse_loss": "mse", "l1_loss": "l1", "huber_loss": "huber",
        "smooth_l1_loss": "smooth_l1", "binary_cross_entropy_with_logits": "bce_with_logits", "kl_div": "kl_div",
        "scaled_dot_product_attention": "attention",
    }.items()},
}  # fmt: skip


def samples(op):
    """Some of torch's."""
    torch.manual_seed(0)
    every = list(op.sample_inputs("cpu", torch.float64, requires_grad=True))
    return Random(0).sample(every, min(MOST, len(every)))


def outcome(op, sample, noted):
    """Output and gradients of all inputs that have one; by rule where ``noted`` is given."""
    torch.manual_seed(1)
    args, kwargs = (sample.input, *sample.args), sample.kwargs
    leaves = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    leaves = [t for t in leaves if t.requires_grad]
    if noted is None:
        out = op(*args, **kwargs)
    else:
        with ByRule(noted):
            out = op(*args, **kwargs)
    first = torch.utils._pytree.tree_leaves(out)[0]
    if first.grad_fn is None:
        return first, None, []
    g = torch.linspace(-1, 2, first.numel(), dtype=first.dtype).view_as(first)
    return first.detach(), first.grad_fn.name(), torch.autograd.grad(first, leaves, g, allow_unused=True)


def ops(name):
    return [op for op in op_db if op.name == name]


def by_rule(name, run):
    """How many samples ran by rule; each as torch has it."""
    count = 0
    for op in ops(name):
        for sample in samples(op):
            noted = set()
            theirs, ours = outcome(op, sample, None), run(op, sample, noted)
            assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-9, equal_nan=True)
            if theirs[1] is not None:  # else torch has given back what it was given
                assert_close(list(ours[2]), list(theirs[2]), rtol=1e-8, atol=1e-8, equal_nan=True)
                count += ours[1] != theirs[1]
    return count


@pytest.mark.filterwarnings("ignore")  # torch's own, of odd arguments among the samples
@pytest.mark.parametrize("name", OPERATIONS)
def test_torchs_samples_have_torchs_values_and_gradients_by_rule(name):
    assert by_rule(name, outcome) > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["nn.functional.linear", "nn.functional.cross_entropy", "softmax"])
def test_a_rule_with_a_fault_is_caught(name, monkeypatch):
    rule = RULES[OPERATIONS[name]]
    apply = rule.apply
    monkeypatch.setattr(rule, "apply", staticmethod(lambda *args, **named: 1.001 * apply(*args, **named)))
    with pytest.raises(AssertionError):
        by_rule(name, outcome)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda z, t: F.gelu(z, approximate="tan"), "approximate"),
        (lambda z, t: F.cross_entropy(z, t.softmax(1), ignore_index=1), "ignore_index"),
        (lambda z, t: F.cross_entropy(z[0, 0], t[0, 0]), "no dimensions"),
    ],
)
def test_what_torch_refuses_is_refused_by_torch(call, words):
    z, t = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3)
    with pytest.raises((RuntimeError, ValueError, IndexError), match=words), ByRule(set()):
        call(z, t)


def test_probabilities_take_torchs_index_that_ignores_nothing():
    z, t = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3)
    with ByRule(set()):
        assert F.cross_entropy(z, t).grad_fn.name() == "CrossEntropyBackward"
