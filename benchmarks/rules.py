"""Every rule beside torch's own: formula, largest error, time, bytes kept for the backward.

    python benchmarks/rules.py           writes docs/rules.md; minutes on a quiet machine
    python benchmarks/rules.py --quick   a look at it: few rounds, prints only

Both run forward and backward on the same float32 numbers, in turn, in one process of one thread; the table has the
ratio of the medians of their processor times.  Errors are of the output and of every cotangent, in units in the last
place (ulp) of the number, or of the tensor's root mean square where the number is smaller: a sum that cancels has no
digit to lose.  Exact is torch's own in float64 on the same numbers; in float64 ours is compared with torch's.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bpdiag.rules import ACTIVATIONS, RULES

PAGE = Path(__file__).parents[1] / "docs" / "rules.md"
SLOW = 1.5

PASSES = "each operation of the formula is one pass over memory, torch's kernel is one for all"
SELECTS = "where and masked_fill, which keep inf and nan apart, take on a CPU the time of twenty products"
MOVED = "little is computed: what is timed is a Function in Python, its checks, and a copy where torch has a view"
AGAIN = "what torch keeps, mean and slope or the place of the largest, is made again, so that it can be differentiated"
# why a rule is slower than SLOW times torch's own
REASONS = {
    **dict.fromkeys(ACTIVATIONS, PASSES),
    **dict.fromkeys(("prelu", "elu", "selu", "hardtanh", "relu6"), SELECTS),
    **dict.fromkeys(("hardswish", "hardsigmoid"), SELECTS),
    **dict.fromkeys(("softmax", "log_softmax", "glu", "swiglu", "mse", "l1", "huber", "smooth_l1"), PASSES),
    **dict.fromkeys(("identity", "add", "concat", "flatten", "pad", "dropout", "embedding"), MOVED),
    **dict.fromkeys(("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"), AGAIN),
    **dict.fromkeys(("max_pool", "adaptive_max_pool", "global_max_pool"), AGAIN),
    **dict.fromkeys(("avg_pool", "adaptive_avg_pool", "global_avg_pool"), PASSES),
    "cross_entropy": "softmax and one-hot classes are two matrices more, where torch's kernel keeps the first",
    "nll": "a scatter each way: what is timed is a Function in Python and its checks",
    "bce_with_logits": PASSES,
    "kl_div": PASSES,
    "attention": "the probabilities are not kept but made again; torch's CPU kernel never holds all of them at once",
    "conv": "the cotangent of W is a convolution of its own, where torch's kernel has a layout for it",
    "rnn": "a loop in Python over the time steps",
    "lstm": "a loop in Python over the time steps, and gates made again, where torch's CPU kernel is one call",
    "gru": "a loop in Python over the time steps",
}


@dataclass
class Pair:
    """A rule and torch's own on the same inputs."""

    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def normal(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Standard normal numbers, float32, the same each time."""
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=draw) for shape in shapes)


def recurrent(name: str, fused: Callable[..., Any]) -> Pair:
    """28 steps of 64 samples, 64 numbers of state; of an lstm the states alone: torch's layer does not tell cells."""
    rule: Any = RULES[name]
    T, B, N, H, n = 28, 64, 28, 64, rule.blocks
    inputs = normal((T, B, N), *[(B, H)] * rule.states, (n * H, N), (n * H, H), (n * H,), (n * H,))

    def theirs(x: Tensor, *rest: Tensor) -> Tensor:
        first = [h.unsqueeze(0) for h in rest[: rule.states]]
        states = first if rule.states > 1 else first[0]
        return fused(x, states, rest[rule.states :], True, 1, 0.0, True, False, False)[0]

    def ours(*given: Tensor) -> Tensor:
        y = rule.apply(*given)
        return y[0] if rule.states > 1 else y

    return Pair(ours, theirs, tuple(t / 8 if t.dim() < 3 else t for t in inputs))


def pairs() -> dict[str, Pair]:
    """Rule -> both on inputs of the size of a small layer."""

    def with_settings(name: str, theirs: Callable[..., Tensor], inputs: tuple[Tensor, ...], **settings: Any) -> None:
        made[name] = Pair(partial(RULES[name].apply, **settings), theirs, inputs)

    made: dict[str, Pair] = {}
    (z,) = normal((256, 1024))
    for name, rule in ACTIVATIONS.items():
        made[name] = Pair(rule.apply, rule.oracle(**rule.settings), (z,))
    made["prelu"] = Pair(RULES["prelu"].apply, functional.prelu, (z, torch.full((1,), 0.25)))
    made["linear"] = Pair(RULES["linear"].apply, functional.linear, normal((256, 512), (512, 512), (512,)))
    conv = normal((16, 16, 32, 32), (32, 16, 3, 3), (32,))
    with_settings("conv", partial(functional.conv2d, padding=1), conv, padding=1)
    back = normal((16, 16, 16, 16), (16, 8, 3, 3), (8,))
    with_settings("conv_transpose", partial(functional.conv_transpose2d, stride=2), back, stride=2)
    x, gamma, beta = normal((32, 32, 16, 16), (32,), (32,))
    made["batch_norm"] = Pair(
        RULES["batch_norm"].apply,
        lambda x, w, b: functional.batch_norm(x, None, None, w, b, training=True),
        (x, gamma, beta),
    )
    with_settings("group_norm", lambda x, w, b: functional.group_norm(x, 8, w, b), (x, gamma, beta), num_groups=8)
    made["instance_norm"] = Pair(
        RULES["instance_norm"].apply,
        lambda x, w, b: functional.instance_norm(x, weight=w, bias=b),
        (x, gamma, beta),
    )
    rows = normal((512, 256), (256,), (256,))
    made["layer_norm"] = Pair(RULES["layer_norm"].apply, lambda x, w, b: functional.layer_norm(x, (256,), w, b), rows)
    made["rms_norm"] = Pair(RULES["rms_norm"].apply, lambda x, w: functional.rms_norm(x, (256,), w), rows[:2])
    with_settings("max_pool", partial(functional.max_pool2d, kernel_size=2), (x,), kernel_size=(2, 2))
    with_settings("avg_pool", partial(functional.avg_pool2d, kernel_size=2), (x,), kernel_size=(2, 2))
    for kind in ("max", "avg"):
        theirs = getattr(functional, f"adaptive_{kind}_pool2d")
        with_settings(f"adaptive_{kind}_pool", partial(theirs, output_size=(4, 4)), (x,), output_size=(4, 4))
        made[f"global_{kind}_pool"] = Pair(
            RULES[f"global_{kind}_pool"].apply, lambda x, pool=theirs: pool(x, 1).flatten(1), (x,)
        )
    made["add"] = Pair(RULES["add"].apply, torch.add, normal((256, 1024), (256, 1024)))
    made["concat"] = Pair(partial(RULES["concat"].apply, 1), lambda *t: torch.cat(t, 1), normal((256, 512), (256, 512)))
    made["flatten"] = Pair(RULES["flatten"].apply, lambda x: torch.flatten(x, 1).clone(), (x,))
    with_settings("pad", partial(functional.pad, pad=(1, 1, 1, 1)), (x,), pad=(1, 1, 1, 1))
    mask = z > 0
    with_settings("dropout", lambda x: x * mask * 2.0, (z,), mask=mask, p=0.5)
    index = torch.arange(4096).remainder(1000).view(64, 64)
    made["embedding"] = Pair(
        lambda W: RULES["embedding"].apply(index, W), lambda W: functional.embedding(index, W), normal((1000, 64))
    )
    with_settings("softmax", partial(torch.softmax, dim=-1), (z,))
    with_settings("log_softmax", partial(torch.log_softmax, dim=-1), (z,))
    made["glu"] = Pair(RULES["glu"].apply, functional.glu, (z,))
    made["swiglu"] = Pair(RULES["swiglu"].apply, lambda x: functional.silu(x[:, :512]) * x[:, 512:], (z,))
    y = torch.arange(2048) % 100
    (logits,) = normal((2048, 100))
    made["cross_entropy"] = Pair(
        lambda z: RULES["cross_entropy"].apply(z, y), lambda z: functional.cross_entropy(z, y), (logits,)
    )
    made["nll"] = Pair(lambda x: RULES["nll"].apply(x, y), lambda x: functional.nll_loss(x, y), (logits,))
    two = normal((256, 1024), (256, 1024))
    for name in ("mse", "l1", "huber", "smooth_l1"):
        made[name] = Pair(RULES[name].apply, getattr(functional, f"{name}_loss"), two)
    likely = two[0], two[1].sigmoid()
    made["bce_with_logits"] = Pair(RULES["bce_with_logits"].apply, functional.binary_cross_entropy_with_logits, likely)
    with_settings("kl_div", partial(functional.kl_div, reduction="sum"), likely, reduction="sum")
    heads = normal(*[(8, 8, 128, 32)] * 3)
    with_settings("attention", partial(functional.scaled_dot_product_attention, is_causal=True), heads, is_causal=True)
    made["rnn"] = recurrent("rnn", torch.rnn_tanh)
    made["lstm"] = recurrent("lstm", torch.lstm)
    made["gru"] = recurrent("gru", torch.gru)
    return made


def outcome(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The output and every cotangent, of a cotangent drawn for it."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, leaves, g)


def ulps(told: tuple[Tensor, ...], exact: tuple[Tensor, ...], dtype: torch.dtype) -> float:
    """The largest error."""
    worst = 0.0
    for a, b in zip(told, exact, strict=True):
        b = b.double()
        size = torch.maximum(b.abs(), b.square().mean().sqrt())
        unit = torch.finfo(dtype).eps * 2.0 ** (size.frexp().exponent - 1)
        worst = max(worst, ((a.double() - b).abs() / unit).max().item())
    return worst


def kept_bytes(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> int:
    """Of what autograd saves, each memory once."""
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function(*[t.detach().requires_grad_() for t in inputs])
    del out
    return sum(seen.values())


def seconds(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], repeats: int) -> float:
    """Processor time of so many forwards and backwards."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    g = torch.ones_like(function(*leaves))
    begun = time.process_time()
    for _ in range(repeats):
        torch.autograd.grad(function(*leaves), leaves, g)
    return time.process_time() - begun


def time_ratio(pair: Pair, rounds: int) -> float:
    """Median of ours over median of torch's, in turn."""
    once = max(seconds(pair.theirs, pair.inputs, 2) / 2, 1e-6)
    repeats = max(1, round(0.01 / once))
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(seconds(pair.ours, pair.inputs, repeats))
        theirs.append(seconds(pair.theirs, pair.inputs, repeats))
    return statistics.median(ours) / statistics.median(theirs)


def formula(name: str) -> str:
    """The docstring's first line."""
    told = (RULES[name].__doc__ or "").splitlines()[0].rstrip(".").replace("``", "")
    return f"`{told}`".replace("|", "\\|")


def measure(name: str, pair: Pair, rounds: int) -> list[Any]:
    """A row of the table, its numbers as they are."""
    wide = tuple(t.double() if t.is_floating_point() else t for t in pair.inputs)
    exact = outcome(pair.theirs, wide)
    errors = [ulps(outcome(f, pair.inputs), exact, torch.float32) for f in (pair.ours, pair.theirs)]
    in_double = ulps(outcome(pair.ours, wide), exact, torch.float64)
    theirs = kept_bytes(pair.theirs, pair.inputs)
    ours = kept_bytes(pair.ours, pair.inputs)
    kept = ours / theirs if theirs else math.inf if ours else 0.0
    return [name, formula(name), *errors, in_double, time_ratio(pair, rounds), kept]


def page(rows: list[list[Any]], rounds: int) -> str:
    """docs/rules.md."""
    slow = [row for row in rows if row[5] > SLOW]
    lines = [
        "# The rules beside torch's own",
        "",
        "Written by `make rules` (`benchmarks/rules.py`). Errors are the largest of the output and of every cotangent,",
        "in units in the last place of float32, against torch's own in float64 on the same numbers; beside them",
        "torch's own in float32, and ours in float64 against torch's, in its units. A number smaller than its",
        "tensor's root mean square counts in the units of that. (Torch's own hardsigmoid takes 1/6 in float32 even for",
        "float64.) Time is forward and backward on one thread, the ratio of the medians of",
        f"{rounds} rounds in turn; kept is what autograd saves for the backward, as a ratio too: 0 is none, inf where",
        "torch alone keeps none.",
        "",
        f"Machine: {platform.processor() or platform.machine()}, 1 thread, Python {platform.python_version()}, "
        f"torch {torch.__version__}.",
        "",
        "| rule | formula | ulp | torch's | in float64 | time | kept |",
        "|---|---|---|---|---|---|---|",
        *[
            f"| {name} | {told} | {ours:.1f} | {theirs:.1f} | {double:.1f} | {ratio:.2f} | {kept:.2f} |"
            for name, told, ours, theirs, double, ratio, kept in rows
        ],
        "",
        f"## Slower than {SLOW}",
        "",
        *[f"- {row[0]} ({row[5]:.1f}): {REASONS.get(row[0], 'not explained')}." for row in slow],
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure, and write or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds; prints only")
    parser.add_argument("rules", nargs="*", help="these only; prints only")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 5 if asked.quick else 25
    all_pairs = pairs()
    assert all_pairs.keys() == RULES.keys(), all_pairs.keys() ^ RULES.keys()
    rows = [measure(name, pair, rounds) for name, pair in all_pairs.items() if not asked.rules or name in asked.rules]
    if asked.quick or asked.rules:
        print(page(rows, rounds))
    else:
        PAGE.write_text(page(rows, rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
