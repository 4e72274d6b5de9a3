"""How long the views keep one waiting, in a real browser; writes docs/viewing.md.

    python benchmarks/viewing.py

Needs selenium, chromium and chromedriver, as the browser tests do.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bpdiag import diagnosis, report, views
from bpdiag.trace import COLUMNS, SCHEMA, Layer, Trace, write_json

LAYERS, STEPS, PART = 200, 10_000, 64
WEIGHTS = ("z_", "W_rms", "g_z", "g_W", "dW_rms", "update", "decades", "backward", "weight_f", "slope_f", "forward")
SLOPES = ("a_", "g_a", "slope_rms")
REPEATS = 3
ROOT = Path(__file__).resolve().parents[1]
PAGE = f"""# What the views keep one waiting

Written by `make bench` (`benchmarks/viewing.py`): seconds, of three times the first and the least. No two numbers of
the traces are alike; a page's time counts from asking for it, a tab's from asking for its frame, both to the frame of
the browser that shows it. A run longer than {views.COLUMNS} sampled steps keeps beside its trace what is drawn of it
(`trace/{views.KEPT}`), made when it ends; while it trains, or where the file is gone, the trace is read, and the tab
waits ten times as long as that took before it reads again.

| | first | least |
|---|---|---|
{{lines}}

Machine: {{machine}}; chromium without a window.
"""
DRAWN = """
const [wanted, done] = arguments;
const painted = () => requestAnimationFrame(() => done(performance.now()));
const look = () => (document.querySelector(wanted) ? painted() : setTimeout(look, 5));
look();
"""
SERVED = """
import sys
from tensorboard import default, program
from bpdiag.dashboard.plugin import GradientFlow
board = program.TensorBoard([*default.get_static_plugins(), GradientFlow])
board.configure(argv=[None, "--logdir", sys.argv[1], "--port", "0"])
print(board.launch(), flush=True)
sys.stdin.read()
"""


def write_run(run: Path, layers: int, steps: int, part: int = PART, **config: Any) -> Path:
    """A finished run as a training of a plain relu chain leaves it: parts of 64 samples, no two numbers alike."""
    table = _layers(layers)
    (run / "trace").mkdir(parents=True)
    draw = np.random.default_rng(layers)
    names = pa.array([layer.name for layer in table])
    own = np.array([layer.is_weight_layer for layer in table])
    walk = np.cumsum(draw.normal(-0.02, 0.03, own.sum()))[::-1] + 0.02  # decades, layer 1 first
    for number, first in enumerate(range(0, steps, part)):
        here = np.arange(first, min(first + part, steps))
        rows = len(here) * len(table)
        columns: dict[str, Any] = {
            "step": np.repeat(here, len(table)),
            "backward": pa.array(np.zeros(rows, np.int32)),
            "layer": pa.concat_arrays([names] * len(here)),
            "call": pa.array(np.zeros(rows, np.int32)),
        }
        for column in COLUMNS:
            side = own if column.startswith(WEIGHTS) else ~own if column.startswith(SLOPES) else None
            if side is None or column.endswith(("rows", "rounded_fraction", "stale_norm")):
                continue
            told = draw.lognormal(0, 0.2, (len(here), len(table)))
            if column == "decades":
                told[:, own] = walk + draw.normal(0, 0.1, (len(here), own.sum()))
            elif column.endswith("fraction"):
                told = 0.3 * told / told.max()
            elif column == "update_ratio":
                told *= 1e-3
            columns[column] = pa.array(told.ravel(), mask=np.tile(~side, len(here)))
        pq.write_table(pa.table(columns), run / "trace" / f"part-{number:05d}.parquet", compression="zstd")
        losses = pa.table({"step": here, "loss": 2.3 * np.exp(-here / steps)})
        pq.write_table(losses, run / "trace" / f"steps-{number:05d}.parquet", compression="zstd")
    told = {"schema": SCHEMA, "planned_steps": steps, "optimizer": {"sgd_like": True, "lr": 0.1}, "config": config}
    write_json(run / "trace" / "meta.json", told | {"rows": steps * len(table), "layers": table})
    return run


def _layers(depth: int) -> list[Layer]:
    relu: dict[str, Any] = {"activation": "relu", "largest_slope": 1.0, "r": math.sqrt(0.5), "window": 8}
    table: list[Layer] = []
    for n in range(1, depth + 1):
        at, last = len(table), n == depth
        up: dict[str, Any] = {} if last else {"next": at + 2, "via": (at + 1,)}
        below = (at - 1,) if at else ()
        table.append(Layer(f"linear{n}", 0, "linear", (64, 100), below, fan_in=100, units=100, **up))
        if not last:
            table.append(Layer(f"relu{n}", 0, "relu", (64, 100), (at,), **relu))
    return table


def judged(run: Path) -> Path:
    """With findings.json and summary.json, as a run's end writes them."""
    trace = Trace.load(run)
    diagnosis.write(trace, diagnosis.diagnose(trace), run)
    return run


def sweep(folder: Path, count: int) -> Path:
    """Judged runs of 20 layers x 40 steps, told apart by three settings."""
    first = judged(write_run(folder / "run=0", 20, 40))
    meta = json.loads((first / "trace" / "meta.json").read_text())
    for n in range(count):
        run = shutil.copytree(first, folder / f"run={n}") if n else first
        model = {"activation": ("relu", "tanh", "sigmoid")[n % 3], "depth": 5 * (n // 3 % 10 + 1)}
        write_json(run / "trace" / "meta.json", meta | {"config": {"model": model, "seed": n // 30}})
    return folder


@contextmanager
def browser() -> Iterator[Any]:
    """A chromium without a window."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for word in ("headless", "no-sandbox", "disable-gpu", "window-size=1280,900"):
        options.add_argument(f"--{word}")
    driver = webdriver.Chrome(service=Service(shutil.which("chromedriver")), options=options)
    driver.set_script_timeout(120)
    try:
        yield driver
    finally:
        driver.quit()


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """The address of a TensorBoard over a folder."""
    command = [sys.executable, "-c", SERVED, str(folder)]
    paths = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True, env={**os.environ, **paths}) as process:  # fmt: skip
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


def opened(driver: Any, url: str, drawn: str) -> float:
    """Seconds from asking for a page, or for the tab's frame in TensorBoard, to a frame with ``drawn`` on it."""
    driver.switch_to.default_content()
    driver.get("about:blank")
    tab = url.startswith("http")
    driver.get(f"{url}#bpdiag" if tab else url)
    if tab:
        while not (frames := driver.find_elements("css selector", "iframe")):
            time.sleep(0.05)
        driver.switch_to.frame(frames[0])
    return float(driver.execute_async_script(DRAWN, drawn)) / 1000


def main() -> None:
    """Measure, print and write the page."""
    lines = []

    def tell(what: str, seconds: list[float]) -> None:
        lines.append(f"| {what} | {seconds[0]:.2f} | {min(seconds):.2f} |")
        print(lines[-1], flush=True)

    with tempfile.TemporaryDirectory() as given, browser() as driver:
        folder = Path(given)
        run = judged(write_run(folder / "deep" / "run", LAYERS, STEPS))
        big = f"{LAYERS} layers x {STEPS:,} steps"
        tell(f"read {big}, no view kept", [reading(run) for _ in range(REPEATS)])
        views.keep(run, STEPS)
        tell("the same as a run's end leaves it, its view kept", [reading(run) for _ in range(REPEATS)])
        page = report.write_html([run], folder / "deep.html").as_uri()
        drawn = [opened(driver, f"{page}#view=map", ".grid canvas") for _ in range(REPEATS)]
        tell("its page: opened, map drawn", drawn)
        with tensorboard(folder / "deep") as address:
            tell("its tab: read, findings drawn", [opened(driver, address, "main .finding") for _ in range(REPEATS)])
        for count in (30, 1_000):
            with tensorboard(sweep(folder / str(count), count)) as address:
                drawn = [opened(driver, address, ".cells svg") for _ in range(REPEATS)]
                tell(f"the tab with {count:,} runs: Compare drawn", drawn)
    machine = f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}"
    (ROOT / "docs" / "viewing.md").write_text(PAGE.format(machine=machine, lines="\n".join(lines)))


def reading(run: Path) -> float:
    """Seconds that the tab's server takes to read a run."""
    begun = time.perf_counter()
    views.detail(run, "run")
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
