"""Rules of what reads a neighbourhood of each place of an image: pooling, means, resizing, padding."""

from __future__ import annotations

from typing import Any

from training.trace import axes as ax
from training.trace.axes import BatchMixed, Dim
from training.trace.call import constants, pair, shape_of
from training.trace.tracing import Rule, Tracing


def pool(op: str, count: int) -> Rule:
    """Pooling over `count` dimensions of space."""

    def rule(t: Tracing, a: dict[str, Any]) -> str:
        x = t.read(a["self"])
        if a.get("divisor_override") is not None:
            raise t.error("has a divisor_override")
        kernel = pair(a["kernel_size"], count)
        values = {
            "kernel": kernel,
            "stride": pair(a["stride"], count) if a["stride"] else kernel,
            "padding": pair(a["padding"], count),
            "ceil_mode": bool(a["ceil_mode"]),
        }
        if op == "max_pool":
            values["dilation"] = pair(a["dilation"], count)
        else:
            values["count_include_pad"] = bool(a["count_include_pad"])
        return t.add(op, (x,), (*t.dims[x][:2], *constants(t.node, 2)), {}, values)

    return rule


def adaptive(op: str, count: int) -> Rule:
    """Adaptive pooling over `count` dimensions of space."""

    def rule(t: Tracing, a: dict[str, Any]) -> str:
        x = t.read(a["self"])
        size = shape_of(t.node)[-count:]
        return t.add(op, (x,), (*t.dims[x][:2], *constants(t.node, 2)), {}, {"size": size})

    return rule


def mean(t: Tracing, a: dict[str, Any]) -> str:
    """The mean over dimensions, but not over the batch."""
    x = t.read(a["self"])
    rank = len(t.dims[x])
    places = sorted(int(dim) % rank for dim in (a.get("dim") or range(rank)))
    if any(t.dims[x][place] == ((ax.BATCH, 1),) for place in places):
        raise BatchMixed
    made: list[Dim] = []
    for place, dim in enumerate(t.dims[x]):
        if place not in places:
            made.append(dim)
        elif a["keepdim"]:
            made.append(((None, 1),))
    return t.add("mean", (x,), made, {}, {"dims": tuple(places), "keepdim": bool(a["keepdim"])})


def resize(mode: str) -> Rule:
    """Resizing of the dimensions of space."""

    def rule(t: Tracing, a: dict[str, Any]) -> str:
        x = t.read(a["input"] if "input" in a else a["self"])
        values = {
            "size": shape_of(t.node)[2:],
            "mode": mode,
            "align_corners": bool(a.get("align_corners", False)),
        }
        return t.add("resize", (x,), (*t.dims[x][:2], *constants(t.node, 2)), {}, values)

    return rule


def pad(t: Tracing, a: dict[str, Any]) -> str:
    """Padding; what is padded by constants still morphs."""
    x = t.read(a["self"])
    pads = [int(p) for p in a["pad"]]
    mode, value = a.get("mode", "constant"), a.get("value") or 0.0
    made = list(t.dims[x])
    for place in range(len(pads) // 2):
        dim = len(made) - 1 - place
        before, after = pads[2 * place : 2 * place + 2]
        if not before and not after:
            continue
        if made[dim] == ((ax.BATCH, 1),):
            raise BatchMixed
        if before < 0 or after < 0 or mode != "constant":
            t.axes.fix(made[dim], f"is padded by {mode} in {t.where()}")
            made[dim] = ((None, t.axes.size(made[dim]) + before + after),)
        else:
            made[dim] = tuple(
                part for part in ((None, before), *made[dim], (None, after)) if part != (None, 0)
            )
    values = {"pad": tuple(pads), "mode": mode, "value": float(value)}
    return t.add("pad", (x,), made, {}, values)
