"""How each operation of the closed set is computed. Knows no graph, no file and no manifold.

An operation is a function of the values it reads, of the tensors it holds by role, and of its
attributes, in which every dimension has become a number.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Held = Mapping[str, Tensor]
Attributes = Mapping[str, Any]
Run = Callable[[tuple[Tensor, ...], Held, Attributes], Tensor]


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


def _one(function: Callable[..., Tensor], *names: str) -> Run:
    """An elementwise function of one value; `names` are the attributes it takes."""
    return lambda v, h, a: function(v[0], **{name: a[name] for name in names})


def _two(function: Callable[[Any, Any], Tensor]) -> Run:
    """A function of two values that are broadcast against each other."""
    return lambda v, h, a: function(v[0], v[1])


def _with_number(function: Callable[[Any, Any], Tensor]) -> Run:
    """The same of one value and a number, which stands first if `reversed`."""
    return lambda v, h, a: (
        function(a["number"], v[0]) if a["reversed"] else function(v[0], a["number"])
    )


_ARITHMETIC = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
}

COMPUTE: dict[str, Run] = {
    "conv": _convolution,
    "conv_transpose": _transposed,
    "linear": lambda v, h, a: F.linear(v[0], h["weight"], h.get("bias")),
    "batch_norm": _batch_norm,
    "affine": _affine,
    # Not torch.nn.functional's, which refuses one image of one value a group: narrow networks have it.
    "group_norm": lambda v, h, a: torch.group_norm(
        v[0], a["groups"], h.get("weight"), h.get("bias"), a["eps"]
    ),
    "layer_norm": lambda v, h, a: F.layer_norm(
        v[0], tuple(v[0].shape[-a["dimensions"] :]), h.get("weight"), h.get("bias"), a["eps"]
    ),
    "prelu": lambda v, h, a: F.prelu(v[0], h["weight"]),
    "parameter": lambda v, h, a: h["value"],
    "relu": _one(F.relu),
    "relu6": _one(F.relu6),
    "leaky_relu": _one(F.leaky_relu, "negative_slope"),
    "elu": _one(F.elu, "alpha"),
    "gelu": _one(F.gelu, "approximate"),
    "silu": _one(F.silu),
    "mish": _one(F.mish),
    "hardswish": _one(F.hardswish),
    "hardsigmoid": _one(F.hardsigmoid),
    "hardtanh": _one(F.hardtanh, "min_val", "max_val"),
    "sigmoid": _one(torch.sigmoid),
    "tanh": _one(torch.tanh),
    "softplus": _one(F.softplus, "beta", "threshold"),
    "exp": _one(torch.exp),
    "neg": _one(torch.neg),
    "softmax": _one(torch.softmax, "dim"),
    "log_softmax": _one(torch.log_softmax, "dim"),
    **{name: _two(function) for name, function in _ARITHMETIC.items()},
    **{f"{name}_number": _with_number(function) for name, function in _ARITHMETIC.items()},
    "cat": lambda v, h, a: torch.cat(v, a["dim"]),
    "max_pool": _pool("max"),
    "avg_pool": _pool("avg"),
    "adaptive_max_pool": _adaptive("max"),
    "adaptive_avg_pool": _adaptive("avg"),
    "mean": lambda v, h, a: v[0].mean(tuple(a["dims"]), a["keepdim"]),
    "resize": _resize,
    "pad": lambda v, h, a: F.pad(v[0], tuple(a["pad"]), a["mode"], a["value"]),
    "reshape": lambda v, h, a: v[0].reshape(a["shape"]),
    "permute": lambda v, h, a: v[0].permute(tuple(a["order"])),
    "expand": lambda v, h, a: v[0].expand(a["shape"]),
    "slice": _slice,
}
