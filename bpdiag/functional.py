"""Torch's functions by our rules: the table FUNCTIONS, torch's function -> the same call by rule.

An entry takes what torch's function takes, by position or name, and gives what it gives.  What no rule covers (a
setting, whole numbers, shapes that broadcast) it refuses with a TypeError or ValueError, before it has changed
anything; ``swapping.ByRule`` then runs torch's own and notes it.  Random masks are drawn as torch draws them on a CPU,
so that from one seed both drop the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.modules.utils import _ntuple

from bpdiag.rules import ACTIVATIONS, RULES
from bpdiag.rules.arguments import wrong
from bpdiag.rules.norm import running_statistics
from bpdiag.rules.recurrent import layers

FUNCTIONS: dict[Any, Callable[..., Any]] = {}


def by_rule(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Into the table, under each of torch's names for it."""

    def enter(call: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            FUNCTIONS[function] = call
        return call

    return enter


def _written(input: Tensor, y: Tensor, inplace: bool) -> Tensor:
    return input.copy_(y) if inplace else y


def _plain(name: str, inplace_always: bool = False) -> Callable[..., Tensor]:
    """An activation without a setting."""
    rule = ACTIVATIONS[name]

    def call(input: Tensor, inplace: bool = inplace_always) -> Tensor:
        return _activated(rule, input, inplace)

    return call


def _activated(rule: Any, input: Tensor, inplace: bool = False) -> Tensor:
    read = input.clone() if inplace and rule.saves == "input" and isinstance(input, Tensor) else input
    return _written(input, rule.apply(read), inplace)


for _name, _functions in {
    "relu": (functional.relu, torch.relu, Tensor.relu),
    "sigmoid": (functional.sigmoid, torch.sigmoid, Tensor.sigmoid),
    "tanh": (functional.tanh, torch.tanh, Tensor.tanh),
    "selu": (functional.selu, torch.selu),
    "silu": (functional.silu,),
    "mish": (functional.mish,),
    "relu6": (functional.relu6,),
    "hardswish": (functional.hardswish,),
    "hardsigmoid": (functional.hardsigmoid,),
    "softsign": (functional.softsign,),
    "log_sigmoid": (functional.logsigmoid,),
}.items():
    by_rule(*_functions)(_plain(_name))
for _name, _functions in {
    "relu": (functional.relu_, torch.relu_, Tensor.relu_),
    "sigmoid": (torch.sigmoid_, Tensor.sigmoid_),
    "tanh": (torch.tanh_, Tensor.tanh_),
}.items():
    by_rule(*_functions)(_plain(_name, inplace_always=True))


def _fixed(function: str, **settings: tuple[Any, Any]) -> None:
    """Refuse a setting that the rule does not have."""
    for name, (came, known) in settings.items():
        if came != known:
            raise wrong(function, name, came, f"{known}, as the rule has it")


@by_rule(functional.leaky_relu)
def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    _fixed("leaky_relu", negative_slope=(negative_slope, 0.01))
    return _activated(ACTIVATIONS["leaky_relu"], input, inplace)


@by_rule(functional.elu)
def _elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    _fixed("elu", alpha=(alpha, 1.0))
    return _activated(ACTIVATIONS["elu"], input, inplace)


@by_rule(functional.hardtanh)
def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    rule = "relu6" if (min_val, max_val) == (0, 6) else "hardtanh"
    if rule == "hardtanh":
        _fixed("hardtanh", min_val=(min_val, -1), max_val=(max_val, 1))
    return _activated(ACTIVATIONS[rule], input, inplace)


@by_rule(functional.gelu)
def _gelu(input: Tensor, approximate: str = "none") -> Tensor:
    if approximate != "tanh":
        _fixed("gelu", approximate=(approximate, "none"))
    return ACTIVATIONS["gelu_tanh" if approximate == "tanh" else "gelu"].apply(input)


@by_rule(functional.softplus)
def _softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    _fixed("softplus", beta=(beta, 1), threshold=(threshold, 20))
    return ACTIVATIONS["softplus"].apply(input)


@by_rule(functional.prelu, torch.prelu)
def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    return ACTIVATIONS["prelu"].apply(input, weight)


def _along(rule: str) -> Callable[..., Tensor]:
    def call(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
        if isinstance(_stacklevel, torch.dtype):  # torch.softmax(input, dim, dtype)
            dtype = _stacklevel
        return RULES[rule].apply(input if dtype is None else input.to(dtype), dim)

    return call


by_rule(functional.softmax, torch.softmax, Tensor.softmax)(_along("softmax"))
by_rule(functional.log_softmax, torch.log_softmax, Tensor.log_softmax)(_along("log_softmax"))


@by_rule(functional.glu)
def _glu(input: Tensor, dim: int = -1) -> Tensor:
    return RULES["glu"].apply(input, dim)


# ---- affine maps and what moves numbers ----


@by_rule(functional.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return RULES["linear"].apply(input, weight, bias)


@by_rule(functional.conv1d, functional.conv2d, functional.conv3d)
def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    return RULES["conv"].apply(input, weight, bias, stride, padding, dilation, groups)


@by_rule(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
def _conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    return RULES["conv_transpose"].apply(input, weight, bias, stride, padding, output_padding, groups, dilation)


@by_rule(functional.embedding)
def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    _fixed("embedding", max_norm=(max_norm, None), scale_grad_by_freq=(scale_grad_by_freq, False))
    _fixed("embedding", sparse=(sparse, False))
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    return RULES["embedding"].apply(input, weight, padding_idx)


@by_rule(torch.add, Tensor.add)
def _add(input: Tensor, other: Tensor, *, alpha: float = 1) -> Tensor:
    return RULES["add"].apply(input, other, alpha)


@by_rule(Tensor.add_)
def _add_(input: Tensor, other: Tensor, *, alpha: float = 1) -> Tensor:
    return input.copy_(RULES["add"].apply(input, other, alpha))


@by_rule(torch.cat, torch.concat, torch.concatenate)
def _cat(tensors: Any, dim: int = 0) -> Tensor:
    return RULES["concat"].apply(dim, *tensors)


@by_rule(torch.flatten, Tensor.flatten)
def _flatten(input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """A copy, where torch's may be a view: the view of a Function could not be changed in place."""
    return RULES["flatten"].apply(input, start_dim, end_dim)


@by_rule(functional.pad)
def _pad(input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Tensor:
    return RULES["pad"].apply(input, pad, mode, value)


# ---- dropout ----


def _dropped(places: int | None, name: str) -> Callable[..., Tensor]:
    """Of single numbers, or of whole channels with so many dimensions of places."""

    def call(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if places is not None and input.dim() != places + 2:
            raise wrong(name, "input", input, f"{places + 2} dimensions")
        if not training or p == 0 or not input.numel():
            return input
        shape = input.shape if places is None else (*input.shape[:2], *[1] * places)
        drawn = torch.empty_like(input) if places is None else input.new_empty(shape)
        mask = (
            drawn.detach().bernoulli_(1 - p).bool()
            if p < 1
            else torch.zeros(shape, dtype=torch.bool, device=input.device)
        )
        return _written(input, RULES["dropout"].apply(input, mask, p), inplace)

    return call


by_rule(functional.dropout)(_dropped(None, "dropout"))
by_rule(functional.dropout1d)(_dropped(1, "dropout1d"))
by_rule(functional.dropout2d)(_dropped(2, "dropout2d"))
by_rule(functional.dropout3d)(_dropped(3, "dropout3d"))


# ---- normalization ----


@by_rule(functional.layer_norm)
def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    return RULES["layer_norm"].apply(input, weight, bias, tuple(normalized_shape), eps)


@by_rule(functional.rms_norm)
def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return RULES["rms_norm"].apply(input, weight, tuple(normalized_shape), eps)


@by_rule(functional.group_norm)
def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    return RULES["group_norm"].apply(input, weight, bias, num_groups, eps)


@by_rule(functional.batch_norm)
def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return RULES["batch_norm"].apply(input, weight, bias, running_mean, running_var, eps)
    y = RULES["batch_norm"].apply(input, weight, bias, eps=eps)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            mean, var = running_statistics(input, running_mean, running_var, momentum)
            running_mean.copy_(mean)
            running_var.copy_(var)
    return y


@by_rule(functional.instance_norm)
def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return RULES["batch_norm"].apply(input, weight, bias, running_mean, running_var, eps)
    _fixed("instance_norm", running_mean=(running_mean, None))
    return RULES["instance_norm"].apply(input, weight, bias, eps)


# ---- pools ----


def _max_pool(n: int) -> Callable[..., Tensor]:
    def call(
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Tensor:
        _fixed("max_pool", return_indices=(return_indices, False))
        return RULES["max_pool"].apply(input, _ntuple(n)(kernel_size), stride or None, padding, dilation, ceil_mode)

    return call


def _avg_pool(n: int) -> Callable[..., Tensor]:
    def call(
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Tensor:
        size = _ntuple(n)(kernel_size)
        settings = stride or None, padding, ceil_mode, count_include_pad, divisor_override
        return RULES["avg_pool"].apply(input, size, *settings)

    return call


def _adaptive(rule: str, n: int) -> Callable[..., Tensor]:
    def call(input: Tensor, output_size: Any, return_indices: bool = False) -> Tensor:
        _fixed(rule, return_indices=(return_indices, False))
        sizes = zip(_ntuple(n)(output_size), input.shape[-n:], strict=True)
        return RULES[rule].apply(input, tuple([there if asked is None else asked for asked, there in sizes]))

    return call


for _n, _max, _avg, _adaptive_max, _adaptive_avg in (
    (1, functional.max_pool1d, functional.avg_pool1d, functional.adaptive_max_pool1d, functional.adaptive_avg_pool1d),
    (2, functional.max_pool2d, functional.avg_pool2d, functional.adaptive_max_pool2d, functional.adaptive_avg_pool2d),
    (3, functional.max_pool3d, functional.avg_pool3d, functional.adaptive_max_pool3d, functional.adaptive_avg_pool3d),
):
    by_rule(_max)(_max_pool(_n))
    by_rule(_avg)(_avg_pool(_n))
    by_rule(_adaptive_max)(_adaptive("adaptive_max_pool", _n))
    by_rule(_adaptive_avg)(_adaptive("adaptive_avg_pool", _n))


# ---- losses ----


def _no_legacy(function: str, size_average: Any, reduce: Any) -> None:
    _fixed(function, size_average=(size_average, None), reduce=(reduce, None))


def _in_rows(rule: str, input: Tensor, target: Tensor, reduction: str, *settings: Any, **named: Any) -> Tensor:
    """Classes along the second dimension, or of one sample along the only one: as rows, and back."""
    if not input.dim():
        raise wrong(rule, "input", input, "a dimension of classes")
    if target.shape == input.shape and target.is_floating_point():
        shape = target.movedim(1, -1).shape[:-1] if input.dim() > 1 else target.shape[:0]
        target = (target.movedim(1, -1) if input.dim() > 1 else target).reshape(
            -1, input.shape[min(1, input.dim() - 1)]
        )
    else:
        shape = target.shape
        target = target.reshape(-1)
    classes = min(1, input.dim() - 1)
    rows = input.movedim(classes, -1).reshape(-1, input.shape[classes])
    if shape != (*input.shape[:classes], *input.shape[classes + 1 :]):
        raise wrong(rule, "target", target, f"a class for each of {tuple(input.shape)}")
    out = RULES[rule].apply(rows, target, *settings, reduction=reduction, **named)
    return out.reshape(shape) if reduction == "none" else out


@by_rule(functional.cross_entropy)
def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    _no_legacy("cross_entropy", size_average, reduce)
    ignored = None if ignore_index < 0 and target.is_floating_point() else ignore_index  # it ignores none, torch holds
    named = {"label_smoothing": label_smoothing, "ignore_index": ignored}
    return _in_rows("cross_entropy", input, target, reduction, weight, **named)


@by_rule(functional.nll_loss)
def _nll(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Tensor:
    _no_legacy("nll_loss", size_average, reduce)
    return _in_rows("nll", input, target, reduction, weight, ignore_index=ignore_index)


def _difference(rule: str, setting: str | None = None) -> Callable[..., Tensor]:
    def call(
        input: Tensor,
        target: Tensor,
        size_average: Any = None,
        reduce: Any = None,
        reduction: str = "mean",
        *more: Any,
        weight: Tensor | None = None,
        **named: Any,
    ) -> Tensor:
        _no_legacy(rule, size_average, reduce)
        _fixed(rule, weight=(weight, None))
        return RULES[rule].apply(input, target, reduction, *more, **named)

    return call


by_rule(functional.mse_loss)(_difference("mse"))
by_rule(functional.l1_loss)(_difference("l1"))
by_rule(functional.smooth_l1_loss)(_difference("smooth_l1"))


@by_rule(functional.huber_loss)
def _huber(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    _fixed("huber_loss", weight=(weight, None))
    return RULES["huber"].apply(input, target, reduction, delta)


@by_rule(functional.kl_div)
def _kl_div(
    input: Tensor,
    target: Tensor,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    _no_legacy("kl_div", size_average, reduce)
    return RULES["kl_div"].apply(input, target, reduction, log_target)


@by_rule(functional.binary_cross_entropy_with_logits)
def _bce_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    _no_legacy("binary_cross_entropy_with_logits", size_average, reduce)
    return RULES["bce_with_logits"].apply(input, target, weight, pos_weight, reduction)


# ---- attention and recurrence ----


@by_rule(functional.scaled_dot_product_attention)
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    dropout = None
    if key.dim() != query.dim() or (key.shape[:-2] != query.shape[:-2] and not enable_gqa):
        raise wrong("scaled_dot_product_attention", "key", key, "as many dimensions, batch and heads as query")
    if dropout_p > 0:
        drawn = query.new_empty((*query.shape[:-1], key.shape[-2]))
        dropout = drawn.bernoulli_(1 - dropout_p).bool() if dropout_p < 1 else torch.zeros_like(drawn, dtype=torch.bool)
    inputs = query, key, value, attn_mask, dropout, float(dropout_p), bool(is_causal), scale, enable_gqa
    return RULES["attention"].apply(*inputs)


def _recurrent(name: str) -> Callable[..., Any]:
    rule: Any = RULES[name]

    def call(
        input: Tensor,
        hx: Any,
        params: Any,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        if not isinstance(params, list | tuple):
            raise wrong(name, "input", "packed", "a tensor (T, B, I)", TypeError)
        each = 4 if has_biases else 2
        if len(params) != each * num_layers * (1 + bidirectional):
            raise wrong(name, "params", len(params), f"{each} tensors for each layer and direction")
        weights = [(*params[i : i + each], None, None)[:4] for i in range(0, len(params), each)]
        x = input.transpose(0, 1) if batch_first else input
        masks: list[Any] = [None] * (num_layers - 1)
        if train and dropout > 0:
            shape = (*x.shape[:2], params[1].shape[-1] * (1 + bidirectional))
            masks = [(x.new_empty(shape).bernoulli_(1 - dropout).bool(), dropout) for _ in masks]
        y, last = layers(rule, x, hx if rule.states > 1 else [hx], weights, bidirectional, masks)
        return (y.transpose(0, 1) if batch_first else y), *last

    return call


def _cell(name: str) -> Callable[..., Any]:
    rule: Any = RULES[name]

    def call(input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
        y = rule.apply(input.unsqueeze(0), *(hx if rule.states > 1 else [hx]), w_ih, w_hh, b_ih, b_hh)
        return (y[0, 0], y[1, 0]) if rule.states > 1 else y[0]

    return call


by_rule(torch.rnn_tanh)(_recurrent("rnn"))
by_rule(torch.lstm)(_recurrent("lstm"))
by_rule(torch.gru)(_recurrent("gru"))
by_rule(torch.rnn_tanh_cell)(_cell("rnn"))
by_rule(torch.lstm_cell)(_cell("lstm"))
by_rule(torch.gru_cell)(_cell("gru"))
