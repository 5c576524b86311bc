"""Rules of what works on each value, alone or joined with its like, and of softmax."""

from __future__ import annotations

from typing import Any

from torch import fx

from training.trace import axes as ax
from training.trace.axes import BatchMixed, Dim
from training.trace.tracing import Rule, Tracing


def same(op: str, **attributes: tuple[str, Any]) -> Rule:
    """An operation that keeps every dimension; `attributes` are (argument's name, type)."""

    def rule(t: Tracing, a: dict[str, Any]) -> str:
        x = t.read(a.get("self", a.get("input")))
        values = {key: kind(a[name]) for key, (name, kind) in attributes.items()}
        return t.add(op, (x,), t.dims[x], {}, values)

    return rule


def softmax(op: str) -> Rule:
    """Softmax or its logarithm, over any dimension but the batch."""

    def rule(t: Tracing, a: dict[str, Any]) -> str:
        x = t.read(a["self"])
        dim = int(a["dim"]) % len(t.dims[x])
        if t.dims[x][dim] == ((ax.BATCH, 1),):
            raise BatchMixed
        return t.add(op, (x,), t.dims[x], {}, {"dim": dim})

    return rule


def elu(t: Tracing, a: dict[str, Any]) -> str:
    """An ELU that is not scaled."""
    if a["scale"] != 1 or a["input_scale"] != 1:
        raise t.error("is a scaled ELU")
    x = t.read(a["self"])
    return t.add("elu", (x,), t.dims[x], {}, {"alpha": float(a["alpha"])})


def arithmetic(op: str, flipped: bool = False) -> Rule:
    """Two values, broadcast, or a value and a number; `flipped`: the second comes first."""

    def rule(t: Tracing, a: dict[str, Any]) -> str:
        if a.get("alpha", 1) != 1 or a.get("rounding_mode"):
            raise t.error("has a factor or a rounding mode")
        one, other = a["self"], a["other"]
        if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
            number, value = (one, other) if isinstance(other, fx.Node) else (other, one)
            x = t.read(value)
            first = (number is one) != flipped
            values = {"number": float(number), "reversed": first}
            return t.add(f"{op}_number", (x,), t.dims[x], {}, values)
        left, right = t.read(one), t.read(other)
        if flipped:
            left, right = right, left
        return t.add(op, (left, right), _broadcast(t, left, right), {}, {})

    return rule


def reciprocal(t: Tracing, a: dict[str, Any]) -> str:
    """One by the value: what a number divided by a value begins with."""
    x = t.read(a["self"])
    return t.add("div_number", (x,), t.dims[x], {}, {"number": 1.0, "reversed": True})


def _broadcast(t: Tracing, left: str, right: str) -> list[Dim]:
    a, b = list(t.dims[left]), list(t.dims[right])
    ones: list[Dim] = [((None, 1),)]
    a, b = ones * (len(b) - len(a)) + a, ones * (len(a) - len(b)) + b
    made: list[Dim] = []
    for one, other in zip(a, b, strict=True):
        sizes = t.axes.size(one), t.axes.size(other)
        if sizes[0] == sizes[1]:
            made.append(
                t.axes.unite(one, other, f"is joined with another kind of axis in {t.where()}")
            )
        else:
            made.append(one if sizes[1] == 1 else other)
    return made
