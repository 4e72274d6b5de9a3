"""What infinite width predicts of a network before its first step: lengths going up, gradients coming down.

    q_{l+1} = sigma_w^2 E phi(sqrt(q_l) x)^2 + sigma_b^2        x ~ N(0, 1),   q = mean z^2 over the units
    G_l^2   = sigma_w^2 E phi'(sqrt(q_l) x)^2 = chi_l           the backward gain of the step above layer l

Letters: q length, w2 = sigma_w^2 = Var W fan_in, b2 = sigma_b^2 = Var b, c the correlation of two samples' z, chi the
squared gain, L depth, N width.  Everything is float64, from the rules' own ``forward`` and ``slope``; no activation has
its formula here.

Source:
    Poole et al. 2016 and Schoenholz et al. 2017 (lengths, correlations, depth scales), Yang & Schoenholz 2017
    (residual), Yang et al. 2019 (batch normalization), Hanin & Nica 2018 (width), Roberts, Yaida & Hanin 2022 (critical
    points of gelu and silu).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bpdiag.rules import Activation

REACH = 13.0  # of x in standard deviations: beyond is 6e-39 of the probability
ORDER = 16  # nodes of a panel
LEAST, MOST = 1e-10, 1e8  # a fixed point below is 0, above is infinite
TINY = 1e-24  # a length so small that phi is its own tangents at 0
NORM_EPS = 1e-5  # of torch's norms
LUCK = math.log10(math.e) / 2  # decades of a norm per e-fold of its square
_POINTS, _WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(ORDER))


# ---- averages over a Gaussian --------------------------------------------------------------------------------


def _graded(length: float, finest: float) -> np.ndarray:
    """Distances from a cut, 0 to ``length``: panels ``finest`` wide, further away half their distance, 2 at most."""
    near = 2 * finest * 1.5 ** np.arange(math.ceil(math.log(2 / finest, 1.5)) + 1)
    at = np.concatenate([[0, finest], near, np.arange(near[-1] + 2, max(length, near[-1]), 2)])
    return np.append(at[at < length], length)


def _between(low: float, high: float, finest: float) -> np.ndarray:
    """Ends of panels from one cut to the next, without the first."""
    rise = _graded((high - low) / 2, finest)
    return np.concatenate([low + rise[1:], high - rise[-2::-1]])


def nodes(cuts: Iterable[float] = (), finest: float = 1.0) -> tuple[Tensor, Tensor]:
    """E f(x) = sum of w f(x): Gauss-Legendre panels over -13 ... 13, cut where f is not smooth.

    Panels are ``finest`` wide beside a cut and grow away from it.  Gauss-Hermite instead is 12 % off for hardtanh, and
    30 times for tanh at q = 100.

    Args:
        cuts: x where f or a derivative of it jumps.
        finest: the scale of f beside a cut.

    Returns:
        x, w: (n,) each.

    Example:
        >>> x, w = nodes([0.0])
        >>> round((w * x.clamp_min(0) ** 2).sum().item(), 15)
        0.5
    """
    inner = sorted({c for c in cuts if -REACH < c < REACH})
    if not inner:
        inner = [0.0]
    parts = [(inner[0] - _graded(inner[0] + REACH, finest))[::-1]]
    parts += [_between(low, high, finest) for low, high in pairwise(inner)]
    parts.append(inner[-1] + _graded(REACH - inner[-1], finest)[1:])
    ends = torch.from_numpy(np.concatenate(parts))
    half, middle = (ends[1:] - ends[:-1]) / 2, (ends[1:] + ends[:-1]) / 2
    x = (middle[:, None] + half[:, None] * _POINTS).flatten()
    w = (half[:, None] * _WEIGHTS).flatten()
    return x, w * _density(x)


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _both(rule: type[Activation], z: Tensor) -> tuple[Tensor, Tensor]:
    """phi(z) and phi'(z); what a rule learns is where it begins."""
    a = rule.forward(z)
    return a, rule.slope(a if rule.saves == "output" else z)


def _corners(rule: type[Activation], q: float) -> list[float]:
    """x where phi(sqrt(q) x) is not smooth: the kinks, and 0, where some have a jump in a higher derivative."""
    return [k / math.sqrt(q) for k in {0.0, *rule.kinks}]


@dataclass(frozen=True)
class Moments:
    """Averages of phi and its slope at one length q,  z = sqrt(q) x."""

    mean: float  # E phi(z)
    square: float  # E phi(z)^2
    slope: float  # E phi'(z)^2
    kappa: float  # 3 E phi'^4 / (E phi'^2)^2 - 1: variance of ln |g|^2 per layer, times N
    stretch: float  # d/dq E phi(z)^2

    @property
    def variance(self) -> float:
        """Var phi(z)."""
        return self.square - self.mean**2


def moments(rule: type[Activation], q: float) -> Moments:
    """E phi, E phi^2, E phi'^2, kappa, d/dq E phi^2 = E[x phi phi'] / sqrt(q)   at z = sqrt(q) x.

    Raises:
        ValueError: q is not positive, or infinite.

    Example:
        >>> from bpdiag.rules import ACTIVATIONS
        >>> relu = moments(ACTIVATIONS["relu"], 4.0)
        >>> round(relu.square, 12), round(relu.slope, 12), round(relu.kappa, 12)
        (2.0, 0.5, 5.0)
    """
    if not 0 < q < math.inf:
        raise ValueError(f"q={q}: a length is a positive, finite number")
    known: Any = rule  # mypy does not take a class for something to be looked up by
    return _moments(known, q)


@lru_cache(maxsize=100_000)
def _moments(rule: type[Activation], q: float) -> Moments:
    x, w = nodes(_corners(rule, q), min(1.0, 1 / math.sqrt(q)))
    a, s = _both(rule, math.sqrt(q) * x)
    s2 = s * s
    columns = torch.stack([a, a * a, s2, s2 * s2, x * a * s])
    mean, square, slope, fourth, stretch = (columns @ w).tolist()
    kappa = 3 * fourth / slope**2 - 1 if slope else math.nan
    return Moments(mean, square, slope, kappa, stretch / math.sqrt(q))


def flat_share(rule: type[Activation], q: float, below: float) -> float:
    """P(|phi'(sqrt(q) x)| < below), the share of elements whose slope is so small, to 1/2000.

    Example:
        >>> from bpdiag.rules import ACTIVATIONS
        >>> round(flat_share(ACTIVATIONS["tanh"], 4.0, 0.05), 3)  # |z| > 2.178
        0.276
    """
    x = torch.special.ndtri((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)
    return float((_both(rule, math.sqrt(q) * x)[1].abs() < below).double().mean())


def first_loss(q: float, classes: int) -> float:
    """E ln sum_k exp(z_k),  z_k ~ N(0, q): the cross-entropy of logits that know nothing; ln K at q = 0.

    The mean over 4,096 draws, always the same.

    Example:
        >>> round(first_loss(0.0, 10), 4), round(first_loss(2.0, 10), 1)
        (2.3026, 3.1)
    """
    draws = torch.randn(4096, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return float(torch.logsumexp(math.sqrt(q) * draws, 1).mean())


# ---- a layer of equals: lengths, correlations, depth scales --------------------------------------------------


def length(rule: type[Activation], q: float, w2: float, b2: float) -> float:
    """q' = sigma_w^2 E phi(sqrt(q) x)^2 + sigma_b^2.

    Example:
        >>> from bpdiag.rules import ACTIVATIONS
        >>> round(length(ACTIVATIONS["relu"], 3.0, 2.0, 0.5), 12)
        3.5
    """
    return w2 * (moments(rule, q).square if q > 0 else _square_at_zero(rule)) + b2


def _square_at_zero(rule: type[Activation]) -> float:
    return float(rule.forward(torch.zeros(1, dtype=torch.float64))) ** 2


def gain(rule: type[Activation], q: float, w2: float) -> float:
    """G = sqrt(chi) = sqrt(sigma_w^2 E phi'(sqrt(q) x)^2): 1 keeps a gradient, less lets it vanish.

    Example:
        >>> from bpdiag.rules import ACTIVATIONS
        >>> round(gain(ACTIVATIONS["relu"], 1.0, 2.0), 12)
        1.0
    """
    return math.sqrt(w2 * moments(rule, q).slope)


def fixed_length(rule: type[Activation], w2: float, b2: float, start: float = 1.0) -> float:
    """q* = q'(q*): where lengths end; 0 below 1e-10, inf above 1e8.

    Twenty steps of the map, then Newton's, so that a fixed point reached like 1/l is reached.

    Example:
        >>> from bpdiag.rules import ACTIVATIONS
        >>> round(fixed_length(ACTIVATIONS["tanh"], 1.3, 0.05), 4), fixed_length(ACTIVATIONS["tanh"], 1.0, 0.0)
        (0.3153, 0.0)
    """
    q = start
    for turn in range(400):
        if not LEAST <= q <= MOST:
            return 0.0 if q < LEAST else math.inf
        there = length(rule, q, w2, b2)
        if abs(there - q) <= 1e-14 * q:
            return q
        slope = w2 * moments(rule, q).stretch
        if turn < 20:
            q = there
        elif slope < 1:  # Newton's step; a step beyond 0 halves instead
            step = (there - q) / (1 - slope)
            q = q + step if q + step > 0 else q / 2
        else:
            q = q * 2 if there > q else q / 2
    return q


def correlated(rule: type[Activation], q: float, c: float) -> tuple[float, float]:
    """(E[phi(u1) phi(u2)], E[phi'(u1) phi'(u2)]),  u1 = sqrt(q) x,  u2 = sqrt(q) (c x + sqrt(1-c^2) y).

    A panel of x for each panel of y, the inner ones cut where u2 has a corner.

    Example:
        >>> from bpdiag.rules import ACTIVATIONS
        >>> [round(v, 10) for v in correlated(ACTIVATIONS["relu"], 1.0, 0.0)]  # 1/2pi, 1/4
        [0.1591549431, 0.25]
    """
    if not -1 < c < 1:
        m = moments(rule, q)
        if c == 1:
            return m.square, m.slope
        raise ValueError(f"c={c}: a correlation above -1, up to 1")
    s, scale = math.sqrt(1 - c * c), min(1.0, 1 / math.sqrt(q))
    corners = torch.tensor(_corners(rule, q), dtype=torch.float64)
    smoothed = (corners / c).tolist() if c else []
    x, w = nodes([*corners.tolist(), *smoothed], min(scale, s / abs(c)) if c else scale)
    cuts = ((corners - c * x[:, None]) / s).clamp(-REACH, REACH).sort(dim=1).values  # (X, K)
    ends = torch.cat([torch.full_like(x[:, None], -REACH), cuts, torch.full_like(x[:, None], REACH)], 1)
    share = torch.from_numpy(np.append(0.0, _between(0, 2 * REACH, min(1.0, 1 / (s * math.sqrt(q)))))) / (2 * REACH)
    low, width = ends[:, :-1, None], (ends[:, 1:] - ends[:, :-1])[:, :, None]  # (X, K + 1, 1)
    half, middle = width * (share[1:] - share[:-1]) / 2, low + width * (share[1:] + share[:-1]) / 2
    y = middle[..., None] + half[..., None] * _POINTS  # (X, K + 1, panels, nodes)
    a2, s2 = _both(rule, math.sqrt(q) * (c * x[:, None, None, None] + s * y))
    inner = half[..., None] * _WEIGHTS * _density(y)
    a1, s1 = _both(rule, math.sqrt(q) * x)
    return float(w @ (a1 * (inner * a2).sum((1, 2, 3)))), float(w @ (s1 * (inner * s2).sum((1, 2, 3))))


def correlation(rule: type[Activation], c: float, q: float, w2: float, b2: float) -> float:
    """c' = (sigma_w^2 E[phi(u1) phi(u2)] + sigma_b^2) / q': how alike two samples are one layer further up.

    Both of length q, q' the next length.

    Example:
        >>> from bpdiag.rules import ACTIVATIONS
        >>> round(correlation(ACTIVATIONS["relu"], 0.0, 1.0, 2.0, 0.0), 10)  # 1/pi
        0.3183098862
    """
    return (w2 * correlated(rule, q, c)[0] + b2) / length(rule, q, w2, b2)


def fixed_correlation(rule: type[Activation], q: float, w2: float, b2: float) -> float:
    """c* = c'(c*), the stable one, at a fixed length q: 1 where chi <= 1, else below.

    c' is convex with c'(1) = 1, so Newton's steps from 0 rise to it and never pass it.

    Example:
        >>> from bpdiag.rules import ACTIVATIONS
        >>> tanh = ACTIVATIONS["tanh"]
        >>> round(fixed_correlation(tanh, fixed_length(tanh, 2.5, 0.05), 2.5, 0.05), 4)
        0.4468
    """
    if w2 * moments(rule, q).slope <= 1 + 1e-9:
        return 1.0
    c = 0.0
    for _ in range(100):
        both, slopes = correlated(rule, q, c)
        step = ((w2 * both + b2) / q - c) / (1 - w2 * slopes)
        c += step
        if abs(step) < 1e-12:
            break
    return c


@dataclass(frozen=True)
class Scales:
    """How fast an infinitely deep net of equal layers forgets.  Depths in layers; inf at criticality."""

    q: float  # fixed length
    chi: float  # squared gain there
    c: float  # fixed correlation
    xi_c: float  # depth over which two samples become as alike as they will be; trainable to about 6 of it
    xi_q: float  # depth over which lengths settle


def depth_scales(rule: type[Activation], w2: float, b2: float) -> Scales:
    """xi_c = -1 / ln(sigma_w^2 E[phi'(u1) phi'(u2)]) at c*,   xi_q = -1 / ln dq'/dq at q*.

    At c* = 1 xi_c is -1/ln chi.  Where q* is 0 or infinite the limit is taken at lengths 1e-24 and 1e8, and c is 1.

    Source:
        Schoenholz et al. 2017, equations 7 and 9; the limit of six xi_c: section 5.

    Example:
        >>> from bpdiag.rules import ACTIVATIONS
        >>> told = depth_scales(ACTIVATIONS["tanh"], 1.3, 0.05)
        >>> round(told.chi, 4), round(told.xi_c, 2), round(told.xi_q, 2)
        (0.8802, 7.83, 1.79)
    """
    q = fixed_length(rule, w2, b2)
    at = min(max(q, TINY), MOST)
    m = moments(rule, at)
    c = fixed_correlation(rule, at, w2, b2) if 0 < q < math.inf else 1.0
    slopes = w2 * (m.slope if c == 1 else correlated(rule, at, c)[1])
    return Scales(q, w2 * m.slope, c, _scale(slopes), _scale(w2 * m.stretch))


def _scale(factor: float) -> float:
    """-1 / ln factor: 0 where it is 0, inf where it keeps or grows."""
    return 0.0 if factor <= 0 else math.inf if factor >= 1 - 1e-9 else -1 / math.log(factor)


@dataclass(frozen=True)
class Critical:
    """Variances at which a gradient neither shrinks nor grows, at the length q."""

    weight_variance: float
    bias_variance: float
    q: float


def critical(rule: type[Activation], b2: float | None = None) -> Critical | None:
    """sigma_w^2 = 1 / E phi'^2,  sigma_b^2 = q* - sigma_w^2 E phi^2: chi = 1 at the fixed length q*.

    Each q* gives one, a line of them.  With ``b2`` the one of that bias variance and least q*.  Without, the one that a
    length near it stays at: (1 / phi'(0)^2, 0) where lengths do not grow at it (tanh, relu); else where dq'/dq is 1 too
    (gelu, silu); else that of b2 = 0 (sigmoid).  None where no q* up to 1e4 has one (softplus).

    Source:
        Schoenholz et al. 2017, section 3; Roberts, Yaida & Hanin 2022, section 5.3.

    Example:
        >>> from bpdiag.rules import ACTIVATIONS
        >>> critical(ACTIVATIONS["relu"])
        Critical(weight_variance=2.0, bias_variance=0.0, q=0.0)
        >>> round(critical(ACTIVATIONS["tanh"], 0.05).weight_variance, 4)
        1.761
    """

    def bias(q: float) -> float:
        m = moments(rule, q)
        return q - m.square / m.slope

    def at(q: float) -> Critical:
        return Critical(1 / moments(rule, q).slope, max(bias(q), 0.0), q)

    tangent = moments(rule, TINY).slope
    through_zero = _square_at_zero(rule) == 0 and tangent > 0
    if b2 in (None, 0) and through_zero and moments(rule, 1e-3).square / tangent <= 1e-3 * (1 + 1e-9):
        return Critical(round(1 / tangent, 9), 0.0, 0.0)
    if b2 is None:
        for q in _roots(lambda q: moments(rule, q).stretch - moments(rule, q).slope):
            if bias(q) >= 0:
                return at(q)
    return next(map(at, _roots(lambda q: bias(q) - (b2 or 0.0))), None)


def _roots(f: Callable[[float], float]) -> Iterable[float]:
    """q in 1e-6 ... 1e4 where f changes its sign, ascending, by halving."""
    grid = np.logspace(-6, 4, 101).tolist()
    values = [f(q) for q in grid]
    for (low, below), (high, above) in pairwise(zip(grid, values, strict=True)):
        if (below < 0) == (above < 0):
            continue
        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if (f(middle) < 0) == (below < 0) else (low, middle)
        yield math.sqrt(low * high)


# ---- a whole network -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A network as the theory sees it: L weight layers, the last one the head."""

    rule: type[Activation]
    widths: Sequence[int]  # N_0 (of the input) ... N_L: L + 1
    weights: Sequence[float]  # sigma_w^2 of each layer, L
    biases: Sequence[float]  # sigma_b^2 of each layer, L
    normalization: str = "none"  # of every hidden z: none, layer, batch
    branch: float | None = None  # residual: what phi(z) is multiplied by in layers 2 ... L-1; None: no residual
    mean_squares: Sequence[float] = (1.0,)  # mean x^2 of the input, one number or quantiles over the samples
    variance: float = 1.0  # mean over the inputs of their variance over the samples: what batch normalization sees


@dataclass(frozen=True)
class Theory:
    """What to expect at the first step, layer by layer from the input, (L,) each; log is log10."""

    length: np.ndarray  # mean of what the weights give, squared: W a + b, before a norm
    fed: np.ndarray  # mean square of what enters the layer
    slope: np.ndarray  # rms of phi'; nan for the head
    weight_factor: np.ndarray  # |g_a_l| / |g_z_{l+1}|, what the next layer's weights do; nan for the head
    slope_factor: np.ndarray  # |g_z_l| / |g_a_l|; nan for the head
    decades: np.ndarray  # log(|g_z_l| / |g_z_L|)
    band: np.ndarray  # standard deviation of decades from the draw of the weights, at most
    hidden_band: float  # the same of the decades between the lowest and the highest hidden layer

    @property
    def gain(self) -> np.ndarray:
        """|g_z_l| / |g_z_{l+1}|; nan for the head."""
        with np.errstate(over="ignore", invalid="ignore"):
            return np.append(10.0 ** (self.decades[:-1] - self.decades[1:]), math.nan)

    @property
    def gain_per_layer(self) -> float:
        """Geometric mean of the gains between hidden layers; of a net with one or none, of all; nan without any."""
        if not self._steps:
            return math.nan
        with np.errstate(invalid="ignore"):
            return float(10 ** ((self.decades[0] - self.decades[self._steps]) / self._steps))

    @property
    def _steps(self) -> int:
        return hidden_steps(len(self.decades))

    @property
    def gain_band(self) -> float:
        """Standard deviation of ``gain_per_layer`` from the draw of the weights, at most."""
        return self.gain_per_layer * self.hidden_band / (self._steps * math.log10(math.e)) if self._steps else math.nan


def follow(plan: Plan) -> Theory:
    """Lengths up and gradients down a whole network, at its own depth.

        h_l = sigma_w^2 E a_{l-1}^2 + sigma_b^2,  h_1 = sigma_w^2 mean x^2 + sigma_b^2;  z_l has length q_l = h_l
        |g_z_l|^2 = E phi'(z_l)^2 |g_a_l|^2,  |g_a_l|^2 = sigma_w^2 |g_z_{l+1}|^2

    Layer norm: q = 1 and |g_h|^2 = |g_z|^2 / h.  Batch norm the same with the variance over the batch, sigma_w^2 Var a,
    in h's place: gain^2 = E phi'^2 / Var phi, whatever the weights.  A residual block, a_l = a_{l-1} + branch phi(z_l),
    adds what its branch brings back: |g_a_{l-1}|^2 = (1 + beta^2) |g_a_l|^2.  g_z is that of W a + b, before a norm.

    Exact for wide layers, gradients independent of the signal, and samples alike in length (``mean_squares`` of several
    quantiles removes the last).  In blocks without a norm of an activation that is not 0 on the average (relu),
    gradients come to share a direction with the signal after some ten blocks, and grow faster than told here.

    The band is .217 sqrt(sum of kappa / N) decades (Hanin & Nica 2018), less over a batch.

    Example:
        >>> from bpdiag.rules import ACTIVATIONS
        >>> told = follow(Plan(ACTIVATIONS["relu"], [784, 128, 128, 10], [1 / 3] * 3, [0.0] * 3))
        >>> round(told.gain_per_layer, 4), round(float(told.decades[0]), 3)
        (0.4082, -0.778)
    """
    samples = [_follow_one(plan, x2) for x2 in plan.mean_squares]
    *up, down, arriving = (np.array(column) for column in zip(*samples, strict=True))
    lengths, fed, slopes, noise, inherited = (column.mean(0) for column in up)
    with np.errstate(all="ignore"):
        count = np.logaddexp.reduce(np.zeros(len(samples)))
        down, arriving = (np.logaddexp.reduce(column) - count for column in (down, arriving))
        weight_factor = np.append(np.exp((arriving - down[1:]) / 2), math.nan)
        slope_factor = np.append(np.exp((down[:-1] - arriving) / 2), math.nan)
    above = np.append(np.cumsum(inherited[::-1])[::-1], 0.0)
    band = LUCK * np.sqrt(np.append(noise, 0.0) + np.append(above[1:], 0.0))
    slope = np.append(np.sqrt(slopes), math.nan)
    top = hidden_steps(len(down))
    between = noise[:1].sum() + inherited[1:top].sum()
    if plan.branch is not None:  # the highest one's own luck is not the lowest one's: the skips go round it
        between += noise[top:].sum()
    hidden_band = LUCK * math.sqrt(between)
    return Theory(lengths, fed, slope, weight_factor, slope_factor, LUCK * down, band, hidden_band)


def hidden_steps(depth: int) -> int:
    """Steps between hidden layers; of a net with only one, the step above it."""
    return max(depth - 2, min(1, depth - 1))


def _follow_one(plan: Plan, x2: float) -> tuple[np.ndarray, ...]:
    """Of one mean x^2:  h, E a^2 below (L,); E phi'^2, kappa / N, its share below (L-1,); ln |g_z|^2, ln |g_a|^2."""
    depth = len(plan.weights)
    square, mean, variance = x2, 0.0, plan.variance  # of a
    h, fed, factors = np.ones(depth), np.ones(depth), np.ones(depth)
    slopes, noise = np.ones(depth - 1), np.ones(depth - 1)
    for l, (w2, b2) in enumerate(zip(plan.weights, plan.biases, strict=True)):  # noqa: E741
        here = w2 * square + b2
        h[l], fed[l] = here, square
        if l == depth - 1:
            break
        normed = {"none": None, "layer": here, "batch": w2 * variance}[plan.normalization]
        m = _at(plan.rule, here if normed is None else 1 / (1 + NORM_EPS / normed) if normed else 0.0)
        slopes[l], noise[l] = m.slope, m.kappa / plan.widths[l + 1]
        factors[l] = 1.0 if normed is None else 1 / (normed + NORM_EPS)
        if plan.branch is None or l == 0:
            square, mean, variance = m.square, m.mean, m.variance
        else:
            factors[l] *= plan.branch**2
            square += plan.branch * (plan.branch * m.square + 2 * mean * m.mean)
            variance += plan.branch**2 * m.variance
            mean += plan.branch * m.mean
    g_z, g_a, inherited = np.zeros(depth), np.zeros(depth - 1), noise.copy()
    with np.errstate(divide="ignore", invalid="ignore"):
        weights, passed = np.log(np.asarray(plan.weights)), np.log(factors[:-1] * slopes)
        for l in reversed(range(depth - 1)):  # noqa: E741
            g_a[l] = brought = weights[l + 1] + g_z[l + 1]
            if plan.branch is not None and l < depth - 2:  # and what the skip over the block above brings
                g_a[l] = np.logaddexp(brought, g_a[l + 1])
                inherited[l + 1] *= np.nan_to_num(np.exp(brought - g_a[l])) ** 2
            g_z[l] = passed[l] + g_a[l]
    return h, fed, slopes, noise, inherited, g_z, g_a


def _at(rule: type[Activation], q: float) -> Moments:
    """Moments also at length 0, where all is what it is at 0, and beyond every number."""
    if q > 1e300:
        return Moments(math.nan, math.inf, moments(rule, MOST).slope, moments(rule, MOST).kappa, math.nan)
    if q > 1e-290:
        return moments(rule, q)
    a, s = (float(v) for v in _both(rule, torch.zeros(1, dtype=torch.float64)))
    return Moments(a, a * a, s * s, 2.0, math.nan)
