"""A rule, forward and vjp as plain tensor functions, made into an ``autograd.Function``: the one place.

The same two functions serve autograd (here) and any sweep that calls them itself, so that the maths stands
once.  ``Rule.apply`` is differentiable to any order in reverse mode, because ``vjp`` is written in differentiable
operations on true inputs and outputs (of an input that a ``vjp`` does not read, as relu's of z, a constant cotangent
has no graph; torch's may have one that leads to 0); it runs under ``torch.func.vmap`` and under autocast.  A rule
states no Jacobian-vector product: ``torch.func.jvp``, and ``hessian``, which is made of it, refuse it;
``jacrev(jacrev(...))`` is the Hessian.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor


class Rule:
    """y = f(x_1, ..., x_n),  g_x_i = J_i^T g_y.

    A subclass states two plain functions, written without ``self`` and made static here, and what links them:

    * ``forward(*inputs) -> Tensor``: tensors, then settings (stride, eps, ...), most with a default; where tensors may
      be any number, settings come before them;
    * ``vjp(g, *kept, needs) -> tuple``: one cotangent (or None) per input, in their order; those left out at the end
      have none.  ``needs[i]`` is False where nobody asks for the i-th: it is None then, and not computed.  A cotangent
      has the shape of its input and the precision that it was computed in, that of g or wider: ``apply`` casts it to
      the dtype of its input, nobody else does;
    * ``keeps(inputs, output, needs) -> tuple``: what the backward needs, and no more.  Tensors become autograd's saved
      tensors; whatever else stands among them (a setting, a shape) reaches ``vjp`` in its place, as it is.

    ``apply(*inputs)`` is the differentiable function made of them; each input may be given by name (where tensors may
    be any number, none), and settings left out.
    """

    name: ClassVar[str]
    apply: ClassVar[Any]
    forward: ClassVar[Any]
    vjp: ClassVar[Any]
    mixes: ClassVar[bool] = False  # vjp takes what was kept in any precision; else it gets all in that of g

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for method in ("forward", "vjp"):
            if method in cls.__dict__:
                setattr(cls, method, staticmethod(cls.__dict__[method]))
        if hasattr(cls, "forward"):  # a rule that inherits its forward may have a vjp of its own
            cls.apply = staticmethod(_complete(cls, cls.guard(_function(cls).apply)))

    @classmethod
    def guard(cls, apply: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``apply`` as it is: ``forward`` refuses what does not fit."""
        return apply

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """What the backward needs of a call."""
        raise NotImplementedError(f"{cls.__name__} does not say what its backward needs")

    @classmethod
    def pull_back(cls, g: Tensor, kept: tuple[Any, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """What ``vjp`` returns, from what ``keeps`` kept."""
        return cls.vjp(g, *kept, needs=needs)


def _complete(rule: type[Rule], apply: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``apply`` with every input in its place: as given, by position or name, or at the default of ``forward``."""
    parameters = inspect.signature(rule.forward).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    names = tuple([name for name, p in parameters.items() if p.kind is not p.VAR_POSITIONAL])
    n, any_number = len(names), len(names) < len(parameters)

    def call(*inputs: Any, **settings: Any) -> Tensor:
        if not settings and (len(inputs) == n or (any_number and len(inputs) > n)):
            return apply(*inputs)
        given, rest = {**defaults, **settings}, names[len(inputs) :]
        unknown, missing = sorted(settings.keys() - set(rest)), [name for name in rest if name not in given]
        if unknown or missing or len(inputs) > n:
            problem = f"{', '.join(unknown)} unknown or given twice" if unknown else f"{', '.join(missing)} missing"
            problem = problem if unknown or missing else f"{len(inputs)} inputs"
            expected = ", ".join([f"*{name}" if p.kind is p.VAR_POSITIONAL else name for name, p in parameters.items()])
            raise TypeError(f"{rule.name}: {problem}; expected ({expected})")
        return apply(*inputs, *[given[name] for name in rest])

    return call


def _function(rule: type[Rule]) -> type[torch.autograd.Function]:
    """The ``autograd.Function`` of a rule."""

    class Template(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Tensor:
            y = rule.forward(*inputs)
            return y if torch.compiler.is_compiling() or not is_batchedtensor(y) else _owned_by_all(y)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            kept = rule.keeps(inputs, output, ctx.needs_input_grad)
            dtypes = [t.dtype if isinstance(t, Tensor) else None for t in inputs]
            others = [None if isinstance(t, Tensor) else t for t in kept]
            ctx.beside = dtypes, others  # one attribute: each costs as much as a small operation
            ctx.save_for_backward(*[t if isinstance(t, Tensor) else None for t in kept])

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
            dtypes, others = ctx.beside
            # Under autocast g is of lower precision than what was kept, and a product refuses to mix them.
            saved = (
                ctx.saved_tensors if rule.mixes else [t if t is None else _cast(t, g.dtype) for t in ctx.saved_tensors]
            )
            kept = tuple([o if t is None else t for t, o in zip(saved, others, strict=True)])
            grads = rule.pull_back(g, kept, ctx.needs_input_grad)
            if len(grads) < len(dtypes):  # settings have none
                grads += (None,) * (len(dtypes) - len(grads))
            return tuple([t if t is None else _cast(t, d) for t, d in zip(grads, dtypes, strict=True)])

    # torch binds the arguments of every call to this signature: worked out each time it would cost as much as the rule
    Template.forward.__signature__ = inspect.signature(Template.forward)  # type: ignore[attr-defined]  # inspect reads it
    return type(rule.__name__, (Template,), {})  # named when made: the node in the graph is <name>Backward


def _owned_by_all(y: Tensor) -> Tensor:
    """Under vmap torch's own functions may give a view of what holds all members."""
    return y.clone() if get_unwrapped(y)._is_view() else y


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype or not t.is_floating_point() else t.to(dtype)


def wide(t: Tensor) -> Tensor:
    """At least float32: sums of many narrower numbers would lose what they add.

    Example:
        >>> wide(torch.zeros(2, dtype=torch.float16)).dtype, wide(torch.zeros(2, dtype=torch.float64)).dtype
        (torch.float32, torch.float64)
    """
    return t.float() if t.element_size() < 4 else t


def owned(y: Tensor) -> Tensor:
    """The same numbers, no view: one made inside a rule could not be changed in place.  A compiler has no views.

    Example:
        >>> x = torch.zeros(2)
        >>> owned(x) is x, owned(x[:]) is x[:]
        (True, False)
    """
    return y if torch.compiler.is_compiling() or not y._is_view() else y.clone()
