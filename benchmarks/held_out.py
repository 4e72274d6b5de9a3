"""Random nets judged at their first step alone, then trained: was the verdict right?

    python benchmarks/held_out.py           40 nets, writes docs/held_out.md; two minutes
    python benchmarks/held_out.py --count 4 --seed 7

Drawn: activation, depth, weight variance, optimizer; width 100, batches of 64, 600 steps planned.  Sick is a net whose
loss, the mean of the last 50 of 600 steps, stays above 2.25 (guessing costs ln 10 = 2.30), or is not finite.  Called
sick is one with a harm among the findings of step 0, before anything has been learned.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import bpdiag
from bpdiag import data, model
from bpdiag.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from bpdiag.training import OPTIMIZERS, batches, flushed_denormals

ROOT = Path(__file__).parents[1]
STEPS = 600
STUCK = 2.25  # of a loss that guessing brings to 2.30
DRAWN = {
    "activation": ("relu", "tanh", "sigmoid", "silu", "gelu", "selu"),
    "depth": (8, 14, 25),
    "weight_variance": ("1/3", "1", "2"),
    "optimizer": (("sgd", 0.05), ("adam", 3e-4)),
}


@dataclass
class Net:
    """One net drawn, what was said of it, what became of it."""

    config: Config
    drawn: dict[str, Any]
    said: str = ""  # kind and cause of the first harm
    decades: float = math.nan
    loss: float = math.nan

    @property
    def sick(self) -> bool:
        """Whether it learned nothing."""
        return not self.loss <= STUCK


def draw(count: int, seed: int) -> list[Net]:
    """So many different ones of the 108 kinds."""
    kinds = random.Random(seed).sample(list(itertools.product(*DRAWN.values())), count)
    return [made(dict(zip(DRAWN, kind, strict=True)), number) for number, kind in enumerate(kinds)]


def made(drawn: dict[str, Any], seed: int) -> Net:
    """The configuration of one kind."""
    name, rate = drawn["optimizer"]
    variance = {"1/3": 1 / 3}.get(drawn["weight_variance"], drawn["weight_variance"])
    shape = ModelConfig(depth=drawn["depth"], width=100, activation=drawn["activation"], weight_variance=str(variance))
    optimizer = OptimizerConfig(name=name, lr=rate, momentum=0.0)
    return Net(Config(seed=seed, model=shape, optimizer=optimizer, training=TrainingConfig(steps=STEPS)), drawn)


def judge(net: Net, dataset: data.Dataset) -> None:
    """Watch the first step, judge, then train on without a look."""
    config = net.config
    module = model.build(config.model, dataset.shape, dataset.classes, config.seed)
    optimizer = OPTIMIZERS[config.optimizer.name](module.parameters(), config)
    rows = list(batches(config, len(dataset.train), STEPS, torch.device("cpu")))
    losses = []

    def step(i: int) -> torch.Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(module(dataset.train.x[rows[i]]), dataset.train.y[rows[i]])
        losses.append(loss.detach())
        return loss

    with bpdiag.watch(module, optimizer, planned_steps=STEPS) as watching:
        watching.loss(step(0)).backward()
        optimizer.step()
    harms = [f for f in bpdiag.diagnose(watching.trace) if f.severity == "harm"]
    net.said = f"{harms[0].kind} by {harms[0].cause}" if harms else "nothing"
    net.decades = bpdiag.diagnosis.profile(watching.trace).decades[0, 0]
    for i in range(1, STEPS):
        step(i).backward()
        optimizer.step()
    net.loss = float(torch.stack(losses[-50:]).mean())


def page(nets: list[Net], seed: int) -> str:
    """What was said and what became of it, in Markdown."""
    told = Counter((net.sick, net.said != "nothing") for net in nets)
    right = told[True, True] + told[False, False]
    lines = [
        "# Judged at the first step",
        "",
        f"Written by `python benchmarks/held_out.py` (seed {seed}): {len(nets)} random nets, judged at step 0 alone and"
        f" then trained for {STEPS} steps.",
        "",
        f"**{right} of {len(nets)} right**: {told[True, True]} sick and called so, {told[False, False]} healthy and"
        f" left alone; {told[False, True]} false alarms, {told[True, False]} missed.",
        "",
        "| activation | depth | weight variance | optimizer | decades at layer 1 | said at step 0 | last loss | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for net in sorted(nets, key=lambda net: net.decades if math.isfinite(net.decades) else -math.inf):
        word = {(True, True): "", (False, False): "", (True, False): "missed", (False, True): "false alarm"}
        cells = [*map(str, list(net.drawn.values())[:3]), "{} {:g}".format(*net.drawn["optimizer"])]
        cells += [f"{net.decades:.1f}", net.said, f"{net.loss:.3g}", word[net.sick, net.said != "nothing"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Draw, judge, train, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    dataset, nets = data.load(DataConfig()), draw(asked.count, asked.seed)
    with flushed_denormals():
        for net in nets:
            judge(net, dataset)
            print(
                *net.drawn.values(), net.said, f"{net.loss:.3g}", "" if net.sick == (net.said != "nothing") else "WRONG"
            )
    told = page(nets, asked.seed)
    print("\n".join(told.splitlines()[2:5]))
    if (asked.count, asked.seed) == (40, 0):
        (ROOT / "docs" / "held_out.md").write_text(told)


if __name__ == "__main__":
    main()
