"""Pictures, read back: what stands where, and in which colour."""

import io

import numpy as np
import pytest
from PIL import Image, ImageColor

from bpdiag.dashboard import pictures
from bpdiag.training import confusion

NAMES = [f"class {i}" for i in range(10)]


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def share_of(picture, colour, within=40):
    """The share of pixels near a colour."""
    return (np.abs(picture - np.array(ImageColor.getrgb(colour))).sum(-1) < within).mean()


def test_all_right_is_blue_and_all_wrong_is_orange():
    right, wrong = (pixels(pictures.confusion(np.roll(np.eye(10, dtype=int) * 50, n, axis=1), NAMES)) for n in (0, 1))
    assert share_of(right, pictures.RIGHT) > 0.04 > 0.001 > share_of(right, pictures.WRONG)
    assert share_of(wrong, pictures.WRONG) > 0.04 > 0.001 > share_of(wrong, pictures.RIGHT)


def test_a_class_that_does_not_occur_is_no_error():
    counts = np.eye(10, dtype=int)
    counts[3] = 0
    assert share_of(pixels(pictures.confusion(counts, NAMES)), pictures.WRONG) < 0.001


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("samples", [0, 5, 100])
def test_digits_are_shown_whatever_their_number(channels, samples):
    generator = np.random.default_rng(0)
    images = np.round(generator.random((samples, channels, 12, 10)))
    probabilities = generator.random((samples, 10))
    classes = probabilities.argmax(1)
    right = pixels(pictures.samples(images, probabilities, classes, NAMES))
    wrong = pixels(pictures.samples(images, probabilities, (classes + 1) % 10, NAMES))
    assert right.shape == wrong.shape
    if samples:
        assert share_of(right, pictures.RIGHT) > 10 * share_of(right, pictures.WRONG)
        assert share_of(wrong, pictures.WRONG) > 10 * share_of(wrong, pictures.RIGHT)


def test_a_net_that_went_nan_is_shown():
    assert pixels(pictures.samples(np.ones((3, 1, 8, 8)), np.full((3, 10), np.nan), np.array([0, 1, 2]), NAMES)).any()


def test_confusion_counts_pairs():
    import torch

    told, right = (torch.randint(4, (200,), generator=torch.Generator().manual_seed(i)) for i in range(2))
    counts = np.zeros((4, 4), int)
    for t, r in zip(told.tolist(), right.tolist(), strict=True):
        counts[r, t] += 1
    assert confusion(told, right, 4).tolist() == counts.tolist()
