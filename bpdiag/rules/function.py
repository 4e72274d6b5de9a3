"""A rule, forward and vjp as plain tensor functions, made into an ``autograd.Function``: the one place.

The same two functions serve autograd (here) and any sweep that calls them itself, so that the maths stands
once.  ``Rule.apply`` is differentiable to any order, because ``vjp`` is written in differentiable operations on
true inputs and outputs; it runs under ``torch.func.vmap`` and under autocast.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor


class Rule:
    """y = f(x_1, ..., x_n),  g_x_i = J_i^T g_y.

    A subclass states two plain functions, written without ``self`` and made static here, and what links them:

    * ``forward(*inputs) -> Tensor``;
    * ``vjp(g, *kept, needs) -> tuple``: one cotangent (or None) per input; ``needs[i]`` is False where nobody asks
      for the i-th, so that it need not be computed;
    * ``keeps(inputs, output, needs) -> tuple of Tensor``: what the backward needs, and no more.

    ``apply(*inputs)`` is the differentiable function made of them.
    """

    name: ClassVar[str]
    apply: ClassVar[Any]
    forward: ClassVar[Any]
    vjp: ClassVar[Any]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for method in ("forward", "vjp"):
            if method in cls.__dict__:
                setattr(cls, method, staticmethod(cls.__dict__[method]))
        if hasattr(cls, "forward"):  # a rule that inherits its forward may have a vjp of its own
            cls.apply = staticmethod(_function(cls).apply)

    @classmethod
    def keeps(cls, inputs: tuple[Any, ...], output: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """What the backward needs of a call."""
        raise NotImplementedError(f"{cls.__name__} does not say what its backward needs")

    @classmethod
    def pull_back(
        cls, g: Tensor, kept: tuple[Tensor | None, ...], needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """One cotangent (or None) per input of ``forward``."""
        return cls.vjp(g, *kept, needs=needs)


def _function(rule: type[Rule]) -> type[torch.autograd.Function]:
    """The ``autograd.Function`` of a rule."""

    class Template(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Tensor:
            return rule.forward(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.dtypes = tuple(t.dtype if isinstance(t, Tensor) else None for t in inputs)
            ctx.save_for_backward(*rule.keeps(inputs, output, ctx.needs_input_grad))

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
            # Under autocast g is of lower precision than what was kept, and a product refuses to mix them.
            kept = tuple(_cast(t, g.dtype) if t is not None and t.is_floating_point() else t for t in ctx.saved_tensors)
            grads = rule.pull_back(g, kept, ctx.needs_input_grad)
            return tuple([t if t is None else _cast(t, d) for t, d in zip(grads, ctx.dtypes, strict=True)])

    # torch binds the arguments of every call to this signature: worked out each time it would cost as much as the rule
    Template.forward.__signature__ = inspect.signature(Template.forward)  # type: ignore[attr-defined]  # inspect reads it
    return type(rule.__name__, (Template,), {})  # named when made: the node in the graph is <name>Backward


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)
