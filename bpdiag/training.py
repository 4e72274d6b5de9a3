"""One Config -> one trained model and its Trace, deterministic by seed, with every layer watched."""

from __future__ import annotations

import dataclasses
import html
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from bpdiag import data, diagnosis, figure, model, prediction
from bpdiag.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RemedyConfig,
    TrainingConfig,
    UsageError,
    WatchConfig,
    check_ranges,
    choose,
    planned_steps,
    says_yes,
)
from bpdiag.dashboard import pictures
from bpdiag.diagnosis import Finding, diagnose
from bpdiag.rules import RULES
from bpdiag.runlog import RunLog
from bpdiag.session import Watch, watch
from bpdiag.trace import Trace, write_json

DTYPES = {"float32": torch.float32, "float64": torch.float64}
Progress = Callable[[int, int, float, float, float], None]
ORDER = 0x6F72646572  # the order of the data draws from its own stream: the seed plus this


def _sgd(parameters: Any, config: Config) -> torch.optim.Optimizer:
    o = config.optimizer
    return torch.optim.SGD(
        parameters, o.lr, momentum=o.momentum, nesterov=o.nesterov, weight_decay=o.weight_decay, fused=True
    )


def _adam(parameters: Any, config: Config) -> torch.optim.Optimizer:
    o = config.optimizer
    return torch.optim.Adam(parameters, o.lr, eps=o.eps, weight_decay=o.weight_decay, fused=True)


def _adamw(parameters: Any, config: Config) -> torch.optim.Optimizer:
    o = config.optimizer
    return torch.optim.AdamW(parameters, o.lr, eps=o.eps, weight_decay=o.weight_decay, fused=True)


OPTIMIZERS = {"sgd": _sgd, "adam": _adam, "adamw": _adamw}
PARTS = {
    part.__name__: part
    for part in (ModelConfig, DataConfig, OptimizerConfig, TrainingConfig, WatchConfig, RemedyConfig)
}


@dataclass
class Result:
    """A finished run: what it was asked, what it measured, what was found."""

    config: Config
    folder: Path | None
    model: nn.Module
    trace: Trace
    findings: list[Finding]
    metrics: dict[str, Any]  # test_accuracy, class_accuracy, train_loss, steps, seconds, stopped, ...

    def __repr__(self) -> str:
        told = diagnosis.summarize(self.trace, self.findings)
        return f"Result({told['verdict']}: {told['sentence']} Test accuracy {self.metrics['test_accuracy']:.2%})"

    def keep(self, dataset: data.Dataset) -> None:
        """model.pt and metrics.json in the run's folder, if it has one."""
        if self.folder is not None:
            keep(self.model, self.config, dataset, self.folder / "model.pt")
            write_json(self.folder / "metrics.json", self.metrics)

    def _repr_html_(self) -> str:
        """For a notebook's cell: the verdict, the findings, the profile."""
        told = "".join(finding._repr_html_() for finding in self.findings)
        return f"<p>{html.escape(repr(self))}</p>{told}{self.trace._repr_html_()}"


def check(config: Config) -> None:
    """Everything in ``config`` can be used: ranges, names, device, and the data, which is read and verified.

    Raises:
        UsageError: Something cannot; the message says what came, what is known, what to do.
    """
    check_names(config)
    device(config)
    samples, batch = len(load_data(config).train), config.data.batch_size
    if batch > samples:
        raise UsageError(f"data.batch_size={batch}: the training split has {samples} samples")
    whole, rest = divmod(samples, batch)
    one_comes = batch == 1 or (rest == 1 and planned_steps(config, samples) > whole)
    if one_comes and model.normalization(config.model) == "batch":
        one = "is one sample" if batch == 1 else f"leaves a last batch of one sample of {samples}"
        raise UsageError(
            f"data.batch_size={batch}: {one}; batch normalization needs two or more (or model.normalization=none)"
        )


def check_names(config: Config) -> None:
    """Every number is in its range and every name known: what can be asked without data or device.

    Raises:
        UsageError: One is not.
    """
    check_ranges(config)
    model.check(config.model)
    choose("data.name", config.data.name, data.DATASETS)
    choose("optimizer.name", config.optimizer.name, OPTIMIZERS)
    if config.optimizer.nesterov and not config.optimizer.momentum:
        raise UsageError("optimizer.nesterov=true looks ahead along the momentum; give optimizer.momentum, above 0")
    choose("training.dtype", config.training.dtype, DTYPES)


def device(config: Config) -> torch.device:
    """The device ``config`` names, tried.

    Raises:
        UsageError: There is none of that name here.
    """
    name = config.training.device
    try:
        found = torch.device(name)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's ways to say no
        there = ["cpu", *(kind for kind in ("cuda", "mps", "xpu") if getattr(torch, kind).is_available())]
        reason = str(error).splitlines()[0].partition(". ")[0][:100]
        raise UsageError(f"training.device={name}: {reason}; here: {', '.join(there)}") from error
    return found


def load_data(config: Config) -> data.Dataset:
    """The data set of ``config``, on its device."""
    return data.load(config.data, config.training.device, DTYPES[config.training.dtype])


@dataclass
class Begun:
    """A run before its first step."""

    dataset: data.Dataset
    where: torch.device
    net: nn.Module
    criterion: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    warm: int = 0  # steps of the warm-up that were made

    def rows(self, config: Config, planned: float) -> Iterator[Tensor]:
        """Indices of each batch, in the run's own order."""
        return batches(config, len(self.dataset.train), planned, self.where)

    def outputs(self, rows: Tensor) -> Tensor:
        """Of the net on these samples."""
        out: Tensor = self.net(self.dataset.train.x[rows])
        return out

    def loss(self, rows: Tensor) -> Tensor:
        """Of the net on these samples."""
        return self.criterion(self.outputs(rows), self.dataset.train.y[rows])

    def descend(self, config: Config, loss: Tensor) -> None:
        """One step: gradient cleared, backward, clipped; warming up, at (n + 1)/warmup of the rate in step n."""
        o = config.optimizer
        self.optimizer.zero_grad()
        loss.backward()
        if o.clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), o.clip)
        if self.warm < o.warmup:
            self.warm += 1
            for group in self.optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * self.warm / o.warmup
        self.optimizer.step()


def begin(config: Config) -> Begun:
    """Data, net, loss and optimizer of ``config``, which has been checked."""
    dataset, where, dtype = load_data(config), device(config), DTYPES[config.training.dtype]
    net = model.build(config.model, dataset.shape, dataset.classes, config.seed).to(where, dtype)
    by_hand = config.model.backward == "handwritten"
    criterion = RULES["cross_entropy"].apply if by_hand else nn.functional.cross_entropy
    return Begun(dataset, where, net, criterion, OPTIMIZERS[config.optimizer.name](net.parameters(), config))


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Numbers under 1.2e-38 count as 0 inside; as before afterwards.

    A vanishing gradient is made of them, and the processor takes many times as long for each.
    """
    tiny = torch.full((1,), 1e-40)
    before = (tiny * 1.0).item() == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """``count`` threads inside; as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def logits(net: nn.Module, split: data.Split, chunk: int = 1_000) -> Tensor:
    """(N, K) of the net in evaluation, a chunk at a time; it goes on as it was, in training or not."""
    training = net.training
    net.eval()
    try:
        return torch.cat([net(split.x[i : i + chunk]) for i in range(0, len(split), chunk)])
    finally:
        net.train(training)


def accuracy(net: nn.Module, split: data.Split) -> float:
    """Share of ``split`` whose largest logit is at its class; a nan logit is largest, as torch has it."""
    return float((logits(net, split).argmax(1) == split.y).sum()) / len(split)


def confusion(told: Tensor, right: Tensor, classes: int) -> Tensor:
    """(K, K) counts: row what it is, column what it was taken for.

    Example:
        >>> confusion(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2)
        tensor([[1, 1],
                [0, 1]])
    """
    return torch.bincount(right * classes + told, minlength=classes**2).view(classes, classes)


def _show(log: Watch | RunLog, out: Tensor, dataset: data.Dataset, counts: Tensor) -> None:
    """The gradient profile, test pictures with their predictions, and the confusion matrix, in TensorBoard."""
    if len((trace := log.trace).sampled_steps):
        log.image("profile", figure.png({"gradient profile": trace}))
    images = dataset.test.x.mul(dataset.std).add_(dataset.mean).view(-1, *dataset.shape)
    shown, sure, right = (t.cpu().numpy() for t in (images, out.softmax(1), dataset.test.y))
    log.image("test/samples", pictures.samples(shown, sure, right, dataset.names))
    log.image("test/confusion", pictures.confusion(counts.cpu().numpy(), dataset.names))


def train(
    config: Config,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Train what ``config`` describes, watch every layer, judge.

    Stops when the loss is not finite, and keeps and judges what there is; so it does when interrupted, before the
    interrupt is passed on.

    Args:
        config: one run, whole.
        folder: where the run folder is written: trace, event file, findings.json, summary.json, metrics.json,
            model.pt; nothing is written without it.
        progress: called at every sampled step with (step, steps planned, loss, share of the batch that is right,
            log10 of the share of the output's gradient that reaches the first layer).

    Raises:
        UsageError: ``config`` cannot be used.
        TraceError: ``folder`` already holds a run.

    Example:
        >>> from bpdiag.config import ModelConfig, TrainingConfig
        >>> config = Config(model=ModelConfig(activation="sigmoid", depth=8), training=TrainingConfig(steps=20))
        >>> [(f.kind, f.cause) for f in train(config).findings]
        [('vanishing', 'slopes')]
    """
    check(config)
    with flushed_denormals(), threads(config.training.threads):
        return _train(config, Path(folder) if folder is not None else None, progress)


def _train(config: Config, folder: Path | None, progress: Progress | None) -> Result:
    start, work = time.perf_counter(), time.process_time()
    begun = begin(config)
    dataset, net, optimizer = begun.dataset, begun.net, begun.optimizer
    per_epoch = math.ceil(len(dataset.train) / config.data.batch_size)
    planned = planned_steps(config, len(dataset.train))
    metrics: dict[str, Any] = {"stopped": None, "validation_accuracy_at": {}}
    interrupt: KeyboardInterrupt | None = None

    with watch(
        net,
        optimizer,
        every=config.watch.every,
        planned_steps=max(planned, 1),
        log=folder,
        histograms=config.watch.histograms,
    ) as watching:
        watching.note(**facts(config, dataset))
        first_step = time.process_time()
        try:
            for rows in begun.rows(config, planned):
                out, right = begun.outputs(rows), dataset.train.y[rows]
                begun.descend(config, watching.loss(begun.criterion(out, right)))
                step = watching.steps
                if (step - 1) % config.watch.every == 0:
                    if not math.isfinite(watching.last_loss):
                        metrics["stopped"] = f"the loss was not finite at step {step - 1}"
                        break
                    if progress:
                        share = float((out.argmax(1) == right).float().mean())
                        progress(step, planned, watching.last_loss, share, watching.last_decades)
                if step % per_epoch == 0 or step == config.remedy.steps:
                    reached = metrics["validation_accuracy_at"][str(step)] = accuracy(net, dataset.validation)
                    watching.scalars({"accuracy/validation": reached}, step)
        except KeyboardInterrupt as caught:
            interrupt, metrics["stopped"] = caught, "interrupted"
        metrics["steps"], stepped = watching.steps, time.process_time()
        examine(watching, net, config, dataset, metrics)

    result = conclude(watching.trace, net, config, folder, metrics)
    metrics["seconds"] = round(time.perf_counter() - start, 3)
    missing = (planned - metrics["steps"]) / max(metrics["steps"], 1)
    worked = time.process_time() - work + missing * (stepped - first_step)
    metrics["processor_seconds_planned"] = round(worked, 3)  # what the whole run would take, where it stopped
    result.keep(dataset)
    if interrupt is not None:
        raise interrupt
    return result


def facts(config: Config, dataset: data.Dataset) -> dict[str, Any]:
    """What a trace tells of its run besides what was measured: what was asked, what theory expects."""
    told = {"config": dataclasses.asdict(config), "data_mean": dataset.mean, "data_std": dataset.std}
    if config.model.name in prediction.COVERED:
        told["predicted"] = prediction.expect(config, prediction.source(dataset))
    return told


def examine(
    log: Watch | RunLog, net: nn.Module, config: Config, dataset: data.Dataset, metrics: dict[str, Any]
) -> None:
    """What a trained net knows, into ``metrics``, which tell its steps, and onto the dashboard."""
    out = logits(net, dataset.test)
    counts = confusion(out.argmax(1), dataset.test.y, dataset.classes)
    metrics["test_accuracy"] = counts.trace().item() / len(dataset.test)
    shares = (counts.diag().double() / counts.sum(1)).tolist()
    metrics["class_accuracy"] = dict(zip(dataset.names, shares, strict=True))
    metrics["validation_accuracy"] = accuracy(net, dataset.validation)
    log.scalars({"accuracy/test": metrics["test_accuracy"]}, metrics["steps"])
    if log.folder is not None and config.watch.pictures:
        _show(log, out, dataset, counts)


def conclude(trace: Trace, net: nn.Module, config: Config, folder: Path | None, metrics: dict[str, Any]) -> Result:
    """A run that has ended, judged."""
    told = trace.losses[1][-100:]
    metrics["train_loss"] = float(told.mean()) if len(told) else math.nan
    findings = diagnose(trace) if len(trace.sampled_steps) else []
    return Result(config, folder, net.eval(), trace, findings, metrics)


def batches(config: Config, samples: int, planned: float, where: torch.device) -> Iterator[Tensor]:
    """Indices of each batch, every sample once an epoch (the last batch may be short), ``planned`` of them."""
    generator = torch.Generator().manual_seed((config.seed + ORDER) % 2**63)
    given = 0
    for _ in range(config.training.epochs):
        order = torch.randperm(samples, generator=generator).to(where)
        for rows in order.split(config.data.batch_size):
            if given >= planned:
                return
            given += 1
            yield rows


def keep(net: nn.Module, config: Config, dataset: data.Dataset, path: Path) -> None:
    """The weights and what is needed to use them, in one file that ``torch.load`` opens with weights_only=True."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    facts = {"mean": dataset.mean, "std": dataset.std, "shape": dataset.shape, "names": dataset.names}
    torch.save({"config": dataclasses.asdict(config), "data": facts, "state_dict": net.state_dict()}, aside)
    aside.replace(path)


@dataclass
class Kept:
    """A trained classifier, ready to use."""

    model: nn.Module
    config: Config
    mean: float  # of the training pixels in [0, 1]
    std: float
    shape: tuple[int, int, int]  # of a picture: channels, height, width
    names: tuple[str, ...]  # of the classes

    @torch.no_grad()
    def classify(self, picture: str | os.PathLike[str] | Image.Image) -> int:
        """The class of a picture of one digit, a file or a picture of Pillow's.  ``names`` has the class's name.

        A digit is framed as the training digits were (``data.framed``), wherever it stands and whatever the paper; of
        the other data sets a picture is brought to the size and colours of theirs, a grey one with a light border
        inverted.

        Raises:
            UsageError: It is no picture, or an empty one.
        """
        channels, height, width = self.shape
        read = _opened(picture).convert("L" if channels == 1 else "RGB")
        if self.config.data.name in data.FRAMED:
            try:
                pixels = data.framed(np.asarray(read) / 255)[None]
            except UsageError as error:
                raise UsageError(f"{picture}: {error}") from error
        else:
            read = read.resize((width, height), Image.Resampling.LANCZOS)
            pixels = (np.asarray(read) / 255).reshape(height, width, channels).transpose(2, 0, 1)
            border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
            pixels = 1 - pixels if channels == 1 and border.mean() > 0.5 else pixels
        weight = next(self.model.parameters())
        x = torch.from_numpy((pixels - self.mean) / self.std).reshape(1, -1).to(weight)
        return int(self.model(x).argmax())


def _opened(picture: str | os.PathLike[str] | Image.Image) -> Image.Image:
    """The picture without transparency: drawn on white or black paper, whichever its ink is further from."""
    try:
        read = picture if isinstance(picture, Image.Image) else Image.open(picture)
        read.load()
    except (OSError, AttributeError, UnidentifiedImageError) as error:
        raise UsageError(f"{picture}: not a picture that can be read: {error}") from error
    if not read.has_transparency_data:
        return read
    read = read.convert("RGBA")
    opaque = np.asarray(read)[..., 3:] > 127
    ink = np.asarray(read)[..., :3][opaque[..., 0]]
    paper = Image.new("RGBA", read.size, "white" if not ink.size or ink.mean() < 128 else "black")
    return Image.alpha_composite(paper, read)


def restored(told: dict[str, Any]) -> Config:
    """The configuration that ``dataclasses.asdict`` wrote; keys it lacks, of an older version's, have their defaults.

    Raises:
        KeyError, TypeError: It has keys that are not known.

    Example:
        >>> restored({"seed": 3, "model": {"depth": 2}}).model.depth
        2
    """
    parts = {f.name: str(f.type) for f in dataclasses.fields(Config)}
    settings: dict[str, Any] = {k: PARTS[parts[k]](**v) if isinstance(v, dict) else v for k, v in told.items()}
    return Config(**settings)


def load(run: str | os.PathLike[str]) -> Kept:
    """The classifier a run kept, and its configuration.

    Raises:
        UsageError: The folder holds none, or it cannot be read.
    """
    path = Path(run) / "model.pt"
    if not says_yes(Path(run).is_dir):
        raise UsageError(f"{run}: no such folder")
    if not path.is_file():
        raise UsageError(f"{run}: no model.pt here; a finished run folder holds one")
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        config, facts = restored(kept["config"]), kept["data"]
        net = model.build(config.model, facts["shape"], len(facts["names"]), config.seed)
        net.to(DTYPES[config.training.dtype]).load_state_dict(kept["state_dict"])
    except (RuntimeError, OSError, KeyError, TypeError, pickle.UnpicklingError, EOFError) as error:
        raise UsageError(f"{path}: damaged, or of another version: {str(error).splitlines()[0]}") from error
    return Kept(net.eval(), config, facts["mean"], facts["std"], facts["shape"], facts["names"])
