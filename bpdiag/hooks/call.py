"""One call of one module: what kind of layer it is, and the numbers it gathers during a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from bpdiag.rules import ACTIVATIONS, Activation

# nodes of autograd's graph that move numbers about and change none
SHAPE_NODES = (
    "View", "UnsafeView", "ReshapeAlias", "T", "Transpose", "Permute", "Squeeze", "Unsqueeze", "Alias",
)  # fmt: skip
MATRIX = (nn.Linear, nn.Bilinear, _ConvNd)  # whose weights are, by their first dimension, units
NO_MATRIX = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
BY_MODULE = {  # torch's class -> the activations that it computes, with one setting or another
    rule.oracle: [other for other in ACTIVATIONS.values() if other.oracle is rule.oracle]
    for rule in ACTIVATIONS.values()
}
MIXING = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU)  # not elementwise


@dataclasses.dataclass(eq=False)
class Facts:
    """What all calls of a module have in common."""

    module: nn.Module
    name: str

    def __post_init__(self) -> None:
        module = self.module
        self.rule = rule_of(module)
        self.tensor = "a" if self.rule or is_activation(module) else "z"
        self.kind = self.rule.name if self.rule else type(module).__name__.removeprefix("FSDP").lower()
        self.r = self.rule.r if self.rule else next((rule.r for rule in BY_MODULE.get(type(module), ())), None)
        self.fan_in = fan_in(module)
        self._is_foreign = is_foreign(module)  # until its first call
        self.childless = is_childless(module)

    def meet(self, x: Tensor | None, out: Tensor) -> None:
        """The first call of a foreign module tells by its input and output which side of its weight it sums over.

        (N_out, N_in) as torch has it, or (N_in, N_out); neither, as of a table of positions: it has no fan-in.
        """
        weight = self.module._parameters.get("weight")
        if self._is_foreign and weight is not None and x is not None and x.dim() and out.dim():
            sides, (rows, columns) = (x.shape[-1], out.shape[-1]), weight.shape
            self.fan_in = columns if sides == (columns, rows) else rows if sides == (rows, columns) else None
        self._is_foreign = False

    def hold(self) -> bool:
        """Whether the module still computes the same function: a setting may have been changed."""
        return rule_of(self.module) is self.rule


@dataclasses.dataclass(eq=False)
class Call:
    """One call of one module in the step being measured."""

    facts: dataclasses.InitVar[Facts]
    number: int  # which call of this module in its forward pass
    backward: int  # which forward pass of the step
    shape: tuple[int, ...]
    in_graph: bool
    parents: tuple[Call, ...]
    order: tuple[int, int]  # of execution; of a sum (that of the call it stands behind, which sum of the pass)
    within: Any = None  # the reentrant checkpoint whose recomputation it is
    given_up: bool = False  # the walk down the graph: what it was computed from is not all known
    through: tuple[Any, ...] = ()  # checkpoints whose last calls are among its parents, once they are known
    dtype: str = "float32"  # of its output
    ops: tuple[str, ...] = ()  # autograd's names of what stands between its parents and its output
    gap: dict[Call, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # operations between it and a parent
    inputs: int = 1  # tensors with a graph that it was given
    adds: Call | None = None  # of a sum of no module: the last module's call among what it adds
    values: dict[str, Any] = dataclasses.field(default_factory=dict)  # Tensor or Held; floats once the host has read
    histograms: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)  # elements: rms = norm / sqrt(size)
    samples: int = 0  # whose pairs the mean cosine is of
    events: dict[int, int] = dataclasses.field(default_factory=dict)  # cotangents that arrived, by output
    # what this call sends to one that others read too; None: several backwards, or none, went that way
    edges: dict[Call, Any] = dataclasses.field(default_factory=dict)
    edge_gains: dict[Call, float] = dataclasses.field(default_factory=dict)  # that against its own cotangent
    gap_gains: dict[Call, float] = dataclasses.field(default_factory=dict)  # and against what it sends into its gap

    def __post_init__(self, facts: Facts) -> None:
        self.module, self.name, self.kind = facts.module, facts.name, facts.kind
        self.tensor, self.g = facts.tensor, f"g_{facts.tensor}"  # what it gives out, and the cotangent of that
        self.fan_in = facts.fan_in
        self.rule, self.r = facts.rule, facts.r  # whose slope this row carries; of a layer, a function's may be added
        self.axis = self._axis()
        self.key = facts.name, self.number  # what names its line in the layer table

    def _axis(self) -> int:
        """Where the units lie, from the end: channels stand before the positions a convolution counts."""
        if isinstance(self.module, _ConvNd):
            return -len(self.module.kernel_size) - 1
        if isinstance(self.module, _NormBase):
            return 1 - max(len(self.shape), 2)
        if self.fan_in is not None or len(self.shape) < 3:
            return -1
        alike = [p.axis for p in self.parents if len(p.shape) == len(self.shape)]
        return alike[0] if alike else (-1 if len(self.shape) == 3 else 1 - len(self.shape))

    @property
    def is_sum(self) -> bool:
        """Whether it is one that no module computes."""
        return self.adds is not None

    @property
    def weight(self) -> nn.Parameter | None:
        """As it is now: a sharded module has another one in its forward pass than its optimizer has."""
        return weight_of(self.module)

    @property
    def units(self) -> int | None:
        """N_out, or channels, of a weight layer."""
        return self.shape[self.axis] if self.fan_in is not None and len(self.shape) >= -self.axis else None


def leaves(tree: Any) -> Iterator[Tensor]:
    """The tensors of a nested output, each once: tensor, mapping, list, tuple, dataclass.

    Example:
        >>> x = Tensor([1.0, 2.0])
        >>> len(list(leaves({"last": x, "all": (x, x + 1)})))
        2
    """
    yield from {id(tensor): tensor for tensor in _branches(tree)}.values()


def _branches(tree: Any) -> Iterator[Tensor]:
    """Every place of a tensor."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for branch in tree.values():
            yield from _branches(branch)
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from _branches(branch)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for f in dataclasses.fields(tree):
            yield from _branches(getattr(tree, f.name))


def is_leaf(module: nn.Module) -> bool:
    """Whether it computes something itself: it has no children, or parameters of its own."""
    return is_childless(module) or any(p is not None for p in module._parameters.values())


def is_childless(module: nn.Module) -> bool:
    """Whether no module stands in it."""
    return all(child is None for child in module._modules.values())


def rule_of(module: nn.Module) -> type[Activation] | None:
    """The activation a module computes: our own say so, torch's are recognized."""
    kind = type(module)
    if "rule" in module.__dict__ or hasattr(kind, "rule"):
        rule = module.rule
        if isinstance(rule, type) and issubclass(rule, Activation):
            return rule
    return next((rule for rule in BY_MODULE.get(kind, ()) if rule.is_done_by(module)), None)


def is_activation(module: nn.Module) -> bool:
    """Whether it is one of torch's elementwise activations, known to us by its rule or not."""
    return type(module).__module__ == "torch.nn.modules.activation" and not isinstance(module, MIXING)


def rule_that_made(x: Tensor) -> type[Activation] | None:
    """The activation whose function call gave ``x``, looking through nodes that only move numbers about."""
    node = x.grad_fn
    while node is not None and node.name().removesuffix("0").removesuffix("Backward") in SHAPE_NODES:
        node = node.next_functions[0][0]
    return next((r for r in ACTIVATIONS.values() if node is not None and r.node and r.made(node)), None)


def kept_by(x: Tensor, rule: type[Activation]) -> tuple[Tensor, ...] | None:
    """What the slope of a function call that gave ``x`` needs: x itself, or what autograd saved, and what it learns."""
    if rule.saves == "output":
        return (x,)
    node: Any = x.grad_fn  # what a node saved is known by its name alone
    while node.name() != rule.node:
        node = node.next_functions[0][0]
    try:
        return node._saved_self, *(getattr(node, f"_saved_{name}") for name in rule.learnable)
    except RuntimeError:  # overwritten in place since, or never saved
        return None


def weight_of(module: nn.Module) -> nn.Parameter | None:
    """Its weight, where it is a parameter that can be read: computed ones (weight_norm, pruning) cannot unasked.

    Of a recurrent cell the one between its steps.
    """
    weight = module._parameters.get("weight_hh" if isinstance(module, nn.RNNCellBase) else "weight")
    if weight is None or not weight.is_leaf or (type(weight) is not nn.Parameter and is_lazy(weight)):
        return None
    return weight


def is_foreign(module: nn.Module) -> bool:
    """Whether its weight is a matrix, of a layout that torch does not say."""
    weight = module._parameters.get("weight")
    if weight is None or isinstance(module, (*MATRIX, *NO_MATRIX)):
        return False
    return not is_lazy(weight) and weight.dim() == 2


def fan_in(module: nn.Module) -> int | None:
    """Products summed into one output: N_in, or C_in/groups times the kernel.  None: no weight matrix that is known."""
    if isinstance(module, nn.RNNCellBase):  # from one step to the next
        return module.hidden_size
    if not isinstance(module, MATRIX):
        return None
    weight = module._parameters.get("weight")
    if weight is None:  # computed from others: their largest has its shape
        parametrized = getattr(module, "parametrizations", None)
        others = parametrized["weight"].parameters() if parametrized is not None and "weight" in parametrized else ()
        others = [*others, *(p for n, p in module._parameters.items() if n.startswith("weight_") and p is not None)]
        weight = max(others, key=Tensor.numel, default=None) if isinstance(module, nn.Linear | _ConvNd) else None
    if weight is None or is_lazy(weight) or weight.dim() < 2:
        return None
    if getattr(module, "transposed", False):  # weight (C_in, C_out/groups, kernel)
        return weight.numel() // (weight.shape[1] * getattr(module, "groups", 1))
    return weight.numel() // max(weight.shape[0], 1)
