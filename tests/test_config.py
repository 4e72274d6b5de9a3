import dataclasses
import math
import typing

import pytest

from bpdiag.config import RANGES, Config, ModelConfig, UsageError, check_ranges, choose, flat, nearest


def typed(config_class, prefix=""):
    """Dotted key -> declared type: written apart from flat, which reads values."""
    for name, kind in typing.get_type_hints(config_class).items():
        if dataclasses.is_dataclass(kind):
            yield from typed(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


TYPES = {key: kind for key, kind in typed(Config) if key != "expect"}  # an experiment's, no run's
NUMBERS = {key for key, kind in TYPES.items() if kind in (int, float)}


def changed(key, value):
    config = Config()
    *path, name = key.split(".")
    owner = config
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, name, value)
    return config


def beyond(key, end, direction):
    return end + direction if TYPES[key] is int else math.nextafter(end, direction * math.inf)


def test_defaults_are_the_documented_ones():
    documented = {
        "seed": 0,
        "model.name": "mlp",
        "model.depth": 5,
        "model.width": 128,
        "model.activation": "relu",
        "model.weight_variance": "he",
        "model.bias_variance": "preset",
        "data.name": "mnist",
        "data.root": "embedded",
        "data.batch_size": 64,
        "data.split_seed": 0,
        "optimizer.name": "sgd",
        "optimizer.lr": 0.01,
        "optimizer.momentum": 0.9,
        "optimizer.weight_decay": 0.0,
        "optimizer.warmup": 0,
        "optimizer.clip": 0.0,
        "training.epochs": 1,
        "training.device": "cpu",
        "training.dtype": "float32",
        "training.threads": 1,
        "watch.every": 10,
    }
    values = flat(Config())
    assert {key: values[key] for key in documented} == documented


def test_every_default_has_its_declared_type():
    values = flat(Config())
    assert {key: type(value) for key, value in values.items()} == TYPES


def test_two_configs_share_nothing():
    changed("model.depth", 7)
    assert Config().model.depth == 5
    assert Config().model is not Config().model


def test_flat_has_every_key_once_in_order_of_declaration():
    assert list(flat(Config())) == list(TYPES)


@pytest.mark.parametrize("key", TYPES)
def test_flat_reads_the_value_under_its_key(key):
    sentinel = object()
    values = flat(changed(key, sentinel))
    assert [k for k, v in values.items() if v is sentinel] == [key]


def test_flat_takes_a_part_and_a_prefix():
    assert flat(ModelConfig(width=3))["width"] == 3
    assert flat(ModelConfig(width=3), "model.")["model.width"] == 3
    assert list(flat(Config(), "run.")) == [f"run.{key}" for key in TYPES]


def test_ranges_cover_every_number_and_nothing_else():
    assert RANGES.keys() == NUMBERS


def test_zero_is_refused_where_it_means_nothing():
    refused = set()
    for key in RANGES:
        try:
            check_ranges(changed(key, 0))
        except UsageError:
            refused.add(key)
    counts = {"model.depth", "model.width", "data.batch_size", "training.epochs", "training.threads", "watch.every"}
    assert refused == counts


def test_the_defaults_are_in_range():
    check_ranges(Config())


@pytest.mark.parametrize("key", RANGES)
def test_both_ends_are_allowed(key):
    for end in RANGES[key]:
        check_ranges(changed(key, end))


@pytest.mark.parametrize(
    ("key", "direction"), [(key, d) for key in RANGES for d in (-1, 1) if math.isfinite(RANGES[key][d > 0])]
)
def test_just_outside_is_refused(key, direction):
    end = RANGES[key][direction > 0]
    value = beyond(key, end, direction)
    assert value != end
    with pytest.raises(UsageError) as refused:
        check_ranges(changed(key, value))
    assert str(refused.value).startswith(f"{key}={value}: must be ")


@pytest.mark.parametrize("key", RANGES)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_nan_and_minus_infinity_are_refused(key, value):
    with pytest.raises(UsageError) as refused:
        check_ranges(changed(key, value))
    assert str(refused.value).startswith(f"{key}={value}: must be ")


def test_a_refusal_names_the_range():
    with pytest.raises(UsageError, match=r"^optimizer\.momentum=1\.5: must be from 0 to 1$"):
        check_ranges(changed("optimizer.momentum", 1.5))
    with pytest.raises(UsageError, match=r"^data\.batch_size=0: must be 1 or more$"):
        check_ranges(changed("data.batch_size", 0))


def test_a_usage_error_is_a_value_error():
    assert issubclass(UsageError, ValueError)


@pytest.mark.parametrize("value", ["relu", "tanh"])
def test_choose_returns_a_known_name(value):
    assert choose("model.activation", value, ["relu", "tanh"]) == value


def test_choose_reads_a_table_or_an_iterator():
    assert choose("k", "b", {"a": 1, "b": 2}) == "b"
    assert choose("k", "b", iter("ab")) == "b"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("thanh", "k=thanh: unknown; known: relu, tanh; did you mean 'tanh'?"),
        ("RELU", "k=RELU: unknown; known: relu, tanh"),
        ("", "k=: unknown; known: relu, tanh"),
        (None, "k=None: unknown; known: relu, tanh"),
        (3, "k=3: unknown; known: relu, tanh"),
    ],
)
def test_choose_refuses_an_unknown_name(value, message):
    with pytest.raises(UsageError) as refused:
        choose("k", value, iter(["relu", "tanh"]))
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("model.depht", "model.depth"),
        ("depth", "model.depth"),
        ("lr", "optimizer.lr"),
        ("zzz", None),
    ],
)
def test_nearest_of_the_keys(name, meant):
    message = nearest(name, flat(Config()))
    assert message.partition("did you mean ")[2] == (f"{meant!r}?" if meant else "")


def test_nearest_lists_many_names_only_where_none_is_near():
    names = [f"n{i}" for i in range(13)]
    assert nearest("zzz", names) == "known: " + ", ".join(names)
    assert nearest("lasst", [*names, "last"]) == "did you mean 'last'?"
    assert nearest("lasst", ["first", "last"]) == "known: first, last; did you mean 'last'?"
