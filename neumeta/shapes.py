"""The shape that each operation gives, by plain arithmetic: what makes a foreign graph safe to run.

A graph that passes `check` runs without an error and without a value larger than its nodes state.
Nothing is allocated and torch is not needed; the rules are as strict as torch's own, or stricter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from neumeta.graph import BATCH, Graph, Sizes, extent
from neumeta.notation import BadGraph
from neumeta.operations import ARITHMETIC, OPERATIONS

MOST_VALUE = 1 << 30
"""Bound of the numbers that one tensor, or one value for one image, holds in a foreign graph."""
IMAGES = 1_000_003
"""The batch of a check: a prime that no dimension of a network has by chance."""

Ints = tuple[int, ...]
Attributes = Mapping[str, Any]
Rule = Callable[[Sequence[Ints], Mapping[str, Ints], Attributes], Ints]


class _Unfit(Exception):
    """Why an operation cannot run on what it reads."""


def numeric(value: Any, kind: str, sizes: Sizes) -> Any:
    """An attribute's value where the axes have these sizes; -1 stands for the batch."""
    if kind == "dim":
        return extent(value, sizes)
    if kind == "dims":
        return tuple(-1 if dim == ((BATCH, 1),) else extent(dim, sizes) for dim in value)
    return value


def check(graph: Graph, sizes: Sizes) -> None:
    """Every operation fits what it reads, and gives the shape its node states, at these sizes.

    Raises BadGraph naming the node.
    """
    wanted = {**sizes, BATCH: IMAGES}
    tensors = {}
    for name, shape in graph.tensors.items():
        tensors[name] = tuple(extent(dim, wanted) for dim in shape)
        _bounded(name, "a tensor", tensors[name], MOST_VALUE)
    held = {"input": tuple(extent(dim, wanted) for dim in graph.input)}
    if held["input"][:1] != (IMAGES,):
        raise BadGraph("input: its first dimension is not the batch")
    _bounded("input", "a value", held["input"], MOST_VALUE * IMAGES)
    for node in graph.nodes:
        if node.name in held:
            raise BadGraph(f"{node.name}: there are two nodes of this name")
        stated = tuple(extent(dim, wanted) for dim in node.shape)
        _bounded(node.name, "a value", stated, MOST_VALUE * IMAGES)
        own = {role: tensors[name] for role, name in node.tensors.items()}
        kinds = OPERATIONS[node.op].attributes
        attributes = {
            key: numeric(value, kinds[key], sizes) for key, value in node.attributes.items()
        }
        read = []
        for value in node.inputs:
            if value not in held:
                raise BadGraph(f"{node.name}: reads {value!r}, which no node before it makes")
            read.append(held[value])
        try:
            made = RULES[node.op](read, own, attributes)
        except _Unfit as why:
            raise BadGraph(f"{node.name}: {node.op} does not fit what it reads: {why}") from None
        if made != stated:
            raise BadGraph(f"{node.name}: {node.op} gives {_text(made)}, not {_text(stated)}")
        held[node.name] = made
    for _, value in graph.outputs:
        if value not in held:
            raise BadGraph(f"outputs: {value!r} is no value")


def _bounded(name: str, what: str, shape: Ints, most: int) -> None:
    if min(shape, default=1) < 1:
        raise BadGraph(f"{name}: {what} of shape {_text(shape)} holds nothing")
    if math.prod(shape) > most:
        raise BadGraph(f"{name}: {what} of more than {MOST_VALUE} numbers")


def _text(shape: Ints) -> str:
    return "(" + ", ".join("batch" if size == IMAGES else str(size) for size in shape) + ")"


def _fit(holds: bool, why: str) -> None:
    if not holds:
        raise _Unfit(why)


def _all(values: Ints, count: int, least: int, name: str) -> Ints:
    """One number of at least `least` for each spatial dimension."""
    _fit(len(values) == count and min(values, default=least) >= least, f"its {name}")
    return values


def _vector(held: Mapping[str, Ints], channels: int, *roles: str) -> None:
    for role in roles:
        _fit(held.get(role, (channels,)) == (channels,), f"its {role} is no vector of {channels}")


def _window(x: Ints, a: Attributes, ranks: Ints) -> tuple[int, Ints, Ints]:
    count = len(x) - 2
    _fit(count in ranks, f"{len(x)} dimensions")
    return count, _all(a["stride"], count, 1, "stride"), _all(a["padding"], count, 0, "padding")


def _convolution(read: Sequence[Ints], held: Mapping[str, Ints], a: Attributes) -> Ints:
    x, weight, groups = read[0], held["weight"], a["groups"]
    count, stride, padding = _window(x, a, (1, 2, 3))
    dilation = _all(a["dilation"], count, 1, "dilation")
    _fit(len(weight) == len(x) and groups >= 1, "its weight")
    _fit(weight[0] % groups == 0, f"{weight[0]} outputs in {groups} groups")
    _fit(x[1] == weight[1] * groups, f"{x[1]} channels where {weight[1] * groups} are read")
    _vector(held, weight[0], "bias")
    made = []
    for size, kernel, s, p, d in zip(x[2:], weight[2:], stride, padding, dilation, strict=True):
        left = size + 2 * p - d * (kernel - 1) - 1
        _fit(left >= 0, "a kernel larger than its input")
        made.append(left // s + 1)
    return (x[0], weight[0], *made)


def _transposed(read: Sequence[Ints], held: Mapping[str, Ints], a: Attributes) -> Ints:
    x, weight, groups = read[0], held["weight"], a["groups"]
    count, stride, padding = _window(x, a, (1, 2))
    dilation = _all(a["dilation"], count, 1, "dilation")
    more = _all(a["output_padding"], count, 0, "output_padding")
    _fit(len(weight) == len(x) and groups >= 1, "its weight")
    _fit(weight[0] % groups == 0, f"{weight[0]} inputs in {groups} groups")
    _fit(x[1] == weight[0], f"{x[1]} channels where {weight[0]} are read")
    channels = weight[1] * groups
    _vector(held, channels, "bias")
    made = []
    sides = zip(x[2:], weight[2:], stride, padding, dilation, more, strict=True)
    for size, kernel, s, p, d, extra in sides:
        _fit(extra < max(s, d), "its output_padding")
        made.append((size - 1) * s - 2 * p + d * (kernel - 1) + extra + 1)
        _fit(made[-1] >= 1, "its padding takes all there is")
    return (x[0], channels, *made)


def _linear(read: Sequence[Ints], held: Mapping[str, Ints], a: Attributes) -> Ints:
    x, weight = read[0], held["weight"]
    _fit(len(x) >= 2 and len(weight) == 2, "its dimensions")
    _fit(x[-1] == weight[1], f"{x[-1]} features where {weight[1]} are read")
    _vector(held, weight[0], "bias")
    return (*x[:-1], weight[0])


def _by_channel(*roles: str) -> Rule:
    def rule(read: Sequence[Ints], held: Mapping[str, Ints], a: Attributes) -> Ints:
        x = read[0]
        _fit(len(x) >= 2, "no channels")
        _fit(a.get("eps", 0) >= 0, "its eps")
        _vector(held, x[1], *roles)
        return x

    return rule


def _group_norm(read: Sequence[Ints], held: Mapping[str, Ints], a: Attributes) -> Ints:
    x, groups = read[0], a["groups"]
    _fit(a["eps"] >= 0, "its eps")
    _fit(len(x) >= 2 and groups >= 1 and x[1] % groups == 0, f"{groups} groups of {x[1:2]}")
    _vector(held, x[1], "weight", "bias")
    return x


def _layer_norm(read: Sequence[Ints], held: Mapping[str, Ints], a: Attributes) -> Ints:
    x, count = read[0], a["dimensions"]
    _fit(a["eps"] >= 0, "its eps")
    _fit(1 <= count < len(x), f"{count} of {len(x)} dimensions")
    for role in held:
        _fit(held[role] == x[-count:], f"its {role}")
    return x


def _prelu(read: Sequence[Ints], held: Mapping[str, Ints], a: Attributes) -> Ints:
    x = read[0]
    _fit(len(x) >= 2 and held["weight"] in ((1,), x[1:2]), "its weight")
    return x


def _hardtanh(read: Sequence[Ints], held: Mapping[str, Ints], a: Attributes) -> Ints:
    _fit(a["min_val"] <= a["max_val"], "its bounds")
    return read[0]


def _same(read: Sequence[Ints], held: Mapping[str, Ints], a: Attributes) -> Ints:
    return read[0]


def _softmax(read: Sequence[Ints], held: Mapping[str, Ints], a: Attributes) -> Ints:
    _fit(0 <= a["dim"] < len(read[0]), f"there is no dimension {a['dim']}")
    return read[0]


def _broadcast(read: Sequence[Ints], held: Mapping[str, Ints], a: Attributes) -> Ints:
    one, other = read
    rank = max(len(one), len(other))
    one, other = (1,) * (rank - len(one)) + one, (1,) * (rank - len(other)) + other
    pairs = list(zip(one, other, strict=True))
    _fit(all(a == b or 1 in (a, b) for a, b in pairs), f"{_text(one)} and {_text(other)}")
    return tuple(b if a == 1 else a for a, b in pairs)


def _cat(read: Sequence[Ints], held: Mapping[str, Ints], a: Attributes) -> Ints:
    dim, first = a["dim"], read[0]
    _fit(0 <= dim < len(first), f"there is no dimension {dim}")
    for x in read:
        alike = (*x[:dim], *x[dim + 1 :]) == (*first[:dim], *first[dim + 1 :])
        _fit(len(x) == len(first) and alike, f"{_text(first)} and {_text(x)}")
    return (*first[:dim], sum(x[dim] for x in read), *first[dim + 1 :])


def _pool(read: Sequence[Ints], held: Mapping[str, Ints], a: Attributes) -> Ints:
    x = read[0]
    count, stride, padding = _window(x, a, (1, 2))
    kernels = _all(a["kernel"], count, 1, "kernel")
    dilation = _all(a.get("dilation", (1,) * count), count, 1, "dilation")
    made = []
    for size, kernel, s, p, d in zip(x[2:], kernels, stride, padding, dilation, strict=True):
        # In one dimension torch asks for half of the kernel, in two for half of its reach.
        reach = kernel if count == 1 else d * (kernel - 1) + 1
        _fit(2 * p <= reach, "padding of more than half its kernel")
        left = size + 2 * p - d * (kernel - 1) - 1
        _fit(left >= 0, "a kernel larger than its input")
        length = (left + (s - 1 if a["ceil_mode"] else 0)) // s + 1
        # The last window starts inside the input or the padding before it.
        if a["ceil_mode"] and (length - 1) * s >= size + p:
            length -= 1
        made.append(length)
    return (*x[:2], *made)


def _adaptive(read: Sequence[Ints], held: Mapping[str, Ints], a: Attributes) -> Ints:
    x = read[0]
    _fit(len(x) in (3, 4), f"{len(x)} dimensions")
    return (*x[:2], *_all(a["size"], len(x) - 2, 1, "size"))


def _mean(read: Sequence[Ints], held: Mapping[str, Ints], a: Attributes) -> Ints:
    x, dims = read[0], a["dims"]
    _fit(0 < len(dims) == len(set(dims)), f"dimensions {list(dims)}")
    _fit(all(0 <= dim < len(x) for dim in dims), f"dimensions {list(dims)}")
    return tuple(
        1 if place in dims else size
        for place, size in enumerate(x)
        if place not in dims or a["keepdim"]
    )


def _resize(read: Sequence[Ints], held: Mapping[str, Ints], a: Attributes) -> Ints:
    x = read[0]
    ranks = {"nearest": (3, 4, 5), "bilinear": (4,), "bicubic": (4,)}.get(a["mode"], ())
    _fit(len(x) in ranks, f"{a['mode']} of {len(x)} dimensions")
    return (*x[:2], *_all(a["size"], len(x) - 2, 1, "size"))


def _pad(read: Sequence[Ints], held: Mapping[str, Ints], a: Attributes) -> Ints:
    x, pads, mode = read[0], a["pad"], a["mode"]
    _fit(len(pads) % 2 == 0 and len(pads) <= 2 * len(x), f"{len(pads)} pads")
    made = list(x)
    for place in range(len(pads) // 2):
        before, after = pads[2 * place : 2 * place + 2]
        made[-1 - place] += before + after
        size, least = x[-1 - place], min(before, after)
        if mode == "constant":
            _fit(size + min(0, before) + min(0, after) >= 1, "pads take all there is")
        else:
            most = {"reflect": size - 1, "circular": size}.get(mode, max(before, after))
            _fit(least >= 0 and max(before, after) <= most, f"{mode} of {size} by {pads}")
    if mode != "constant":
        modes = ("reflect", "replicate", "circular")
        _fit(mode in modes and a["value"] == 0, f"{mode} with a value")
        _fit(
            len(pads) == 2 * (len(x) - 2) and len(x) in (3, 4, 5), f"{mode} of {len(x)} dimensions"
        )
    return tuple(made)


def _reshape(read: Sequence[Ints], held: Mapping[str, Ints], a: Attributes) -> Ints:
    x, shape = read[0], a["shape"]
    known = math.prod(size for size in shape if size != -1)
    _fit(shape.count(-1) <= 1 and known >= 1, f"into {list(shape)}")
    rest, over = divmod(math.prod(x), known)
    _fit(over == 0 and (rest == 1 or -1 in shape), f"{_text(x)} into {list(shape)}")
    return tuple(rest if size == -1 else size for size in shape)


def _permute(read: Sequence[Ints], held: Mapping[str, Ints], a: Attributes) -> Ints:
    x, order = read[0], a["order"]
    _fit(sorted(order) == list(range(len(x))), f"order {list(order)} of {len(x)} dimensions")
    return tuple(x[place] for place in order)


def _expand(read: Sequence[Ints], held: Mapping[str, Ints], a: Attributes) -> Ints:
    x, shape = read[0], a["shape"]
    more = len(shape) - len(x)
    _fit(more >= 0 and -1 not in shape[:more], f"{_text(x)} into {list(shape)}")
    made = list(shape[:more])
    for size, wanted in zip(x, shape[more:], strict=True):
        _fit(wanted in (-1, size) or size == 1, f"{_text(x)} into {list(shape)}")
        made.append(size if wanted == -1 else wanted)
    return tuple(made)


def _slice(read: Sequence[Ints], held: Mapping[str, Ints], a: Attributes) -> Ints:
    x, dim, start, length, step = read[0], a["dim"], a["start"], a["length"], a["step"]
    _fit(0 <= dim < len(x) and step >= 1, f"dimension {dim} by {step}")
    _fit(start + length <= x[dim], f"{start} to {start + length} of {x[dim]}")
    return (*x[:dim], -(-length // step), *x[dim + 1 :])


ELEMENTWISE: tuple[str, ...] = ("relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish")
ELEMENTWISE += ("hardswish", "hardsigmoid", "sigmoid", "tanh", "softplus", "exp", "neg")

RULES: dict[str, Rule] = {
    "conv": _convolution,
    "conv_transpose": _transposed,
    "linear": _linear,
    "batch_norm": _by_channel("mean", "variance", "weight", "bias"),
    "affine": _by_channel("weight", "bias"),
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "prelu": _prelu,
    "parameter": lambda read, held, a: held["value"],
    **dict.fromkeys(ELEMENTWISE, _same),
    "hardtanh": _hardtanh,
    "softmax": _softmax,
    "log_softmax": _softmax,
    **dict.fromkeys(ARITHMETIC, _broadcast),
    **{f"{name}_number": _same for name in ARITHMETIC},
    "cat": _cat,
    "max_pool": _pool,
    "avg_pool": _pool,
    "adaptive_max_pool": _adaptive,
    "adaptive_avg_pool": _adaptive,
    "mean": _mean,
    "resize": _resize,
    "pad": _pad,
    "reshape": _reshape,
    "permute": _permute,
    "expand": _expand,
    "slice": _slice,
}
