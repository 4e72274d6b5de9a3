"""What watching costs: times as ratios to the same training left alone, all contestants interleaved in one process.

    python benchmarks/watching.py           writes docs/overhead.md; minutes on a quiet machine
    python benchmarks/watching.py --quick   a look at it: one round, prints only

Each round runs every contestant for a block of steps, in random order, and divides its time by that of the training
left alone in the same round; the table has the median of the rounds and the middle half.  Memory is measured in a
process of its own for each contestant.

Rivals that are not installed are said to be so: BackPACK (backpack-for-pytorch), TorchLens (torchlens), Cockpit
(cockpit-for-pytorch); what they measure is not the same, see the last column.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

import bpdiag

ROOT = Path(__file__).parents[1]
IDLE = 10**9  # every so many steps: never again after step 0

Step = Callable[[], None]


def mlp() -> tuple[nn.Module, Tensor]:
    """784-128-...-128-10, ten weight layers, relu; 64 samples."""
    widths = [784] + [128] * 9
    hidden = [m for n, k in pairwise(widths) for m in (nn.Linear(n, k), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(128, 10)), torch.randn(64, 784)


def resnet18() -> tuple[nn.Module, Tensor]:
    """Torchvision's, at 32 x 32; 64 samples."""
    from torchvision.models import resnet18 as make

    return make(num_classes=10), torch.randn(64, 3, 32, 32)


# name -> (maker, steps in a block, rounds)
NETS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], int, int]] = {
    "MLP 128 x 10, batch 64": (mlp, 32, 25),
    "ResNet-18 at 32 x 32, batch 64": (resnet18, 16, 7),
}


class Training:
    """One model, its optimizer and its data, made anew from the same seed for each contestant."""

    def __init__(self, make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
        torch.manual_seed(0)
        self.model, self.x = make()
        self.y = torch.arange(64) % 10
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)

    def leaves(self) -> list[nn.Module]:
        """Modules without children."""
        return [m for m in self.model.modules() if not list(m.children())]

    def step(self, loss_of: Callable[[Tensor], Tensor] = lambda loss: loss) -> None:
        """Forward, backward, update."""
        self.optimizer.zero_grad()
        loss_of(cross_entropy(self.model(self.x), self.y)).backward()
        self.optimizer.step()


# ---- contestants --------------------------------------------------------------------------------------


def alone(training: Training) -> Step:
    """Nobody watches."""
    return training.step


def watched(**options: Any) -> Callable[[Training], Step]:
    """Under bpdiag.watch; the block is never left, as a training would not either."""

    def begin(training: Training) -> Step:
        watching = bpdiag.watch(training.model, training.optimizer, **options)
        watching.__enter__()
        return lambda: training.step(watching.loss)

    return begin


def reduced(reduce: Callable[[Tensor], object]) -> Callable[[Training], Step]:
    """Plain hooks that bring every output, cotangent, weight and weight gradient to the host one by one."""

    def come_back(g: Tensor) -> None:
        reduce(g)

    def begin(training: Training) -> Step:
        def see(module: nn.Module, args: object, out: Tensor) -> None:
            reduce(out.detach())
            out.register_hook(come_back)

        for module in training.leaves():
            module.register_forward_hook(see)

        def step() -> None:
            training.step()
            for p in training.model.parameters():
                reduce(p.detach())
                reduce(p.grad)

        return step

    return begin


def backpack(training: Training) -> Step:
    """BackPACK's norms of every sample's weight gradients."""
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    model, loss = extend(training.model), extend(nn.CrossEntropyLoss())

    def step() -> None:
        training.optimizer.zero_grad()
        with backpack(BatchL2Grad()):
            loss(model(training.x), training.y).backward()
        for p in model.parameters():
            p.batch_l2.tolist()
        training.optimizer.step()

    return step


def torchlens(training: Training) -> Step:
    """TorchLens logs the forward pass, beside the training's own."""
    import torchlens

    def step() -> None:
        torchlens.trace(training.model, training.x)
        training.step()

    return step


def cockpit(training: Training) -> Step:
    """Cockpit with gradient norm, update size, distance and the gradient's histogram, on every step."""
    from backpack import extend
    from cockpit import Cockpit, quantities
    from cockpit.utils import schedules

    model, loss_of = extend(training.model), extend(nn.CrossEntropyLoss())
    each_of = extend(nn.CrossEntropyLoss(reduction="none"))
    always = schedules.linear(1)
    kinds = (quantities.GradNorm, quantities.UpdateSize, quantities.Distance, quantities.GradHist1d)
    told = Cockpit(model.parameters(), quantities=[kind(always) for kind in kinds])
    count = iter(range(10**9))

    def step() -> None:
        number, out = next(count), model(training.x)
        loss = loss_of(out, training.y)
        facts = {"batch_size": 64, "individual_losses": each_of(out, training.y), "loss": loss}
        with told(number, info={**facts, "optimizer": training.optimizer}):
            loss.backward(create_graph=told.create_graph(number))
        training.optimizer.step()
        training.optimizer.zero_grad()

    return step


CONTESTANTS: dict[str, tuple[Callable[[Training], Step], str]] = {
    "left alone": (alone, ""),
    "watch, every step": (watched(), "all columns of the trace"),
    "watch, every 16th step": (watched(every=16), "the same"),
    "watch, idle": (watched(every=IDLE), "no step of those timed; losses"),
    "watch, max_overhead=0.02": (watched(max_overhead=0.02), "picks every by itself"),
    "plain .norm().item() hooks": (reduced(lambda x: x.norm().item()), "one norm of each tensor, in its own precision"),
    "histograms": (reduced(lambda x: torch.histc(x, 64).tolist()), "64 bins of each tensor, as wandb.watch's"),
    "BackPACK": (backpack, "norms of each sample's weight gradients"),
    "TorchLens": (torchlens, "outputs of the forward pass, kept"),
    "Cockpit": (cockpit, "gradient norm, histogram, update, distance"),
}


APART = ("TorchLens",)  # wraps torch's functions for good, which slows all: runs when the others are through


# ---- time ---------------------------------------------------------------------------------------------


def timed(make: Callable[[], tuple[nn.Module, Tensor]], block: int, rounds: int) -> dict[str, list[float] | str]:
    """name -> seconds of a step, one number a round; or why it could not run."""
    told: dict[str, list[float] | str] = {}
    steps: dict[str, Step] = {}
    for name in CONTESTANTS:
        told[name] = []
        if name not in APART:
            begin(name, make, block, steps, told)
    for _ in range(rounds):
        for name in random.sample(list(steps), len(steps)):
            run(name, block, steps, told)
    for name in APART:
        begin(name, make, block, steps, told)
        for _ in range(rounds if name in steps else 0):
            run(name, block, steps, told)
    return told


def begin(name: str, make: Callable[[], tuple[nn.Module, Tensor]], block: int, steps: dict, told: dict) -> None:
    """Put the contestant's step, warm, into ``steps``, or why it has none into ``told``."""
    try:
        step = CONTESTANTS[name][0](Training(make))
        for _ in range(block if "watch" in name else 3):
            step()
        steps[name] = step
    except ImportError as error:
        told[name] = f"not installed ({error.name})"
    except Exception as error:  # whatever a rival's version does with this torch
        told[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:70]}"


def run(name: str, block: int, steps: dict, told: dict) -> None:
    """Time a block."""
    count = block if "watch" in name or name == "left alone" else max(block // 4, 1)
    began = time.perf_counter()
    for _ in range(count):
        steps[name]()
    told[name].append((time.perf_counter() - began) / count)


def quartiles(numbers: list[float]) -> tuple[float, float, float]:
    """25 %, 50 %, 75 %."""
    if len(numbers) < 2:
        return (numbers[0],) * 3
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return low, middle, high


def table(told: dict[str, list[float] | str]) -> list[str]:
    """Rows of a Markdown table."""
    base = told["left alone"]
    assert isinstance(base, list)
    lines = ["| | ms a step | ratio | middle half | what it measures |", "|---|---|---|---|---|"]
    for name, seconds in told.items():
        what = CONTESTANTS[name][1]
        if isinstance(seconds, str):
            lines.append(f"| {name} | – | {seconds} | | {what} |")
            continue
        low, ratio, high = quartiles([a / b for a, b in zip(seconds, base, strict=True)])
        if name == "left alone":  # the noise: a round of it against the median
            low, ratio, high = quartiles([a / statistics.median(base) for a in base])
        lines.append(
            f"| {name} | {1e3 * statistics.median(seconds):.3g} | {ratio:.2f} | {low:.2f} to {high:.2f} | {what} |"
        )
    return lines


# ---- memory -------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process that are in memory now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def peak_of(step: Step) -> int:
    """The most bytes of tensors that a step holds beyond those it found, by the allocator's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def live() -> tuple[int, int]:
    """How many tensors Python knows of, and their bytes."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    return len(tensors), sum(x.numel() * x.element_size() for x in tensors)


def remember(net: str, contestant: str, steps: int) -> None:
    """Run, and print what memory it took, as JSON: for a process of its own."""
    torch.set_num_threads(1)
    with bpdiag.watch(nn.Linear(1, 1)) as watching:  # every contestant has what watching imports
        watching.trace.to_pandas()
    training = Training(NETS[net][0])
    step = CONTESTANTS[contestant][0](training)
    early = steps // 4
    for _ in range(early):
        step()
    told: dict[str, object] = {"early": resident(), "tensors early": live()[0]}
    for _ in range(steps - early):
        step()
    told |= {"late": resident(), "tensors late": live()[0], "peak": peak_of(step)}  # a sampled one: steps is 16 n
    print(json.dumps({**told, "weights": sum(p.numel() * p.element_size() for p in training.model.parameters())}))


def memory(net: str, contestant: str, steps: int) -> dict[str, int]:
    """``remember`` in a process of its own."""
    command = [sys.executable, __file__, "--memory", net, contestant, str(steps)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def memory_table() -> list[str]:
    """Rows of a Markdown table."""
    lines = [
        "| net | | resident after a quarter | at the end | tensors Python knows, then and now | a step's peak |",
        "|---|---|---|---|---|---|",
    ]
    for net, steps in zip(NETS, (2000, 48), strict=True):
        for contestant in ("left alone", "watch, every step", "watch, every 16th step"):
            told = memory(net, contestant, steps)
            early, late, peak = (f"{told[key] / 1e6:.1f}" for key in ("early", "late", "peak"))
            tensors = f"{told['tensors early']}, {told['tensors late']}"
            more = f"{peak} (weights: {told['weights'] / 1e6:.1f})"
            lines.append(f"| {net}, {steps} steps | {contestant} | {early} | {late} | {tensors} | {more} |")
    return lines


# ---- the page -----------------------------------------------------------------------------------------


PAGE = """# What watching costs

Written by `make bench` (`benchmarks/watching.py`). The rows of a table take turns in one process, in random order; a
ratio is a contestant's time over that of the same training left alone in the same round: the median over the rounds,
and the middle half of them. The middle half of the first row is the noise: a round of it against their median.
TorchLens wraps torch's functions for good and therefore runs last. What rivals measure is not the same; the last column
says what it is.

Machine: {machine}.

"""
MEMORY = """## Memory

Each row in a process of its own; MB of 10^6 bytes. The peak is of the tensors of one sampled step beyond those there
before it, by the allocator's own account. A loss is a tensor until it is read with the next sample.

"""


def machine() -> str:
    """What it ran on."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, 1 thread, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description="What watching costs; writes docs/overhead.md.")
    parser.add_argument("--quick", action="store_true", help="one round, printed only")
    parser.add_argument("--memory", nargs=3, metavar=("NET", "CONTESTANT", "STEPS"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.memory:
        remember(asked.memory[0], asked.memory[1], int(asked.memory[2]))
        return
    torch.set_num_threads(1)
    random.seed(0)
    warnings.simplefilter("ignore")  # rivals warn of this torch
    page = PAGE.format(machine=machine())
    print(page, flush=True)
    for net, (make, block, rounds) in NETS.items():
        section = [f"## {net}", "", *table(timed(make, block, 1 if asked.quick else rounds)), ""]
        page += "\n".join(section) + "\n"
        print(*section, sep="\n", flush=True)
    if not asked.quick:
        page += MEMORY + "\n".join(memory_table()) + "\n"
        (ROOT / "docs").mkdir(exist_ok=True)
        (ROOT / "docs" / "overhead.md").write_text(page)
        print(page)


if __name__ == "__main__":
    main()
