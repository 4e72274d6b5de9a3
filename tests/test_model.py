from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bpdiag import data
from bpdiag.config import DataConfig, ModelConfig, UsageError
from bpdiag.initialization import INITIALIZERS
from bpdiag.model import build
from bpdiag.modules import BACKWARDS
from bpdiag.rules import ACTIVATIONS, RULES
from bpdiag.session import watch


def twins(**options):
    return [build(ModelConfig(backward=b, **options), 20, 4, seed=3) for b in ("handwritten", "autograd")]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight_variance", INITIALIZERS)
def test_by_hand_and_by_torch_are_the_same_net(activation, weight_variance):
    ours, theirs = twins(depth=4, width=16, activation=activation, weight_variance=weight_variance)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    x, y = torch.randn(8, 20, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    RULES["cross_entropy"].apply(ours.double()(x.double()), y).backward()
    nn.functional.cross_entropy(theirs.double()(x.double()), y).backward()
    near = 1e-6 if activation == "hardsigmoid" else 1e-12  # torch's own takes 1/6 in float32
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=near, atol=1e-15)


NETS = {
    "residual": {"residual": "identity"},
    "scaled": {"residual": "identity", "branch_scale": "1/sqrt(blocks)", "activation": "prelu"},
    "layer": {"normalization": "layer"},
    "batch": {"normalization": "batch", "activation": "tanh"},
    "residual_batch": {"residual": "identity", "normalization": "batch", "branch_scale": "0.3"},
    "cnn": {"name": "cnn"},
    "cnn_plain": {"name": "cnn", "normalization": "none"},
    "cnn_layer": {"name": "cnn", "normalization": "layer", "activation": "gelu"},
    "cnn_batch": {"name": "cnn", "normalization": "batch", "weight_variance": "orthogonal"},
    "rnn": {"name": "rnn", "weight_variance": "torch"},
    "lstm": {"name": "lstm", "weight_variance": "orthogonal", "depth": 2},
    "gru": {"name": "gru", "weight_variance": "torch", "depth": 3},
    "gru_pixels": {"name": "gru", "weight_variance": "torch", "depth": 2, "sequence": "pixels"},
}
PICTURE = (3, 13, 12)


def trained(net, loss, steps=4):
    """The outputs and gradients of some steps of SGD on one batch and another, then what evaluation gives."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(steps + 1, 8, math.prod(PICTURE), generator=generator).double()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    seen = []
    for batch in x[:steps]:
        optimizer.zero_grad()
        z = net(batch)
        loss(z, torch.arange(8) % 4).backward()
        optimizer.step()
        seen += [z.detach(), *[p.grad.clone() for p in net.parameters()]]
    return [*seen, net.eval()(x[steps]).detach()]


@pytest.mark.parametrize("options", NETS.values(), ids=NETS)
def test_any_net_by_hand_trains_as_by_torch(options):
    options = {"depth": 5, "width": 16, **options}
    ours, theirs = (
        build(ModelConfig(backward=b, **options), PICTURE, 4, seed=3).double() for b in ("handwritten", "autograd")
    )
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    mine, its = trained(ours, RULES["cross_entropy"].apply), trained(theirs, nn.functional.cross_entropy)
    torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-10, atol=1e-10)


def test_another_seed_does_not_train_so():
    """The twin."""
    one, other = (build(ModelConfig(depth=3, width=16), PICTURE, 4, seed=s).double() for s in (3, 4))
    loss = nn.functional.cross_entropy
    assert not torch.allclose(trained(one, loss)[-1], trained(other, loss)[-1])


@pytest.mark.parametrize("options", [o for o in NETS.values() if "name" not in o])
def test_a_seed_gives_the_weights_of_the_plain_net(options):
    net = build(ModelConfig(depth=5, width=16, **options), 20, 4, seed=3).state_dict()
    plain = build(ModelConfig(depth=5, width=16), 20, 4, seed=3).state_dict()
    assert all(torch.equal(net[name], W) for name, W in plain.items())


def test_the_plain_nets_weights_are_drawn_layer_by_layer():
    """So they were in every release; a run folder of then is made again from its seed."""
    generator = torch.Generator().manual_seed(3)
    net = build(ModelConfig(depth=3, width=16), 20, 4, seed=3)
    assert type(net) is nn.Sequential
    for layer, shape in ((net.linear1, (16, 20)), (net.linear2, (16, 16)), (net.linear3, (4, 16))):
        W = torch.empty(shape).normal_(0, math.sqrt(2 / shape[1]), generator=generator)
        assert torch.equal(layer.weight, W)


def names(n_in=20, **options):
    return " ".join(dict(build(ModelConfig(width=8, **options), n_in, 4, seed=0).named_children()))


def test_modules_are_named_by_what_they_are_and_their_layer():
    assert names(depth=2) == "linear1 relu1 linear2"
    assert names(depth=4, residual="identity", normalization="layer") == (
        "linear1 layernorm1 relu1 linear2 layernorm2 relu2 sum2 linear3 layernorm3 relu3 sum3 linear4"
    )
    assert names(PICTURE, name="cnn", depth=4) == (
        "unflatten conv1 batchnorm1 relu1 maxpool1 conv2 batchnorm2 relu2 maxpool2 flatten2 "
        "linear3 batchnorm3 relu3 linear4"
    )
    assert names(PICTURE, name="cnn", depth=3, normalization="none") == (
        "unflatten conv1 relu1 maxpool1 conv2 relu2 maxpool2 flatten2 linear3"
    )
    assert names(PICTURE, name="lstm", depth=3) == "cell1 cell2 linear3"


@pytest.mark.parametrize("backward", ["handwritten", "autograd"])
def test_a_watcher_sees_a_sum_with_two_parents(backward):
    config = ModelConfig(depth=4, width=8, residual="identity", backward=backward)
    net = build(config, 20, 4, seed=0)
    with watch(net) as watching:
        net(torch.randn(5, 20)).sum().backward()
        watching.step()
    layers = watching.trace.layers
    parents = {layer.name: [layers[i].name for i in layer.parents] for layer in layers}
    assert parents["sum2"] == ["relu1", "relu2"]
    assert parents["sum3"] == ["sum2", "relu3"]
    assert parents["linear3"] == ["sum2"]


def test_a_branch_scale_of_0_leaves_the_first_layer_and_the_head():
    net = build(ModelConfig(depth=6, width=8, residual="identity", branch_scale="0"), 20, 4, seed=0)
    x = torch.randn(5, 20)
    assert torch.equal(net(x), net.linear6(net.relu1(net.linear1(x))))
    assert not torch.equal(build(ModelConfig(depth=6, width=8, residual="identity"), 20, 4, seed=0)(x), net(x))


TOGETHER = [
    ({"name": "cnn", "residual": "identity"}, "model.residual=identity: of model.name=mlp only", {"name": "cnn"}),
    ({"branch_scale": "0.5"}, "add model.residual=identity", {"branch_scale": "0.5", "residual": "identity"}),
    ({"branch_scale": "-1", "residual": "identity"}, "must be 0 or more", {"branch_scale": "1.0"}),
    ({"branch_scale": "1/blocks"}, r"known: 1/sqrt\(blocks\)", {"branch_scale": "1"}),
    ({"depth": 2, "residual": "identity"}, "must be 3 or more", {"depth": 3, "residual": "identity"}),
    ({"name": "rnn", "residual": "identity"}, "model.residual=identity: of model.name=mlp only", {"name": "rnn"}),
    ({"name": "gru", "normalization": "layer"}, "of model.name=mlp and cnn only, here it is gru", {"name": "gru"}),
    ({"name": "lstm", "depth": 1}, "too few for model.name=lstm; must be 2", {"name": "lstm", "depth": 2}),
    ({"sequence": "pixels"}, "model.sequence=pixels: of model.name=rnn, lstm, gru only", {"name": "rnn"}),
    ({"name": "rnn", "sequence": "words"}, "known: rows, pixels", {"name": "rnn", "sequence": "pixels"}),
    ({"depth": 2, "name": "cnn"}, "too few for model.name=cnn; must be 3", {"depth": 3, "name": "cnn"}),
]


@pytest.mark.parametrize(("options", "message", "good"), TOGETHER, ids=[" ".join(o) for o, _, _ in TOGETHER])
def test_what_does_not_go_together_is_refused_and_its_neighbour_is_not(options, message, good):
    with pytest.raises(UsageError, match=message):
        build(ModelConfig(width=8, **options), PICTURE, 4, seed=0)
    build(ModelConfig(width=8, **good), PICTURE, 4, seed=0)


@pytest.mark.parametrize("shape", [(1, 11, 28), (1, 28, 11), 784])
def test_a_picture_too_small_for_two_convolutions_and_pools_is_refused(shape):
    with pytest.raises(UsageError, match="it needs 12 x 12 or more"):
        build(ModelConfig(name="cnn"), shape, 4, seed=0)


@pytest.mark.parametrize("shape", [(1, 12, 12), (1, 28, 28), (3, 32, 32), (2, 13, 29)])
def test_a_cnn_takes_flat_pictures_of_any_larger_shape(shape):
    net = build(ModelConfig(name="cnn", depth=3), shape, 4, seed=0).eval()
    x = torch.randn(2, *shape)
    assert net(x.flatten(1)).shape == (2, 4)
    assert torch.equal(net[1:](x), net(x.flatten(1)))


def test_by_torch_is_made_of_torchs_modules_only():
    assert all(type(m).__module__.startswith("torch.") for m in twins(depth=3)[1].modules())


def test_three_steps_equal_a_plain_torch_loop():
    config = ModelConfig(depth=3, width=16, activation="tanh")
    ours, theirs = (build(config, 20, 4, seed=1).double() for _ in range(2))
    plain = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    plain.load_state_dict(dict(zip(plain.state_dict(), theirs.state_dict().values(), strict=True)))
    x, y = torch.randn(12, 20, generator=torch.Generator().manual_seed(0)).double(), torch.arange(12) % 4
    losses = []
    for net, loss in ((ours, RULES["cross_entropy"].apply), (plain, nn.functional.cross_entropy)):
        optimizer = torch.optim.SGD(net.parameters(), 0.5, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            value = loss(net(x), y)
            value.backward()
            optimizer.step()
            losses.append(value.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-12)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


# finite-depth mean field, maths of sigma_w^2 E phi'^2 along the length map, depth 20, width 512: torch, 1, 2
CURVE = {
    "identity": (0.577, 1.0, 1.414),
    "relu": (0.408, 0.707, 1.0),
    "elu": (0.561, 0.903, 1.079),
    "selu": (0.784, 1.036, 1.180),
    "gelu": (0.293, 0.521, None),
    "silu": (0.291, 0.511, 0.767),
    "mish": (0.349, 0.612, 0.976),
    "hardswish": (0.290, 0.508, 0.751),
    "softplus": (0.295, 0.538, 0.860),
    "tanh": (0.568, 0.915, 1.028),
    "hardtanh": (0.576, 0.971, 1.147),
    "softsign": (0.527, 0.840, 0.948),
    "sigmoid": (0.141, 0.235, 0.315),
    "hardsigmoid": (0.096, 0.167, 0.236),
}


@pytest.mark.parametrize("activation", CURVE)
def test_the_gain_at_the_start_is_the_theorys(activation):
    """Rules, initializers and recorder together against numbers computed without any of them."""
    split = data.load(DataConfig()).train
    for variance, expected in zip(("torch", "1", "2"), CURVE[activation], strict=True):
        if expected is None:  # the length map is unstable there: bright and dark digits follow different lengths
            continue
        net = build(ModelConfig(depth=20, width=512, activation=activation, weight_variance=variance), 784, 10, seed=0)
        with watch(net) as watching:
            RULES["cross_entropy"].apply(net(split.x[:256]), split.y[:256]).backward()
            watching.step()
        gains = watching.trace.column("backward_gain")[0][0, watching.trace.weight_layers()][:-2]
        measured = math.exp(sum(map(math.log, gains)) / len(gains))
        near = 0.05 if variance == "2" and activation in ("silu", "mish", "hardswish", "softplus") else 0.02
        assert measured == pytest.approx(expected, rel=near), variance


# gain^2 of a layer or block at sigma_w^2 = 1/3, of one of relu's z at q = 1: E phi'^2 = 1/2, E phi^2 = 1/2, (E phi)^2
# = 1/2pi.  Layer norm E phi'^2 / E phi^2; batch norm E phi'^2 / Var phi (Yang et al. 2019); a sum adds 1 (Yang &
# Schoenholz 2017), where what is normalized was |a|^2 = q_l or the batch's variance v_l of the stream after l layers:
# q_l = l^2/2pi + l Var phi, v_l = l Var phi.  The ends: |g_z| carries 1/sd of its own layer, sd_1 that of the data.
MEAN2 = 1 / (2 * math.pi)
SPREAD = 0.5 - MEAN2


def theory(residual, normalization, depth, of_data):
    """(|g_z_1| / |g_z_{L-1}|)^(1/(L-2))."""

    def size(layers):
        if residual == "none":
            layers = 1
        return {"none": 1.0, "layer": layers**2 * MEAN2 + layers * SPREAD, "batch": layers * SPREAD}[normalization]

    total = 1.0 if normalization == "none" else size(depth - 2) / of_data[normalization]
    for layer in range(2, depth):
        branch = 1 / 6 if normalization == "none" else 0.5 / size(layer - 1)
        total *= branch + (residual == "identity")
    return total ** (1 / (2 * (depth - 2)))


def measured_and_theory(residual, normalization, depth):
    """What a watched net shows of 256 images at width 256, and what it should at any residual and normalization."""
    split = data.load(DataConfig()).train
    of_data = {"layer": split.x.square().mean().item(), "batch": split.x.var(0).mean().item()}
    config = ModelConfig(
        depth=depth, width=256, residual=residual, normalization=normalization, weight_variance="torch"
    )
    net = build(config, 784, 10, seed=0)
    with watch(net) as watching:
        RULES["cross_entropy"].apply(net(split.x[:256]), split.y[:256]).backward()
        watching.step()
    decades = watching.trace.column("decades")[0][0, watching.trace.weight_layers()]
    expected = {(r, n): theory(r, n, depth, of_data) for r in ("none", "identity") for n in ("none", "layer", "batch")}
    return 10 ** ((decades[0] - decades[-2]) / (depth - 2)), expected


@pytest.mark.parametrize(
    ("residual", "normalization", "depth", "near"),
    [
        ("none", "none", 20, 0.02),
        ("none", "layer", 20, 0.02),
        ("none", "layer", 50, 0.02),
        ("none", "batch", 20, 0.02),
        ("none", "batch", 50, 0.02),
        ("identity", "none", 5, 0.03),
        ("identity", "layer", 20, 0.02),
        ("identity", "layer", 50, 0.02),
        ("identity", "batch", 20, 0.03),
        ("identity", "batch", 50, 0.03),
    ],
)
def test_the_gain_of_blocks_and_norms_is_the_theorys(residual, normalization, depth, near):
    measured, expected = measured_and_theory(residual, normalization, depth)
    assert measured == pytest.approx(expected[residual, normalization], rel=near)


def test_the_theories_can_be_told_apart():
    """The twin."""
    measured, expected = measured_and_theory("none", "layer", 50)
    near = {key for key, gain in expected.items() if measured == pytest.approx(gain, rel=0.02)}
    assert near == {("none", "layer")}


def test_the_seed_alone_decides():
    a, b, c = (build(ModelConfig(depth=2, width=8), 6, 3, seed=s).linear1.weight for s in (5, 5, 6))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_building_draws_nothing_from_the_global_stream():
    before = torch.get_rng_state()
    twins(depth=3)
    assert torch.equal(before, torch.get_rng_state())


def test_one_layer_is_a_linear_classifier():
    assert [name for name, _ in build(ModelConfig(depth=1), 6, 3, seed=0).named_children()] == ["linear1"]


@pytest.mark.parametrize("option", ["name", "activation", "weight_variance", "backward"])
def test_an_unknown_name_is_refused_with_what_is_known(option):
    with pytest.raises(UsageError, match=rf"model\.{option}=nonsuch: unknown; .*known: "):
        build(ModelConfig(**{option: "nonsuch"}), 6, 3, seed=0)


@pytest.mark.parametrize(("sequence", "steps", "numbers"), [("rows", 13, 36), ("pixels", 156, 3)])
def test_a_picture_is_read_row_by_row_or_pixel_by_pixel(sequence, steps, numbers):
    """The second step of rows is the second row of every channel, of pixels the second pixel."""
    net = build(ModelConfig(name="rnn", depth=2, width=4, sequence=sequence), PICTURE, 4, seed=0)
    picture = torch.arange(math.prod(PICTURE)).view(1, *PICTURE)
    read = net.read(picture.view(1, -1))
    assert (len(read), tuple(read[0].shape)) == (steps, (1, numbers))
    second = picture[0, :, 1, :].T if sequence == "rows" else picture[0, :, 0, 1]
    assert read[1].flatten().tolist() == second.flatten().tolist()


@pytest.mark.parametrize("name", ["rnn", "lstm", "gru"])
def test_a_recurrent_net_is_torchs_layer_and_a_head(name):
    net = build(ModelConfig(name=name, depth=2, width=5, weight_variance="torch"), PICTURE, 4, seed=0)
    layer = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[name](36, 5, batch_first=True)
    layer.load_state_dict({f"{k}_l0": v for k, v in net.cell1.state_dict().items()})
    x = torch.randn(6, math.prod(PICTURE))
    states, _ = layer(torch.stack(net.read(x), 1))
    torch.testing.assert_close(net(x), net.linear2(states[:, -1]))


def test_every_time_step_is_a_row_of_the_trace():
    net = build(ModelConfig(name="lstm", depth=3, width=4), PICTURE, 4, seed=0)
    with watch(net) as watching:
        net(torch.randn(5, math.prod(PICTURE))).square().sum().backward()
        watching.step()
    layers = watching.trace.layers
    assert [layer.call for layer in layers if layer.name == "cell1"] == list(range(13))
    assert {layer.kind for layer in layers if layer.name.startswith("cell")} == {"lstmcell"}
    gains = watching.trace.column("backward_gain")[0][0]
    assert all(gains[i] > 0 for i, layer in enumerate(layers) if layer.name == "cell2" and layer.call < 12)


@pytest.mark.parametrize("name", ["rnn", "lstm", "gru"])
def test_a_cell_begins_at_zeros(name):
    cells = [BACKWARDS[backward].cell[name](3, 4).double() for backward in BACKWARDS]
    cells[1].load_state_dict(cells[0].state_dict())
    x = torch.randn(5, 3).double()
    torch.testing.assert_close(cells[0](x), cells[1](x), rtol=1e-12, atol=1e-12)
