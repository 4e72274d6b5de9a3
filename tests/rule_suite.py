"""What holds for every rule, each check a function of a case; a suite pairs it with the rules and with faulty twins.

A case knows the rule, torch's own function and how to draw inputs for both.  A twin is the rule with one fault; each
check must fail for the twins it names, so that it is known to be able to.  A mutant is a twin made from the source.
"""

import inspect
import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.testing import assert_close

from bpdiag.rules import Rule

torch.set_num_threads(1)

TIGHT = {"rtol": 1e-14, "atol": 1e-14, "equal_nan": True}
LOOSE = {"rtol": 1e-10, "atol": 1e-11, "equal_nan": True}  # sums of many products, in an order of their own
EXAMPLES = range(36)  # generated shapes of a rule, by seed
NARROW = (torch.float16, torch.bfloat16)
CAUGHT = (AssertionError, GradcheckError, pytest.fail.Exception)


@dataclass(frozen=True)
class Case:
    """A rule, torch's own function, and tensors for both, float64 and away from kinks."""

    rule: type[Rule]
    oracle: Callable  # (*tensors, **settings)
    inputs: Callable  # seed -> tensors of one shape
    settings: dict[str, Any] = field(default_factory=dict)
    generate: Callable | None = None  # seed -> (tensors, settings) of any shape
    tolerance: dict[str, Any] = field(default_factory=lambda: TIGHT)
    narrow: Callable | None = None  # as generate, for narrow numbers, where some shapes leave no digit
    any_dtype: bool = False  # of the rule's tensors: it moves numbers of every kind

    def arguments(self, tensors):
        """All that ``forward`` and ``keeps`` take."""
        bound = inspect.signature(self.rule.forward).bind(*tensors, **self.settings)
        bound.apply_defaults()
        return bound.args

    def names(self, tensors):
        """What a refusal calls each tensor."""
        return list(inspect.signature(self.rule.forward).parameters)[: len(tensors)]

    def ours(self, *tensors):
        return self.rule.apply(*self.arguments(tensors))

    def theirs(self, *tensors):
        return self.oracle(*tensors, **self.settings)

    def example(self, seed, narrow=False):
        """The case on a generated shape, and the tensors: plain, with gaps, columns first, or one row repeated."""
        tensors, settings = (self.narrow if narrow and self.narrow else self.generate)(seed)
        one = replace(self, settings=settings, tolerance=LOOSE)
        return one, laid(tensors, LAYOUTS[seed % len(LAYOUTS)])


class Suite:
    """check -> (the cases it holds for, the twins it catches); and all mutants of these rules."""

    def __init__(self, cases, mutants=()):
        self.cases, self.checks, self.all_mutants = cases, {}, mutants

    def check(self, over, catches):
        def register(function):
            assert function not in self.checks
            self.checks[function] = (list(over), list(catches))
            return function

        return register

    def grid(self, column):
        return [
            pytest.param(function, entry, id=f"{function.__name__}-{getattr(entry, '__name__', entry)}")
            for function, columns in self.checks.items()
            for entry in columns[column]
        ]

    @property
    def rules(self):
        return pytest.mark.parametrize(("function", "name"), self.grid(0))

    @property
    def twins(self):
        return pytest.mark.parametrize(("function", "twin"), self.grid(1))

    @property
    def mutants(self):
        """All of them at once; the test is named by what it proves."""
        n = len(self.all_mutants)
        return pytest.mark.parametrize("mutants", [pytest.param(self.all_mutants, id=f"{n} of {n} caught")])

    def run(self, function, name):
        torch.manual_seed(0)  # gradcheck draws from the global generator
        function(self.cases[name])

    def assert_caught(self, function, twin):
        torch.manual_seed(0)
        with pytest.raises(CAUGHT):
            function(replace(self.cases[twin.name], rule=twin))

    def missed(self, mutants):
        """Those that torch's own function does not tell from the rule on any generated shape."""
        check = torch_on_generated_shapes
        return [m.__name__ for m in mutants if not caught(check, replace(self.cases[m.name], rule=m))]

    def assert_sound(self, twin):
        """A twin without a fault passes every check, so that the others fail by their fault, not by being twins."""
        for function, (over, _) in self.checks.items():
            if twin.name in over:
                torch.manual_seed(0)
                function(replace(self.cases[twin.name], rule=twin))


def caught(function, case):
    try:
        function(case)
    except CAUGHT:
        return True
    return False


# ---- drawing and running ----


def random(seed):
    return torch.Generator().manual_seed(seed)


def some(r, n, *of):
    """n of these."""
    return tuple(r.choice(of) for _ in range(n))


def draw(*shapes, seed=0):
    one = random(seed)
    return tuple([torch.randn(shape, generator=one, dtype=torch.float64) for shape in shapes])


def drawn(*shapes):
    """Inputs of these shapes, by seed."""
    return lambda seed: draw(*shapes, seed=seed)


def is_float(t):
    return isinstance(t, torch.Tensor) and t.is_floating_point()


def in_dtype(t, dtype):
    return t.to(dtype) if is_float(t) else t


def floats(tensors):
    return tuple(filter(is_float, tensors))


def leaves(inputs, needs=None):
    """Copies, of which those that float need a gradient: all, or as ``needs`` says."""
    need = itertools.repeat(True) if needs is None else iter(needs)
    return tuple(t.clone().requires_grad_(next(need)) if is_float(t) else t for t in inputs)


def every_need(inputs):
    """Of many inputs none, all, each alone and all but each."""
    n = len(floats(inputs))
    if n <= 4:
        return list(itertools.product((True, False), repeat=n))
    alone = [tuple(i == k for i in range(n)) for k in range(n)]
    return [(True,) * n, *alone, *[tuple(not a for a in one) for one in alone], (False,) * n]


def cotangent_of(out, seed=7):
    return torch.randn(out.shape, generator=random(seed), dtype=torch.float64).to(out.dtype)


def outcome(function, inputs, cotangent=None):
    """Output and gradients; of the floating-point inputs as they are, strides included."""
    inputs = tuple(t.detach().requires_grad_() if is_float(t) else t for t in inputs)
    out = function(*inputs)
    g = cotangent_of(out) if cotangent is None else cotangent
    return out.detach(), *torch.autograd.grad(out, floats(inputs), g)


def twice(function, inputs):
    """The gradients of a scalar made of output and gradients."""
    inputs = leaves(inputs)
    out = function(*inputs)
    g = cotangent_of(out).requires_grad_()
    once = torch.autograd.grad(out, floats(inputs), g, create_graph=True)
    loss = sum((t * t).sum() for t in once) + (out * out).sum()
    return torch.autograd.grad(loss, (*floats(inputs), g), materialize_grads=True)


def once_more(function, inputs, needs):
    """The gradients of the gradients that are asked for, and of nothing beside them."""
    inputs = leaves(inputs, needs)
    asked = [t for t in floats(inputs) if t.requires_grad]
    out = function(*inputs)
    g = cotangent_of(out).requires_grad_()
    once = torch.autograd.grad(out, asked, g, create_graph=True)
    return torch.autograd.grad(once, (*asked, g), list(map(cotangent_of, once)), materialize_grads=True)


def told(case, inputs):
    def where(message):
        shapes = [None if t is None else tuple(t.shape) for t in inputs]
        return f"{case.rule.__name__} {shapes} {case.settings}: {message}"

    return where


def assert_same(case, inputs, cotangent=None, **tolerance):
    ours, theirs = (outcome(f, inputs, cotangent) for f in (case.ours, case.theirs))
    assert_close(ours, theirs, **(tolerance or case.tolerance), msg=told(case, inputs))


def kept_bytes(function, inputs):
    sizes = []

    def pack(t):
        sizes.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(*inputs)
    return sum(sizes)


LAYOUTS = (
    lambda t: t,
    lambda t: torch.stack([t, t], -1)[..., 0],  # every second number
    lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,  # columns first
    lambda t: t[:1].expand_as(t),  # one row again and again
)


def laid(tensors, layout):
    return tuple(t if t is None or not t.dim() else layout(t) for t in tensors)


def spacings_off(ours, exact, dtype):
    """The largest distance, in spacings of the narrow numbers there."""
    most, info = 0.0, torch.finfo(dtype)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == dtype
        spacing = info.eps * 2.0 ** (b.abs().frexp().exponent - 1).clamp(min=math.log2(info.smallest_normal))
        most = max([most, *((a.double() - b).abs() / spacing).flatten().tolist()])
    return most


def rounded(case, dtype):
    """The case with its settings in a dtype."""
    return replace(case, settings={k: in_dtype(v, dtype) for k, v in case.settings.items()})


def narrow_errors(case, tensors, dtype):
    """Ours and torch's own, both of float64 on the same narrow numbers."""
    tensors = tuple(in_dtype(t, dtype) for t in tensors)
    narrow = rounded(case, dtype)
    exact = rounded(narrow, torch.float64)
    wide = tuple(in_dtype(t, torch.float64) for t in tensors)
    g = cotangent_of(exact.theirs(*wide)).to(dtype)
    whole = outcome(exact.theirs, wide, g.double())
    return [spacings_off(outcome(f, tensors, g), whole, dtype) for f in (narrow.ours, narrow.theirs)]


# ---- the checks ----


def gradient(case):
    assert gradcheck(case.ours, leaves(case.inputs(0)), check_batched_grad=True)


def second_gradient(case):
    assert gradgradcheck(case.ours, leaves(case.inputs(0)), check_batched_grad=True)


def torchs_values_and_gradients(case):
    for seed in range(3):
        assert_same(case, case.inputs(seed))


def torchs_second_gradients(case):
    inputs = case.inputs(0)
    assert_close(twice(case.ours, inputs), twice(case.theirs, inputs), **case.tolerance)


def torch_on_generated_shapes(case):
    for seed in EXAMPLES:
        one, tensors = case.example(seed)
        assert_same(one, tensors)
        if one.theirs(*tensors).isfinite().all():  # of nan there is no second gradient
            ours, theirs = twice(one.ours, tensors), twice(one.theirs, tensors)
            assert_close(ours, theirs, **one.tolerance, msg=told(one, tensors))


def torchs_second_gradients_of_whatever_is_asked_for(case):
    """Without the output, whose own gradient would stand in for a graph that was lost."""
    for one, tensors in [(case, case.inputs(0)), *map(case.example, EXAMPLES)]:
        if not one.theirs(*tensors).isfinite().all():
            continue
        for needs in filter(any, every_need(tensors)):
            where = f"second gradients of {needs}"
            try:
                theirs = once_more(one.theirs, tensors, needs)
            except RuntimeError:  # torch's own: of one that is empty it keeps no graph
                assert "concat" in case.rule.name, told(one, tensors)(where)
                continue
            try:
                ours = once_more(one.ours, tensors, needs)
            except RuntimeError as error:
                raise AssertionError(told(one, tensors)(f"{where}: {error}")) from error
            assert_close(ours, theirs, **one.tolerance, msg=told(one, tensors))


def finite_differences_on_generated_shapes(case):
    for seed in EXAMPLES[1::3]:  # every third may lie on a kink
        one, tensors = case.example(seed)
        if all(t.numel() for t in floats(tensors)):
            assert gradcheck(one.ours, leaves(tensors), fast_mode=True)
            assert gradgradcheck(one.ours, leaves(tensors), fast_mode=True)


def vjp_alone_is_torchs_and_none_where_not_asked_for(case):
    """Called by itself: autograd would sum a cotangent of a wrong shape to the right one."""
    for one, tensors in [(case, case.inputs(0)), *map(case.example, EXAMPLES)]:
        arguments = one.arguments(tensors)
        out = one.rule.forward(*arguments)
        g = cotangent_of(out)
        theirs = iter(outcome(one.theirs, tensors, g)[1:])
        whole = [next(theirs) if any(t is u for u in floats(tensors)) else None for t in arguments]
        for some in every_need(tensors):
            need = iter(some)
            needs = tuple([t is not None and next(need) for t in whole])
            ours = one.rule.pull_back(g, one.rule.keeps(arguments, out, needs), needs)
            ours += (None,) * (len(arguments) - len(ours))
            for a, b, needed in zip(ours, whole, needs, strict=True):
                assert (a is not None) == needed, needs
                if needed:
                    assert_close(a, b, **one.tolerance, msg=told(one, tensors))


def keeps_no_more_than_torch(case):
    """Whichever inputs need a gradient."""
    for one, tensors in [(case, case.inputs(0)), *map(case.example, EXAMPLES)]:
        for needs in every_need(tensors):
            ours, theirs = (kept_bytes(f, leaves(tensors, needs)) for f in (one.ours, one.theirs))
            short_cut = case.rule.name == "batch_norm" and not tensors[0].numel()  # torch's, of an empty batch
            assert ours <= theirs or short_cut, told(one, tensors)(f"{ours} bytes, torch {theirs}; {needs}")


def keeps_what_entered(case):
    """And the output, and not a byte more: where what torch keeps depends on the kernel it picks, or grows inside."""
    for one, tensors in [(case, case.inputs(0)), *map(case.example, EXAMPLES)]:
        of = (*tensors, *one.settings.values(), one.ours(*tensors))
        entered = sum(t.nbytes for t in of if isinstance(t, torch.Tensor))
        for needs in every_need(tensors):
            ours = kept_bytes(one.ours, leaves(tensors, needs))
            assert ours <= entered, told(one, tensors)(f"{ours} bytes, {entered} entered; {needs}")


def vmap_equals_a_loop(case):
    members = [case.inputs(seed) for seed in range(3)]
    stack = tuple(torch.stack(ts, 0) for ts in zip(*members, strict=True))
    argnums = tuple(i for i, t in enumerate(stack) if t.is_floating_point())

    def loss(function):
        return lambda *inputs: function(*inputs).square().sum()

    def loop(inputs, dims):
        one = [tuple(t if d is None else t.select(d, k) for t, d in zip(inputs, dims, strict=True)) for k in range(3)]
        out = torch.stack([case.theirs(*member) for member in one])
        grads = []
        for member in map(leaves, one):
            grads.append(torch.autograd.grad(loss(case.theirs)(*member), floats(member)))
        return out, tuple(torch.stack(g) for g in zip(*grads, strict=True))

    def mapped(inputs, dims):
        vmap, grad = torch.func.vmap, torch.func.grad
        return (
            vmap(case.ours, in_dims=dims)(*inputs),
            vmap(grad(loss(case.ours), argnums=argnums), in_dims=dims)(*inputs),
        )

    n = len(stack)
    last = tuple(t.movedim(0, -1) for t in stack)  # the members' dimension may stand anywhere
    ways = [(stack, (0,) * n), (last, (-1,) * n)]
    for k in range(n):  # ... and be missing from all inputs but one
        alone = tuple([t if i == k else t[0] for i, t in enumerate(stack)])
        ways.append((alone, tuple([0 if i == k else None for i in range(n)])))
    for inputs, dims in ways:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "An output with one or more elements was resized")  # torch's own prelu
            ours = mapped(inputs, dims)
        assert_close(ours, loop(inputs, dims), **case.tolerance)


def autocast_keeps_gradients_float32(case):
    inputs = tuple(in_dtype(t, torch.float32) for t in case.inputs(0))
    first = next(i for i, t in enumerate(inputs) if is_float(t))
    eye = torch.eye(inputs[first].shape[-1])

    def after_a_product(function):  # bfloat16 enters a rule, whose other inputs stay float32
        return lambda *t: function(*t[:first], t[first] @ eye, *t[first + 1 :])

    exact = outcome(case.theirs, inputs)
    for wrap, inside in itertools.product((lambda f: f, after_a_product), (False, True)):

        def cast(function, wrap=wrap, inside=inside):
            own = leaves(inputs)
            with torch.autocast("cpu", torch.bfloat16):
                out = wrap(function)(*own)
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):  # the backward is run outside, as a rule
                return out.detach(), *torch.autograd.grad(out, floats(own), cotangent_of(out))

        ours, theirs = cast(case.ours), cast(case.theirs)
        assert [t.dtype for t in ours] == [t.dtype for t in theirs]
        assert all(t.dtype == torch.float32 for t in ours[1:])
        assert_close(tuple(t.float() for t in ours), exact, rtol=0.02, atol=0.02)


def any_layout(case):
    inputs = case.inputs(0)
    for layout in (*LAYOUTS, lambda t: t[..., :1].expand_as(t) if t.is_floating_point() else t):
        assert_same(case, laid(inputs, layout))
    out = case.theirs(*inputs)
    assert_same(case, inputs, cotangent_of(out[..., :1] if out.dim() else out).expand_as(out))


def any_precision(case):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)):
        assert_same(case, tuple(in_dtype(t, dtype) for t in case.inputs(0)), rtol=tolerance, atol=tolerance)


def narrow_numbers_are_as_near_as_torchs(case):
    for one, tensors in [(case, case.inputs(0)), *[case.example(seed, narrow=True) for seed in EXAMPLES]]:
        for dtype in NARROW:
            ours, theirs = narrow_errors(one, tensors, dtype)
            far = f"{dtype}: {ours:.2f} spacings off, torch's own {theirs:.2f}"
            assert ours <= max(2, 2 * theirs), told(one, tensors)(far)


def apply_alone_casts_a_cotangent(case):
    for one, tensors in [(case, case.inputs(0)), *map(case.example, EXAMPLES)]:
        one, tensors = rounded(one, torch.bfloat16), tuple(in_dtype(t, torch.bfloat16) for t in tensors)
        arguments = one.arguments(tensors)
        needs = tuple([is_float(t) and any(t is u for u in tensors) for t in arguments])
        out = one.rule.forward(*arguments)
        alone = one.rule.pull_back(torch.ones_like(out), one.rule.keeps(arguments, out, needs), needs)
        assert {t.dtype for t in alone if t is not None} <= {torch.bfloat16, torch.float32}
        assert {t.dtype for t in outcome(one.ours, tensors)} == {torch.bfloat16}


def inputs_and_output_stay_apart(case):
    """What is done to the output in place reaches no input, and autograd allows it, unless a slope needs the output."""

    def doubled_in_place(function, inputs):
        out = function(*inputs)
        out.mul_(2)
        try:
            return torch.autograd.grad(out, floats(inputs), cotangent_of(out))
        except RuntimeError:
            return None

    for one, tensors in [(case, case.inputs(0)), *map(case.example, EXAMPLES)]:
        inputs = leaves(tensors)
        try:
            ours = doubled_in_place(one.ours, inputs)
        except RuntimeError as error:
            raise AssertionError(told(one, tensors)(str(error))) from error
        assert all(a is None or torch.equal(a, b) for a, b in zip(inputs, tensors, strict=True))
        if ours is None:
            assert case.rule.saves == "output"
        else:
            g = cotangent_of(one.theirs(*inputs))
            assert_close(ours, torch.autograd.grad(2 * one.theirs(*inputs), floats(inputs), g), **LOOSE)


def nan_and_infinity_go_where_torchs_go(case):
    for value in (math.nan, math.inf, -math.inf):
        inputs = leaves(case.inputs(0))
        first = floats(inputs)[0]
        first.data.reshape(-1)[first.numel() // 2] = value
        assert_same(case, tuple(t.detach() for t in inputs))


def refuses_by_name(case):
    """No tensor, no real numbers, or another device: the error names the argument."""
    tensors = case.inputs(0)
    for i, (argument, t) in enumerate(zip(case.names(tensors), tensors, strict=True)):
        faults = [("three", TypeError)]
        if not case.any_dtype:
            faults.append((t.to(torch.complex64), TypeError))
            faults += [(t.int(), TypeError)] if is_float(t) else []
        if i:
            faults += [(t.to("meta"), ValueError)]
        for fault, kind in faults:
            given = [fault if k == i else u for k, u in enumerate(tensors)]
            try:
                with pytest.raises(kind, match=f"^{case.rule.name}: {argument} is .*; expected "):
                    case.ours(*given)
            except (RuntimeError, ArithmeticError) as error:
                raise AssertionError(f"{argument} is told by torch: {error}") from error


EVERY = (
    gradient,
    torchs_values_and_gradients,
    torchs_second_gradients,
    torch_on_generated_shapes,
    torchs_second_gradients_of_whatever_is_asked_for,
    finite_differences_on_generated_shapes,
    vjp_alone_is_torchs_and_none_where_not_asked_for,
    vmap_equals_a_loop,
    autocast_keeps_gradients_float32,
    any_layout,
    any_precision,
    nan_and_infinity_go_where_torchs_go,
)


def standard(cases, mutants, wrong, also):
    """A suite of the checks that need nothing but a case; ``wrong`` are twins that each of them catches.

    ``also``: further twins of a check, among them all of those whose faults are of another kind.
    """
    suite = Suite(cases, mutants)
    for function in EVERY:
        suite.check(cases, [*wrong, *also.get(function, ())])(function)
    for function, twins in also.items():
        if function not in EVERY:
            suite.check(cases, twins)(function)
    return suite
