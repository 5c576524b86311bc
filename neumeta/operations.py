"""The closed set of operations that a graph may hold, and how each is computed.

An operation is a function of the values it reads, of the tensors it holds by role, and of its
attributes, in which every dimension has become a number. Nothing else is ever run: a graph that names
another operation is refused when it is read. Knows no graph, no file and no manifold.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Held = Mapping[str, Tensor]
Attributes = Mapping[str, Any]


@dataclass(frozen=True)
class Operation:
    """How to run one operation, and what a node of it must look like.

    `run` takes (values, held tensors, attributes). `inputs` is how many values it reads (None: one or
    more). `tensors` and `optional` are the roles of the tensors it holds. `attributes` says of what
    kind each attribute is: `int`, `ints`, `number`, `flag`, `dim`, `dims`, `text`.
    """

    run: Callable[[tuple[Tensor, ...], Held, Attributes], Tensor]
    inputs: int | None = 1
    tensors: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)


def _convolution(values: tuple[Tensor, ...], held: Held, a: Attributes) -> Tensor:
    weight = held["weight"]
    run = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[weight.ndim - 2]
    return run(
        values[0],
        weight,
        held.get("bias"),
        a["stride"],
        a["padding"],
        a["dilation"],
        a["groups"],
    )


def _transposed(values: tuple[Tensor, ...], held: Held, a: Attributes) -> Tensor:
    weight = held["weight"]
    run = {1: F.conv_transpose1d, 2: F.conv_transpose2d}[weight.ndim - 2]
    return run(
        values[0],
        weight,
        held.get("bias"),
        a["stride"],
        a["padding"],
        a["output_padding"],
        a["groups"],
        a["dilation"],
    )


def _batch_norm(values: tuple[Tensor, ...], held: Held, a: Attributes) -> Tensor:
    # Without kept statistics, those of the batch.
    return F.batch_norm(
        values[0],
        held.get("mean"),
        held.get("variance"),
        held.get("weight"),
        held.get("bias"),
        training="mean" not in held,
        momentum=0.0,
        eps=a["eps"],
    )


def _affine(values: tuple[Tensor, ...], held: Held, a: Attributes) -> Tensor:
    around = (-1, *[1] * (values[0].ndim - 2))
    return values[0] * held["weight"].view(around) + held["bias"].view(around)


def _pool(kind: str) -> Callable[[tuple[Tensor, ...], Held, Attributes], Tensor]:
    functions = {
        ("max", 1): F.max_pool1d,
        ("max", 2): F.max_pool2d,
        ("avg", 1): F.avg_pool1d,
        ("avg", 2): F.avg_pool2d,
    }

    def run(values: tuple[Tensor, ...], held: Held, a: Attributes) -> Tensor:
        function: Any = functions[kind, values[0].ndim - 2]
        more = {"dilation": a["dilation"]} if kind == "max" else {}
        if kind == "avg":
            more = {"count_include_pad": a["count_include_pad"]}
        result: Tensor = function(
            values[0], a["kernel"], a["stride"], a["padding"], ceil_mode=a["ceil_mode"], **more
        )
        return result

    return run


def _adaptive(kind: str) -> Callable[[tuple[Tensor, ...], Held, Attributes], Tensor]:
    functions = {
        ("max", 1): F.adaptive_max_pool1d,
        ("max", 2): F.adaptive_max_pool2d,
        ("avg", 1): F.adaptive_avg_pool1d,
        ("avg", 2): F.adaptive_avg_pool2d,
    }

    def run(values: tuple[Tensor, ...], held: Held, a: Attributes) -> Tensor:
        function: Any = functions[kind, values[0].ndim - 2]
        result: Tensor = function(values[0], tuple(a["size"]))
        return result

    return run


def _resize(values: tuple[Tensor, ...], held: Held, a: Attributes) -> Tensor:
    corners = {"align_corners": a["align_corners"]} if a["mode"] in ("bilinear", "bicubic") else {}
    return F.interpolate(values[0], size=tuple(a["size"]), mode=a["mode"], **corners)


def _slice(values: tuple[Tensor, ...], held: Held, a: Attributes) -> Tensor:
    places: list[slice] = [slice(None)] * values[0].ndim
    places[a["dim"]] = slice(a["start"], a["start"] + a["length"], a["step"])
    return values[0][tuple(places)]


def _one(function: Callable[..., Tensor], **named: str) -> Operation:
    """An elementwise function of one value; `named` are the kinds of its attributes."""
    return Operation(lambda v, h, a: function(v[0], **{k: a[k] for k in named}), attributes=named)


def _two(function: Callable[[Any, Any], Tensor]) -> Operation:
    """A function of two values that are broadcast against each other."""
    return Operation(lambda v, h, a: function(v[0], v[1]), inputs=2)


def _with_number(function: Callable[[Any, Any], Tensor]) -> Operation:
    """The same of one value and a number, which stands first if `reversed`."""
    return Operation(
        lambda v, h, a: (
            function(a["number"], v[0]) if a["reversed"] else function(v[0], a["number"])
        ),
        attributes={"number": "number", "reversed": "flag"},
    )


_WINDOW = {"stride": "ints", "padding": "ints", "dilation": "ints", "groups": "dim"}
_POOL = {"kernel": "ints", "stride": "ints", "padding": "ints", "ceil_mode": "flag"}
_ARITHMETIC = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
}

OPERATIONS: dict[str, Operation] = {
    "conv": Operation(_convolution, 1, ("weight",), ("bias",), {**_WINDOW, "norm": "text?"}),
    "conv_transpose": Operation(
        _transposed,
        1,
        ("weight",),
        ("bias",),
        {**_WINDOW, "output_padding": "ints", "norm": "text?"},
    ),
    "linear": Operation(
        lambda v, h, a: F.linear(v[0], h["weight"], h.get("bias")),
        1,
        ("weight",),
        ("bias",),
        {"norm": "text?"},
    ),
    "batch_norm": Operation(
        _batch_norm, 1, (), ("mean", "variance", "weight", "bias"), {"eps": "number"}
    ),
    "affine": Operation(_affine, 1, ("weight", "bias"), (), {"norm": "text?"}),
    "group_norm": Operation(
        lambda v, h, a: F.group_norm(v[0], a["groups"], h.get("weight"), h.get("bias"), a["eps"]),
        1,
        (),
        ("weight", "bias"),
        {"groups": "dim", "eps": "number"},
    ),
    "layer_norm": Operation(
        lambda v, h, a: F.layer_norm(
            v[0], tuple(v[0].shape[-a["dimensions"] :]), h.get("weight"), h.get("bias"), a["eps"]
        ),
        1,
        (),
        ("weight", "bias"),
        {"dimensions": "int", "eps": "number"},
    ),
    "prelu": Operation(lambda v, h, a: F.prelu(v[0], h["weight"]), 1, ("weight",)),
    "parameter": Operation(lambda v, h, a: h["value"], 0, ("value",)),
    "relu": _one(F.relu),
    "relu6": _one(F.relu6),
    "leaky_relu": _one(F.leaky_relu, negative_slope="number"),
    "elu": _one(F.elu, alpha="number"),
    "gelu": _one(F.gelu, approximate="text"),
    "silu": _one(F.silu),
    "mish": _one(F.mish),
    "hardswish": _one(F.hardswish),
    "hardsigmoid": _one(F.hardsigmoid),
    "hardtanh": _one(F.hardtanh, min_val="number", max_val="number"),
    "sigmoid": _one(torch.sigmoid),
    "tanh": _one(torch.tanh),
    "softplus": _one(F.softplus, beta="number", threshold="number"),
    "exp": _one(torch.exp),
    "neg": _one(torch.neg),
    "softmax": _one(torch.softmax, dim="int"),
    "log_softmax": _one(torch.log_softmax, dim="int"),
    **{name: _two(function) for name, function in _ARITHMETIC.items()},
    **{f"{name}_number": _with_number(function) for name, function in _ARITHMETIC.items()},
    "cat": Operation(lambda v, h, a: torch.cat(v, a["dim"]), None, attributes={"dim": "int"}),
    "max_pool": Operation(_pool("max"), attributes={**_POOL, "dilation": "ints"}),
    "avg_pool": Operation(_pool("avg"), attributes={**_POOL, "count_include_pad": "flag"}),
    "adaptive_max_pool": Operation(_adaptive("max"), attributes={"size": "ints"}),
    "adaptive_avg_pool": Operation(_adaptive("avg"), attributes={"size": "ints"}),
    "mean": Operation(
        lambda v, h, a: v[0].mean(tuple(a["dims"]), a["keepdim"]),
        attributes={"dims": "ints", "keepdim": "flag"},
    ),
    "resize": Operation(
        _resize, attributes={"size": "ints", "mode": "text", "align_corners": "flag"}
    ),
    "pad": Operation(
        lambda v, h, a: F.pad(v[0], tuple(a["pad"]), a["mode"], a["value"]),
        attributes={"pad": "ints", "mode": "text", "value": "number"},
    ),
    "reshape": Operation(lambda v, h, a: v[0].reshape(a["shape"]), attributes={"shape": "dims"}),
    "permute": Operation(
        lambda v, h, a: v[0].permute(tuple(a["order"])), attributes={"order": "ints"}
    ),
    "expand": Operation(lambda v, h, a: v[0].expand(a["shape"]), attributes={"shape": "dims"}),
    "slice": Operation(
        _slice, attributes={"dim": "int", "start": "dim", "length": "dim", "step": "int"}
    ),
}
