"""Faults of the architecture: layers with nothing between them, sums that outgrow their net, samples made alike."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from bpdiag.diagnosis.blocks import blocks
from bpdiag.diagnosis.finding import Finding, percent, power, real
from bpdiag.diagnosis.harm import verdict
from bpdiag.diagnosis.ledger import Profile
from bpdiag.diagnosis.losspath import SHAPES

# operations known to be linear, of a layer's own and between layers; our rules' names among them
LINEAR = {
    *SHAPES, "add", "addmm", "addmv", "asstrided", "conv", "convolution", "convolutionoverrideable", "cudnnconvolution",
    "expand", "linear", "mkldnnconvolution", "mkldnnlinear", "mm", "mv", "narrow", "neg", "slowconv2d", "split", "sub",
    "thnnconv2d", "unbind", "unsafesplit",
}  # fmt: skip
SAME = 1e-6  # of a slope factor from 1: what lies between changed no number
ALIKE = math.exp(-6)  # 1 - c: six correlation lengths (Schoenholz et al. 2017, section 5: trainable to about six)
APART = 0.01  # 1 - c of the data: below, they are alike themselves
DECOUPLED = ("AdamW", "NAdamW", "Lion")  # decay beside a step of fixed size
BALANCE = 1 / 3  # of Adam's step: decay at balance with gradients of one sign takes all of it, with mixed ones a part
SHRUNK = 0.1  # of their first size: weights do not shrink so by learning
KEPT = 0.2  # of the units: dropout's usual 0.1 to 0.5 keep half or more
IDLE = 0.01  # of 1/blocks: branches whose squared gain is less add nothing (1 + beta^2)^blocks = 1.01


def linear_stack(p: Profile) -> Iterator[Finding]:
    """Every step between weight layers is the identity: one matrix would do what all of them do.

    The cotangents pass unchanged and every operation on the way is known to be linear: many that are not, as abs,
    maxout and max-pooling, leave a cotangent's norm as it was too.  A warning where a low rank may be meant.
    """
    steps = [(at, i) for at, i in enumerate(p.lines) if p.trace.layers[i].next is not None]
    if not steps or len(steps) < len(p.lines) - 1 or not p.finite.any():
        return
    at = int(np.flatnonzero(p.finite)[0])
    slopes = p.trace.column("slope_factor")[0][at, [i for _, i in steps]]
    if not (np.abs(slopes - 1) < SAME).all() or not all(_is_linear(p, i) for _, i in steps):
        return
    yield Finding(
        kind="linear_stack",
        severity="warning" if p.converged[-1] or _is_low_rank(p) else "harm",
        layers=p.names(range(len(p.lines))),
        onset_step=int(p.steps[at]),
        cause="no activation between the layers",
        evidence={"layers": float(len(p.lines)), "loss": float(p.losses[-1])},
        confidence=1.0,
        remedy="put an activation between them (nn.ReLU())",
        expected="a net that can bend: training loss below that of one linear layer",
        source="structure: cotangents pass between the layers unchanged, and no operation there is nonlinear",
        sentence=f"All {len(p.lines)} layers together are one linear map: nothing nonlinear stands between them.",
        why="A product of matrices is a matrix: depth adds nothing here but slower learning.",
    )


def _is_linear(p: Profile, i: int) -> bool:
    """Whether all from weight layer ``i`` to the next one, both included, is known to be linear."""
    layers = p.trace.layers
    way = [i, *layers[i].via, layers[i].next or 0]
    ops = {op for j in way for op in (*layers[j].ops, *(op for gap in layers[j].gap for op in gap))}
    bends = any(layers[j].activation not in (None, "identity") for j in way)
    return not bends and {op.lower().replace("_", "") for op in ops} <= LINEAR


def _is_low_rank(p: Profile) -> bool:
    """Whether a hidden layer is narrower than both ends, or than the input and without a bias: W = U V, on purpose."""
    layers = [p.trace.layers[i] for i in p.lines]
    ends = layers[0].fan_in or 1, layers[-1].units or 1
    hidden = [(layer.units or 1, "mm" in {op.lower() for op in layer.ops}) for layer in layers[:-1]]
    return any(units < min(ends) or (units < ends[0] and bare) for units, bare in hidden)


def residual_mismatch(p: Profile) -> Iterator[Finding]:
    """Blocks x + f(x) whose gains multiply up to more than the top can live beside: 1/2 sum log(1 + beta^2) > log T.

    A warning where the branches are idle instead: beta^2 under 1/(100 blocks), so that the net is its skip.
    """
    usable = np.flatnonzero(p.finite)
    if not usable.size:
        return
    at = int(usable[-1])
    found = [b for b in blocks(p.trace, at) if b.skip > 0 and math.isfinite(b.branch)]
    if len(found) < 2:
        return
    decades = sum(math.log10(math.hypot(b.skip, b.branch)) for b in found)
    limit = math.log10(p.planned)
    grown = decades > limit and not p.converged[-1]
    idle = max(b.branch**2 for b in found) < IDLE / len(found)
    if not grown and not idle:
        return
    branch = float(np.median([b.branch for b in found]))
    many, even = len(found), 1 / math.sqrt(len(found))
    told = {
        "cause": "branches too large",
        "sentence": f"The gradient grows {power(decades)} times over {many} residual blocks, by their branches.",
        "remedy": f"scale each branch by 1/sqrt({many}) = {even:.2g}",
        "expected": "total gain between 1 and 1.65",
    }
    if not grown:
        told = {
            "cause": "idle branches",
            "sentence": f"The branches of {many} residual blocks carry almost nothing.",
            "remedy": "enlarge the branches: their last weights, or their scale",
            "expected": f"branch from {branch:.1g} to {even:.2g}",
        }
    yield Finding(
        kind="residual_mismatch",
        severity="harm" if grown else "warning",
        layers=tuple(p.trace.layers[b.join].key for b in found),
        onset_step=int(p.steps[at]),
        evidence={"decades": decades, "limit": limit, "branch": branch, "blocks": float(many)},
        confidence=1.0,
        source="Yang & Schoenholz 2017: gain^2 = 1 + beta^2 a block; limits as for exploding",
        why=f"The branch carries {branch:.2g} of what arrives at its sum.",
        **told,
    )


def correlation_collapse(p: Profile) -> Iterator[Finding]:
    """All samples look alike to the head (1 - c < e^-6) and the loss stands still."""
    cosine = p.trace.column("z_cosine")[0][:, p.lines]
    if len(p.lines) < 3 or not _is_read_alone(p):
        return
    alike = (1 - cosine[:, -2] < ALIKE) & (1 - cosine[:, 0] > APART) & p.plateau & p.finite & ~p.converged
    told = verdict(p, alike)
    if told is None or told[0] != "harm":
        return
    _, quote, onset, confidence = told
    above, below = (float(np.median(1 - cosine[quote, k])) for k in (-2, 0))
    yield Finding(
        kind="correlation_collapse",
        severity="harm",
        layers=p.names([len(p.lines) - 2]),
        onset_step=onset,
        cause="forward pass",
        evidence={"one_minus_cosine": above, "one_minus_cosine_first": below, "loss": float(p.losses[quote[-1]])},
        confidence=confidence,
        remedy="initialize at the critical weight variance with no bias, normalize, or add residual connections",
        expected=f"1 - cosine of {p.title(len(p.lines) - 2)} from {above:.1g} to {below:.1g}",
        source="Schoenholz et al. 2017: signals are trainable to about six correlation lengths",
        sentence=f"All samples look alike to the last layer: their cosine below it is 1 - {above:.1g}.",
        why=f"In {p.title(0)} it is {real(1 - below, 2)}: what tells them apart is lost on the way up.",
    )


def _dropped(p: Profile) -> Iterator[Finding]:
    """Dropout that keeps under a fifth: what it lets pass is enlarged by 1/sqrt(kept), which tells the share."""
    z = p.trace.column("z_norm")[0]
    into = {"z": z, "a": p.trace.column("a_norm")[0]}
    rows = [i for i, layer in enumerate(p.trace.layers) if layer.kind.endswith("dropout") and len(layer.parents) == 1]
    if not rows or not p.plateau[-1] or p.converged[-1] or not p.finite.any():
        return
    kept = {}
    for i in rows:
        below = p.trace.layers[i].parents[0]
        fed = np.where(np.isfinite(into["a"][:, below]), into["a"][:, below], into["z"][:, below])
        ratio = (fed / z[:, i]) ** 2
        if np.isfinite(ratio).any():
            kept[i] = float(np.median(ratio[np.isfinite(ratio)]))
    low = [i for i, share in kept.items() if share < KEPT]
    if not low:
        return
    least = min(kept[i] for i in low)
    yield Finding(
        kind="over_regularized",
        severity="harm",
        layers=tuple(p.trace.layers[i].key for i in low),
        onset_step=int(p.steps[0]),
        cause="dropout",
        evidence={"kept": least, "loss": float(p.losses[-1])},
        confidence=1.0,
        remedy=f"lower the dropout from about {1 - least:.2g} to 0.5 or less (its p is the share dropped)",
        expected=f"share of units kept from {percent(least)} to 50 % or more",
        source="Srivastava et al. 2014, section 7.3: best between .4 and .8 kept, and .8 of the input",
        sentence=f"Dropout leaves {percent(least)} of the units at {p.trace.layers[low[0]].title}.",
        why=f"What is kept differs from step to step and is enlarged {1 / math.sqrt(least):.1f} times in rms.",
    )


def _shrunk(p: Profile) -> Iterator[Finding]:
    """Weights drawn to 0, by the optimizer's decay or by a penalty in the loss."""
    if not p.lines or not p.finite.any():
        return
    decay = float(p.trace.meta.get("optimizer", {}).get("weight_decay", 0.0) or 0.0)
    by = "weight decay" if decay else "a penalty in the loss"
    W = p.trace.column("W_rms")[0][:, p.lines]
    first = W[0]
    with np.errstate(all="ignore"):
        share = np.where(first > 0, W / first, np.nan)
    small = (np.nan_to_num(share, nan=1.0) < SHRUNK).sum(axis=1) * 2 > np.isfinite(first).sum()
    told = verdict(p, small & p.plateau & p.finite & ~p.converged)
    if told is None or told[0] != "harm":
        return
    _, quote, onset, confidence = told
    left = float(np.nanmedian(share[quote]))
    yield Finding(
        kind="over_regularized",
        severity="harm",
        layers=p.names(range(len(p.lines))),
        onset_step=onset,
        cause=f"weights drawn to 0: {by}",
        evidence={"weights_left": left, "weight_decay": decay, "loss": float(p.losses[quote[-1]])},
        confidence=confidence,
        remedy=f"lower {by} a hundredfold" + (f", from {decay:.2g} to {decay / 100:.2g}" if decay else ""),
        expected=f"rms of the weights from {percent(left)} of what they began with to about as much",
        source="ours",
        sentence=f"The weights shrink to nothing: {percent(left)} of their first size is left.",
        why=f"The loss stands at {p.losses[quote[-1]]:.3g}: something pulls them to 0.",
    )


def _is_read_alone(p: Profile) -> bool:
    """Whether the last layer reads the one below and nothing else: a head that reads a sum does not."""
    below, last = (p.trace.layers[i] for i in p.lines[-2:])
    way = [*(p.trace.layers[i] for i in below.via), last]
    return below.next == p.lines[-1] and all(len(layer.parents) == 1 for layer in way)


def over_regularized(p: Profile) -> Iterator[Finding]:
    """Weight decay pulls harder than the loss in most layers, or dropout leaves next to nothing; the loss stands still.

    SGD: lambda |W| > |g_W|.  AdamW, whose own step has the size of 1 an element whatever the gradient: lambda rms(W)
    above a third, where the two have come to balance.  A penalty inside the loss: most weights are under a tenth of
    their first size.  Dropout: less than a fifth of the units are kept.
    """
    yield from _dropped(p)
    shrunk = list(_shrunk(p))
    yield from shrunk
    if shrunk:
        return
    optimizer = p.trace.meta.get("optimizer", {})
    decay = float(optimizer.get("weight_decay", 0.0) or 0.0)
    decoupled = optimizer.get("name") in DECOUPLED
    if not decay or not (p.sgd_like or decoupled) or not p.lines:
        return
    sizes = np.array([math.sqrt((p.trace.layers[i].fan_in or 1) * (p.trace.layers[i].units or 1)) for i in p.lines])
    pull = decay * p.trace.column("W_rms")[0][:, p.lines] * sizes
    push = p.trace.column("g_W_norm")[0][:, p.lines] if not decoupled else np.broadcast_to(sizes * BALANCE, pull.shape)
    share = np.nanmean(np.where(np.isfinite(push), pull > push, np.nan), axis=1) if push.size else np.zeros(0)
    told = verdict(p, (share > 0.5) & p.plateau & p.finite & ~p.converged)
    if told is None or told[0] != "harm":
        return
    _, quote, onset, confidence = told
    most = float(share[quote].mean())
    ratio = float(np.nanmedian(pull[quote] / np.where(push[quote] > 0, push[quote], np.nan)))
    yield Finding(
        kind="over_regularized",
        severity="harm",
        layers=p.names(range(len(p.lines))),
        onset_step=onset,
        cause="weight decay",
        evidence={"weight_decay": decay, "decay_over_gradient": ratio, "loss": float(p.losses[quote[-1]])},
        confidence=confidence,
        remedy=f"lower the weight decay from {decay:.2g} to {decay / max(10 * ratio, 10):.1g}",
        expected=f"decay against gradient from {ratio:.2g} to under 0.1",
        source="ours: both terms of the step, norm against norm",
        sentence=f"Weight decay pulls {ratio:.2g} times as hard as the loss, in {percent(most)} of the layers.",
        why=f"The loss stands at {p.losses[quote[-1]]:.3g} while the weights shrink.",
    )
