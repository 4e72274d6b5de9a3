"""What does not fit is refused by the rule: the error names the argument, what came and what was expected."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rule_suite import CAUGHT, draw

from bpdiag.rules import RULES, arguments
from bpdiag.rules import norm as norm_file
from bpdiag.rules import shape as shape_file
from bpdiag.rules.norm import running_statistics
from bpdiag.rules.shape import PAD_MODES

X, X1 = draw((2, 4, 5, 6), (2, 4, 6))
W, W1 = draw((6, 4, 2, 3), (6, 4, 3))
ONES = torch.ones(4, dtype=torch.float64)
MASK, INDEX = torch.ones(2, 4, 6, dtype=torch.bool), torch.tensor([[1, 0, 3], [3, 3, 1]])
HALF_BUT_STATISTICS = (X1.half(), ONES.half(), ONES.half(), ONES.float(), ONES.float())
NESTED = [[1] * 40] * 40
LOGITS, CLASSES = draw((3, 5))[0], torch.tensor([0, 1, 4])


def meta(t):
    return t.to("meta")


# (rule, its inputs, its settings, the error, what it says)
REFUSED = [
    ("tanh", (X.int(),), {}, TypeError, "z is a tensor .* of torch.int32 on cpu; expected .*floating-point"),
    ("relu", (X.to(torch.complex64),), {}, TypeError, "z is a tensor .* torch.complex64"),
    ("gelu", (1.0,), {}, TypeError, "z is 1.0; expected a tensor"),
    ("prelu", (X, "a"), {}, TypeError, "p is 'a'; expected a number or a tensor"),
    ("prelu", (X, ONES[:3]), {}, ValueError, r"p is a tensor \(3,\) .* the 4 channels"),
    ("prelu", (X, meta(ONES)), {}, ValueError, "p is .* on meta; expected it on cpu"),
    ("linear", (X, W, None), {}, ValueError, r"W is .*; expected shape \(N_out, N_in\)"),
    ("linear", (X, *draw((2, 5)), None), {}, ValueError, r"x is a tensor \(2, 4, 5, 6\) .* shape \(..., 5\)"),
    ("linear", (X, *draw((2, 6), (3,))), {}, ValueError, r"b is .* shape \(2,\)"),
    ("linear", (X.float(), *draw((2, 6)), None), {}, TypeError, "W is .* torch.float64 .* torch.float32, as x"),
    ("linear", (X, meta(draw((2, 6))[0]), None), {}, ValueError, "W is .* on meta; expected it on cpu, where x is"),
    ("cross_entropy", (LOGITS[0], CLASSES), {}, ValueError, r"z is .* logits of shape \(B, K\)"),
    ("cross_entropy", (LOGITS, CLASSES[:2]), {}, ValueError, r"y is .* shape \(3,\)"),
    ("cross_entropy", (LOGITS, CLASSES.double()), {}, TypeError, "y is .* torch.int64"),
    ("cross_entropy", (LOGITS, meta(CLASSES)), {}, ValueError, "y is .* on cpu, where z is"),
    ("cross_entropy", (LOGITS, CLASSES + 1), {}, IndexError, "y is out of range; expected classes from 0 to 4"),
    ("cross_entropy", (LOGITS[:, :0], CLASSES), {}, ValueError, "z is .* of a class or more"),
    ("conv", (X1[:, :3], W1, None), {}, ValueError, "x is .* 4 channels"),
    ("conv", (X1, W1, None), {"stride": True}, TypeError, "stride is True; expected a whole number"),
    ("conv", (X1, W1, None), {"stride": np.True_}, TypeError, "stride is np.True_; expected a whole number"),
    ("conv", (X1, W1, None), {"stride": X1}, TypeError, r"stride is a tensor \(2, 4, 6\) .* a whole number"),
    ("conv", (X1, W1, None), {"stride": CLASSES[1]}, TypeError, r"stride is a tensor \(\) .* a whole number"),
    (
        "conv",
        (X1, W1, None),
        {"padding_mode": X1},
        ValueError,
        r"padding_mode is a tensor \(2, 4, 6\) .* one of",
    ),
    ("conv", (X1, W1, None), {"stride": 0}, ValueError, "stride is 0; expected 1 or more"),
    ("conv", (X1, W1, None), {"stride": (1, 1)}, ValueError, r"stride is \(1, 1\); expected a whole number or 1"),
    ("conv", (X1, W1, None), {"dilation": 1.5}, TypeError, "dilation is 1.5; expected a whole number"),
    ("conv", (X1, W1, None), {"groups": 4}, ValueError, "groups is 4; expected a divisor of 6"),
    ("conv", (X1, W1, None), {"padding": "sam"}, ValueError, "padding is 'sam'; expected one of same, valid"),
    ("conv", (X1, W1, None), {"padding": "same", "stride": 2}, ValueError, "padding is 'same'; expected stride 1"),
    ("conv", (X1, W1, None), {"padding_mode": "mirror"}, ValueError, "padding_mode is 'mirror'; expected one of zeros"),
    ("conv", (X1, W1, None), {"padding": 6, "padding_mode": "reflect"}, ValueError, "padding is .* at most 5"),
    ("conv", (X1[..., :2], W1, None), {}, ValueError, "x is .* 3 places or more"),
    ("conv", (X1, W1, ONES), {}, ValueError, r"b is .* shape \(6,\)"),
    ("conv", (X1.float(), W1, None), {}, TypeError, "W is .* torch.float32, as x"),
    ("conv", (X1, meta(W1), None), {}, ValueError, "W is .* on cpu, where x is"),
    ("conv_transpose", (X1, W1[:4], None), {"padding": "same"}, TypeError, "padding is 'same'"),
    ("conv_transpose", (X1, W1[:4], None), {"padding": "valid"}, TypeError, "padding is 'valid'"),
    ("conv_transpose", (X1, W1[:4], None), {"output_padding": 1}, ValueError, "output_padding is 1; expected less"),
    ("conv_transpose", (X1, W1[:4], None), {"padding": 9}, ValueError, "padding is 9; expected one that leaves"),
    ("conv_transpose", (X1, W1, None), {}, ValueError, "x is .* 6 channels"),
    ("batch_norm", (X1[0, :, :1].T, None, None), {}, ValueError, "x is .* more than one number for each channel"),
    ("batch_norm", (X1, ONES[:3], None), {}, ValueError, "gamma is .* a number for each channel of x"),
    ("batch_norm", (X1, None, None, ONES), {}, TypeError, "var is None; expected a tensor as mean"),
    ("batch_norm", (X1, None, None, meta(ONES), ONES), {}, ValueError, "mean is .* on meta"),
    ("batch_norm", (X1, None, None), {"eps": "a"}, TypeError, "eps is 'a'; expected a finite number"),
    ("batch_norm", (X1, None, None), {"eps": 0}, ValueError, "eps is 0; expected a finite number over 0"),
    ("batch_norm", (X1, None, None), {"eps": math.nan}, ValueError, "eps is nan; expected a finite number over 0"),
    ("batch_norm", (X1, None, None, ONES, ONES), {"eps": -1}, ValueError, "eps is -1; expected .* 0 or more"),
    ("batch_norm", (X1, None, None, ONES, ONES), {"eps": math.inf}, ValueError, "eps is inf; .* finite number"),
    ("batch_norm", (X1.half(), ONES.float(), ONES.half()), {}, TypeError, "beta is .*; expected torch.float32, as ga"),
    ("batch_norm", HALF_BUT_STATISTICS, {}, TypeError, "mean is .* torch.float32 on cpu; expected torch.float16, as g"),
    ("batch_norm", (X1.half(), None, None, ONES.half(), ONES.float()), {}, TypeError, "var is .*; .* as mean"),
    ("group_norm", (X1, None, None), {"num_groups": 3}, ValueError, "num_groups is 3; .* a divisor of the 4 channels"),
    ("group_norm", (X1, None, None, 1, "a"), {}, TypeError, "eps is 'a'"),
    ("group_norm", (X1, None, None, 1, -1e-5), {}, ValueError, "eps is -1e-05; expected .* 0 or more"),
    ("group_norm", (X1.half(), ONES.half(), ONES.float(), 1), {}, TypeError, "beta is .*; expected torch.float16"),
    ("group_norm", (X1[:1, :, :1], None, None, 4), {}, ValueError, "x is .* more than one number in a group"),
    ("instance_norm", (X1, None, None, "a"), {}, TypeError, "eps is 'a'"),
    ("instance_norm", (X1, None, None, math.nan), {}, ValueError, "eps is nan; expected .* 0 or more"),
    ("instance_norm", (X1[:, :0], None, None), {}, ValueError, "x is .* a channel"),
    ("instance_norm", (X1[..., :1], None, None), {}, ValueError, "x is .* more than one place"),
    ("instance_norm", (X1[..., :0], None, None), {}, ValueError, "x is .* more than one place"),
    ("layer_norm", (X1, ONES, None), {}, ValueError, r"gamma is \(4,\); expected the last sizes of x"),
    ("layer_norm", (X1, None, None), {}, TypeError, "normalized_shape is None"),
    ("layer_norm", (X1, None, None, 2.0), {}, TypeError, "normalized_shape is 2.0"),
    ("layer_norm", (X1, None, None, 6, "a"), {}, TypeError, "eps is 'a'"),
    ("layer_norm", (X1, None, None, 6, -1), {}, ValueError, "eps is -1; expected .* 0 or more"),
    ("layer_norm", (X1.half().mT, ONES.float(), ONES.half()), {}, TypeError, "beta is .*; .* torch.float32, as gamma"),
    ("rms_norm", (X1, None, 6, "a"), {}, TypeError, "eps is 'a'"),
    ("rms_norm", (X1, None, 6, -1), {}, ValueError, "eps is -1; expected .* 0 or more"),
    ("rms_norm", (X1, None, 5), {}, ValueError, r"normalized_shape is \(5,\); expected the last sizes"),
    ("max_pool", (X[0, 0], 2), {}, ValueError, "x is .* batch, channels and 1 to 3 dimensions"),
    ("max_pool", (X, (2, 2, 2, 2)), {}, ValueError, r"kernel_size is \(2, 2, 2, 2\); expected 1 to 3"),
    ("max_pool", (X, (2,)), {}, ValueError, r"x is .* 3 dimensions .* as kernel_size is \(2,\)"),
    ("max_pool", (X, "ab"), {}, TypeError, "kernel_size is 'ab'"),
    ("max_pool", (X, 0), {}, ValueError, "kernel_size is 0; expected 1 or more"),
    ("max_pool", (X, 7), {}, ValueError, "kernel_size is 7; expected one that reaches no further than 5"),
    ("max_pool", (X, 2), {"stride": 0}, ValueError, "stride is 0"),
    ("max_pool", (X, 2), {"padding": 2}, ValueError, "padding is 2; expected at most half of the kernel's 2"),
    ("max_pool", (X, 2), {"dilation": True}, TypeError, "dilation is True"),
    (
        "max_pool",
        (X1[..., :2], 2),
        {"padding": 1, "dilation": 3},
        ValueError,
        "dilation is 3; expected one whose every",
    ),
    ("max_pool", (X, 2), {"ceil_mode": 1}, TypeError, "ceil_mode is 1; expected True or False"),
    ("max_pool", (X[:, :0], 2), {}, ValueError, "x is .* no size 0 but the batch's"),
    ("max_pool", (X.int(), 2), {}, TypeError, "x is .* torch.int32"),
    ("avg_pool", (X, 2), {"count_include_pad": None}, TypeError, "count_include_pad is None"),
    ("avg_pool", (X, 2), {"divisor_override": 0}, ValueError, "divisor_override is 0"),
    ("avg_pool", (X, 2), {"divisor_override": 0.5}, TypeError, "divisor_override is 0.5"),
    (
        "avg_pool",
        (X[..., None], (2, 2, 2)),
        {"padding": (0, 0, 1)},
        ValueError,
        r"kernel_size is .* at most \(5, 6, 1\)",
    ),
    ("adaptive_max_pool", (X, 0), {}, ValueError, "output_size is 0; expected 1 or more"),
    ("adaptive_max_pool", (X, "ab"), {}, TypeError, "output_size is 'ab'"),
    ("adaptive_max_pool", (X[..., :0], 1), {}, ValueError, "x is .* no size 0"),
    ("adaptive_avg_pool", (X, (2, 2, 2, 2)), {}, ValueError, "output_size is .* 1 to 3 whole numbers"),
    ("adaptive_avg_pool", (X[:, :0], 1), {}, ValueError, "x is .* no size 0"),
    ("global_max_pool", (X[0, 0],), {}, ValueError, r"x is .* \(batch, channels, ...\)"),
    ("global_max_pool", (X[..., :0],), {}, ValueError, "x is .* no size 0"),
    ("global_avg_pool", (X.int(),), {}, TypeError, "x is .* torch.int32"),
    ("add", (X1, ONES), {}, ValueError, "f is .* that of a"),
    ("add", (X1.float(), X1), {}, TypeError, "f is .* torch.float32, as a"),
    ("add", (X1, X1, torch.ones(1)), {}, TypeError, "beta is .* torch.float64, as a"),
    ("add", (X1, X1, ONES), {}, ValueError, "beta is .* a shape that broadcasts"),
    ("add", (X1, meta(X1)), {}, ValueError, "f is .* on cpu, where a is"),
    ("concat", (0,), {}, ValueError, r"tensors is \(\); expected at least one"),
    ("concat", (0, X1, X1[:, :3]), {}, ValueError, "tensor 1 is .* the shape of tensor 0"),
    ("concat", (3, X1), {}, ValueError, "dim is 3; expected a dimension of tensor 0"),
    ("concat", (0, X1[0].float(), X1[0]), {}, TypeError, "tensor 1 is .* as tensor 0"),
    ("concat", (0, [X1]), {}, TypeError, r"tensor 0 is \[a tensor \(2, 4, 6\) of torch.float64 on cpu\]; .* a tensor"),
    ("concat", (X1, X1), {}, TypeError, "dim is a tensor .*; expected a whole number"),
    ("linear", (NESTED, X, None), {}, TypeError, r"x is \[\[1, 1.*\.\.\.; expected a tensor"),
    ("flatten", (X1, 3), {}, ValueError, "start_dim is 3; expected a dimension of x"),
    ("flatten", (X1, 2, 1), {}, ValueError, "start_dim is 2; expected no dimension after end_dim 1"),
    ("pad", (X1, (6, 0)), {"mode": "reflect"}, ValueError, r"pad is \(6, 0\); expected at most 5 in mode reflect"),
    ("pad", (X1, (1,)), {}, ValueError, r"pad is \(1,\); expected a pair"),
    ("pad", (X1, 1), {}, TypeError, "pad is 1; expected a sequence"),
    ("pad", (X1, (1, 1)), {"mode": "mirror"}, ValueError, "mode is 'mirror'; expected one of constant"),
    ("pad", (X1, (-4, -4)), {}, ValueError, "pad is .* no more cropped"),
    ("pad", (X1, (1, 1)), {"value": "a"}, TypeError, "value is 'a'; expected a number"),
    *[
        ("pad", (X1[..., :0], (1, 1)), {"mode": mode}, ValueError, f"x is .*; expected in mode {mode} a place or more")
        for mode in PAD_MODES[1:]
    ],
    ("pad", (X1[:, :0], (1, 1)), {"mode": "reflect"}, ValueError, "x is .*; expected in mode reflect a place or more"),
    ("dropout", (X1, X1), {}, TypeError, "mask is .* torch.bool"),
    ("dropout", (X1, MASK[:1, :3]), {}, ValueError, "mask is .* a shape that broadcasts"),
    ("dropout", (X1, meta(MASK)), {}, ValueError, "mask is .* on cpu, where x is"),
    ("dropout", (X1, MASK, 1.5), {}, ValueError, "p is 1.5; expected a number from 0 to 1"),
    ("embedding", (INDEX + 9, W[0, :, 0]), {}, IndexError, "index is out of range; expected rows of W, 0 to 3"),
    ("embedding", (INDEX, W[0, :0, 0]), {}, ValueError, "W is .*; expected a row or more"),
    ("embedding", (INDEX.double(), W[0, :, 0]), {}, TypeError, "index is .* torch.int64 or torch.int32"),
    ("embedding", (INDEX, ONES), {}, ValueError, r"W is .* shape \(V, D\)"),
    ("embedding", (INDEX, W[0, :, 0], 4), {}, ValueError, "padding_idx is 4; expected a row of W, 0 to 3"),
    ("softmax", (X1, 3), {}, ValueError, r"dim is 3; expected a dimension of \(2, 4, 6\)"),
    ("softmax", (X1, "a"), {}, TypeError, "dim is 'a'; expected a whole number"),
    ("log_softmax", (X1.int(),), {}, TypeError, "z is .* torch.int32"),
    ("log_softmax", (X1, -4), {}, ValueError, "dim is -4; expected a dimension"),
    ("glu", (LOGITS,), {}, ValueError, r"x is a tensor \(3, 5\) .* two halves along dimension -1"),
    ("glu", (LOGITS[0, 0],), {}, ValueError, r"x is a tensor \(\) .* two halves"),
    ("swiglu", (LOGITS, 0), {}, ValueError, "x is .* two halves along dimension 0"),
    ("cross_entropy", (LOGITS, LOGITS[:, :4].softmax(1)), {}, ValueError, r"y is .* shape \(3, 5\): a probability"),
    ("cross_entropy", (LOGITS, CLASSES, ONES), {}, ValueError, r"weight is .* shape \(5,\): a number for each class"),
    ("cross_entropy", (LOGITS, CLASSES), {"reduction": "max"}, ValueError, "reduction is 'max'; .* one of mean, sum"),
    ("cross_entropy", (LOGITS, CLASSES), {"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5; .* 0 to 1"),
    (
        "cross_entropy",
        (LOGITS, LOGITS.softmax(1)),
        {"ignore_index": 2},
        ValueError,
        "ignore_index is 2; expected None, as y holds prob",
    ),
    ("cross_entropy", (LOGITS, CLASSES), {"ignore_index": 0.5}, TypeError, "ignore_index is 0.5; .* a whole number"),
    ("cross_entropy", (LOGITS, CLASSES + 1), {"reduction": "sum"}, IndexError, "y is out of range; .* 0 to 4"),
    ("nll", (LOGITS, CLASSES.int()), {}, TypeError, "y is .* torch.int64"),
    ("nll", (LOGITS[0], CLASSES), {}, ValueError, r"x is .* shape \(B, K\)"),
    ("nll", (LOGITS, CLASSES[:1]), {}, ValueError, r"y is .* shape \(3,\)"),
    ("nll", (LOGITS, CLASSES + 1), {}, IndexError, "y is out of range; expected classes from 0 to 4"),
    ("nll", (LOGITS, CLASSES, ONES), {}, ValueError, "weight is .* a number for each class"),
    ("mse", (LOGITS, LOGITS[:1]), {}, ValueError, r"y is a tensor \(1, 5\) .* shape \(3, 5\): that of x"),
    ("mse", (LOGITS, LOGITS.float()), {}, TypeError, "y is .* torch.float64, as x"),
    ("l1", (LOGITS, LOGITS[0]), {}, ValueError, "y is .* that of x"),
    ("huber", (LOGITS, LOGITS), {"delta": 0}, ValueError, "delta is 0; expected a number over 0"),
    ("huber", (LOGITS, LOGITS), {"delta": "a"}, TypeError, "delta is 'a'"),
    ("smooth_l1", (LOGITS, LOGITS), {"beta": -1}, ValueError, "beta is -1; expected a number, 0 or more"),
    ("bce_with_logits", (LOGITS, LOGITS[0]), {}, ValueError, "y is .* that of z"),
    ("bce_with_logits", (LOGITS, LOGITS, ONES), {}, ValueError, r"weight is .* broadcasts to \(3, 5\), that of z"),
    ("bce_with_logits", (LOGITS, LOGITS, None, "a"), {}, TypeError, "pos_weight is 'a'; expected a tensor"),
    ("kl_div", (LOGITS, LOGITS, "batch"), {}, ValueError, "reduction is 'batch'; expected one of mean, sum, none"),
    ("kl_div", (LOGITS, LOGITS), {"log_target": 1}, TypeError, "log_target is 1; expected True or False"),
    ("kl_div", (LOGITS[0, 0], LOGITS[0, 0], "batchmean"), {}, ValueError, "x is .* a dimension or more"),
    ("attention", (LOGITS[0], LOGITS, LOGITS), {}, ValueError, r"q is .* shape \(..., length, numbers\)"),
    ("attention", (X1, X1[:1], X1), {}, ValueError, r"k is .* batch and heads \(2,\), as in q"),
    ("attention", (X, X[:, :3], X), {"enable_gqa": True}, ValueError, "k is .* a divisor of q's heads"),
    ("attention", (X1, X1[..., :5], X1), {}, ValueError, "k is .* 6 numbers for each key"),
    ("attention", (X1, X1, X1[:, :3]), {}, ValueError, r"v is .* a value for each key"),
    ("attention", (X1, X1, X1, MASK), {}, ValueError, r"mask is .* a shape that broadcasts to \(2, 4, 4\)"),
    ("attention", (X1, X1, X1, INDEX), {}, TypeError, "mask is .* torch.bool, or numbers to add"),
    ("attention", (X1, X1, X1, None, X1[..., :4]), {}, TypeError, "dropout is .* torch.bool"),
    ("attention", (X1, X1, X1, MASK[..., :4]), {"is_causal": True}, ValueError, "mask is .* None, as is_causal"),
    ("attention", (X1, X1, X1), {"scale": "a"}, TypeError, "scale is 'a'; expected a number or None"),
    ("attention", (X1, X1, X1), {"p": 2}, ValueError, "p is 2; expected a number from 0 to 1"),
    ("rnn", (LOGITS, LOGITS, LOGITS, LOGITS, None, None), {}, ValueError, r"x is .* \(T, B, I\).* no packed sequence"),
    ("rnn", (X1, *draw((4, 3), (3, 5), (3, 3)), None, None), {}, ValueError, r"W is .* shape \(H, 6\)"),
    ("rnn", (X1, *draw((2, 3), (3, 6), (3, 3)), None, None), {}, ValueError, r"h is .* shape \(4, 3\)"),
    ("rnn", (X1[:0], *draw((4, 3), (3, 6), (3, 3)), None, None), {}, ValueError, "x is .* a time step or more"),
    ("lstm", (X1, *draw((4, 1), (4, 1), (5, 6), (5, 1)), None, None), {}, ValueError, r"W is .* shape \(4 H, 6\)"),
    ("lstm", (X1, *draw((4, 1), (4, 2), (4, 6), (4, 1)), None, None), {}, ValueError, r"s is .* shape \(4, 1\)"),
    ("gru", (X1, *draw((4, 2), (6, 6), (6, 3)), None, None), {}, ValueError, r"U is .* shape \(6, 2\)"),
    ("gru", (X1, *draw((4, 2), (6, 6), (6, 2)), ONES, None), {}, ValueError, r"b is .* shape \(6,\)"),
]


def refused(name, inputs, settings, kind, words):
    with pytest.raises(kind, match=rf"^{name}: ({words})") as caught:
        RULES[name].apply(*inputs, **settings)
    assert "\n" not in str(caught.value)
    came = re.search(r" is (.*?); expected ", str(caught.value))[1]
    assert len(came) <= 80


@pytest.mark.parametrize(("name", "inputs", "settings", "kind", "words"), REFUSED)
def test_what_does_not_fit_is_named(name, inputs, settings, kind, words):
    refused(name, inputs, settings, kind, words)


@pytest.mark.parametrize(
    ("file", "guard", "instead", "names"),
    [
        (norm_file, "number", lambda *args: None, ("batch_norm", "group_norm", "layer_norm", "rms_norm")),
        (norm_file, "floats", lambda *args, **named: None, ("batch_norm", "group_norm", "layer_norm")),
        (shape_file, "number", lambda *args: None, ("pad", "dropout")),
        (shape_file, "check_pads", lambda rule, argument, pad, *rest: pad, ("pad",)),
        (arguments, "told", repr, ("concat", "conv", "linear")),
        (arguments, "LONGEST", 10_000, ("linear",)),
        (arguments, "operator", SimpleNamespace(index=int), ("conv", "max_pool", "layer_norm")),
    ],
)
def test_a_guard_that_is_away_is_missed(file, guard, instead, names, monkeypatch):
    """The twin of the table: of each of these rules an entry there fails without the guard."""
    monkeypatch.setattr(file, guard, instead)
    if guard == "told":
        monkeypatch.setattr(shape_file, guard, instead)
    if guard == "LONGEST":
        monkeypatch.setattr(arguments._Brief, "maxlist", 10_000)

    def missed(entry):
        try:
            refused(*entry)
        except (*CAUGHT, RuntimeError, TypeError, ValueError):
            return True
        return False

    assert {entry[0] for entry in REFUSED if missed(entry)} >= set(names)


def test_another_error_of_a_gather_is_its_own(monkeypatch):
    """What is no class out of range is not told to be one."""

    def torn(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.Tensor, "gather", torn)
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        RULES["cross_entropy"].apply(LOGITS, CLASSES)


def test_a_class_out_of_range_is_named_under_vmap():
    with pytest.raises(IndexError, match="cross_entropy: y is out of range; expected classes from 0 to 4"):
        torch.vmap(RULES["cross_entropy"].apply)(LOGITS.expand(2, 3, 5), CLASSES.expand(2, 3) + 1)


def test_a_mask_may_be_padded_with_true_and_none_is_torchs_nought():
    assert RULES["pad"].apply(torch.zeros(1, dtype=torch.bool), (0, 1), value=True).tolist() == [False, True]
    assert RULES["pad"].apply(torch.ones(1), (0, 1), value=None).tolist() == [1, 0]
    assert RULES["pad"].apply(torch.ones(1), (0, 1), value=-math.inf).tolist() == [1, -math.inf]


def test_every_rule_that_could_refuses_something():
    activations = {name for name, rule in RULES.items() if rule.__module__.endswith("activation")}
    assert {name for name, *_ in REFUSED} >= RULES.keys() - activations


@pytest.mark.parametrize(("k", "argument"), [(0, "mean"), (1, "var")])
def test_running_statistics_have_no_gradient(k, argument):
    statistics = [ONES.clone().requires_grad_(i == k) for i in (0, 1)]
    with pytest.raises(TypeError, match=f"batch_norm: {argument} is asked for a gradient"):
        RULES["batch_norm"].apply(X1, None, None, *statistics)


@pytest.mark.parametrize(
    ("rule", "k", "argument"),
    [
        ("cross_entropy", 0, "weight"),
        ("nll", 0, "weight"),
        ("bce_with_logits", 0, "weight"),
        ("bce_with_logits", 1, "pos_weight"),
    ],
)
def test_weights_of_a_loss_have_no_gradient(rule, k, argument):
    y = LOGITS.sigmoid() if rule == "bce_with_logits" else CLASSES
    weights = [None, None]
    weights[k] = ONES[:1].expand(5).clone().requires_grad_()
    with pytest.raises(TypeError, match=f"{rule}: {argument} is asked for a gradient"):
        RULES[rule].apply(LOGITS, y, *weights[: k + 1])


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ((None, 0), ValueError, "batches is 0; expected 1 or more"),
        ((None,), TypeError, "batches is None; expected their number"),
        (("a",), TypeError, "momentum is 'a'"),
        ((math.nan,), ValueError, "momentum is nan; expected a finite number"),
    ],
)
def test_running_statistics_refuse(settings, kind, words):
    with pytest.raises(kind, match=f"running_statistics: {words}"):
        running_statistics(X1, ONES, ONES, *settings)
