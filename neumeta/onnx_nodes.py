"""Each operation of a network as nodes of ONNX, and the graph that takes them up.

Knows neither weights nor what stands around a graph in a model.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from neumeta.protobuf import data, float32, number, single

FLOAT, INT64 = 1, 7
"""TensorProto's data types of constants."""
LITERAL = 1 << 12
"""A constant of more equal numbers is made when the model is loaded, not written out."""

Ints = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One operation of the network in ONNX's names: what it reads, holds and makes.

    In shapes and attributes, -1 is the batch.
    """

    read: tuple[str, ...]
    shapes: tuple[Ints, ...]
    held: Mapping[str, str]
    holds: Mapping[str, Ints]
    attributes: Mapping[str, Any]
    made: Ints

    @property
    def bias(self) -> tuple[str, ...]:
        """The bias, where there is one."""
        return (self.held["bias"],) if "bias" in self.held else ()


class Model:
    """The nodes and constants of an ONNX graph, as they are written."""

    def __init__(self, taken: set[str]) -> None:
        self.nodes: list[bytes] = []
        self.constants: dict[bytes, str] = {}
        self.taken = taken
        self.stem = ""

    def named(self, wanted: str) -> str:
        """This name, or one like it that nothing has."""
        while wanted in self.taken:
            wanted += "_"
        self.taken.add(wanted)
        return wanted

    def op(
        self, kind: str, *read: str, makes: str = "", **attributes: int | float | str | Ints
    ) -> str:
        """Write one node; the name of the value it makes. An empty name reads nothing."""
        made = makes or self.named(f"{self.stem}/{kind}")
        parts = [data(1, name) for name in read]
        parts += [data(2, made), data(3, made), data(4, kind)]
        parts += [data(5, _attribute(*each)) for each in attributes.items()]
        self.nodes.append(b"".join(parts))
        return made

    def ints(self, *values: int, shape: Ints | None = None) -> str:
        """A constant of whole numbers: a vector, or of this shape."""
        raw = struct.pack(f"<{len(values)}q", *values)
        return self._constant(INT64, (len(values),) if shape is None else shape, raw)

    def floats(self, *values: float, shape: Ints = ()) -> str:
        """A constant of float32 numbers: one alone, or of this shape."""
        return self._constant(FLOAT, shape, b"".join(map(float32, values)))

    def full(self, value: float, *shape: int) -> str:
        """A constant of equal numbers."""
        if (count := math.prod(shape)) > LITERAL:
            return self.op("Expand", self.floats(value), self.ints(*shape))
        return self.floats(*[value] * count, shape=shape)

    def _constant(self, kind: int, shape: Ints, raw: bytes) -> str:
        held = b"".join(number(1, size) for size in shape) + number(2, kind) + data(9, raw)
        if held not in self.constants:
            self.constants[held] = self.named(f"/constant{len(self.constants)}")
        return self.constants[held]


@lru_cache(maxsize=4096, typed=True)  # 1 and 1.0 are two attributes
def _attribute(name: str, value: int | float | str | Ints) -> bytes:
    held = data(1, name)
    if isinstance(value, float):
        return held + single(2, value) + number(20, 1)
    if isinstance(value, int):
        return held + number(3, value) + number(20, 2)
    if isinstance(value, str):
        return held + data(4, value) + number(20, 3)
    return held + b"".join(number(8, each) for each in value) + number(20, 7)


# How each operation is written. Where ONNX has no operation of its own, or one that runtimes of
# different ages compute differently, it is put together of older ones.

Writer = Callable[[Model, Step], str]


def _convolution(kind: str, *more: str) -> Writer:
    """One with a window; `more` are attributes that it alone has."""

    def write(m: Model, s: Step) -> str:
        a = s.attributes
        return m.op(
            kind,
            s.read[0],
            s.held["weight"],
            *s.bias,
            kernel_shape=s.holds["weight"][2:],
            strides=a["stride"],
            pads=a["padding"] * 2,
            **{name: a[name] for name in more},
            dilations=a["dilation"],
            group=a["groups"],
        )

    return write


def _linear(m: Model, s: Step) -> str:
    if len(s.shapes[0]) == 2:
        return m.op("Gemm", s.read[0], s.held["weight"], *s.bias, transB=1)
    made = m.op("MatMul", s.read[0], m.op("Transpose", s.held["weight"], perm=(1, 0)))
    return m.op("Add", made, *s.bias) if s.bias else made


def _by_channel(m: Model, s: Step, role: str) -> str:
    """A vector of channels, to be broadcast against what the step makes."""
    rank = len(s.made)
    if rank == 2 or s.holds[role] == (1,):
        return s.held[role]
    return m.op("Reshape", s.held[role], m.ints(-1, *[1] * (rank - 2)))


def _scaled(m: Model, s: Step, x: str) -> str:
    """Multiplied by the weight and added to the bias of each channel, where there are any."""
    if "weight" in s.held:
        x = m.op("Mul", x, _by_channel(m, s, "weight"))
    return m.op("Add", x, _by_channel(m, s, "bias")) if "bias" in s.held else x


def _group_norm(m: Model, s: Step) -> str:
    groups, shape = s.attributes["groups"], s.made
    each = math.prod(shape[1:]) // groups
    x = m.op("Reshape", s.read[0], m.ints(shape[0], groups, each))
    one, zero = m.full(1.0, groups), m.full(0.0, groups)
    x = m.op("InstanceNormalization", x, one, zero, epsilon=float(s.attributes["eps"]))
    return _scaled(m, s, m.op("Reshape", x, m.ints(*shape)))


def _layer_norm(m: Model, s: Step) -> str:
    count = s.attributes["dimensions"]
    weight = s.held.get("weight") or m.full(1.0, *s.made[-count:])
    eps = float(s.attributes["eps"])
    return m.op("LayerNormalization", s.read[0], weight, *s.bias, axis=-count, epsilon=eps)


def _plain(kind: str) -> Writer:
    """An operation of as many values, without attributes."""
    return lambda m, s: m.op(kind, *s.read)


def _clip(m: Model, s: Step) -> str:
    low, high = s.attributes.get("min_val", 0.0), s.attributes.get("max_val", 6.0)
    return m.op("Clip", s.read[0], m.floats(low), m.floats(high))


def _gelu(m: Model, s: Step) -> str:
    (x,) = s.read
    if s.attributes["approximate"] == "none":
        inner = m.op("Erf", m.op("Div", x, m.floats(math.sqrt(2))))
    else:
        cube = m.op("Mul", m.op("Mul", x, x), x)
        inner = m.op("Add", x, m.op("Mul", cube, m.floats(0.044715)))
        inner = m.op("Tanh", m.op("Mul", inner, m.floats(math.sqrt(2 / math.pi))))
    # In this order runtimes know it as GELU.
    return m.op("Mul", m.op("Mul", x, m.op("Add", inner, m.floats(1.0))), m.floats(0.5))


def _softplus(m: Model, s: Step) -> str:
    beta, threshold = m.floats(s.attributes["beta"]), m.floats(s.attributes["threshold"])
    scaled = m.op("Mul", s.read[0], beta)
    soft = m.op("Div", m.op("Softplus", scaled), beta)
    return m.op("Where", m.op("Greater", scaled, threshold), s.read[0], soft)


def _with_number(kind: str) -> Writer:
    def write(m: Model, s: Step) -> str:
        pair = (s.read[0], m.floats(s.attributes["number"]))
        return m.op(kind, *(reversed(pair) if s.attributes["reversed"] else pair))

    return write


def _beyond(s: Step) -> Ints:
    """How far the windows of a pool reach beyond the end of what they read: its padding, or more of
    it where the last window is cut off (`ceil_mode`), or less."""
    a, made = s.attributes, []
    for place, size in enumerate(s.shapes[0][2:]):
        reach = a.get("dilation", (1,) * 8)[place] * (a["kernel"][place] - 1) + 1
        last = (s.made[2 + place] - 1) * a["stride"][place] + reach
        made.append(max(0, last - size - a["padding"][place]))
    return tuple(made)


def _max_pool(m: Model, s: Step) -> str:
    a = s.attributes
    # Said by pads: runtimes differ in what they make of ceil_mode.
    pads = (*a["padding"], *_beyond(s))
    x = s.read[0]
    if any(pad >= kernel for pad, kernel in zip(pads, a["kernel"] * 2, strict=True)):
        count = len(a["kernel"])  # runtimes refuse a pad as large as the kernel
        around = (0, 0, *pads[:count], 0, 0, *pads[count:])
        x, pads = m.op("Pad", x, m.ints(*around), m.floats(-math.inf)), (0,) * (2 * count)
    return m.op(
        "MaxPool",
        x,
        kernel_shape=a["kernel"],
        strides=a["stride"],
        pads=pads,
        dilations=a["dilation"],
    )


def _avg_pool(m: Model, s: Step) -> str:
    a, x, beyond = s.attributes, s.read[0], _beyond(s)
    pads, count = (*a["padding"], *beyond), a["count_include_pad"]
    if count and any(more > own for more, own in zip(beyond, a["padding"], strict=True)):
        # Padding counts, what lies beyond it does not.
        around = (0, 0, *a["padding"])
        x = m.op("Pad", x, m.ints(*around, *around), m.floats(0.0))
        more = (max(0, far - own) for far, own in zip(beyond, a["padding"], strict=True))
        pads, count = (*[0] * len(beyond), *more), False
    return m.op(
        "AveragePool",
        x,
        kernel_shape=a["kernel"],
        strides=a["stride"],
        pads=pads,
        count_include_pad=int(count),
    )


def _windows(size: int, wanted: int) -> list[range]:
    """What each of `wanted` places of an adaptive pool covers."""
    return [
        range(place * size // wanted, -(-(place + 1) * size // wanted)) for place in range(wanted)
    ]


def _adaptive(kind: str) -> Writer:
    def write(m: Model, s: Step) -> str:
        sizes, wanted, x = s.shapes[0][2:], s.attributes["size"], s.read[0]
        if set(wanted) == {1}:
            return m.op(f"Global{kind}Pool", x)
        if not any(size % want for size, want in zip(sizes, wanted, strict=True)):
            steps = tuple(size // want for size, want in zip(sizes, wanted, strict=True))
            return m.op(f"{kind}Pool", x, kernel_shape=steps, strides=steps)
        for place, (size, want) in enumerate(zip(sizes, wanted, strict=True)):
            if size != want:
                x = along[kind](m, x, place + 2 - len(s.made), _windows(size, want), size)
        return x

    def largest(m: Model, x: str, axis: int, windows: list[range], size: int) -> str:
        most = max(map(len, windows))
        # A short window's last place again and again changes no maximum.
        places = [min(each.start + k, each.stop - 1) for each in windows for k in range(most)]
        x = m.op("Gather", x, m.ints(*places, shape=(len(windows), most)), axis=axis)
        return m.op("ReduceMax", x, axes=(axis,), keepdims=0)

    def average(m: Model, x: str, axis: int, windows: list[range], size: int) -> str:
        rows = [[1 / len(each) * (k in each) for k in range(size)] for each in windows]
        if axis == -1:
            flat = [row[k] for k in range(size) for row in rows]
            return m.op("MatMul", x, m.floats(*flat, shape=(size, len(rows))))
        flat = [value for row in rows for value in row]
        return m.op("MatMul", m.floats(*flat, shape=(len(rows), size)), x)

    along = {"Max": largest, "Average": average}
    return write


def _resize(m: Model, s: Step) -> str:
    a, x = s.attributes, s.read[0]
    pairs = tuple(zip(s.shapes[0][2:], a["size"], strict=True))
    how: dict[str, Any]
    if a["mode"] != "nearest":
        how = {
            "mode": {"bilinear": "linear", "bicubic": "cubic"}[a["mode"]],
            "coordinate_transformation_mode": "align_corners"
            if a["align_corners"]
            else "half_pixel",
            "cubic_coeff_a": -0.75,
        }
    elif all(
        _nearest(*pair) == [place * pair[0] // pair[1] for place in range(pair[1])]
        and not pair[1] % pair[0]
        for pair in pairs
    ):
        how = {
            "mode": "nearest",
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        }
    else:  # torch and ONNX round differently
        for place, pair in enumerate(pairs):
            x = m.op("Gather", x, m.ints(*_nearest(*pair)), axis=place + 2)
        return x
    lead = m.op("Slice", m.op("Shape", x), m.ints(0), m.ints(2))
    return m.op("Resize", x, "", "", m.op("Concat", lead, m.ints(*a["size"]), axis=0), **how)


def _nearest(size: int, wanted: int) -> list[int]:
    """The places that torch's nearest takes: it multiplies in float32."""

    def rounded(value: float) -> float:
        return float(struct.unpack("<f", float32(value))[0])

    scale = rounded(size / wanted)
    return [min(math.floor(rounded(place * scale)), size - 1) for place in range(wanted)]


def _pad(m: Model, s: Step) -> str:
    pads, mode, x = s.attributes["pad"], s.attributes["mode"], s.read[0]
    rank = len(s.made)
    if mode == "circular":
        for place in range(len(pads) // 2):
            ahead, after = pads[2 * place : 2 * place + 2]
            axis, size = rank - 1 - place, s.shapes[0][-1 - place]
            parts = [x]
            if ahead:
                parts.insert(0, _cut(m, x, axis, size - ahead, size))
            if after:
                parts.append(_cut(m, x, axis, 0, after))
            x = m.op("Concat", *parts, axis=axis)
        return x
    begins, ends = [0] * rank, [0] * rank
    for place in range(len(pads) // 2):
        begins[-1 - place], ends[-1 - place] = pads[2 * place : 2 * place + 2]
    around = m.ints(*begins, *ends)
    if mode == "constant":
        return m.op("Pad", x, around, m.floats(s.attributes["value"]))
    return m.op("Pad", x, around, mode={"replicate": "edge"}.get(mode, mode))


def _cut(m: Model, x: str, axis: int, start: int, end: int, step: int = 1) -> str:
    return m.op("Slice", x, m.ints(start), m.ints(end), m.ints(axis), m.ints(step))


def _slice(m: Model, s: Step) -> str:
    a = s.attributes
    return _cut(m, s.read[0], a["dim"], a["start"], a["start"] + a["length"], a["step"])


_ARITHMETIC = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div"}

WRITERS: dict[str, Writer] = {
    "conv": _convolution("Conv"),
    "conv_transpose": _convolution("ConvTranspose", "output_padding"),
    "linear": _linear,
    "affine": lambda m, s: _scaled(m, s, s.read[0]),
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "prelu": lambda m, s: m.op("PRelu", s.read[0], _by_channel(m, s, "weight")),
    "parameter": lambda m, s: s.held["value"],
    "relu": _plain("Relu"),
    "relu6": _clip,
    "leaky_relu": lambda m, s: m.op(
        "LeakyRelu", s.read[0], alpha=float(s.attributes["negative_slope"])
    ),
    "elu": lambda m, s: m.op("Elu", s.read[0], alpha=float(s.attributes["alpha"])),
    "gelu": _gelu,
    "silu": lambda m, s: m.op("Mul", s.read[0], m.op("Sigmoid", s.read[0])),
    "mish": lambda m, s: m.op("Mul", s.read[0], m.op("Tanh", m.op("Softplus", s.read[0]))),
    "hardswish": _plain("HardSwish"),
    "hardsigmoid": lambda m, s: m.op("HardSigmoid", s.read[0], alpha=1 / 6, beta=0.5),
    "hardtanh": _clip,
    "sigmoid": _plain("Sigmoid"),
    "tanh": _plain("Tanh"),
    "softplus": _softplus,
    "exp": _plain("Exp"),
    "neg": _plain("Neg"),
    "softmax": lambda m, s: m.op("Softmax", s.read[0], axis=s.attributes["dim"]),
    "log_softmax": lambda m, s: m.op("LogSoftmax", s.read[0], axis=s.attributes["dim"]),
    **{name: _plain(kind) for name, kind in _ARITHMETIC.items()},
    **{f"{name}_number": _with_number(kind) for name, kind in _ARITHMETIC.items()},
    "cat": lambda m, s: m.op("Concat", *s.read, axis=s.attributes["dim"]),
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "adaptive_max_pool": _adaptive("Max"),
    "adaptive_avg_pool": _adaptive("Average"),
    "mean": lambda m, s: m.op(
        "ReduceMean",
        s.read[0],
        axes=s.attributes["dims"],
        keepdims=int(s.attributes["keepdim"]),
    ),
    "resize": _resize,
    "pad": _pad,
    "reshape": lambda m, s: m.op("Reshape", s.read[0], m.ints(*s.attributes["shape"])),
    "permute": lambda m, s: m.op("Transpose", s.read[0], perm=s.attributes["order"]),
    "expand": lambda m, s: m.op(
        "Expand", s.read[0], m.ints(*(max(1, size) for size in s.attributes["shape"]))
    ),
    "slice": _slice,
}
