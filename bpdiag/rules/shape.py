"""What moves, joins, adds, picks or masks numbers: linear maps whose matrix holds zeros and ones (times one number).

The vjp of each is the transposed selection: what was moved goes back, what was copied is summed, what was left out
gets 0.  So hardly anything is kept: sizes, a mask, indices, never the numbers themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bpdiag.rules.arguments import floats, number, one_of, tensor, told, whole, wrong
from bpdiag.rules.function import Rule, wide

PAD_MODES = ("constant", "reflect", "replicate", "circular")


class Pad(Rule):
    """y_j = x_i(j),  g_x_i = sum of g_y_j over the j with i(j) = i: the edges are folded back where they came from.

    ``pad`` as in torch, the last dimension first: (left, right, top, bottom, ...).  i(j) by mode, for a place j before
    the first or after the last of n: ``reflect`` mirrors (the edge itself not repeated; fewer than n), ``replicate``
    repeats the edge, ``circular`` goes on at the other end (n at most); ``constant`` takes ``value``, which gets no
    cotangent, and a negative pad crops.  Keeps no tensor: the sizes are those of g_y less the pads.  No kink.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 3.0]])
        >>> Pad.apply(x, (1, 2), mode="reflect")
        tensor([[2., 1., 2., 3., 2., 1.]])
        >>> Pad.vjp(torch.tensor([[1.0, 0.0, 0.0, 0.0, 8.0, 4.0]]), (1, 2), "reflect")
        (tensor([[4., 9., 0.]]),)
    """

    name = "pad"

    def forward(x, pad, mode="constant", value=0.0):
        tensor("pad", "x", x)
        one_of("pad", "mode", mode, PAD_MODES)
        pad = check_pads("pad", "pad", pad, x, mode)
        if value is not None and not isinstance(value, bool):  # as torch has it: 0, and for a mask True
            number("pad", "value", value)
        return nn.functional.pad(x, pad, mode, value if mode == "constant" else None)

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """The pads and the mode."""
        return tuple(map(int, inputs[1])), inputs[2]

    def vjp(g_y, pad, mode="constant", needs=(True,)):
        if not needs[0]:
            return (None,)
        if mode == "constant":
            return (nn.functional.pad(g_y, [-p for p in pad]),)
        g = wide(g_y)
        for i in range(0, len(pad), 2):
            if pad[i] or pad[i + 1]:
                g = _folded(g, g.dim() - 1 - i // 2, pad[i], pad[i + 1], mode)
        return (g,)


def _folded(g: Tensor, dim: int, left: int, right: int, mode: str) -> Tensor:
    """One dimension without its pads, whose cotangents are added where the padding took its numbers."""
    n = g.shape[dim] - left - right
    before, middle, after = g.split([left, n, right], dim)
    if mode == "replicate":
        before, after = before.sum(dim, keepdim=True), after.sum(dim, keepdim=True)
        to_before, to_after = (0, 1), (n - 1, 1)
    elif mode == "reflect":
        before, after = before.flip(dim), after.flip(dim)
        to_before, to_after = (1, left), (n - 1 - right, right)
    else:
        to_before, to_after = (n - left, left), (0, right)
    g_x = middle.clone()
    g_x.narrow(dim, *to_before).add_(before)
    g_x.narrow(dim, *to_after).add_(after)
    return g_x


def check_pads(rule: str, argument: str, pad: Any, x: Tensor, mode: str) -> tuple[int, ...]:
    """The pads; refuse those that x has not the dimensions or the size for."""
    if not isinstance(pad, tuple | list):
        raise wrong(rule, argument, told(pad), "a sequence of whole numbers", TypeError)
    dims = len(pad) // 2
    if len(pad) % 2 or dims > x.dim():
        raise wrong(rule, argument, tuple(pad), f"a pair for each of at most {x.dim()} dimensions, the last first")
    if mode != "constant":
        if not (1 <= dims <= 3 and x.dim() - dims in (1, 2)):
            expected = f"in mode {mode} a pair for each dimension of {tuple(x.shape)} but the first one or two"
            raise wrong(rule, argument, tuple(pad), expected)
        if 0 in x.shape[-dims if mode == "circular" else -dims - 1 :]:  # circular: channels may be none, as in torch
            raise wrong(rule, "x", x, f"in mode {mode} a place or more along each dimension, channels too")
    pad = tuple([whole(rule, argument, p, None if mode == "constant" else 0) for p in pad])
    for i, p in enumerate(pad):
        n = x.shape[-1 - i // 2]
        most = {"reflect": n - 1, "circular": n}.get(mode, p)
        if p > most:
            raise wrong(rule, argument, pad, f"at most {most} in mode {mode} along a dimension of {n}")
    if mode == "constant":
        for i in range(0, len(pad), 2):
            if x.shape[-1 - i // 2] + pad[i] + pad[i + 1] < 0:
                raise wrong(rule, argument, tuple(pad), f"no more cropped than the shape {tuple(x.shape)} has")
    return pad


class Flatten(Rule):
    """y is x with dimensions ``start_dim`` to ``end_dim`` as one,  g_x = g_y in the shape of x.

    Keeps that shape and no tensor.  y is a copy, where torch's own flatten may be a view: what is then done to y in
    place does not reach x.

    Example:
        >>> Flatten.apply(torch.zeros(2, 3, 4)).shape
        torch.Size([2, 12])
    """

    name = "flatten"

    def forward(x, start_dim=1, end_dim=-1):
        tensor("flatten", "x", x)
        dims = max(x.dim(), 1)
        start_dim = whole("flatten", "start_dim", start_dim, None)
        end_dim = whole("flatten", "end_dim", end_dim, None)
        for argument, dim in (("start_dim", start_dim), ("end_dim", end_dim)):
            if not -dims <= dim < dims:
                raise wrong("flatten", argument, dim, f"a dimension of x {tuple(x.shape)}")
        if start_dim % dims > end_dim % dims:
            raise wrong("flatten", "start_dim", start_dim, f"no dimension after end_dim {end_dim}")
        return torch.flatten(x, start_dim, end_dim).clone()  # a view made here could not be changed in place

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """The shape of x."""
        return (inputs[0].shape,)

    def vjp(g_y, shape, needs=(True,)):
        return (g_y.reshape(shape) if needs[0] else None,)


class Concat(Rule):
    """y = x_1, x_2, ... end to end along ``dim``,  g_x_k = the k-th stretch of g_y.

    ``apply(dim, *tensors)``: the dimension stands first, as the tensors are any number.  Keeps their lengths and no
    tensor.

    Example:
        >>> Concat.apply(0, torch.tensor([1.0]), torch.tensor([2.0, 3.0]))
        tensor([1., 2., 3.])
        >>> Concat.vjp(torch.tensor([4.0, 5.0, 6.0]), 0, [1, 2])
        (None, tensor([4.]), tensor([5., 6.]))
    """

    name = "concat"

    def forward(dim, *tensors):
        if not tensors:
            raise wrong("concat", "tensors", (), "at least one")
        floats("concat", **{f"tensor {k}": t for k, t in enumerate(tensors)})
        first = tensors[0]
        dim = whole("concat", "dim", dim, None)
        if not -first.dim() <= dim < first.dim():
            raise wrong("concat", "dim", dim, f"a dimension of tensor 0 {tuple(first.shape)}")
        for k, t in enumerate(tensors):
            if t.dim() != first.dim() or t.movedim(dim, 0).shape[1:] != first.movedim(dim, 0).shape[1:]:
                raise wrong(
                    "concat", f"tensor {k}", t, f"the shape of tensor 0 {tuple(first.shape)} but along dim {dim}"
                )
        return torch.cat(tensors, dim)

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """The dimension and the lengths along it."""
        dim, *tensors = inputs
        return int(dim), [t.shape[dim] for t in tensors]

    def vjp(g_y, dim, lengths, needs=None):
        parts = g_y.split(lengths, dim)
        return (None, *[p if needs is None or needs[k] else None for k, p in enumerate(parts, start=1)])


class Add(Rule):
    """y = a + beta f,  g_a = g_y,  g_f = beta g_y,  g_beta = sum of g_y f: the sum that ends a residual block.

    a and f have one shape: a sum that broadcasts is no residual sum.  beta is a number, or a tensor that is learned and
    broadcasts over f.  Keeps nothing for a number; for a tensor, beta (for g_f) and f (for g_beta).  No kink.

    Example:
        >>> Add.apply(torch.tensor([1.0]), torch.tensor([4.0]), 0.5)
        tensor([3.])
        >>> Add.vjp(torch.tensor([2.0]), None, 0.5)
        (tensor([2.]), tensor([1.]), None)
    """

    name = "add"

    def forward(a, f, beta=1.0):
        floats("add", a=a, f=f, beta=beta if isinstance(beta, Tensor) else None)
        if f.shape != a.shape:
            raise wrong("add", "f", f, f"shape {tuple(a.shape)}, that of a")
        if not isinstance(beta, Tensor):
            number("add", "beta", beta, "a number or a tensor")
            return torch.add(a, f, alpha=beta)
        if not _fits(beta.shape, f.shape):
            raise wrong("add", "beta", beta, f"a shape that broadcasts to {tuple(f.shape)}, that of f")
        return a + beta * f

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """The tensor f for g_beta, beta for g_f; a number always."""
        _, f, beta = inputs
        return f if needs[2] else None, beta if needs[1] or not isinstance(beta, Tensor) else None, _shape(beta)

    def vjp(g_y, f, beta, shape=(), needs=(True, True, False)):
        g_a = g_y if needs[0] else None
        g_f = beta * g_y if needs[1] else None
        g_beta = (wide(g_y) * wide(f)).sum_to_size(shape) if needs[2] else None
        return g_a, g_f, g_beta


class Dropout(Rule):
    """y = x m / (1 - p),  g_x = g_y m / (1 - p): the mask m says what stays.

    m (bool, a shape that broadcasts to that of x: (B, C, 1, 1) drops whole channels) is drawn by the caller, true with
    probability 1 - p; the division keeps the mean.  At p = 1 all is 0.  A product, as in torch: where m is 0, an
    infinite x gives nan.  Keeps the mask, one byte an element, and p.  No kink.

    Example:
        >>> Dropout.apply(torch.tensor([3.0, 5.0]), torch.tensor([True, False]), 0.25)
        tensor([4., 0.])
    """

    name = "dropout"

    def forward(x, mask, p=0.5):
        floats("dropout", x=x)
        tensor("dropout", "mask", mask)
        if mask.dtype != torch.bool:
            raise wrong("dropout", "mask", mask, "a tensor of torch.bool: true stays", TypeError)
        if not _fits(mask.shape, x.shape):
            raise wrong("dropout", "mask", mask, f"a shape that broadcasts to {tuple(x.shape)}, that of x")
        if mask.device != x.device:
            raise wrong("dropout", "mask", mask, f"it on {x.device}, where x is")
        number("dropout", "p", p, "a number from 0 to 1", lambda p: 0 <= p <= 1)
        return Dropout.vjp(x, mask, p)[0]  # linear and its own transpose

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """The mask and p."""
        return inputs[1:]

    def vjp(g_y, mask, p=0.5, needs=(True,)):
        return (g_y * mask * (1 / (1 - p) if p < 1 else 0.0) if needs[0] else None, None)


class Embedding(Rule):
    """y_b = W_i(b),  g_W_v = sum of g_y_b over the b with i(b) = v: the linear map of a one-hot i, never written out.

    Shapes: index (...) of integers 0..V-1, W (V, D), y (..., D).  ``padding_idx`` names a row that gets no cotangent.
    Keeps the indices and V; not W: the map is linear in it.  Sums in float32 at least.

    Raises:
        IndexError: An index is outside 0..V-1 (on a CPU; elsewhere torch's own check comes first).

    Example:
        >>> Embedding.apply(torch.tensor([1, 1]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[3., 4.], [3., 4.]])
        >>> Embedding.vjp(torch.ones(2, 2), torch.tensor([1, 1]), 2)
        (None, tensor([[0., 0.], [2., 2.]]))
    """

    name = "embedding"

    def forward(index, W, padding_idx=None):
        tensor("embedding", "index", index)
        floats("embedding", W=W)
        if index.dtype not in (torch.int64, torch.int32):
            raise wrong("embedding", "index", index, "a tensor of torch.int64 or torch.int32", TypeError)
        if W.dim() != 2:
            raise wrong("embedding", "W", W, "shape (V, D): one row of D numbers for each of V")
        if W.device != index.device:
            raise wrong("embedding", "W", W, f"it on {index.device}, where index is")
        if not len(W) and (index.numel() or padding_idx is not None):
            raise wrong("embedding", "W", W, "a row or more")
        if padding_idx is not None and not 0 <= whole("embedding", "padding_idx", padding_idx, None) < len(W):
            raise wrong("embedding", "padding_idx", padding_idx, f"a row of W, 0 to {len(W) - 1}")
        try:
            return nn.functional.embedding(index, W)
        except IndexError as error:
            raise wrong("embedding", "index", "out of range", f"rows of W, 0 to {len(W) - 1}", IndexError) from error

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """The indices, V and the row without a cotangent."""
        index, W, padding_idx = inputs
        return index, len(W), padding_idx

    def vjp(g_y, index, V, padding_idx=None, needs=(False, True)):
        if not needs[1]:
            return None, None
        if padding_idx is not None:
            g_y = g_y.masked_fill((index == padding_idx).unsqueeze(-1), 0)
        rows = wide(g_y).reshape(index.numel(), g_y.shape[-1])
        g_W = rows.new_zeros(V, rows.shape[-1]).index_add(0, index.reshape(-1), rows)
        return None, g_W


def _fits(shape: torch.Size, target: torch.Size) -> bool:
    """Whether a shape broadcasts to another."""
    return len(shape) <= len(target) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(target), strict=False)
    )


def _shape(t: Any) -> tuple[int, ...]:
    return tuple(t.shape) if isinstance(t, Tensor) else ()
