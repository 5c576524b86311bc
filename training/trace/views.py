"""Rules of what lays values out otherwise: concatenation, reshaping, permuting, cutting."""

from __future__ import annotations

from typing import Any

from training.trace import axes as ax
from training.trace.axes import BatchMixed, Dim
from training.trace.call import shape_of
from training.trace.tracing import Spans, SpansOf, Tracing


def cat(t: Tracing, a: dict[str, Any]) -> str:
    """A concatenation: the parts of its dimension lie side by side."""
    names = [t.read(value) for value in a["tensors"]]
    if len(names) == 1:
        return names[0]
    dim = t.channels(names[0], a["dim"])
    made = list(t.dims[names[0]])
    for name in names[1:]:
        for place, other in enumerate(t.dims[name]):
            if place == dim:
                if other == ((ax.BATCH, 1),):
                    raise BatchMixed
                made[dim] = (*made[dim], *other)
            else:
                made[place] = t.axes.unite(made[place], other, f"is joined in {t.where()}")
    return t.add("cat", names, made, {}, {"dim": dim})


def reshape(t: Tracing, a: dict[str, Any]) -> str:
    """view, reshape, flatten, squeeze, unsqueeze: runs of dimensions merged or split."""
    x = t.read(a["self"] if "self" in a else a["input"])
    given, wanted = list(t.dims[x]), list(shape_of(t.node))
    sizes = [t.axes.size(dim) for dim in given]
    made: list[Dim] = []
    i = j = 0
    while i < len(given) or j < len(wanted):
        if i < len(given) and j < len(wanted) and sizes[i] == wanted[j]:
            made.append(given[i])
            i, j = i + 1, j + 1
            continue
        if j < len(wanted) and wanted[j] == 1:
            made.append(((None, 1),))
            j += 1
            continue
        if i < len(given) and sizes[i] == 1:
            i += 1
            continue
        first, second = i, j
        left, right = sizes[i], wanted[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * sizes[i], i + 1
            else:
                right, j = right * wanted[j], j + 1
        if any(dim == ((ax.BATCH, 1),) for dim in given[first:i]):
            raise BatchMixed
        why = f"is reshaped across channels in {t.where()}"
        if j - second == 1:
            made.append(t.axes.merge(given[first:i], why))
        else:
            made += t.axes.split(t.axes.merge(given[first:i], why), wanted[second:j], why)
    return t.add("reshape", (x,), made, {}, {"shape": SpansOf(made)})


def permute(t: Tracing, a: dict[str, Any]) -> str:
    """permute, transpose, t."""
    x = t.read(a["self"])
    rank = len(t.dims[x])
    if "dims" in a:
        order = [int(dim) % rank for dim in a["dims"]]
    else:
        order = list(range(rank))
        i, j = int(a.get("dim0", 0)) % rank, int(a.get("dim1", 1)) % rank
        order[i], order[j] = order[j], order[i]
    return t.add(
        "permute", (x,), [t.dims[x][place] for place in order], {}, {"order": tuple(order)}
    )


def expand(t: Tracing, a: dict[str, Any]) -> str:
    """Dimensions of 1 become as long as they are asked to be."""
    x = t.read(a["self"])
    wanted = shape_of(t.node)
    given = [((None, 1),)] * (len(wanted) - len(t.dims[x])) + list(t.dims[x])
    made: list[Dim] = []
    for dim, size in zip(given, wanted, strict=True):
        made.append(dim if t.axes.size(dim) == size else ((None, size),))
    return t.add("expand", (x,), made, {}, {"shape": SpansOf(made)})


def _cut(t: Tracing, x: str, dim: int, start: int, end: int, step: int) -> str:
    given = t.dims[x][dim]
    if given == ((ax.BATCH, 1),):
        raise BatchMixed
    why = f"is cut in {t.where()}"
    if step != 1:
        t.axes.fix(given, why)
    before, inside = t.axes.take(given, start, end, why)
    made = list(t.dims[x])
    length = inside
    if step != 1:
        made[dim] = ((None, -(-(end - start) // step)),)
    else:
        made[dim] = inside
    values = {
        "dim": dim,
        "start": Spans(before or ((None, 0),)),
        "length": Spans(length),
        "step": step,
    }
    return t.add("slice", (x,), made, {}, values)


def sliced(t: Tracing, a: dict[str, Any]) -> str:
    """slice, narrow."""
    x = t.read(a["self"])
    dim = t.channels(x, int(a["dim"]))
    size = t.axes.size(t.dims[x][dim])
    if "length" in a:
        start = int(a["start"]) % size
        end = start + int(a["length"])
    else:
        start, end, _ = slice(a["start"], a["end"]).indices(size)
    step = int(a.get("step", 1))
    if (start, end, step) == (0, size, 1):
        return x
    return _cut(t, x, dim, start, end, step)


def split(t: Tracing, a: dict[str, Any]) -> str:
    """chunk, split: each part a slice of its own."""
    x = t.read(a["self"])
    dim = t.channels(x, int(a["dim"]))
    sizes = [int(value.shape[dim]) for value in t.node.meta["val"]]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    parts = [_cut(t, x, dim, end - size, end, 1) for size, end in zip(sizes, ends, strict=True)]
    key = f"parts:{t.node.name}"
    t.parts[key] = parts
    return key


def select(t: Tracing, a: dict[str, Any]) -> str:
    """One index of a dimension, which goes."""
    x = t.read(a["self"])
    dim = t.channels(x, int(a["dim"]))
    size = t.axes.size(t.dims[x][dim])
    start = int(a["index"]) % size
    cut = _cut(t, x, dim, start, start + 1, 1)
    made = [each for place, each in enumerate(t.dims[cut]) if place != dim]
    return t.add("reshape", (cut,), made, {}, {"shape": SpansOf(made)})
