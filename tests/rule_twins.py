"""Rules with one fault, for the suite of ``rule_suite`` to catch: mutants of the source, and faults of any rule."""

import inspect
import sys
from pathlib import Path

from bpdiag.rules import RULES


def mutant(name, fault, old, new):
    """A rule as its file would have it with one place changed; the place must be there, once."""
    module = RULES[name].__module__
    source = Path(sys.modules[module].__file__).read_text()
    assert source.count(old) == 1, f"{name}, {fault}: {source.count(old)} times in the source: {old}"
    names = {"__name__": module}
    exec(compile(source.replace(old, new), f"<{name}: {fault}>", "exec"), names)
    (rule,) = [t for t in names.values() if isinstance(t, type) and t.__dict__.get("name") == name]
    rule.__name__ = f"{name}: {fault}"
    return rule


def narrow_sums(name):
    """The rule without ``wide``."""
    source = "from bpdiag.rules.function import Rule, wide\n"
    return mutant(name, "sums in narrow numbers", source, source.replace(", wide", "") + "wide = lambda t: t\n")


def twin(rule, fault, vjp=None, keeps=None, forward=None):
    """The rule with another vjp, keeps or forward."""
    body = {"forward": forward or rule.forward, "vjp": vjp or rule.vjp}
    if keeps:
        body["keeps"] = classmethod(lambda cls, *args: keeps(*args))
    return type(f"{rule.name}: {fault}", (rule,), body)


def spoiled(rule, fault, place, spoil):
    """The rule with a fault in one cotangent of several."""

    def vjp(*kept, needs):
        grads = rule.vjp(*kept, needs=needs)
        return tuple([spoil(t) if i == place and t is not None else t for i, t in enumerate(grads)])

    return twin(rule, fault, vjp)


def sound(rule):
    return twin(rule, "no fault")


def unsteady(rule):
    """A vjp of the right value, whose own derivative in g has the wrong sign."""
    return twin(rule, "unsteady", vjp=lambda g, *kept, needs: rule.vjp(2 * g.detach() - g, *kept, needs=needs))


def severed(rule):
    """A cotangent that is asked for alone has lost its graph: of all at once, or beside the output, nobody sees it."""

    def vjp(*args, needs):
        grads = rule.vjp(*args, needs=needs)
        return tuple([t if t is None or sum(needs) > 1 else t.detach() for t in grads])

    return twin(rule, "severed", vjp)


def eager(rule):
    """Computes what nobody asked for."""
    return twin(rule, "eager", vjp=lambda *args, needs: rule.vjp(*args))


def doubled(rule):
    """Casts its cotangents."""

    def vjp(*args, needs):
        return tuple(t if t is None else t.double() for t in rule.vjp(*args, needs=needs))

    return twin(rule, "cotangents in float64", vjp=vjp)


def coarse(rule):
    """Rounds to bfloat16 on its way, which in float16 is up to four spacings."""

    def vjp(*args, needs):
        return tuple(t if t is None else t.bfloat16().to(t.dtype) for t in rule.vjp(*args, needs=needs))

    return twin(rule, "coarse", vjp)


def greedy(rule):
    """Keeps its output besides."""

    def vjp(g, output, *kept, needs):
        return rule.vjp(g, *kept, needs=needs)

    def keeps(inputs, output, needs):
        return output, *rule.keeps(inputs, output, needs)

    return twin(rule, "greedy", vjp, keeps)


def viewing(rule):
    """Returns a view, which autograd lets nobody change in place."""
    return twin(rule, "a view", forward=with_signature(rule, lambda *args: rule.forward(*args)[...]))


def unchecked(rule, forward):
    """Torch's own function, with torch's own errors."""
    return twin(rule, "unchecked", forward=with_signature(rule, forward))


def with_signature(rule, function):
    def forward(*args):
        return function(*args)

    forward.__signature__ = inspect.signature(rule.forward)
    return forward
