"""Recurrence: one layer in one direction, the same weights at every time step.

Letters: t the T time steps, b the B samples, i the I numbers that enter, h the H numbers of the state.

    a_t = x_t W^T + b,  u_t = h_{t-1} U^T + c        g_h_t = g_y_t + g_u_{t+1} U + (what the cell passes on beside)

All rules take x (T, B, I), an initial state (B, H), W (n H, I), U (n H, H), b and c (n H,) or None; n is 1, 4 or 3, the
blocks of weights as torch orders them.  They keep what entered and what came out; the gates of all steps are made again
at once, so that fewer numbers are kept than torch keeps.  What arrives at each time step, which torch's fused ones
hide, ``cotangents`` tells.  ``layers`` makes of a rule what torch.nn.LSTM is.  Narrow numbers are computed in float32,
rounded once at the end.  No kink.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from bpdiag.rules.arguments import floats, shaped, wrong
from bpdiag.rules.function import Rule, wide
from bpdiag.rules.shape import Concat, Dropout


class Recurrent(Rule):
    """g_a, g_u of every step by one sweep from the last to the first; then g_W = sum_t g_a_t^T x_t and its like.

    A subclass states beside ``forward`` and ``vjp``: ``sweep(g, x, *states, W, U, b, c, output)``, all of float32 at
    least, which gives (g_h (T, B, H), g_a and g_u (T, B, n H), the cotangents of the initial states).
    """

    blocks: ClassVar[int]
    states: ClassVar[int] = 1
    saves: ClassVar[Literal["output", "input"]] = "output"
    sweep: ClassVar[Any]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "sweep" in cls.__dict__:
            cls.sweep = staticmethod(cls.__dict__["sweep"])

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """What entered, for the gates, and what came out."""
        return *inputs, output


class Rnn(Recurrent):
    """h_t = tanh(a_t + u_t),  g_a_t = g_u_t = g_h_t (1 - h_t^2).

    Shapes: x (T, B, I), h (B, H), W (H, I), U (H, H), b, c (H,) or None, y (T, B, H): the state after each step.  For
    what else holds see the head of this file.

    Raises:
        ValueError, TypeError: An argument does not fit; it is named.

    Source:
        Elman 1990.

    Example:
        >>> x, one, zero = torch.zeros(3, 1, 1), torch.ones(1, 1), torch.zeros(1, 1)
        >>> y = Rnn.apply(x, zero, one, 0.5 * one, None, None)
        >>> g = torch.tensor([0.0, 0.0, 1.0]).reshape(3, 1, 1)    # the last state alone is asked for
        >>> cotangents(Rnn, g, (x, zero, one, 0.5 * one, None, None), y).flatten()
        tensor([0.2500, 0.5000, 1.0000])
    """

    name = "rnn"
    blocks = 1

    def forward(x, h, W, U, b, c):
        _check("rnn", 1, x, W, U, b, c, h=h)
        h, U, c = wide(h), wide(U), _wide(c)
        steps = []
        for a in _into(x, W, b):
            h = torch.tanh(a + linear(h, U, c))
            steps.append(h)
        return _as(x, torch.stack(steps))

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """The output, which has the slopes, and U; x for g_W, the first state for g_U, W for g_x."""
        x, h, W, U, _, _ = inputs
        return x if needs[2] else None, h if needs[3] else None, W if needs[0] else None, U, None, None, output

    def vjp(g_y, x, h, W, U, b, c, y, needs=(True,) * 6):
        return _pulled(Rnn, g_y, (x, h, W, U, b, c, y), needs)

    def sweep(g, x, h, W, U, b, c, y):
        slopes, g_u, arrived, sent = (1 - y * y).unbind(0), None, [], []
        for g_h, slope in zip(reversed(g.unbind(0)), reversed(slopes), strict=True):
            g_h = g_h if g_u is None else g_h + torch.matmul(g_u, U)
            g_u = g_h * slope
            arrived.append(g_h)
            sent.append(g_u)
        g_u = _in_order(sent)
        return _in_order(arrived), g_u, g_u, (torch.matmul(g_u[0], U),)


class Lstm(Recurrent):
    """s_t = f s_{t-1} + i k,  h_t = o tanh s_t,  g_s_t = g_y_s_t + g_h_t o (1 - tanh^2 s_t) + f_{t+1} g_s_{t+1}.

    The gates i, f, o are sigmoids, k a tanh, of their blocks of a_t + u_t, in the order i, f, k, o.  Of the gates:
    g_i = g_s k i (1 - i), g_f = g_s s_{t-1} f (1 - f), g_k = g_s i (1 - k^2), g_o = g_h tanh(s) o (1 - o).  Where f is
    open, g_s goes back through time as it is.

    Shapes: x (T, B, I), h and s (B, H), W (4 H, I), U (4 H, H), b, c (4 H,) or None; y (2, T, B, H): state h and cell s
    after each step.  For what else holds see the head of this file.

    Raises:
        ValueError, TypeError: An argument does not fit; it is named.

    Source:
        Hochreiter & Schmidhuber 1997; the gate f: Gers et al. 2000.

    Example:
        >>> x, zero = torch.zeros(2, 1, 1), torch.zeros(1, 1)
        >>> y = Lstm.apply(x, zero, torch.ones(1, 1), torch.zeros(4, 1), torch.zeros(4, 1), None, None)
        >>> y[1].flatten()                                        # an empty input, every gate half open
        tensor([0.5000, 0.2500])
    """

    name = "lstm"
    blocks = 4
    states = 2

    def forward(x, h, s, W, U, b, c):
        _check("lstm", 4, x, W, U, b, c, h=h, s=s)
        h, s, U, c = wide(h), wide(s), wide(U), _wide(c)
        steps, cells = [], []
        for a in _into(x, W, b):
            i, f, k, o = (a + linear(h, U, c)).chunk(4, -1)
            s = torch.sigmoid(f) * s + torch.sigmoid(i) * torch.tanh(k)
            h = torch.sigmoid(o) * torch.tanh(s)
            steps.append(h)
            cells.append(s)
        return _as(x, torch.stack([torch.stack(steps), torch.stack(cells)]))

    def vjp(g_y, x, h, s, W, U, b, c, y, needs=(True,) * 7):
        return _pulled(Lstm, g_y, (x, h, s, W, U, b, c, y), needs)

    def sweep(g, x, h, s, W, U, b, c, y):
        i, f, k, o = (linear(x, W, b) + linear(_before(h, y[0]), U, c)).chunk(4, -1)
        i, f, k, o, squashed = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(k), torch.sigmoid(o), torch.tanh(y[1])
        of_s = torch.stack([k * i * (1 - i), _before(s, y[1]) * f * (1 - f), i * (1 - k * k)], 2).unbind(0)
        of_h, to_s, f = squashed * o * (1 - o), o * (1 - squashed * squashed), f.unbind(0)
        g_h, g_s = g.unbind(0)
        g_h, g_s, g_u, arrived, sent = list(g_h.unbind(0)), list(g_s.unbind(0)), None, [], []
        for t in reversed(range(len(f))):
            if g_u is not None:
                g_h[t] = g_h[t] + torch.matmul(g_u, U)
                g_s[t] = g_s[t] + f[t + 1] * g_s[t + 1]
            g_s[t] = g_s[t] + g_h[t] * to_s[t]
            g_u = torch.cat(
                [(g_s[t].unsqueeze(1) * of_s[t]).reshape(len(of_h[t]), 3 * h.shape[-1]), g_h[t] * of_h[t]], 1
            )
            arrived.append(g_h[t])
            sent.append(g_u)
        g_u = _in_order(sent)
        return _in_order(arrived), g_u, g_u, (torch.matmul(g_u[0], U), f[0] * g_s[0])


class Gru(Recurrent):
    """h_t = (1 - z) n + z h_{t-1},  n = tanh(a_n + r u_n),  g_h_{t-1} = g_y_{t-1} + z g_h_t + g_u_t U.

    The gates r, z are sigmoids of their blocks of a_t + u_t, in the order r, z, n; g_n = g_h (1 - z) (1 - n^2), g_z =
    g_h (h_{t-1} - n) z (1 - z), g_r = g_n u_n r (1 - r); into a and u go g_r, g_z and g_n, in u times r.  Where z is 1,
    g_h goes back through time as it is.

    Shapes: x (T, B, I), h (B, H), W (3 H, I), U (3 H, H), b, c (3 H,) or None, y (T, B, H): the state after each step.
    For what else holds see the head of this file.

    Raises:
        ValueError, TypeError: An argument does not fit; it is named.

    Source:
        Cho et al. 2014; r after the product with U, as torch has it.

    Example:
        >>> x, one = torch.zeros(2, 1, 1), torch.ones(1, 1)
        >>> Gru.apply(x, one, torch.zeros(3, 1), torch.zeros(3, 1), None, None).flatten()   # half forgotten a step
        tensor([0.5000, 0.2500])
    """

    name = "gru"
    blocks = 3

    def forward(x, h, W, U, b, c):
        _check("gru", 3, x, W, U, b, c, h=h)
        h, U, c = wide(h), wide(U), _wide(c)
        steps = []
        for a in _into(x, W, b):
            (a_r, a_z, a_n), (u_r, u_z, u_n) = a.chunk(3, -1), linear(h, U, c).chunk(3, -1)
            z, n = torch.sigmoid(a_z + u_z), torch.tanh(a_n + torch.sigmoid(a_r + u_r) * u_n)
            h = (1 - z) * n + z * h
            steps.append(h)
        return _as(x, torch.stack(steps))

    def vjp(g_y, x, h, W, U, b, c, y, needs=(True,) * 6):
        return _pulled(Gru, g_y, (x, h, W, U, b, c, y), needs)

    def sweep(g, x, h, W, U, b, c, y):
        before = _before(h, y)
        (a_r, a_z, a_n), (u_r, u_z, u_n) = linear(x, W, b).chunk(3, -1), linear(before, U, c).chunk(3, -1)
        r, z = torch.sigmoid(a_r + u_r), torch.sigmoid(a_z + u_z)
        n = torch.tanh(a_n + r * u_n)
        g_n = (1 - z) * (1 - n * n)
        of_h = torch.stack([g_n * u_n * r * (1 - r), (before - n) * z * (1 - z), g_n * r], 2).unbind(0)
        z, passed, arrived, sent = z.unbind(0), None, [], []
        for t in reversed(range(len(z))):
            g_h = g[t] if passed is None else g[t] + passed
            g_u = (g_h.unsqueeze(1) * of_h[t]).reshape(len(g_h), 3 * h.shape[-1])
            passed = z[t] * g_h + torch.matmul(g_u, U)
            arrived.append(g_h)
            sent.append(g_u)
        g_h, g_u = _in_order(arrived), _in_order(sent)
        return g_h, torch.cat([g_u[..., : -h.shape[-1]], g_h * g_n], -1), g_u, (passed,)


def cotangents(rule: type[Recurrent], g: Tensor, inputs: Sequence[Any], output: Tensor) -> Tensor:
    """g_h_t of every time step: what the loss asks of the state, through all that comes after.

    The norm over that of the step above, ‖g_h_t‖ / ‖g_h_{t+1}‖, is the gain of a time step: where it is under 1 at
    every step, the first inputs are forgotten.

    Args:
        rule: ``RULES["rnn"]``, ``["lstm"]`` or ``["gru"]``.
        g: the cotangent of its output, as the loss has it.
        inputs: what ``apply`` was given.
        output: what it gave.

    Returns:
        (T, B, H), float32 at least; from the first step to the last.
    """
    return rule.sweep(wide(g), *map(_wide, inputs), wide(output))[0]


def layers(
    rule: type[Recurrent],
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Sequence[Tensor | None]],
    bidirectional: bool = False,
    dropout: Sequence[tuple[Tensor, float] | None] = (),
) -> tuple[Tensor, list[Tensor]]:
    """Layers of a rule in a row, each reading the states of the one below; both directions, end to end, if asked for.

    Args:
        rule: of one layer in one direction.
        x: (T, B, I).
        states: initial ones (h, or h and s), each (layers * directions, B, H).
        weights: (W, U, b, c) of each layer and direction: forward and backward of layer 1, then of layer 2, ...
        bidirectional: two directions; the second reads from the last step to the first.
        dropout: (mask, p) between each two layers, or None.

    Returns:
        y (T, B, directions * H) of the last layer, and the states after the last step of each, as ``states``.
    """
    directions, last = 1 + bidirectional, []
    for k, (W, U, b, c) in enumerate(weights):
        if k % directions == 0:
            below, outputs = x, []
            if k and k // directions <= len(dropout) and (drawn := dropout[k // directions - 1]) is not None:
                below = Dropout.apply(below, *drawn)
        read = below.flip(0) if k % directions else below
        y = rule.apply(read, *[s[k] for s in states], W, U, b, c)
        y = y if rule.states > 1 else y.unsqueeze(0)
        last.append([s[-1] for s in y])
        outputs.append(y[0].flip(0) if k % directions else y[0])
        if len(outputs) == directions:
            x = Concat.apply(-1, *outputs) if bidirectional else outputs[0]
    return x, [torch.stack(s) for s in zip(*last, strict=True)]


def _pulled(
    rule: type[Recurrent], g: Tensor, kept: tuple[Any, ...], needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The cotangents of all inputs from those of every step: products over all steps at once."""
    kept, n = tuple(map(_wide, kept)), rule.states
    x, h, W, y = kept[0], kept[1], kept[1 + n], kept[-1]
    _, g_a, g_u, states = rule.sweep(wide(g), *kept)
    needs_W, needs_U, needs_b, needs_c = needs[1 + n : 5 + n]
    return (
        torch.matmul(g_a, W) if needs[0] else None,
        *[t if needed else None for t, needed in zip(states, needs[1:], strict=False)],
        torch.matmul(_rows(g_a).t(), _rows(x)) if needs_W else None,
        torch.matmul(_rows(g_u).t(), _rows(_before(h, y[0] if n > 1 else y))) if needs_U else None,
        g_a.sum((0, 1)) if needs_b else None,
        g_u.sum((0, 1)) if needs_c else None,
    )


def _into(x: Tensor, W: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
    """a_t of every step."""
    return linear(wide(x), wide(W), _wide(b)).unbind(0)


def _before(h: Tensor, y: Tensor) -> Tensor:
    """The state before each step."""
    return torch.cat([h.unsqueeze(0), y[:-1]])


def _rows(t: Tensor) -> Tensor:
    """Time steps and samples as one."""
    return t.reshape(-1, t.shape[-1])


def _in_order(steps: list[Tensor]) -> Tensor:
    return torch.stack(steps[::-1])


def _wide(t: Any) -> Any:
    return wide(t) if isinstance(t, Tensor) else t


def _as(x: Tensor, y: Tensor) -> Tensor:
    """Rounded to narrow numbers, but under autocast, where the state stays what it came to be."""
    return y if x.element_size() >= 4 or torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)


def _check(rule: str, blocks: int, x: Any, W: Any, U: Any, b: Any, c: Any, **states: Any) -> None:
    """Refuse shapes that do not fit each other."""
    floats(rule, x=x, **states, W=W, U=U, b=b, c=c)
    if x.dim() != 3 or not len(x):
        raise wrong(rule, "x", x, "shape (T, B, I): a time step or more, samples, numbers; no packed sequence")
    if W.dim() != 2 or W.shape[1] != x.shape[2] or not len(W) or len(W) % blocks:
        told = f"{blocks} H" if blocks > 1 else "H"
        raise wrong(rule, "W", W, f"shape ({told}, {x.shape[2]}), for x {tuple(x.shape)}")
    rows, H = len(W), len(W) // blocks
    for argument, t in states.items():
        shaped(rule, argument, t, (x.shape[1], H), "the state of each sample")
    shaped(rule, "U", U, (rows, H), "for W and a state of H numbers")
    shaped(rule, "b", b, (rows,), "a number for each row of W")
    shaped(rule, "c", c, (rows,), "a number for each row of U")
