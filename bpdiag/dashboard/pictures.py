"""What a classifier does, as pictures: digits with their predictions, the confusion matrix.  numpy in, PNG out."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, PAGE, FAINT = "#1d1f23", "#fbfaf7", "#656b73"
RIGHT, WRONG = "#1a5f9e", "#a84a08"  # blue and orange: they differ for every eye
ROWS, COLUMNS = 6, 6  # few: TensorBoard shows a picture at half its size until it is clicked


def samples(images: np.ndarray, probabilities: np.ndarray, classes: np.ndarray, names: Sequence[str]) -> bytes:
    """Half the first pictures as they come, half those it got most surely wrong, each with what it was taken for.

    Args:
        images: (N, C, H, W) in [0, 1], C 1 or 3.
        probabilities: (N, K); a row may be nan.
        classes: (N,) the right ones.
        names: of the K classes.
    """
    told = probabilities.argmax(1)  # a nan is the largest, as for torch
    surest = probabilities[np.arange(len(told)), told]
    wrong = np.flatnonzero(told != classes)
    half = ROWS // 2
    worst = wrong[np.argsort(-surest[wrong], kind="stable")][: half * COLUMNS]
    height, width = images.shape[2:]
    cell_h, cell_w = height * 1.35, width * 1.15
    figure = _figure(COLUMNS * 1.0, ROWS * 1.2 + 0.5)
    axis = figure.add_axes((0, 0, 1, 1))  # one for all pictures: one for each would take seconds
    axis.axis("off")
    small = 9 if max(map(len, names)) < 3 else 6.5
    parts: list[tuple[str, Sequence[int], float]] = [
        ("the first of the test set", range(min(len(told), half * COLUMNS)), 0.0),
        ("surest errors: is → taken for" if len(worst) else "no error", worst.tolist(), half + 0.5),
    ]
    for title, chosen, row in parts:
        axis.text(0, (row - 0.32) * cell_h, title, color=FAINT, fontsize=10)
        for place, i in enumerate(chosen):
            top, left = (row + place // COLUMNS) * cell_h, place % COLUMNS * cell_w
            picture = images[i].transpose(1, 2, 0).squeeze()
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=(left, left + width, top + height, top))
            right = told[i] == classes[i]
            said = names[told[i]] if right else f"{names[classes[i]]} → {names[told[i]]}"
            sure = f"{surest[i]:.0%}" if np.isfinite(surest[i]) else "nan"
            axis.text(
                left + width / 2, top - 0.06 * height, f"{said}  {sure}", ha="center", fontsize=small,
                color=RIGHT if right else WRONG,
            )  # fmt: skip
    axis.set(xlim=(-0.15 * width, COLUMNS * cell_w), ylim=((ROWS + 0.55) * cell_h, -0.6 * cell_h))
    return _png(figure)


def confusion(matrix: np.ndarray, names: Sequence[str]) -> bytes:
    """Rows what it is, columns what it was taken for, on the right the share of each class that was right.

    Args:
        matrix: (K, K) counts.
        names: of the K classes.
    """
    total = matrix.sum(1)
    share = matrix / np.maximum(total, 1)[:, None]
    figure = _figure(0.5 * len(names) + 1.6, 0.4 * len(names) + 1.0)
    axis = figure.add_axes((0.13, 0.03, 0.74, 0.82))
    axis.imshow(_shades(share), aspect="auto")
    for (i, j), count in np.ndenumerate(matrix):
        dark = share[i, j] > 0.55
        axis.text(
            j, i, f"{count:d}" if count else "·", ha="center", va="center", fontsize=9,
            color=PAGE if dark else INK if count else FAINT,
        )  # fmt: skip
    for i, right in enumerate(np.diag(share)):
        axis.text(len(names) - 0.35, i, f"{right:.1%}" if total[i] else "–", va="center", fontsize=9, color=INK)
    digits = max(map(len, names)) < 3
    axis.set_xticks(range(len(names)), names, fontsize=9 if digits else 7, rotation=0 if digits else 35)
    axis.set_yticks(range(len(names)), names, fontsize=9 if digits else 7)
    axis.xaxis.tick_top()
    axis.tick_params(length=0, colors=INK)
    axis.spines[:].set_visible(False)
    axis.set_ylabel("is", color=FAINT, fontsize=9)
    axis.set_title("taken for", color=FAINT, fontsize=9)
    axis.text(len(names) - 0.35, -0.75, "right", va="center", color=FAINT, fontsize=9)
    return _png(figure)


def _shades(share: np.ndarray) -> np.ndarray:
    """(K, K, 3): the diagonal towards blue, the rest towards orange; the root makes a rare error visible."""
    from matplotlib.colors import to_rgb

    ends = np.where(np.eye(len(share), dtype=bool)[..., None], to_rgb(RIGHT), to_rgb(WRONG))
    return np.array(to_rgb(PAGE)) + np.sqrt(share)[..., None] * (ends - np.array(to_rgb(PAGE)))


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, facecolor=PAGE)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
