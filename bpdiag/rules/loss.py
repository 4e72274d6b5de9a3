"""Losses, fused with the output nonlinearity where the product is simpler than its factors.

Letters: b the B samples, k the K classes, c_b the cost of a sample or c_i of a number.  ``reduction`` says what becomes
of the costs: "mean" and "sum" give one number C, "none" gives them all; g_c is g_C, over their number for a mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bpdiag.rules.arguments import flag, floats, number, one_of, shaped, tensor, whole, wrong
from bpdiag.rules.function import Rule, wide

REDUCTIONS = ("mean", "sum", "none")
NO_CLASS = torch.iinfo(torch.int64).min  # an ignore_index that ignores nothing


class CrossEntropy(Rule):
    """C = mean_b(log sum_k exp z_bk - z_b,y_b),  g_z = (softmax(z) - onehot(y)) / B.

    Shapes: logits z (B, K), classes y (B,) of integers 0..K-1, C ().  Softmax and logarithm are one rule: apart, the
    slope of the logarithm at a probability that underflowed is infinite; together it is p - 1.  Stable: the largest
    logit is subtracted before the exponential, and not added back.  Keeps z and y.  No kink; rows of g_z sum to 0.  A
    logit of +inf or nan gives nan, as in torch; a wrong class of logit -inf costs nothing (with smoothing, or of a
    probability, inf or nan); the right class at -inf costs inf.  An empty batch gives nan.

    In general the target is a distribution, c_b = -sum_k q_bk log softmax(z)_bk with q_bk = w_k ((1 - e) t_bk + e / K),
    and g_z_bk = g_c (softmax(z)_bk sum_j q_bj - q_bk):

    * t is onehot(y), or y itself where it holds probabilities (B, K) of z's dtype; g_y = -g_c (1 - e) w log softmax(z);
    * ``weight`` w (K,), a constant; ``label_smoothing`` e, from 0 to 1;
    * rows of the class ``ignore_index`` (None: there is none, as where y holds probabilities) cost 0 and get 0,
      whatever their logits;
    * ``reduction``: a mean is over the sum of w_y of the rows that count, of probabilities over B.  Where no row counts
      it is nan and g_z 0; where rows count whose weights are all 0, both are nan, as in torch.

    Raises:
        ValueError, TypeError: An argument does not fit; it is named.
        IndexError: A class is outside 0..K-1 (on a CPU; elsewhere torch's own check comes first).

    Source:
        Label smoothing: Szegedy et al. 2016, section 7.

    Example:
        >>> z, y = torch.zeros(1, 4), torch.tensor([2])
        >>> round(CrossEntropy.apply(z, y).item(), 6)           # log 4
        1.386294
        >>> CrossEntropy.vjp(torch.tensor(1.0), z, y)[0]
        tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]])
        >>> CrossEntropy.vjp(torch.tensor(1.0), z, y, label_smoothing=1.0)[0]
        tensor([[0., 0., 0., 0.]])
    """

    name = "cross_entropy"

    def forward(z, y, weight=None, reduction="mean", label_smoothing=0.0, ignore_index=None):
        floats("cross_entropy", z=z)
        tensor("cross_entropy", "y", y)
        if y.dtype != torch.int64 and (y.dtype != z.dtype or y.dim() != z.dim()):
            expected = "a tensor of torch.int64: the class of each sample; or probabilities, in the dtype of z"
            raise wrong("cross_entropy", "y", y, expected, TypeError)
        if y.device != z.device:
            raise wrong("cross_entropy", "y", y, f"it on {z.device}, where z is")
        if z.dim() != 2 or not z.shape[1]:
            raise wrong("cross_entropy", "z", z, "logits of shape (B, K), of a class or more")
        by_class = y.dtype == torch.int64
        meaning = "the class of each sample of z" if by_class else "a probability of each class, for each sample of z"
        shaped("cross_entropy", "y", y, z.shape[:1] if by_class else z.shape, meaning)
        _check_weights("cross_entropy", z, weight, reduction, ignore_index)
        if ignore_index is not None and not by_class:
            raise wrong("cross_entropy", "ignore_index", ignore_index, "None, as y holds probabilities")
        number("cross_entropy", "label_smoothing", label_smoothing, "a number from 0 to 1", lambda e: 0 <= e <= 1)
        # a mean of many small numbers: under autocast in float32, as torch does
        narrow = z.element_size() < 4 and torch.is_autocast_enabled(z.device.type)
        log_p = torch.log_softmax(z, 1, dtype=torch.float32 if narrow else None)
        if not by_class:
            q = _smoothed(y, z.shape[1], weight, label_smoothing)
            return _reduced(-(q * log_p).sum(1), reduction, len(z)).to(log_p.dtype)
        try:
            if _is_plain(weight, reduction, label_smoothing, ignore_index):
                return -log_p.gather(1, y.unsqueeze(1)).mean()
            counts = None if ignore_index is None else y != ignore_index
            right = y if counts is None else y.masked_fill(~counts, 0)
            cost = -(1 - label_smoothing) * log_p.gather(1, right.unsqueeze(1)).squeeze(1)
            cost = cost if weight is None else cost * weight[right]
        except (IndexError, RuntimeError) as error:
            # torch has looked at every class; to look again before would cost a pass, and on an accelerator a wait
            if "out of bounds" not in str(error):
                raise
            raise _out_of_range("cross_entropy", z.shape[1]) from error
        if label_smoothing:
            cost = cost - label_smoothing / z.shape[1] * (log_p if weight is None else log_p * weight).sum(1)
        cost = cost if counts is None else cost.masked_fill(~counts, 0)
        total = torch.ones_like(cost) if weight is None else weight[right]
        total = total if counts is None else total * counts
        return _reduced(cost, reduction, total.sum()).to(log_p.dtype)

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """z, and y for g_z; weight and settings where there are any."""
        z, y, *general = inputs
        _refuse_gradient("cross_entropy", "weight", needs[2:3])
        if y.dtype == torch.int64 and _is_plain(*general):
            return z, y
        return z, y if needs[0] or y.dtype == torch.int64 else None, *general

    def vjp(g_C, z, y, weight=None, reduction="mean", label_smoothing=0.0, ignore_index=None, needs=(True, False)):
        if y is not None and y.dtype == torch.int64 and _is_plain(weight, reduction, label_smoothing, ignore_index):
            if not needs[0]:
                return None, None
            onehot = y.unsqueeze(-1) == torch.arange(z.shape[-1], device=z.device)
            return g_C * (torch.softmax(z, -1) - onehot.to(z.dtype)) / z.shape[0], None
        z, w, K = wide(z), 1.0 if weight is None else wide(weight), z.shape[-1]
        if y is not None and y.dtype == torch.int64:
            counts = None if ignore_index is None else (y != ignore_index).unsqueeze(-1)
            onehot = y.unsqueeze(-1) == torch.arange(K, device=z.device)
            t = (onehot if counts is None else onehot & counts).to(z.dtype)
            q = _smoothed(t, K, weight, label_smoothing)
            total = (w * t).sum() if reduction == "mean" else None
        else:
            q, total, counts = None if y is None else _smoothed(wide(y), K, weight, label_smoothing), len(z), None
        g_c = _each(g_C, reduction, total, counts).reshape(-1, 1)
        g_z = g_c * (torch.softmax(z, -1) * q.sum(-1, keepdim=True) - q) if needs[0] else None
        g_z = g_z if g_z is None or counts is None else g_z.masked_fill(~counts, 0)  # whatever its logits
        g_y = -g_c * ((1 - label_smoothing) * w * torch.log_softmax(z, -1)) if needs[1] else None
        return g_z, g_y


class Nll(Rule):
    """C = -sum_b w_y_b x_b,y_b / sum_b w_y_b,  g_x_bk = -g_c w_k onehot(y_b)_k: x holds logarithms of probabilities.

    Shapes: x (B, K), classes y (B,) of integers 0..K-1; ``weight`` w (K,), a constant, 1 unless given.  ``reduction``:
    the mean is over the sum of the weights; rows of the class ``ignore_index`` (None: there is none) cost 0 and get 0.
    Where no row counts the mean is nan and g_x 0; where rows count whose weights are all 0, both are nan.  Keeps y,
    where torch keeps x too: linear in x.  No kink.

    Raises:
        ValueError, TypeError: An argument does not fit; it is named.
        IndexError: A class is outside 0..K-1 (on a CPU; elsewhere torch's own check comes first).

    Example:
        >>> x, y = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), torch.tensor([0, 1])
        >>> Nll.apply(x, y), Nll.apply(x, y, torch.tensor([3.0, 1.0]))
        (tensor(2.5000), tensor(1.7500))
        >>> Nll.vjp(torch.tensor(1.0), y, 2)[0]
        tensor([[-0.5000,  0.0000],
                [ 0.0000, -0.5000]])
    """

    name = "nll"

    def forward(x, y, weight=None, reduction="mean", ignore_index=None):
        floats("nll", x=x)
        tensor("nll", "y", y)
        if y.dtype != torch.int64:
            raise wrong("nll", "y", y, "a tensor of torch.int64: the class of each sample", TypeError)
        if y.device != x.device:
            raise wrong("nll", "y", y, f"it on {x.device}, where x is")
        if x.dim() != 2 or not x.shape[1]:
            raise wrong("nll", "x", x, "shape (B, K), of a class or more")
        shaped("nll", "y", y, x.shape[:1], "the class of each sample of x")
        _check_weights("nll", x, weight, reduction, ignore_index)
        ignored = NO_CLASS if ignore_index is None else ignore_index
        try:
            return functional.nll_loss(x, y, weight, ignore_index=ignored, reduction=reduction)
        except (IndexError, RuntimeError) as error:
            if "out of bounds" not in str(error):
                raise
            raise _out_of_range("nll", x.shape[1]) from error

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """The classes and how many there are, the weights and the settings."""
        x, y, weight, *settings = inputs
        _refuse_gradient("nll", "weight", needs[2:3])
        return y, x.shape[1], weight, *settings

    def vjp(g_C, y, K, weight=None, reduction="mean", ignore_index=None, needs=(True, False)):
        if not needs[0]:
            return None, None
        counts = None if ignore_index is None else y != ignore_index
        right = y if counts is None else y.masked_fill(~counts, 0)
        w = torch.ones_like(y, dtype=wide(g_C).dtype) if weight is None else wide(weight)[right]
        w = w if counts is None else w * counts
        g_right = -_each(g_C, reduction, w.sum(), counts) * w
        g_right = g_right if counts is None else g_right.masked_fill(~counts, 0)
        return torch.zeros(len(y), K, dtype=w.dtype, device=w.device).scatter(
            1, right.unsqueeze(1), g_right.unsqueeze(1)
        ), None


class Difference(Rule):
    """C = mean_i c(d_i),  g_x = g_c c'(d),  g_y = -g_x,  d = x - y: a cost of how far off each number is."""

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """x, y and the settings."""
        return inputs


class Mse(Difference):
    """C = mean_i d_i^2,  g_x = 2 d g_c,  g_y = -g_x,  d = x - y.

    Shapes: x and y alike, any; C () or, unreduced, as they.  Keeps x and y.  No kink.  A mean of none is nan.

    Example:
        >>> x, y = torch.tensor([1.0, 4.0]), torch.tensor([0.0, 0.0])
        >>> Mse.apply(x, y), Mse.vjp(torch.tensor(1.0), x, y)[0]
        (tensor(8.5000), tensor([1., 4.]))
    """

    name = "mse"

    def forward(x, y, reduction="mean"):
        _check_pair("mse", x, y, reduction)
        return functional.mse_loss(x, y, reduction=reduction)

    def vjp(g_C, x, y, reduction="mean", needs=(True, True)):
        return _apart(g_C, reduction, 2 * (wide(x) - wide(y)), needs)


class L1(Rule):
    """C = mean_i |d_i|,  g_x = sign(d) g_c,  g_y = -g_x,  d = x - y.

    Shapes: x and y alike, any; C () or, unreduced, as they.  Keeps sign(d), as the slope does not change with d.  Kink
    at d = 0, slope there 0.  A mean of none is nan.

    Example:
        >>> x, y = torch.tensor([1.0, -4.0]), torch.tensor([0.0, 0.0])
        >>> L1.apply(x, y), L1.vjp(torch.tensor(1.0), torch.sign(x - y))[0]
        (tensor(2.5000), tensor([ 0.5000, -0.5000]))
    """

    name = "l1"

    def forward(x, y, reduction="mean"):
        _check_pair("l1", x, y, reduction)
        return functional.l1_loss(x, y, reduction=reduction)

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """The sign of x - y and the reduction."""
        x, y, reduction = inputs
        return torch.sign(x - y), reduction

    def vjp(g_C, sign, reduction="mean", needs=(True, True)):
        return _apart(g_C, reduction, sign, needs)


class Huber(Difference):
    """C = mean_i (d_i^2 / 2 to |d_i| = delta, then delta (|d_i| - delta / 2)),  g_x = max(min(d, delta), -delta) g_c.

    g_y = -g_x, d = x - y.  Shapes: x and y alike, any; C () or, unreduced, as they.  ``delta`` over 0.  Keeps x and y.
    No kink: the slope is delta on both sides of |d| = delta.  A mean of none is nan.

    Source:
        Huber 1964.

    Example:
        >>> x, y = torch.tensor([0.5, -4.0]), torch.tensor([0.0, 0.0])
        >>> Huber.apply(x, y, "sum"), Huber.vjp(torch.tensor(1.0), x, y, "sum")[0]
        (tensor(3.6250), tensor([ 0.5000, -1.0000]))
    """

    name = "huber"

    def forward(x, y, reduction="mean", delta=1.0):
        _check_pair("huber", x, y, reduction)
        number("huber", "delta", delta, "a number over 0", lambda delta: delta > 0)
        return functional.huber_loss(x, y, reduction=reduction, delta=delta)

    def vjp(g_C, x, y, reduction="mean", delta=1.0, needs=(True, True)):
        return _apart(g_C, reduction, torch.clamp(wide(x) - wide(y), -delta, delta), needs)


class SmoothL1(Difference):
    """C = mean_i (d_i^2 / (2 beta) below |d_i| = beta, then |d_i| - beta / 2),  g_x = max(min(d / beta, 1), -1) g_c.

    g_y = -g_x, d = x - y: ``Huber`` over beta.  Shapes: x and y alike, any; C () or, unreduced, as they.  ``beta`` 0 or
    more; at 0 it is ``L1``.  Keeps x and y.  No kink for beta over 0.  A mean of none is nan.

    Source:
        Girshick 2015, eq. 3.

    Example:
        >>> x, y = torch.tensor([0.5, -4.0]), torch.tensor([0.0, 0.0])
        >>> SmoothL1.apply(x, y, "sum", 2.0), SmoothL1.vjp(torch.tensor(1.0), x, y, "sum", 2.0)[0]
        (tensor(3.0625), tensor([ 0.2500, -1.0000]))
    """

    name = "smooth_l1"

    def forward(x, y, reduction="mean", beta=1.0):
        _check_pair("smooth_l1", x, y, reduction)
        number("smooth_l1", "beta", beta, "a number, 0 or more", lambda beta: beta >= 0)
        return functional.smooth_l1_loss(x, y, reduction=reduction, beta=beta)

    def vjp(g_C, x, y, reduction="mean", beta=1.0, needs=(True, True)):
        d = wide(x) - wide(y)
        return _apart(g_C, reduction, torch.clamp(d / beta, -1, 1) if beta else torch.sign(d), needs)


class BceWithLogits(Rule):
    """C = mean_i w (-y v log p - (1 - y) log(1 - p)),  p = sigmoid(z),  g_z = w (p (1 - y) - v y (1 - p)) g_c.

    g_y = w (log(1 - p) - v log p) g_c.  Shapes: z and y alike, any; C () or, unreduced, as they.  ``weight`` w and
    ``pos_weight`` v, constants, broadcast to them; 1 unless given, and then g_z = (p - y) g_c.  Sigmoid and logarithm
    are one rule: stable for every z.  Keeps z, y, w and v.  No kink.  A mean of none is nan.

    Raises:
        ValueError, TypeError: An argument does not fit; it is named.

    Example:
        >>> z, y = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0])
        >>> BceWithLogits.vjp(torch.tensor(1.0), z, y, pos_weight=torch.tensor(3.0))[0]
        tensor([-0.7500,  0.2500])
    """

    name = "bce_with_logits"

    def forward(z, y, weight=None, pos_weight=None, reduction="mean"):
        _check_pair("bce_with_logits", z, y, reduction, "z")
        for argument, t in (("weight", weight), ("pos_weight", pos_weight)):
            if t is not None:
                floats("bce_with_logits", z=z, **{argument: t})
                if t.dim() > z.dim() or any(
                    n not in (1, m) for n, m in zip(t.shape[::-1], z.shape[::-1], strict=False)
                ):
                    raise wrong(
                        "bce_with_logits", argument, t, f"a shape that broadcasts to {tuple(z.shape)}, that of z"
                    )
        return functional.binary_cross_entropy_with_logits(z, y, weight, pos_weight=pos_weight, reduction=reduction)

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """z, y, the weights and the reduction."""
        _refuse_gradient("bce_with_logits", "weight", needs[2:3])
        _refuse_gradient("bce_with_logits", "pos_weight", needs[3:4])
        return inputs

    def vjp(g_C, z, y, weight=None, pos_weight=None, reduction="mean", needs=(True, True)):
        z, y, g_c = wide(z), wide(y), _each(g_C, reduction, z.numel())
        g_c = g_c if weight is None else g_c * wide(weight)
        v, g_z, g_y = 1.0 if pos_weight is None else wide(pos_weight), None, None
        if needs[0]:
            p = torch.sigmoid(z)
            g_z = g_c * (p - y if pos_weight is None else p * (1 - y) - v * y * torch.sigmoid(-z))
        if needs[1]:
            g_y = g_c * (functional.logsigmoid(-z) - v * functional.logsigmoid(z) if pos_weight is not None else -z)
        return g_z, g_y


class KlDiv(Rule):
    """C = mean_i y (log y - x),  g_x = -y g_c,  g_y = (log y + 1 - x) g_c: x holds logarithms of probabilities.

    With ``log_target`` y holds logarithms too: C = mean_i e^y (y - x), g_x = -e^y g_c, g_y = e^y (y - x + 1) g_c.
    Shapes: x and y alike, any; C () or, unreduced, as they.  ``reduction`` may be "batchmean" too: the sum over the
    first size, which is the divergence of distributions in rows.  Keeps y, and x for g_y.  At y = 0 the cost is 0 and
    g_y -inf (torch's is nan); 0 times infinity is nan there as in torch: at y = 0 with x = -inf, and of logarithms at
    y = -inf.  A mean of none is nan.

    Raises:
        ValueError, TypeError: An argument does not fit; it is named.

    Source:
        Kullback & Leibler 1951.

    Example:
        >>> x, y = torch.tensor([[-1.0, -2.0]]), torch.tensor([[1.0, 0.0]])
        >>> KlDiv.apply(x, y, "batchmean"), KlDiv.vjp(torch.tensor(1.0), x, y, "batchmean")[0]
        (tensor(1.), tensor([[-1., -0.]]))
    """

    name = "kl_div"

    def forward(x, y, reduction="mean", log_target=False):
        _check_pair("kl_div", x, y, "sum" if reduction == "batchmean" else reduction)
        flag("kl_div", "log_target", log_target)
        if reduction == "batchmean" and not x.dim():
            raise wrong("kl_div", "x", x, "a dimension or more, the first of them the batch")
        wide_x, wide_y = wide(x), wide(y)
        cost = torch.exp(wide_y) * (wide_y - wide_x) if log_target else torch.xlogy(wide_y, wide_y) - wide_y * wide_x
        cost = cost.sum() / len(x) if reduction == "batchmean" else _reduced(cost, reduction, cost.numel())
        return cost if torch.is_autocast_enabled(x.device.type) else cost.to(x.dtype)

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """y and the settings; x for g_y."""
        x, *others = inputs
        return x if needs[1] else None, *others

    def vjp(g_C, x, y, reduction="mean", log_target=False, needs=(True, True)):
        y, n = wide(y), len(y) if reduction == "batchmean" else y.numel()
        g_c = _each(g_C, "mean" if reduction == "batchmean" else reduction, n)
        p, log_p = (torch.exp(y), y) if log_target else (y, torch.log(y) if needs[1] else None)
        g_x = (-g_c * p).expand_as(p) if needs[0] else None
        if not needs[1]:
            return g_x, None
        return g_x, g_c * (p * (y - wide(x) + 1) if log_target else log_p + 1 - wide(x))


def _is_plain(
    weight: Any = None, reduction: str = "mean", label_smoothing: float = 0.0, ignore_index: int | None = None
) -> bool:
    return weight is None and reduction == "mean" and label_smoothing == 0 and ignore_index is None


def _smoothed(t: Tensor, classes: int, weight: Tensor | None, label_smoothing: float) -> Tensor:
    """q: the probabilities a little nearer to equal, times the weights."""
    q = (1 - label_smoothing) * t + label_smoothing / classes
    return q if weight is None else weight * q


def _reduced(cost: Tensor, reduction: str, n: Any) -> Tensor:
    """C, of which a mean is over n."""
    return cost if reduction == "none" else cost.sum() / n if reduction == "mean" else cost.sum()


def _each(g_C: Tensor, reduction: str, n: Any, counts: Tensor | None = None) -> Tensor:
    """g_c: the cotangent of each cost, of which a mean is over n; where no row counts nobody is asked for anything."""
    g = wide(g_C)
    if reduction != "mean":
        return g
    if counts is None:
        return g / n
    some = counts.any()
    return torch.where(some, g / torch.where(some, n, 1), 0)


def _apart(g_C: Tensor, reduction: str, slope: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """(g_x, g_y) of a cost of x - y."""
    g_x = _each(g_C, reduction, slope.numel()) * slope
    return g_x if needs[0] else None, -g_x if needs[1] else None


def _check_pair(rule: str, x: Any, y: Any, reduction: Any, first: str = "x") -> None:
    floats(rule, **{first: x, "y": y})
    shaped(rule, "y", y, x.shape, f"that of {first}")
    one_of(rule, "reduction", reduction, REDUCTIONS)


def _check_weights(rule: str, x: Tensor, weight: Any, reduction: Any, ignore_index: Any) -> None:
    one_of(rule, "reduction", reduction, REDUCTIONS)
    if weight is not None:
        floats(rule, x=x, weight=weight)
        shaped(rule, "weight", weight, x.shape[1:], "a number for each class")
    if ignore_index is not None:
        whole(rule, "ignore_index", ignore_index, None)


def _refuse_gradient(rule: str, argument: str, needed: tuple[bool, ...]) -> None:
    if any(needed):
        raise wrong(rule, argument, "asked for a gradient", "a constant: detach it", TypeError)


def _out_of_range(rule: str, classes: int) -> Exception:
    return wrong(rule, "y", "out of range", f"classes from 0 to {classes - 1}", IndexError)
