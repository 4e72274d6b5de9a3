"""MNIST and its relatives as two tensors a split, on the device, sliced by index.

The digits are embedded in the package (``bpdiag/mnist``, xz, verified by sha256), so that a run needs no network; the
relatives come through torchvision, which downloads them once.  Nothing that fits in memory goes through a DataLoader:
it would cost more than the training step it feeds.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import lzma
import os
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bpdiag.config import DataConfig, UsageError, choose, says_yes

VALIDATION = 5_000  # of MNIST's 60,000 training digits; of a smaller set at most a tenth

# file: (sha256 of the uncompressed content, shape)
MNIST: dict[str, tuple[str, tuple[int, ...]]] = {
    "train-images-idx3-ubyte": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        (60_000, 28, 28),
    ),
    "train-labels-idx1-ubyte": ("65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5", (60_000,)),
    "t10k-images-idx3-ubyte": (
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        (10_000, 28, 28),
    ),
    "t10k-labels-idx1-ubyte": ("ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2", (10_000,)),
}
FAINTEST = 0.05  # of the way from black to white: less is no ink
MIDDLE = 14  # of the places 0 to 27: the published digits have their center of mass there, within half a place
PAPER = 0.25  # of the darkest ink: less is paper, its grain and the shade over it
WAY_OUT = "leave data.root out to use the embedded MNIST"


@dataclass(frozen=True)
class Relative:
    """A data set that torchvision reads and can download."""

    dataset: str  # its class in torchvision.datasets
    files: str  # what it reads below its folder
    classes: tuple[str, ...]
    upright: Callable[[np.ndarray], np.ndarray] = lambda images: images  # -> (N, H, W) or (N, C, H, W)
    options: tuple[tuple[str, str], ...] = ()


DIGITS = tuple("0123456789")
IDX = "raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"
RELATIVES = {
    "fashion_mnist": Relative(
        "FashionMNIST",
        f"FashionMNIST/{IDX}",
        ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"),
    ),
    "kmnist": Relative("KMNIST", f"KMNIST/{IDX}", ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")),
    "emnist-digits": Relative(
        "EMNIST",
        "EMNIST/raw/emnist-digits-{train,test}-{images-idx3,labels-idx1}-ubyte",
        DIGITS,
        lambda images: images.transpose(0, 2, 1),  # the files hold every picture mirrored at its diagonal
        (("split", "digits"),),
    ),
    "cifar10": Relative(
        "CIFAR10",
        "cifar-10-batches-py",
        ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        lambda images: images.transpose(0, 3, 1, 2),
    ),
}
DATASETS = ("mnist", *RELATIVES)
FRAMED = ("mnist", "emnist-digits")  # their pictures were framed by the ink: see framed()


@dataclass(frozen=True)
class Split:
    """Pictures x (N, C H W), standardized, and their classes y (N,), int64, on one device."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Dataset:
    """The three splits, and the training statistics that standardized them: x = (pixel - mean) / std."""

    train: Split
    validation: Split
    test: Split
    mean: float  # of the training pixels in [0, 1]
    std: float
    shape: tuple[int, int, int]  # of a picture: channels, height, width
    names: tuple[str, ...]  # of the classes

    @property
    def classes(self) -> int:
        """How many."""
        return len(self.names)


def load(config: DataConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Dataset:
    """The data set that ``config`` names: 55,000 / 5,000 / 10,000 digits for MNIST.

    Which training pictures are held out is fixed by ``config.split_seed`` alone.  Read, verified and standardized once
    a process for equal arguments.

    Raises:
        UsageError: The name is unknown, or ``config.root`` lacks a file or holds a damaged one.
    """
    choose("data.name", config.name, DATASETS)
    return _load(config.name, config.root, config.split_seed, str(device), dtype)


@functools.lru_cache(maxsize=2)
def _load(name: str, root: str, split_seed: int, device: str, dtype: torch.dtype) -> Dataset:
    images, labels, test_images, test_labels = _arrays(root) if name == "mnist" else _relative(name, root)
    order = np.random.default_rng(split_seed).permutation(len(images))
    size = min(VALIDATION, len(images) // 10)
    held_out, kept = np.sort(order[:size]), np.sort(order[size:])
    # exact in float64 from a count of the 256 grey values
    count = np.bincount(images[kept].reshape(-1), minlength=256)
    grey = np.arange(256) / 255
    mean = float(count @ grey / count.sum())
    std = float(np.sqrt(count @ (grey - mean) ** 2 / count.sum()))

    def split(x: np.ndarray, y: np.ndarray) -> Split:
        pixels = torch.tensor(x.reshape(len(x), -1)).to(device=device, dtype=dtype)
        return Split(pixels.div_(255).sub_(mean).div_(std), torch.from_numpy(y.astype(np.int64)).to(device))

    return Dataset(
        train=split(images[kept], labels[kept]),
        validation=split(images[held_out], labels[held_out]),
        test=split(test_images, test_labels),
        mean=mean,
        std=std,
        shape=(1, *images.shape[1:]) if images.ndim == 3 else images.shape[1:],
        names=RELATIVES[name].classes if name in RELATIVES else DIGITS,
    )


def framed(grey: np.ndarray) -> np.ndarray:
    """A picture of one digit as NIST's were framed: ink white on black, in a box of 20 pixels, centered.

    The paper is what the border shows; ink is what differs from it, stretched to 1.  Size, place, margin and shade of
    the picture do not matter then.

    Args:
        grey: (H, W) in [0, 1].

    Returns:
        (28, 28) in [0, 1].

    Raises:
        UsageError: It shows one shade: nothing is drawn.

    Source:
        LeCun et al. 1998, section III.A.

    Example:
        >>> paper = np.ones((50, 90))
        >>> paper[10:30, 60:64] = 0.4  # a grey stroke, high up on the right
        >>> stroke = framed(paper)
        >>> np.argwhere(stroke == stroke.max())[[0, -1]].tolist()
        [[4, 12], [23, 15]]
    """
    from PIL import Image

    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    ink = np.abs(grey - np.median(border))
    if ink.max() < FAINTEST:
        raise UsageError("nothing is drawn in it: it shows one shade")
    ink = ink / ink.max()
    rows, columns = (np.flatnonzero((ink > PAPER).any(axis)) for axis in (1, 0))
    box = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = (max(1, round(n * 20 / max(box.shape))) for n in box.shape)
    small = Image.fromarray(np.rint(box * 255).astype(np.uint8)).resize((width, height), Image.Resampling.LANCZOS)
    digit = np.asarray(small) / 255
    down, right = (float((np.indices(digit.shape)[k] * digit).sum() / digit.sum()) for k in (0, 1))
    top, left = (min(max(round(MIDDLE - center), 0), 28 - n) for center, n in ((down, height), (right, width)))
    out = np.zeros((28, 28))
    out[top : top + height, left : left + width] = digit
    return out


# ---- through torchvision ----------------------------------------------------------------------------------


def downloads() -> Path:
    """Where data sets are kept that were downloaded: one copy for all projects."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bpdiag"


@functools.lru_cache(maxsize=2)
def _relative(name: str, root: str) -> tuple[np.ndarray, ...]:
    """Images and labels of training and test, uint8, read by torchvision; downloaded where they are missing."""
    from torchvision import datasets

    relative = RELATIVES[name]
    folder = downloads() if root == "embedded" else Path(root).expanduser()
    if root != "embedded" and not says_yes(folder.is_dir):
        raise UsageError(f"data.root={root}: no such folder; leave it out to keep {name} in {downloads()}")
    wanted = folder / relative.files

    def read(**more: bool) -> list[Any]:
        dataset = getattr(datasets, relative.dataset)
        with contextlib.redirect_stdout(sys.stderr):  # what torchvision prints is no result
            return [dataset(folder, train=train, **dict(relative.options), **more) for train in (True, False)]

    try:
        parts = read()
    except Exception as error:  # each reader has its own
        if "not found" not in str(error):
            raise UsageError(
                f"data.name={name}: {wanted} cannot be read ({_reason(error)}); put sound files there"
            ) from error
        try:
            parts = read(download=True)
        except Exception as refusal:  # no network, a full disk
            raise UsageError(
                f"data.name={name}: no {wanted}, and no download ({_reason(refusal)}); put the files there, "
                "or name the folder that has them with data.root"
            ) from refusal
    return tuple(
        array for part in parts for array in (relative.upright(np.asarray(part.data)), np.asarray(part.targets))
    )


def _reason(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2] or type(error).__name__


# ---- MNIST, ours ------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _arrays(root: str) -> tuple[np.ndarray, ...]:
    """Images and labels of training and test, uint8, verified."""
    return tuple(read_idx(_content(root, name), name, digest, shape) for name, (digest, shape) in MNIST.items())


def _content(root: str, name: str) -> tuple[bytes, Path]:
    """The uncompressed file and where it came from."""
    if root == "embedded":
        path = Path(__file__).parent / "mnist" / f"{name}.xz"
        try:
            return lzma.decompress(path.read_bytes()), path
        except (OSError, lzma.LZMAError) as error:
            raise UsageError(f"cannot read the embedded {path}: {error}; install bpdiag anew") from error
    folder = Path(root).expanduser()
    if not says_yes(folder.is_dir):
        raise UsageError(f"data.root={root}: no such folder; give a torchvision data folder, or {WAY_OUT}")
    places = [folder / "MNIST" / "raw", folder / "raw", folder]
    for path in (place / f"{name}{ending}" for place in places for ending in ("", ".gz")):
        if path.is_file():
            try:
                return (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()), path
            except (OSError, EOFError, zlib.error) as error:  # an unreadable or damaged file
                raise UsageError(f"data.root={root}: cannot read {path}: {error}; {WAY_OUT}") from error
    looked = ", ".join(map(str, places))
    raise UsageError(f"data.root={root}: no {name} (or .gz) in {looked}; {WAY_OUT}")


def read_idx(source: tuple[bytes, Path], name: str, digest: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array of an IDX file of unsigned bytes, read-only, whose content has this sha256 and shape.

    Raises:
        UsageError: The content differs, with its path, its size and both digests.
    """
    content, path = source
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise UsageError(
            f"{path} is damaged or not MNIST: {len(content)} bytes with sha256 {found[:16]}..., "
            f"expected {4 + 4 * len(shape) + int(np.prod(shape))} bytes with {digest[:16]}...; {WAY_OUT}"
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
