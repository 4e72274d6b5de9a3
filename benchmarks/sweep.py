"""What a stack is worth: its time for a member's step against rivals', interleaved in one process of one thread.

    python benchmarks/sweep.py                      writes docs/sweep.md; about half an hour on a quiet machine
    python benchmarks/sweep.py --quick              a look at it: few rounds, prints only
    python benchmarks/sweep.py --command 24         also whole command against whole command: that many runs

Each round times a block of steps of every contestant, in random order, in processor time, and divides it by the stack's
of the same round; told is the median of the rounds and the middle half.  Random pictures of MNIST's shape, but for the
whole commands, which train on the digits.
"""

from __future__ import annotations

import argparse
import lzma
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bpdiag import training
from bpdiag.backprop import Meter, Optimizer, Stack
from bpdiag.config import ModelConfig
from bpdiag.model import build
from bpdiag.rules import ACTIVATIONS

ROOT = Path(__file__).parents[1]
BATCH, SAMPLES, RATE = 64, 4096, 0.01
MEMBERS = 8
Steps = Callable[[int], None]


def data(features: int = 784) -> tuple[Tensor, Tensor]:
    """Samples and classes."""
    return torch.randn(SAMPLES, features), torch.randint(10, (SAMPLES,))


def slices(n: int) -> list[slice]:
    """Of n batches."""
    starts = [i * BATCH % SAMPLES for i in range(n)]
    return [slice(start, start + BATCH) for start in starts]


def tuned(model: ModelConfig, optimizer: str = "sgd") -> Steps:
    """One network as one would tune it: torch's modules, slices of one tensor, a fused optimizer."""
    x, y = data()
    net = build(replace(model, backward="autograd"), (1, 28, 28), 10, seed=0)
    if optimizer == "sgd":
        update: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=0.9, fused=True)
    else:
        update = torch.optim.Adam(net.parameters(), RATE / 10, fused=True)

    def steps(n: int) -> None:
        for s in slices(n):
            loss = cross_entropy(net(x[s]), y[s])
            update.zero_grad()
            loss.backward()
            update.step()

    return steps


def stacked(
    model: ModelConfig, members: int = MEMBERS, optimizer: str = "sgd", orders: int = 1, every: int = 0
) -> Steps:
    """Ours."""
    x, y = data()
    nets = [build(model, (1, 28, 28), 10, seed) for seed in range(members)]
    rates = [RATE if optimizer == "sgd" else RATE / 10] * members
    reads = [k * orders // members for k in range(members)]
    stack = Stack(nets, [ACTIVATIONS[model.activation]] * members, Optimizer(rates, optimizer), reads)
    meter = Meter(members, torch.device("cpu"))

    def steps(n: int) -> None:
        for i, s in enumerate(slices(n)):
            sampled = every and i % every == 0
            rows = [slice(s.start + BATCH * o, s.stop + BATCH * o) for o in range(orders)]
            rows = [r if r.stop <= SAMPLES else slice(0, BATCH) for r in rows]
            stack.step([x[r] for r in rows], [y[r] for r in rows], meter if sampled else None)
            if sampled:
                stack.adjust(meter.read(stack.units))

    return steps


def by_vmap(model: ModelConfig, members: int = 32) -> Steps:
    """The same stack by torch.func: one functional network, mapped over its parameters."""
    x, y = data()
    nets = [build(replace(model, backward="autograd"), 784, 10, seed) for seed in range(members)]
    parameters, buffers = torch.func.stack_module_state(nets)
    leaves = list(parameters.values())
    update = torch.optim.SGD(leaves, RATE, momentum=0.9, fused=True)

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(torch.func.functional_call(nets[0], (parameters, buffers), (x,)), y)

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(0, 0, None, None))

    def steps(n: int) -> None:
        for s in slices(n):
            found = gradients({k: p.detach() for k, p in parameters.items()}, buffers, x[s], y[s])
            for name, parameter in parameters.items():
                parameter.grad = found[name]
            update.step()

    return steps


def by_autograd(model: ModelConfig, members: int = 32) -> Steps:
    """The same stack as batched products, differentiated by autograd."""
    x, y = data()
    widths = [784, *[model.width] * (model.depth - 1), 10]
    W = [nn.Parameter(torch.randn(members, o, i) / i**0.5) for i, o in pairwise(widths)]
    b = [nn.Parameter(torch.zeros(members, o, 1)) for o in widths[1:]]
    update, phi = torch.optim.SGD([*W, *b], RATE, momentum=0.9, fused=True), getattr(torch, model.activation)

    def steps(n: int) -> None:
        for s in slices(n):
            a = x[s].t().contiguous().expand(members, -1, -1)
            for layer, (weight, bias) in enumerate(zip(W, b, strict=True)):
                a = torch.baddbmm(bias, weight, a)
                if layer < len(W) - 1:
                    a = phi(a)
            losses = cross_entropy(a.permute(0, 2, 1).flatten(0, 1), y[s].repeat(members), reduction="sum") / BATCH
            update.zero_grad()
            losses.backward()
            update.step()

    return steps


def products(model: ModelConfig, members: int = MEMBERS) -> Steps:
    """The products of a step alone, each hot: what a perfect engine would take."""
    widths = [784, *[model.width] * (model.depth - 1), 10]
    shapes = list(pairwise(widths))
    W = {s: torch.randn(members, s[1], s[0]) for s in set(shapes)}
    a = {n: torch.randn(members, n, BATCH) for n in set(widths)}
    z = {n: torch.empty(members, n, BATCH) for n in set(widths)}
    G = {s: torch.empty(members, s[1], s[0]) for s in set(shapes)}

    def steps(n: int) -> None:
        for _ in range(n):
            for i, o in shapes:
                torch.bmm(W[i, o], a[i], out=z[o])
            for layer, (i, o) in enumerate(reversed(shapes)):
                if layer < len(shapes) - 1:
                    torch.bmm(W[i, o].transpose(1, 2), a[o], out=z[i])
                torch.bmm(a[o], a[i].transpose(1, 2), out=G[i, o])

    return steps


@dataclass
class Rival:
    """A contestant: what it is called, the steps, and how many members one of its steps serves."""

    name: str
    steps: Steps
    members: int = 1
    block: int = 0  # steps; 0: as many as make a fair block


def race(ours: Rival, rivals: Sequence[Rival], rounds: int, seconds: float = 0.4) -> dict[str, list[float]]:
    """Rival -> of each round, its time for a member's step over ours."""
    everyone = [ours, *rivals]
    for one in everyone:
        one.steps(2)
        begun = time.process_time()
        one.steps(4)
        one.block = max(2, round(seconds * 4 / max(time.process_time() - begun, 1e-6)))
    told: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    for _ in range(rounds):
        took = {}
        for one in random.sample(everyone, len(everyone)):
            begun = time.process_time()
            one.steps(one.block)
            took[one.name] = (time.process_time() - begun) / one.block / one.members
        for rival in rivals:
            told[rival.name].append(took[rival.name] / took[ours.name])
    return told


def shown(ratios: Sequence[float]) -> str:
    """Median and middle half."""
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def mlp(width: int = 64, depth: int = 10, **options: Any) -> ModelConfig:
    """tanh, critical."""
    return replace(ModelConfig(width=width, depth=depth, activation="tanh", weight_variance="lecun"), **options)


def table(rounds: int) -> list[tuple[str, str, str, str]]:
    """(against, work, ratio, aim)."""
    rows: list[tuple[str, str, str, str]] = []

    def add(against: str, work: str, ratios: Sequence[float], aim: str) -> None:
        rows.append((against, work, shown(ratios), aim))
        print(" | ".join(rows[-1]), flush=True)

    for width, depth, aim in (
        (64, 5, 3.5),
        (64, 10, 3.5),
        (64, 20, 3.5),
        (64, 30, 3.5),
        (128, 10, 1.7),
        (256, 10, 1.0),
    ):
        model = mlp(width, depth)
        found = race(Rival("stack", stacked(model), MEMBERS), [Rival("tuned", tuned(model))], rounds)
        add("tuned loop", f"width {width}, depth {depth}", found["tuned"], f"{aim} or more")
    found = race(
        Rival("stack", stacked(mlp(), 32), 32),
        [Rival("vmap", by_vmap(mlp()), 32), Rival("autograd", by_autograd(mlp()), 32)],
        rounds,
    )
    add("torch.func.vmap, 32 members", "64 x 10", found["vmap"], "1.7 or more")
    add("a stack by autograd, 32 members", "64 x 10", found["autograd"], "1.7 or more")
    found = race(Rival("stack", stacked(mlp()), MEMBERS), [Rival("products", products(mlp()), MEMBERS)], rounds)
    add("its matrix products alone, hot", "64 x 10", found["products"], "0.75 or more")
    found = race(Rival("stack", stacked(mlp()), MEMBERS), [Rival("own", stacked(mlp(), orders=8), MEMBERS)], rounds)
    add("a batch of its own for each member", "64 x 10", found["own"], "")
    found = race(
        Rival("stack", stacked(mlp()), MEMBERS),
        [Rival(f"every {n}", stacked(mlp(), every=n), MEMBERS) for n in (1, 10)],
        rounds,
    )
    add("statistics every 10th step", "64 x 10", found["every 10"], "1.07 or less")
    add("statistics every step", "64 x 10", found["every 1"], "")
    for name, model, optimizer in (
        ("batch norm", mlp(normalization="batch"), "sgd"),
        ("layer norm", mlp(normalization="layer"), "sgd"),
        ("residual", mlp(residual="identity"), "sgd"),
        ("Adam", mlp(), "adam"),
        ("Adam, width 256", mlp(256), "adam"),
        ("batch norm, width 256", mlp(256, normalization="batch"), "sgd"),
        ("cnn", ModelConfig(name="cnn", depth=4, width=128), "sgd"),
    ):
        ours = Rival("stack", stacked(model, optimizer=optimizer), MEMBERS)
        found = race(ours, [Rival("tuned", tuned(model, optimizer))], rounds)
        add("tuned loop", f"64 x 10, {name}" if model.name == "mlp" else name, found["tuned"], "1 or more")
    found = race(
        Rival("stack", stacked(mlp()), MEMBERS), [Rival(f"{n}", stacked(mlp(), n), n) for n in (1, 64, 512)], rounds
    )
    for n in (1, 64, 512):
        add(f"{n} members instead of {MEMBERS}", "64 x 10", found[f"{n}"], "0.9 to 1.1" if n > 1 else "")
    vanishing = mlp(depth=30, activation="sigmoid", weight_variance="0.05")
    found = race(
        Rival("stack", stacked(mlp(depth=30, activation="sigmoid", weight_variance="1")), MEMBERS),
        [Rival("vanishing", stacked(vanishing), MEMBERS)],
        rounds,
    )
    add("a gradient that vanishes (sigma_w^2 0.05 instead of 1)", "sigmoid 64 x 30", found["vanishing"], "1.1 or less")
    return rows


USUAL = '''"""What one writes without us: Hydra, torchvision's loader, nn.Sequential, SGD, TensorBoard."""
import os, sys
import hydra, torch, torchvision
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import Compose, Normalize, ToTensor


@hydra.main(version_base=None, config_path=None)
def main(cfg):
    torch.manual_seed(cfg.seed)
    seen = Compose([ToTensor(), Normalize((0.1307,), (0.3081,))])
    train = DataLoader(torchvision.datasets.MNIST(os.environ["DATA"], True, seen), 64, shuffle=True)
    test = DataLoader(torchvision.datasets.MNIST(os.environ["DATA"], False, seen), 1000)
    phi = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}[cfg.act]
    widths = [784, *[64] * 9, 10]
    layers = [m for i, o in zip(widths, widths[1:]) for m in (nn.Linear(i, o), phi())][:-1]
    net = nn.Sequential(nn.Flatten(), *layers)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    log = SummaryWriter(hydra.core.hydra_config.HydraConfig.get().runtime.output_dir)
    for epoch in range(2):
        for x, y in train:
            loss = nn.functional.cross_entropy(net(x), y)
            optimizer.zero_grad(); loss.backward(); optimizer.step()
        for name, p in net.named_parameters():
            log.add_scalar("gradient/" + name, p.grad.norm(), epoch)
        with torch.no_grad():
            right = sum((net(x).argmax(1) == y).sum().item() for x, y in test)
        log.add_scalar("accuracy", right / 10000, epoch)
    log.close()


main()
'''


def commands(runs: int) -> str:
    """Whole command against whole command: three activations, as many seeds as make the runs, two epochs."""
    seeds = ",".join(str(seed) for seed in range(runs // 3))
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        raw = here / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for packed in (ROOT / "bpdiag" / "mnist").glob("*.xz"):
            (raw / packed.stem).write_bytes(lzma.decompress(packed.read_bytes()))
        (here / "usual.py").write_text(USUAL)
        ours = [sys.executable, "-m", "bpdiag", "-m", "model.activation=sigmoid,tanh,relu", f"seed={seeds}",
                "model.depth=10", "model.width=64", "training.epochs=2", "hydra.sweep.dir=ours"]  # fmt: skip
        theirs = [sys.executable, "usual.py", "-m", "+act=sigmoid,tanh,relu", f"+seed={seeds}"]
        took = []
        for command in (ours, theirs):
            begun = time.perf_counter()
            known = {"DATA": folder, "PYTHONPATH": str(ROOT)}
            subprocess.run(command, cwd=here, env={**os.environ, **known}, check=True, capture_output=True)
            took.append(time.perf_counter() - begun)
    return f"{took[1] / took[0]:.1f} ({took[1]:.0f} s against {took[0]:.0f} s)"


HEAD = """\
Written by `make bench` (`benchmarks/sweep.py`). A stack of 8 networks, batches of 64, tanh, SGD with momentum, unless
said; one thread each. In a round every contestant trains for a block of steps, in random order; a ratio is its
processor time for a member's step over the stack's in the same round: the median over the rounds, and the middle half
of them. The tuned loop is torch's modules and autograd on slices of one tensor, with the fused optimizer. The row of
the matrix products says what is left to win: they alone, each hot in the cache, take that share of the stack's time,
and no engine on these products takes less."""


def page(rows: Sequence[tuple[str, str, str, str]]) -> str:
    """docs/sweep.md."""
    lines = [
        "# What a stack is worth",
        "",
        *HEAD.splitlines(),
        "",
        "| against | work | times the stack's | aim |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        f"torch {torch.__version__}, {processor()}, {os.cpu_count()} cores.",
    ]
    return "\n".join(lines) + "\n"


def processor() -> str:
    """What the machine calls it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.machine()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--command", type=int, default=0, metavar="RUNS")
    told = parser.parse_args()
    with training.flushed_denormals(), training.threads(1):
        rows = table(3 if told.quick else 11)
    if told.command:
        rows.append(("the usual Hydra script, whole command", f"{told.command} runs of 64 x 10, two epochs",
                     commands(told.command), "20 or more"))  # fmt: skip
        print(" | ".join(rows[-1]), flush=True)
    if told.quick:
        return
    (ROOT / "docs" / "sweep.md").write_text(page(rows))


if __name__ == "__main__":
    main()
