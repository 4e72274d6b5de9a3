"""Any torch model on the rules: the same losses, by our nodes; what is not swapped is told."""

import copy
import inspect
import io
import warnings

import pytest
import torch
from swapped_models import MODELS, Lossy, losses, model
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bpdiag
from bpdiag import functional as table
from bpdiag import swapping
from bpdiag.rules import ACTIVATIONS, RULES
from bpdiag.swapping import ByHand, handwritten

torch.set_num_threads(1)

EQUAL = {"rel": 0, "abs": 1e-10}
NODES = {f"{rule.__name__}Backward" for rule in RULES.values()}
# torch's own nodes of what rules cover
COVERED = (
    "Addmm", "Linear", "Convolution", "NativeBatchNorm", "NativeLayerNorm", "NativeGroupNorm", "Relu", "Gelu", "Tanh",
    "Softmax", "LogSoftmax", "NllLoss", "ScaledDotProduct", "MaxPool2D", "Mean", "Embedding", "NativeDropout",
)  # fmt: skip


def nodes(loss):
    """Names of all nodes of autograd's graph."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return {node.name() for node in seen}


def by_torch(names, but=()):
    return {n for n in names if any(n.startswith(c) and n[-1].isdigit() for c in COVERED if c not in but)}


@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_have_torchs_losses(name):
    net, inputs = model(name)
    by_hand = handwritten(net)
    assert losses(by_hand, inputs) == pytest.approx(losses(net, inputs), **EQUAL)
    torch.testing.assert_close(by_hand.state_dict(), net.state_dict(), rtol=1e-9, atol=1e-9)
    assert by_hand.unswapped.modules == {}


@pytest.mark.parametrize("name", MODELS)
def test_what_rules_cover_runs_by_our_nodes(name):
    """The twin: the model's own graph has torch's."""
    net, inputs = model(name)
    ours, theirs = nodes(handwritten(net)(*inputs)), nodes(net(*inputs))
    mean_of_heads = ("Mean",) if "multi-head" in name else ()  # of the weights that it tells
    assert by_torch(ours, mean_of_heads) == set()
    assert ours & NODES
    assert by_torch(theirs)
    assert not theirs & NODES


@pytest.mark.parametrize("rule", ["linear", "layer_norm", "attention"])
def test_a_rule_with_a_fault_is_seen_in_the_losses(rule, monkeypatch):
    apply = RULES[rule].apply
    monkeypatch.setattr(RULES[rule], "apply", staticmethod(lambda *inputs: 1.001 * apply(*inputs)))
    net, inputs = model("gpt")
    assert losses(handwritten(net), inputs, 3) != pytest.approx(losses(net, inputs, 3), **EQUAL)


@pytest.mark.parametrize("share", [False, True])
def test_state_is_copied_or_shared(share):
    net, inputs = model("resnet18")
    by_hand = handwritten(net, share=share)
    before = copy.deepcopy(net.state_dict())
    losses(by_hand, inputs, 1)
    for ours, theirs in (
        (by_hand.parameters(), net.parameters()),
        (by_hand.buffers(), net.buffers()),
    ):
        assert all((a is b) == share for a, b in zip(ours, theirs, strict=True))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) != share
    assert type(net.net.conv1) is nn.Conv2d


def test_a_model_in_evaluation_is_torchs():
    for name in ("resnet18", "encoder", "gpt, dropout"):
        net, inputs = model(name)
        by_hand = handwritten(net).eval()
        assert by_hand(*inputs).item() == pytest.approx(net.eval()(*inputs).item(), rel=1e-12)


def test_any_part_of_the_copy_runs_on_rules():
    net, (x, _) = model("resnet18")
    by_hand = handwritten(net)
    y = by_hand.net.layer1(by_hand.net.maxpool(by_hand.net.conv1(x)))
    assert by_torch(nodes(y)) == set()
    assert by_torch(nodes(by_hand.net.layer1[:1](by_hand.net.conv1(x)))) == set()  # a slice of it too


# ---- what is told ----


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.act, self.pool = nn.Bilinear(2, 2, 2), nn.LeakyReLU(0.2), nn.MaxPool1d(1, return_indices=True)
        self.recurrent, self.lazy = nn.LSTM(2, 4, proj_size=2), nn.LazyLinear(3)

    def forward(self, x):
        return self.act(self.gate(x, x)).cumsum(0) @ x.mT


def test_what_has_no_rule_is_told():
    by_hand = handwritten(Odd())
    assert {name: why.partition("(")[0].split()[0] for name, why in by_hand.unswapped.modules.items()} == {
        "gate": "Bilinear", "act": "LeakyReLU", "pool": "MaxPool1d", "recurrent": "LSTM", "lazy": "LazyLinear",
    }  # fmt: skip
    assert by_hand.unswapped.modules["pool"] == "MaxPool1d has return_indices=True, of which there is no rule"
    assert by_hand.unswapped.functions == set()
    by_hand(torch.ones(3, 2))
    assert by_hand.unswapped.functions == {"bilinear", "leaky_relu", "cumsum", "matmul"}


def test_strict_raises_and_names_each():
    with pytest.raises(ValueError, match=r"^handwritten: gate: Bilinear\(.*\) has no rule; act: .*; expected modules"):
        handwritten(Odd(), strict=True)
    assert isinstance(handwritten(nn.Linear(2, 2), strict=True), nn.Linear)


@pytest.mark.parametrize(
    ("make", "settings", "kind", "words"),
    [
        (lambda: 3, {}, TypeError, "model is 3; expected a torch.nn.Module"),
        (lambda: nn.Linear, {}, TypeError, "model is <class .*; expected a torch.nn.Module"),
        (lambda: torch.compile(nn.Linear(2, 2)), {}, TypeError, "model is compiled; .* compile the copy"),
        (lambda: nn.Linear(2, 2), {"share": 1}, TypeError, "share is 1; expected True or False"),
        (lambda: nn.Linear(2, 2), {"strict": None}, TypeError, "strict is None; expected True or False"),
    ],
)
def test_what_is_no_model_is_refused(make, settings, kind, words):
    with pytest.raises(kind, match=f"^handwritten: {words}"):
        handwritten(make(), **settings)


def test_what_cannot_be_copied_is_told():
    net = nn.Linear(2, 2)
    net.output = net(torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"^handwritten: the model cannot be copied: Only Tensors created explicitly"):
        handwritten(net)


def test_a_setting_that_no_rule_has_runs_by_torchs_own():
    net = nn.Sequential(nn.LeakyReLU(0.2), nn.ELU(0.5), nn.Hardtanh(-2, 2), nn.Softplus(2))
    by_hand, x = handwritten(net), torch.linspace(-3, 3, 7)
    assert torch.equal(by_hand(x), net(x))
    assert len(by_hand.unswapped.modules) == 4


def test_a_packed_sequence_runs_by_torchs_own_and_is_told():
    net = nn.GRU(3, 4).double()
    x = torch.nn.utils.rnn.pack_sequence([torch.ones(4, 3).double(), torch.ones(2, 3).double()])
    by_hand = handwritten(net)
    assert torch.equal(by_hand(x)[0].data, net(x)[0].data)
    assert by_hand.unswapped.functions == {"gru"}


# ---- it is the module that it was ----


def test_it_is_of_its_kind_and_takes_its_state():
    net, _ = model("encoder")
    by_hand = handwritten(net)
    assert isinstance(by_hand, Lossy)
    assert isinstance(by_hand, ByHand)
    assert repr(by_hand) == repr(net)
    assert list(by_hand.state_dict()) == list(net.state_dict())
    by_hand.load_state_dict(net.state_dict())


def test_it_can_be_copied_swapped_again_and_pickled():
    net, inputs = model("gpt")
    by_hand = handwritten(net)
    stored = io.BytesIO()
    torch.save(by_hand, stored)
    stored.seek(0)
    expected = net(*inputs).item()
    for one in (copy.deepcopy(by_hand), handwritten(by_hand), torch.load(stored, weights_only=False)):
        assert one(*inputs).item() == pytest.approx(expected, rel=1e-12)
        assert by_torch(nodes(one(*inputs))) == set()


def test_hooks_go_with_it_and_modes_end():
    net, inputs = model("gpt")
    seen = []
    net.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    by_hand = handwritten(net)
    by_hand(*inputs)
    assert seen == [1]
    with pytest.raises(RuntimeError):
        by_hand(inputs[0][:, :3], inputs[1])
    assert F.relu(torch.ones(1, requires_grad=True)).grad_fn.name() == "ReluBackward0"


def test_the_recorder_knows_its_activations():
    by_hand = handwritten(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    with bpdiag.watch(by_hand, torch.optim.SGD(by_hand.parameters(), 0.1)) as watching:
        watching.loss(by_hand(torch.ones(5, 3)).square().mean()).backward()
    (layer,) = [layer for layer in watching.trace.layers if layer.activation]
    assert (layer.activation, layer.largest_slope) == ("tanh", ACTIVATIONS["tanh"].largest_slope)


# ---- with what torch offers ----


class Overwriting(nn.Module):
    """What an in-place activation leaves behind is read again."""

    def __init__(self, act):
        super().__init__()
        self.first, self.act = nn.Linear(3, 3), act

    def forward(self, x):
        z = self.first(x)
        self.act(z)
        return (z + self.first(x)).sum()


@pytest.mark.parametrize(
    "act", [nn.ReLU(True), nn.SiLU(True), nn.Hardswish(True), nn.Dropout(0.5, True), nn.ELU(inplace=True)]
)
def test_what_is_done_in_place_is_done_in_place(act):
    torch.manual_seed(0)
    net, x = Overwriting(act).double(), torch.randn(4, 3).double()
    assert losses(handwritten(net), (x,), 3) == pytest.approx(losses(net, (x,), 3), **EQUAL)


class Checkpointed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, tokens, targets):
        net = self.net
        x = net.tokens(tokens) + net.places
        for block in net.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return F.cross_entropy(net.head(x).transpose(1, 2), targets)


def test_checkpoints_recompute_by_rule():
    net, inputs = model("gpt")
    assert losses(handwritten(Checkpointed(net)), inputs, 3) == pytest.approx(losses(net, inputs, 3), **EQUAL)


@pytest.mark.parametrize("name", ["resnet18", "gpt", "encoder", "multi-head attention", "lstm", "gru"])
def test_compiled_where_torchs_is(name):
    torch._dynamo.reset()
    net, inputs = model(name)
    by_hand = handwritten(net)
    compiled = torch.compile(by_hand, backend="aot_eager", fullgraph=name not in ("lstm", "gru"))  # nor is torch's
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its compiler
        ours = losses(by_hand, inputs, 2, compiled)
    torch._dynamo.reset()
    assert ours == pytest.approx(losses(net, inputs, 2), **EQUAL)


@pytest.mark.parametrize(
    "name", ["resnet18", "vit", "convnext", "gpt", "encoder", "multi-head attention", "lstm", "gru"]
)
def test_autocast_is_near_torchs(name):
    net, inputs = model(name)
    net.float()
    inputs = [t.float() if t.is_floating_point() else t for t in inputs]

    def cast(one):
        def call(*args):
            with torch.autocast("cpu", torch.bfloat16):
                return one(*args)

        return call

    by_hand = handwritten(net)
    ours, theirs = (losses(one, inputs, 2, cast(one), lr=0.01) for one in (by_hand, net))
    assert ours == pytest.approx(theirs, rel=0.03)
    assert all(p.grad.dtype == torch.float32 for p in by_hand.parameters())


def each_samples_gradients(net, inputs):
    state = dict(net.named_parameters()), dict(net.named_buffers())

    def loss(parameters, *sample):
        return torch.func.functional_call(net, (parameters, state[1]), tuple(t.unsqueeze(0) for t in sample))

    dims = (None, *[0] * len(inputs))
    return torch.func.vmap(torch.func.grad(loss), dims)(state[0], *inputs)


@pytest.mark.parametrize(
    "name", ["resnet18", "vit", "convnext", "gpt", "encoder", "multi-head attention", "lstm", "gru"]
)
def test_vmap_gives_each_samples_gradients(name):
    """Against a loop over the samples with torch's own, whose fused recurrence has no vmap."""
    net, inputs = model(name)
    net.eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # torch's own, of some of its functions
        ours = each_samples_gradients(handwritten(net), inputs)
    for k in range(2):
        net.zero_grad()
        net(*[t[k : k + 1] for t in inputs]).backward()
        theirs = {name: p.grad for name, p in net.named_parameters()}
        torch.testing.assert_close({name: g[k] for name, g in ours.items()}, theirs, rtol=1e-9, atol=1e-11)


# ---- every module that is said to be known ----

X1, X2, X3 = ((2, 4, *[6] * n) for n in (1, 2, 3))
ARGUMENTS = {
    nn.Linear: ((6, 3), X1), swapping.NonDynamicallyQuantizableLinear: ((6, 3), X1), nn.Embedding: ((5, 3), None),
    nn.Dropout: ((0.3,), X1), nn.Dropout1d: ((0.3,), X1), nn.Dropout2d: ((0.3,), X2), nn.Dropout3d: ((0.3,), X3),
    nn.Conv1d: ((4, 3, 2), X1), nn.Conv2d: ((4, 3, 2), X2), nn.Conv3d: ((4, 3, 2), X3),
    nn.ConvTranspose1d: ((4, 3, 2), X1), nn.ConvTranspose2d: ((4, 3, 2), X2), nn.ConvTranspose3d: ((4, 3, 2), X3),
    nn.BatchNorm1d: ((4,), X1), nn.BatchNorm2d: ((4,), X2), nn.BatchNorm3d: ((4,), X3),
    nn.InstanceNorm1d: ((4,), X1), nn.InstanceNorm2d: ((4,), X2), nn.InstanceNorm3d: ((4,), X3),
    nn.LayerNorm: ((6,), X1), nn.GroupNorm: ((2, 4), X1), nn.RMSNorm: ((6,), X1),
    nn.MaxPool1d: ((2,), X1), nn.MaxPool2d: ((2,), X2), nn.MaxPool3d: ((2,), X3),
    nn.AvgPool1d: ((2,), X1), nn.AvgPool2d: ((2,), X2), nn.AvgPool3d: ((2,), X3),
    nn.AdaptiveAvgPool1d: ((4,), X1), nn.AdaptiveAvgPool2d: (((None, 4),), X2), nn.AdaptiveAvgPool3d: ((2,), X3),
    nn.AdaptiveMaxPool1d: ((4,), X1), nn.AdaptiveMaxPool2d: (((None, 4),), X2), nn.AdaptiveMaxPool3d: ((2,), X3),
    nn.Flatten: ((), X2), nn.Unflatten: ((1, (2, 2)), X1), nn.PixelShuffle: ((2,), X2), nn.PixelUnshuffle: ((2,), X2),
    nn.ChannelShuffle: ((2,), X2), nn.Softmax: ((1,), X1), nn.LogSoftmax: ((1,), X1), nn.GLU: ((), X1),
    nn.MultiheadAttention: ((6, 2), (X1, X1, X1)), nn.RNN: ((6, 3), X1), nn.LSTM: ((6, 3), X1), nn.GRU: ((6, 3), X1),
    nn.RNNCell: ((6, 3), (4, 6)), nn.LSTMCell: ((6, 3), (4, 6)), nn.GRUCell: ((6, 3), (4, 6)),
    **dict.fromkeys((nn.MSELoss, nn.L1Loss, nn.HuberLoss, nn.SmoothL1Loss, nn.BCEWithLogitsLoss), ((), (X1, X1))),
    nn.KLDivLoss: ((None, None, "batchmean"), (X1, X1)), nn.CrossEntropyLoss: ((), X1), nn.NLLLoss: ((), X1),
    **{
        pad: ((1, 0.5) if "Constant" in pad.__name__ else (1,), (X1, X2, X3)[int(pad.__name__[-2]) - 1])
        for pad in swapping._PADS
    },
}  # fmt: skip
MOVES = {nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle}


def module_and_inputs(kind):
    torch.manual_seed(0)
    arguments, shapes = ARGUMENTS[kind]
    module = kind(*arguments).double()
    if shapes is None:
        return module, (torch.tensor([[1, 0, 4]]),)
    several = shapes if isinstance(shapes[0], tuple) else (shapes,)
    inputs = tuple(torch.rand(shape, dtype=torch.float64).requires_grad_() for shape in several)
    if kind in (nn.CrossEntropyLoss, nn.NLLLoss):
        inputs += (torch.randint(4, (2, 6)),)
    return module, inputs


def told(module, inputs):
    torch.manual_seed(1)
    out = module(*inputs)
    first = out[0] if isinstance(out, tuple) else out
    leaves = [t for t in (*inputs, *module.parameters()) if t.requires_grad]
    return nodes(first), [first, *torch.autograd.grad(first.pow(2).sum(), leaves)]


@pytest.mark.parametrize("kind", sorted(swapping.KNOWN, key=str), ids=lambda kind: kind.__name__)
def test_every_known_module_runs_by_rule(kind):
    module, inputs = module_and_inputs(kind)
    by_hand = handwritten(module, strict=True)
    (ours, numbers), (theirs, expected) = told(by_hand, inputs), told(module, inputs)
    torch.testing.assert_close(numbers, expected, rtol=1e-10, atol=1e-10)
    assert bool(ours & NODES) == (kind not in MOVES)
    assert not theirs & NODES


def test_the_table_of_known_modules_is_whole():
    assert ARGUMENTS.keys() == swapping.KNOWN


@pytest.mark.parametrize(
    "module",
    [
        nn.Embedding(3, 2, max_norm=1.0), nn.Embedding(3, 2, sparse=True), nn.Embedding(3, 2, scale_grad_by_freq=True),
        nn.InstanceNorm1d(2, track_running_stats=True), nn.MaxPool2d(2, return_indices=True),
        nn.AdaptiveMaxPool2d(2, return_indices=True), nn.LSTM(2, 4, proj_size=2), nn.RNN(2, 2, nonlinearity="relu"),
        nn.RNNCell(2, 2, nonlinearity="relu"),
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_without_a_rule_is_told(module):
    assert "of which there is no rule" in handwritten(module).unswapped.modules[""]


def test_the_tables_name_functions_of_torch():
    assert all(callable(function) for function in table.FUNCTIONS)
    assert {F.linear, F.cross_entropy, F.scaled_dot_product_attention, torch.lstm} <= table.FUNCTIONS.keys()


class Registered(nn.Module):
    """Looks at its subclasses, as registries do."""

    def __init_subclass__(cls, *, key, **options):
        super().__init_subclass__(**options)


class Keyed(Registered, key="keyed"):
    def forward(self, x):
        return x


def test_a_class_that_takes_no_subclass_is_told():
    with pytest.raises(ValueError, match=r"handwritten: no class can be made from Keyed: .*key"):
        handwritten(nn.Sequential(Keyed()))


@pytest.mark.parametrize(
    "empty", [nn.Sequential(), nn.ModuleList(), nn.ModuleDict(), nn.ParameterList(), nn.ParameterDict(), nn.Module()]
)
def test_what_holds_nothing_needs_no_rule(empty):
    """As the shortcut of a residual net for small pictures; the twin has something to do."""
    assert handwritten(nn.ModuleDict({"shortcut": empty}), strict=True).unswapped.modules == {}
    assert handwritten(nn.ModuleDict({"shortcut": nn.Threshold(0.1, 0.0)})).unswapped.modules


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_scripted_child_stays_as_it_is_and_is_told():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    by_hand = handwritten(nn.Sequential(scripted, nn.Linear(2, 2)))
    assert by_hand.unswapped.modules["0"] == "Sequential is scripted: its code is torch's own"
    assert isinstance(by_hand[0], torch.jit.ScriptModule)
    x = torch.ones(1, 2)
    assert by_hand(x).grad_fn.name() == "LinearBackward"
    assert torch.equal(by_hand[0](x), scripted(x))


def test_a_compiled_child_is_refused_by_name():
    child = nn.Sequential(torch.compile(nn.Linear(2, 2)))
    for net in (nn.Sequential(nn.Tanh(), child), handwritten(nn.Sequential(nn.Tanh(), nn.Tanh()))):
        net[1] = child
        with pytest.raises(TypeError, match=r"handwritten: model\.1\.0 is compiled; give the model itself"):
            handwritten(net)


def test_a_forward_of_one_module_alone_is_told():
    net = nn.Sequential(nn.Tanh(), nn.Tanh())
    net[1].forward = torch.sin
    by_hand = handwritten(net)
    assert by_hand.unswapped.modules == {"1": "Tanh has a forward of this one alone"}
    x = torch.ones(2, requires_grad=True)
    assert torch.equal(by_hand(x), net(x))


def test_a_copy_has_the_signature_of_its_model():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x, *, scale=2.0):
            """Scaled."""
            return torch.tanh(self.linear(x)) * scale

    net = Two()
    by_hand = handwritten(net)
    assert inspect.signature(by_hand.forward) == inspect.signature(net.forward)
    assert by_hand.forward.__doc__ == "Scaled."
    assert nodes(by_hand(torch.ones(1, 2), scale=3.0)) & NODES == {"LinearBackward", "TanhBackward"}


def test_a_copy_can_be_traced_symbolically():
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    traced = torch.fx.symbolic_trace(handwritten(net))
    x = torch.ones(1, 2)
    assert torch.equal(traced(x), net(x))


@pytest.mark.parametrize(
    "function",
    [F.l1_loss, lambda a, b: F.layer_norm(a, (5,)) * b, lambda a, b: F.linear(a, b) * F.dropout(a), F.cross_entropy],
)
def test_a_function_under_a_checkpoint_runs_again_by_rule(function):
    """By torch's own it would find other numbers than the rule kept, as the twin does."""

    class Checkpointed(nn.Module):
        def forward(self, x, y):
            return checkpoint(lambda a, b: function(a, b) * 2, x * 1, y, use_reentrant=False)

    def told(net):
        torch.manual_seed(1)
        return torch.autograd.grad(net(x, y).sum(), x)[0]

    torch.manual_seed(0)
    x, y = torch.randn(5, 5, requires_grad=True), torch.rand(5, 5)
    torch.testing.assert_close(told(handwritten(Checkpointed())), told(Checkpointed()))


def test_other_hooks_on_what_is_kept_stay():
    """Here they double what the backward reads: g_x = g W of a linear layer."""
    x, net = torch.ones(1, 2, requires_grad=True), nn.Linear(2, 2, bias=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: 2 * t):
        y = handwritten(net)(x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], 2 * net.weight.sum(0, keepdim=True))
