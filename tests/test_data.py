import gzip
import hashlib
import lzma
import pickle
from collections import Counter
from importlib.resources import files

import numpy as np
import pytest
import torch

from bpdiag import data
from bpdiag.config import DataConfig, UsageError

torch.set_num_threads(1)

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
NAMES = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)
# published: how often each digit occurs
TRAIN_COUNTS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
TEST_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.fixture(scope="module")
def raw():
    """The four files' content, read without the code under test."""
    folder = files("bpdiag") / "mnist"
    return {name: lzma.decompress((folder / f"{name}.xz").read_bytes()) for name in NAMES}


@pytest.fixture(scope="module")
def embedded():
    return data.load(DataConfig())


@pytest.fixture(scope="module")
def torchvision_folder(raw, tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write(root / "MNIST" / "raw", raw)
    return root


@pytest.fixture(scope="module")
def found(embedded):
    """Split -> one hash a digit, of what was loaded."""
    return {name: digests(pixels(embedded, split), split.y.tolist()) for name, split in splits(embedded).items()}


@pytest.fixture
def linked(tmp_path, torchvision_folder):
    """A folder as torchvision's, whose files may be replaced."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / name).symlink_to(torchvision_folder / "MNIST" / "raw" / name)
    return folder


def write(folder, raw, gz=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in raw.items():
        if gz:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content, compresslevel=1))
        else:
            (folder / name).write_bytes(content)


def splits(dataset):
    return {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}


def pixels(dataset, split):
    """The grey values that were standardized, uint8."""
    return split.x.mul(dataset.std).add_(dataset.mean).mul_(255).round_().to(torch.uint8).numpy()


def digests(images, labels):
    """One hash a digit, its class included."""
    return [hashlib.md5(x.tobytes() + bytes([y])).digest() for x, y in zip(images, labels, strict=True)]


def original(raw, images, labels):
    return digests(np.frombuffer(raw[images], np.uint8, offset=16).reshape(-1, 784), raw[labels][8:])


def assert_same(one, other):
    assert (one.mean, one.std, one.classes) == (other.mean, other.std, other.classes)
    for name, split in splits(one).items():
        assert torch.equal(split.x, splits(other)[name].x), name
        assert torch.equal(split.y, splits(other)[name].y), name


def refusal(root, name="mnist"):
    with pytest.raises(UsageError) as refused:
        data.load(DataConfig(name=name, root=str(root)))
    return str(refused.value)


def test_sizes_shapes_and_types(embedded):
    assert {name: len(split) for name, split in splits(embedded).items()} == {
        "train": 55_000,
        "validation": 5_000,
        "test": 10_000,
    }
    for split in splits(embedded).values():
        assert split.x.shape == (len(split), 784)
        assert split.y.shape == (len(split),)
        assert (split.x.dtype, split.y.dtype) == (torch.float32, torch.int64)
    assert embedded.classes == 10


def test_label_counts_are_the_published_ones(embedded):
    whole = torch.cat([embedded.train.y, embedded.validation.y])
    assert whole.bincount(minlength=10).tolist() == TRAIN_COUNTS
    assert embedded.test.y.bincount(minlength=10).tolist() == TEST_COUNTS


def test_standardized_by_the_training_statistics(embedded, raw):
    x = embedded.train.x.numpy()
    assert x.mean(dtype=np.float64) == pytest.approx(0, abs=1e-4)
    assert np.square(x).mean(dtype=np.float64) == pytest.approx(1, abs=1e-4)
    grey = pixels(embedded, embedded.train)
    mean = grey.mean(dtype=np.float64)
    assert embedded.mean == pytest.approx(mean / 255, abs=1e-12)
    assert embedded.std == pytest.approx(np.sqrt(np.square(grey - mean).mean()) / 255, abs=1e-12)
    # the test digits by the same two numbers, not by their own
    grey = np.frombuffer(raw[TEST_IMAGES], np.uint8, offset=16).reshape(-1, 784) / 255
    x = embedded.test.x.numpy()
    np.testing.assert_allclose(x, (grey - embedded.mean) / embedded.std, rtol=0, atol=1e-6)
    assert abs(x.mean(dtype=np.float64)) > 1e-3


def test_the_splits_are_the_original_digits_each_once(found, raw):
    whole = original(raw, TRAIN_IMAGES, TRAIN_LABELS)
    assert len(set(whole)) == 60_000  # no digit occurs twice, so a hash is an index
    assert Counter(found["train"] + found["validation"]) == Counter(whole)
    assert not set(found["train"]) & set(found["validation"])
    assert found["test"] == original(raw, TEST_IMAGES, TEST_LABELS)


def test_the_split_is_fixed_by_its_seed_alone(embedded, found):
    torch.manual_seed(1)
    np.random.seed(1)
    again = data.load(DataConfig(batch_size=7), dtype=torch.float64)  # another dtype: not the cached one
    assert again.train.x.dtype == torch.float64
    assert torch.equal(again.train.y, embedded.train.y)
    torch.testing.assert_close(again.validation.x.float(), embedded.validation.x, rtol=0, atol=1e-6)
    other = data.load(DataConfig(split_seed=1))
    held_out = digests(pixels(other, other.validation), other.validation.y.tolist())
    common = set(held_out) & set(found["validation"])
    assert 300 < len(common) < 540  # 417 expected of an independent draw, standard deviation 19


@pytest.mark.parametrize(("place", "gz"), [("MNIST/raw", False), ("MNIST/raw", True), ("raw", False), (".", False)])
def test_reads_a_torchvision_folder(embedded, raw, tmp_path, place, gz):
    write(tmp_path / place, raw, gz)
    assert_same(data.load(DataConfig(root=str(tmp_path))), embedded)


def test_a_plain_file_is_preferred_to_a_packed_one(linked, tmp_path, embedded):
    for name in NAMES:
        (linked / f"{name}.gz").write_bytes(b"not gzip")
    assert_same(data.load(DataConfig(root=str(tmp_path))), embedded)


def test_home_is_expanded(embedded, torchvision_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(torchvision_folder.parent))
    assert_same(data.load(DataConfig(root=f"~/{torchvision_folder.name}")), embedded)


def test_torchvision_reads_the_same_pixels_in_the_same_folder(found, torchvision_folder):
    datasets = pytest.importorskip("torchvision.datasets")
    train, test = (datasets.MNIST(torchvision_folder, train=t, download=False) for t in (True, False))
    assert digests(test.data.numpy(), test.targets.tolist()) == found["test"]
    assert sorted(digests(train.data.numpy(), train.targets.tolist())) == sorted(found["train"] + found["validation"])


def test_an_unknown_name_is_refused():
    with pytest.raises(UsageError, match=r"^data\.name=minst: unknown; known: mnist, .*; did you mean 'mnist'\?$"):
        data.load(DataConfig(name="minst"))


def test_a_missing_folder_is_refused(tmp_path):
    message = refusal(tmp_path / "nowhere")
    assert f"data.root={tmp_path / 'nowhere'}: no such folder" in message
    assert "embedded" in message


def test_a_file_for_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert f"data.root={tmp_path / 'file'}: no such folder" in refusal(tmp_path / "file")


@pytest.mark.parametrize("missing", NAMES)
def test_a_missing_file_is_refused_with_where_it_was_sought(linked, tmp_path, missing):
    (linked / missing).unlink()
    message = refusal(tmp_path)
    assert missing in message
    assert str(linked) in message
    assert ".gz" in message


def damaged(content, how):
    """A packed file with one fault; each makes gzip fail in its own way."""
    packed = bytearray(gzip.compress(content, mtime=0))
    if how == "truncated":
        return bytes(packed[: len(packed) // 2])
    if how == "cut in the header":
        return bytes(packed[:5])
    if how == "not gzip":
        return b"<html>404</html>"
    if how == "empty":
        return b""
    if how == "flipped checksum":
        packed[-8] ^= 0xFF
    if how == "overwritten stream":
        packed[10:40] = b"\xff" * 30
    if how == "other content":
        return gzip.compress(content[:-1] + bytes([content[-1] ^ 1]))
    return bytes(packed)


GZ_FAULTS = [
    "truncated",
    "cut in the header",
    "not gzip",
    "empty",
    "flipped checksum",
    "overwritten stream",
    "other content",
]


@pytest.mark.parametrize("fault", GZ_FAULTS)
def test_a_damaged_packed_file_is_refused_with_its_path(linked, tmp_path, raw, fault):
    path = linked / f"{TRAIN_LABELS}.gz"
    (linked / TRAIN_LABELS).unlink()
    path.write_bytes(damaged(raw[TRAIN_LABELS], fault))
    assert str(path) in refusal(tmp_path)


@pytest.mark.parametrize("fault", ["truncated", "flipped", "longer", "empty", "of the test set"])
def test_a_damaged_plain_file_is_refused_with_its_path(linked, tmp_path, raw, fault):
    content = raw[TRAIN_LABELS]
    faulty = {
        "truncated": content[:-1],
        "flipped": content[:-1] + bytes([content[-1] ^ 1]),
        "longer": content + b"\0",
        "empty": b"",
        "of the test set": raw[TEST_LABELS],
    }[fault]
    path = linked / TRAIN_LABELS
    path.unlink()
    path.write_bytes(faulty)
    message = refusal(tmp_path)
    assert str(path) in message
    assert f"{len(faulty)} bytes" in message
    assert "expected 60008 bytes" in message


@pytest.mark.parametrize("fault", ["missing", "damaged", "unreadable"])
def test_every_refusal_of_a_file_says_what_to_do(linked, tmp_path, fault):
    path = linked / TRAIN_LABELS
    path.unlink()
    if fault == "damaged":
        path.write_bytes(b"")
    if fault == "unreadable":
        path.with_name(f"{path.name}.gz").write_bytes(b"not gzip")
    message = refusal(tmp_path)
    assert str(tmp_path) in message
    assert "embedded" in message  # the way out that always works


def test_a_repaired_folder_is_read_again(linked, tmp_path, raw, embedded):
    path = linked / TEST_LABELS
    path.unlink()
    assert TEST_LABELS in refusal(tmp_path)
    path.write_bytes(raw[TEST_LABELS])
    assert_same(data.load(DataConfig(root=str(tmp_path))), embedded)


@pytest.mark.parametrize(
    "content",
    [lzma.compress(b"other"), lzma.compress(b"cut" * 99)[:-20], b"not xz"],
    ids=["other content", "truncated", "not xz"],
)
def test_a_damaged_embedded_file_is_refused_with_its_path(tmp_path, monkeypatch, content):
    path = tmp_path / "mnist" / f"{TRAIN_IMAGES}.xz"
    path.parent.mkdir()
    path.write_bytes(content)
    monkeypatch.setattr(data, "__file__", str(tmp_path / "data.py"))
    data._arrays.cache_clear()
    with pytest.raises(UsageError) as refused:
        data.load(DataConfig(split_seed=12345))
    assert str(path) in str(refused.value)


def test_the_embedded_files_come_with_their_licence():
    licence = (files("bpdiag") / "mnist" / "LICENSE").read_text(encoding="utf-8")
    assert "CC BY-SA 3.0" in licence
    assert "LeCun" in licence


# ---- through torchvision: small folders laid out as it lays them out ----

SIZES = {"train": 60, "test": 20}


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def pictures(part, shape, seed):
    one = np.random.default_rng([seed, SIZES[part]])
    return one.integers(256, size=(SIZES[part], *shape), dtype=np.uint8), np.arange(SIZES[part], dtype=np.uint8) % 10


def lay_out(root, name, monkeypatch):
    """A folder of ``name`` with made-up pictures; returns part -> (pictures upright (N, C, H, W), classes)."""
    if name == "cifar10":
        return lay_out_cifar(root, monkeypatch)
    folder = {"fashion_mnist": "FashionMNIST", "kmnist": "KMNIST", "emnist-digits": "EMNIST"}[name]
    (root / folder / "raw").mkdir(parents=True)
    told = {}
    for part in SIZES:
        x, y = pictures(part, (28, 28), seed=3)
        told[part] = x[:, None], y
        stem = f"emnist-digits-{part}" if folder == "EMNIST" else {"train": "train", "test": "t10k"}[part]
        held = x.transpose(0, 2, 1).copy() if folder == "EMNIST" else x  # EMNIST's files hold them mirrored
        (root / folder / "raw" / f"{stem}-images-idx3-ubyte").write_bytes(idx(held))
        (root / folder / "raw" / f"{stem}-labels-idx1-ubyte").write_bytes(idx(y))
    return told


def lay_out_cifar(root, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def packed(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return file, hashlib.md5((folder / file).read_bytes()).hexdigest()

    told = {part: pictures(part, (3, 32, 32), seed=5) for part in SIZES}
    for part, (x, y) in told.items():
        files = [packed(f"{part}_batch", {"data": x.reshape(len(x), -1), "labels": y.tolist()})]
        monkeypatch.setattr(CIFAR10, f"{part}_list", files)
    file, digest = packed("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": file, "key": "label_names", "md5": digest})
    return told


@pytest.mark.parametrize("name", sorted(data.RELATIVES))
def test_a_relative_is_read_from_torchvisions_folder(name, tmp_path, monkeypatch):
    told = lay_out(tmp_path, name, monkeypatch)
    read = data.load(DataConfig(name=name, root=str(tmp_path)))
    assert read.shape == told["train"][0].shape[1:]
    assert (len(read.train), len(read.validation), len(read.test)) == (54, 6, 20)
    x, y = told["test"]
    assert np.array_equal(pixels(read, read.test), x.reshape(len(x), -1))  # upright, channels first
    assert read.test.y.tolist() == y.tolist()
    assert (read.classes, len(set(read.names))) == (10, 10)
    assert read.train.x.mean().item() == pytest.approx(0, abs=1e-5)


def test_a_download_is_kept_where_all_projects_find_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lay_out(tmp_path / "bpdiag", "kmnist", monkeypatch)
    assert data.load(DataConfig(name="kmnist")).shape == (1, 28, 28)


@pytest.mark.parametrize("name", sorted(data.RELATIVES))
def test_offline_one_line_names_the_folder_and_what_belongs_there(name, tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError("no network in a test")

    for module in ("mnist", "cifar"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", refuse)
    message = refusal(tmp_path, name)
    where = {"cifar10": "cifar-10-batches-py", "emnist-digits": "EMNIST/raw/emnist-digits-"}
    start = where.get(name, f"{ {'kmnist': 'KMNIST'}.get(name, 'FashionMNIST') }/raw/")
    assert message.startswith(f"data.name={name}: no {tmp_path}/{start}")
    assert "no download (no network in a test)" in message
    assert "\n" not in message
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "")


def test_a_folder_that_is_not_there_is_not_made(tmp_path):
    assert f"data.root={tmp_path / 'typo'}: no such folder" in refusal(tmp_path / "typo", "kmnist")
    assert not (tmp_path / "typo").exists()


def test_a_damaged_relative_is_refused(tmp_path, monkeypatch):
    lay_out(tmp_path, "kmnist", monkeypatch)
    path = tmp_path / "KMNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:100])
    message = refusal(tmp_path, "kmnist")
    assert f"data.name=kmnist: {tmp_path}/KMNIST/raw/" in message
    assert "cannot be read" in message
    assert "download" not in message  # none was tried


# ---- framing ----


def canvas(digit, height, width, top, left):
    """A digit of the data set on a larger black sheet."""
    sheet = np.zeros((height, width))
    sheet[top : top + 28, left : left + 28] = digit
    return sheet


def cropped(digit):
    rows, columns = (np.flatnonzero((digit > 0.1).any(axis)) for axis in (1, 0))
    return digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def photographed(digit):
    """Ink on grey paper, with the grain of a sensor."""
    return np.clip(
        0.7 - 0.5 * canvas(digit, 60, 60, 10, 20) + np.random.default_rng(0).normal(0, 0.015, (60, 60)), 0, 1
    )


FORMS = {
    "as it is": lambda digit: digit,
    "ink on paper": lambda digit: 1 - digit,
    "twice as large": lambda digit: digit.repeat(2, 0).repeat(2, 1),
    "wide margin": lambda digit: canvas(digit, 84, 84, 28, 28),
    "no margin": cropped,
    "wide sheet": lambda digit: canvas(digit, 28, 60, 0, 16),
    "in a corner": lambda digit: canvas(digit, 60, 60, 0, 0),
    "grey paper": lambda digit: 0.67 - 0.5 * digit,
    "photographed": photographed,
}


@pytest.fixture(scope="module")
def digits():
    """Test digits as they were published: framed by NIST's procedure."""
    mnist = data.load(DataConfig())
    return (mnist.test.x[:40] * mnist.std + mnist.mean).view(-1, 28, 28).numpy()


def away(form, digits, move=0):
    """Mean distance of the framed forms from the digits as they were published."""
    return float(np.mean([np.abs(np.roll(data.framed(form(digit)), move, 0) - digit).mean() for digit in digits]))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_framing_gives_back_the_published_digit_whatever_was_made_of_it(form, digits):
    """Oracle: NIST's own framing.  A blank picture is .12 away."""
    assert away(form, digits) < 0.02


def test_a_published_digit_is_framed_already_but_for_its_faintest_rim(digits):
    assert all(np.abs(data.framed(digit) - digit).max() < data.PAPER for digit in digits)
    assert sum(np.allclose(data.framed(digit), digit, atol=1e-6) for digit in digits) >= 20


def test_a_digit_framed_a_place_off_would_be_seen(digits):
    assert away(FORMS["as it is"], digits, move=1) > 0.05


@pytest.mark.parametrize("shade", [0.0, 0.4, 1.0])
def test_an_empty_sheet_is_no_digit(shade):
    with pytest.raises(UsageError, match="nothing is drawn"):
        data.framed(np.full((30, 40), shade))
