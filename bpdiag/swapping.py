"""A copy of any torch model that runs on the rules by hand.

Each module of the copy is of a class made from its own: torch's forward, or the model's, inside ``ByRule``, so that
the functions it calls, of torch.nn.functional and of tensors, are our rules.  What a module is, its parameters,
buffers, hooks, settings and state dict, stays as it is.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks as _hooks
from torch._dynamo.eval_frame import skip_code
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from bpdiag.functional import FUNCTIONS
from bpdiag.rules import ACTIVATIONS, Activation
from bpdiag.rules.arguments import flag, told

# of autograd's nodes those that move numbers about and change none
MOVES = (
    "Alias", "AsStrided", "Clone", "Copy", "Expand", "Flip", "Index", "MaskedFill", "Permute", "Repeat", "Reshape",
    "ReshapeAlias", "Roll", "Select", "Slice", "Split", "Squeeze", "Stack", "T", "ToCopy", "Transpose", "Unbind",
    "Unfold", "UnsafeView", "Unsqueeze", "View",
)  # fmt: skip


class ByRule(TorchFunctionMode):
    """Inside, each of torch's functions that FUNCTIONS has runs by our rule; ``noted`` are those that could not.

    Example:
        >>> z, noted = torch.ones(2, requires_grad=True), set()
        >>> with ByRule(noted):
        ...     y = torch.tanh(z) * 2
        >>> y.grad_fn.next_functions[0][0].name(), noted
        ('TanhBackward', {'mul'})
    """

    def __init__(self, noted: set[str]) -> None:
        super().__init__()
        self.noted = noted

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        hooks = None if torch.compiler.is_compiling() else _hooks(True)
        if hooks is None:
            return self._run(func, args, kwargs or {})
        pack, unpack = hooks  # a checkpoint's, say, which runs a function again to unpack what it kept: by rule too
        with saved_tensors_hooks(pack, lambda kept: self._inside(unpack, kept)):
            return self._run(func, args, kwargs or {})

    def _inside(self, function: Any, *args: Any) -> Any:
        with self:
            return function(*args)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is functional.multi_head_attention_forward:
            with self:  # torch's own lines, and each function in them by rule
                return _MULTI_HEAD_ATTENTION(*args, **kwargs)
        by_rule = FUNCTIONS.get(func)
        if by_rule is not None:
            try:
                return by_rule(*args, **kwargs)
            except (TypeError, ValueError):
                pass
        out = func(*args, **kwargs)
        if not torch.compiler.is_compiling():
            self._note(func, out, args)
        return out

    def _note(self, func: Any, out: Any, args: Any) -> None:
        """A function of torch's own that a gradient goes through."""
        first = out[0] if isinstance(out, tuple | list) and out else out
        node = first.grad_fn if isinstance(first, Tensor) else None
        if node is None or any(first is t for t in args):
            return
        kind, backward, number = node.name().rpartition("Backward")
        if backward and number and kind not in MOVES:
            self.noted.add(getattr(func, "__name__", str(func)).strip("_"))


# the body of torch's function, which would hand itself back to the mode that called it
_MULTI_HEAD_ATTENTION: Callable[..., Any] = types.FunctionType(
    functional.multi_head_attention_forward.__code__,
    {**vars(functional), "has_torch_function": lambda *_: False},
    "multi_head_attention_forward",
    functional.multi_head_attention_forward.__defaults__,
)


_PADS = [
    getattr(nn, f"{kind}Pad{n}d")
    for kind in ("Reflection", "Replication", "Zero", "Constant", "Circular")
    for n in (1, 2, 3)
]
KNOWN = frozenset(
    {
        nn.Linear, NonDynamicallyQuantizableLinear, nn.Embedding, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
        nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
        nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
        nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
        nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, *_PADS,
        nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
        nn.Softmax, nn.LogSoftmax, nn.GLU, nn.CrossEntropyLoss, nn.NLLLoss, nn.MSELoss, nn.L1Loss, nn.HuberLoss,
        nn.SmoothL1Loss, nn.BCEWithLogitsLoss, nn.KLDivLoss,
        nn.MultiheadAttention, nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell,
    }
)  # fmt: skip
CONTAINERS = frozenset({nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict})
# of these and of their subclasses: the settings that have a rule
NEEDED: dict[type[nn.Module], dict[str, Any]] = {
    nn.Embedding: {"max_norm": None, "scale_grad_by_freq": False, "sparse": False},
    nn.modules.instancenorm._InstanceNorm: {"track_running_stats": False},
    nn.modules.pooling._MaxPoolNd: {"return_indices": False},
    nn.modules.pooling._AdaptiveMaxPoolNd: {"return_indices": False},
    nn.RNN: {"mode": "RNN_TANH"},
    nn.LSTM: {"proj_size": 0},
    nn.RNNCell: {"nonlinearity": "tanh"},
}


@dataclass
class Unswapped:
    """What of a model runs on torch's own: modules, known at once, and functions that a gradient went through."""

    modules: dict[str, str] = field(default_factory=dict)  # name -> why
    functions: set[str] = field(default_factory=set)  # filled as the copy runs


class ByHand(nn.Module):
    """What a module of the copy has beside what it was."""

    torchs: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Its own, each function in it by rule."""
        if any(isinstance(mode, ByRule) for mode in _get_current_function_mode_stack()):
            return super().forward(*args, **kwargs)
        with ByRule(self.__dict__.setdefault("unswapped", Unswapped()).functions):  # new where a Sequential was sliced
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled by the class that it was made from."""
        made: Any = super().__reduce_ex__(protocol)
        return _new, (self.torchs,), *made[2:]


_MADE: dict[type[nn.Module], type[nn.Module]] = {}


def _by_hand(kind: type[nn.Module]) -> type[nn.Module]:
    """The class made from one, once."""
    if kind not in _MADE:
        plain: Any = ByHand.forward  # a function of its own for each class: it has the signature of the class's
        made = types.FunctionType(plain.__code__, plain.__globals__, "forward", None, plain.__closure__)
        forward = functools.update_wrapper(made, kind.forward)
        try:
            _MADE[kind] = type(
                kind.__name__, (ByHand, kind), {"__module__": __name__, "torchs": kind, "forward": forward}
            )
        except Exception as error:  # of a base class that looks at its subclasses: whatever it raises
            raise ValueError(f"handwritten: no class can be made from {kind.__name__}: {error}") from error
    return _MADE[kind]


def _new(kind: type[nn.Module]) -> nn.Module:
    made = _by_hand(kind)
    return made.__new__(made)


def handwritten(model: nn.Module, share: bool = False, strict: bool = False) -> Any:
    """A copy of ``model`` whose known modules and functions run on the rules by hand; it trains like the model.

    Args:
        model: Any; it stays as it is.
        share: The copy has the model's parameters and buffers themselves (but of scripted modules); else copies.
        strict: Raise where a module has no rule; functions, known only as they run, are told.

    Returns:
        The copy.  ``copy.unswapped.modules`` says which modules run on torch's own and why,
        ``copy.unswapped.functions`` which of torch's functions without a rule a gradient has gone through so far (+ of
        shapes that differ, @ and the like among them), in the forward of a module: not those outside, nor when
        compiled.  ``flatten`` gives a copy where torch's may be a view: what is then written to it its source does not
        see.  Of checkpoints those that are reentrant run a function, which is no module, again on torch's own.

    Raises:
        TypeError: ``model`` is no module, or a compiled one: compile the copy.
        ValueError: It cannot be copied; or, if ``strict``, it has modules without a rule.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Threshold(0.1, 0.0))
        >>> copied = handwritten(net)
        >>> copied[:2](torch.ones(1, 2)).grad_fn.name(), copied.unswapped.modules
        ('TanhBackward', {'2': 'Threshold(threshold=0.1, value=0.0) has no rule'})
        >>> torch.equal(copied(torch.ones(1, 2)), net(torch.ones(1, 2)))
        True
    """
    # compiled alone, between two graphs, such a frame would hand out numbers for dtypes; inside a graph it is traced
    for method in (ByRule.__torch_function__, ByRule._run):
        skip_code(method.__code__)
    flag("handwritten", "share", share)
    flag("handwritten", "strict", strict)
    if not isinstance(model, nn.Module):
        raise TypeError(f"handwritten: model is {told(model)}; expected a torch.nn.Module")
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules:
            what = f"model.{name}" if name else "model"
            raise TypeError(f"handwritten: {what} is compiled; give the model itself and compile the copy")
    unswapped = Unswapped({name: why for name, m in model.named_modules() if (why := _why_not(m))})
    if strict and unswapped.modules:
        where = "; ".join(f"{name or 'the model'}: {why}" for name, why in unswapped.modules.items())
        raise ValueError(f"handwritten: {where}; expected modules that rules cover, or strict=False")
    kept = {id(t): t for t in (*model.parameters(), *model.buffers())} if share else {}
    try:
        made: Any = copy.deepcopy(model, kept)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"handwritten: the model cannot be copied: {error}") from error
    for name, module in list(made.named_modules()):
        if isinstance(module, torch.jit.ScriptModule):
            continue
        module.__dict__["unswapped"] = unswapped
        if (rule := _activation(module)) is not None:
            module.__dict__["rule"] = rule
        if name not in unswapped.modules and not isinstance(module, ByHand):
            module.__class__ = _by_hand(type(module))
    return made


def _activation(module: nn.Module) -> type[Activation] | None:
    return next((rule for rule in ACTIVATIONS.values() if rule.is_done_by(module)), None)


def _why_not(module: nn.Module) -> str | None:
    """Why a module has no rule; None where it has, and where its own forward says what it runs."""
    kind = type(module)
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return f"{kind.__name__} has no weights yet: run it once before"
    for needing in (needing for needing in NEEDED if isinstance(module, needing)):
        for setting, known in NEEDED[needing].items():
            if (came := getattr(module, setting)) != known:
                return f"{kind.__name__} has {setting}={came!r}, of which there is no rule"
    if isinstance(module, torch.jit.ScriptModule):
        return f"{module.original_name} is scripted: its code is torch's own"
    if "forward" in module.__dict__:
        return f"{kind.__name__} has a forward of this one alone"
    by_rule = kind in KNOWN or kind in CONTAINERS or _activation(module) is not None
    if by_rule or not kind.__module__.startswith("torch."):
        return None
    if list(module.children()):
        return None  # what it is made of is told
    return f"{kind.__name__}({module.extra_repr()}) has no rule"
