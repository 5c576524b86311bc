"""Rules of what holds weights: convolutions, linear maps, norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from training.trace.axes import Dim
from training.trace.call import constants, pair
from training.trace.tracing import Spans, Tracing


def convolution(t: Tracing, a: dict[str, Any], transposed: bool = False) -> str:
    """A convolution; a grouped one whose groups are whole blocks of channels morphs with them."""
    x = t.read(a["input"])
    weight = t.held(a["weight"])
    assert weight is not None
    shape = tuple(t.tensors[weight].shape)
    given, groups = t.dims[x][1], int(a["groups"])
    spatial: list[Dim] = [((None, size),) for size in shape[2:]]
    count = len(spatial)
    total = t.axes.size(given)
    reads = total // groups
    makes = shape[1] if transposed else shape[0] // groups
    if groups == 1:
        made = t.new(makes)
        expression: Dim = ((None, 1),)
        across = (made, given) if not transposed else (given, made)
    else:
        whole = t.axes.blocks(given, reads)
        if whole is None:
            t.axes.fix(given, f"feeds {t.where()}, whose groups cut across it")
            whole = t.axes.now(given)
            made, expression = ((None, makes * groups),), ((None, groups),)
            if any(axis is not None and repeat % reads for axis, repeat in whole):
                whole = ((None, total),)
        else:
            made = tuple((axis, repeat // reads * makes) for axis, repeat in whole)
            expression = tuple((axis, repeat // reads) for axis, repeat in whole)
        inner: Dim = ((None, makes if transposed else reads),)
        across = (whole, inner) if transposed else (made, inner)
    padding = a["padding"]
    if isinstance(padding, str):
        raise t.error(f"has padding {padding!r}: give it as numbers")
    attributes = {
        "stride": pair(a["stride"], count),
        "padding": pair(padding, count),
        "dilation": pair(a["dilation"], count),
        "groups": Spans(expression),
    }
    if transposed:
        attributes["output_padding"] = pair(a["output_padding"], count)
    return t.add(
        "conv_transpose" if transposed else "conv",
        (x,),
        (t.dims[x][0], made, *constants(t.node, 2)),
        {"weight": (weight, (*across, *spatial)), "bias": (t.held(a["bias"]), (made,))},
        attributes,
    )


def transposed(t: Tracing, a: dict[str, Any]) -> str:
    """A transposed convolution."""
    return convolution(t, a, transposed=True)


def linear(t: Tracing, a: dict[str, Any]) -> str:
    """A linear map of the last dimension."""
    x = t.read(a["input"])
    weight = t.held(a["weight"])
    assert weight is not None
    made = t.new(t.tensors[weight].shape[0])
    return t.add(
        "linear",
        (x,),
        (*t.dims[x][:-1], made),
        {
            "weight": (weight, (made, t.dims[x][-1])),
            "bias": (t.held(a["bias"]), (made,)),
        },
        {},
    )


def batch_norm(t: Tracing, a: dict[str, Any]) -> str:
    """A batch norm with running statistics."""
    x = t.read(a["input"])
    mean, variance = t.held(a["running_mean"]), t.held(a["running_var"])
    if a["training"] or mean is None or variance is None:
        raise t.error("keeps no running statistics: use track_running_stats=True")
    spans = (t.dims[x][1],)
    held = {
        "mean": (mean, spans),
        "variance": (variance, spans),
        "weight": (t.held(a["weight"]), spans),
        "bias": (t.held(a["bias"]), spans),
    }
    return t.add("batch_norm", (x,), t.dims[x], held, {"eps": float(a["eps"])})


def group_norm(t: Tracing, a: dict[str, Any]) -> str:
    """A group norm; its groups morph where each is whole blocks of channels."""
    x = t.read(a["input"])
    groups = int(a["num_groups"])
    given = t.dims[x][1]
    expression: Dim = ((None, groups),)
    if groups > 1:
        each = t.axes.size(given) // groups
        whole = t.axes.blocks(given, each)
        if whole is None:
            t.axes.fix(given, f"feeds {t.where()}, whose groups cut across it")
        else:
            expression = tuple((axis, repeat // each) for axis, repeat in whole)
    return _grouped(t, a, x, expression)


def _grouped(t: Tracing, a: dict[str, Any], x: str, groups: Dim) -> str:
    """A group norm of `x` whose number of groups follows from a dimension."""
    spans = (t.dims[x][1],)
    held = {"weight": (t.held(a["weight"]), spans), "bias": (t.held(a["bias"]), spans)}
    values = {"groups": Spans(groups), "eps": float(a["eps"])}
    return t.add("group_norm", (x,), t.dims[x], held, values)


def instance_norm(t: Tracing, a: dict[str, Any]) -> str:
    """An instance norm: a group norm of one channel a group."""
    if not a["use_input_stats"]:
        raise t.error("uses running statistics: use track_running_stats=False")
    x = t.read(a["input"])
    return _grouped(t, a, x, t.dims[x][1])


def layer_norm(t: Tracing, a: dict[str, Any]) -> str:
    """A layer norm over the last dimensions."""
    x = t.read(a["input"])
    count = len(a["normalized_shape"])
    spans = t.dims[x][-count:]
    held = {"weight": (t.held(a["weight"]), spans), "bias": (t.held(a["bias"]), spans)}
    return t.add("layer_norm", (x,), t.dims[x], held, {"dimensions": count, "eps": float(a["eps"])})


def prelu(t: Tracing, a: dict[str, Any]) -> str:
    """A PReLU, of one slope or of one a channel."""
    x, weight = t.read(a["self"]), t.held(a["weight"])
    assert weight is not None
    shared = t.tensors[weight].numel() == 1
    spans: Sequence[Dim] = [((None, 1),)] if shared else [t.dims[x][1]]
    return t.add("prelu", (x,), t.dims[x], {"weight": (weight, spans)}, {})
