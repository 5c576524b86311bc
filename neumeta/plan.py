"""A file before it exists: every byte of it that is no weight, and each tensor's place between them.

What the formats share. Knows neither of them, no manifold and no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from neumeta.graph import Graph, Sizes
from neumeta.operations import WEIGHTED

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
"""What a file's numbers can be asked for as, and the bytes of one."""
NAMED = 256
"""Bytes, about, that scales cost a file beside their numbers: int8 must save more than that."""


@dataclass(frozen=True)
class Scales:
    """The float32 factors of one int8 tensor: where they are, and which axis has one for each place."""

    name: str
    axis: int

    def shape(self, tensor: tuple[int, ...]) -> tuple[int, ...]:
        """That of the factors: numbers times them are the tensor."""
        return tuple(size if place == self.axis else 1 for place, size in enumerate(tensor))


@dataclass(frozen=True)
class Part:
    """Numbers of one type that lie together in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """How many they are in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype]


@dataclass(frozen=True)
class Plan:
    """The file of one architecture: `header`, then its parts in the order that `layout` gives."""

    header: bytes
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    length: int
    """Total bytes, header included."""
    frames: Mapping[str, bytes] = field(default_factory=dict)
    """The bytes in front of each part's own, where a format has any."""
    scales: Mapping[str, Scales] = field(default_factory=dict)
    """By name, the tensors that are written as int8."""


def scaled(graph: Graph, sizes: Sizes, dtype: str) -> dict[str, Scales]:
    """The tensors of a graph that are int8 in a file of this dtype, by name.

    Those that convolutions and linear maps multiply by, one factor for each channel of the output;
    of a transposed convolution in groups, one for a channel's place in all groups. What would save
    nothing is left as it is.
    """
    if dtype != "int8":
        return {}
    found: dict[str, Scales] = {}
    for name in sorted(graph.tensors):
        node = graph.owners.get(name)
        if node is None or node.op not in WEIGHTED or node.tensors["weight"] != name:
            continue
        shape, axis = graph.shape(name, sizes), int(node.op == "conv_transpose")
        if 3 * math.prod(shape) > 4 * shape[axis] + NAMED:
            own = f"{name}_scale"
            while own in graph.tensors:
                own += "_"
            found[name] = Scales(own, axis)
    return found


def layout(graph: Graph, sizes: Sizes, dtype: str) -> tuple[list[Part], dict[str, Scales]]:
    """What lies in a file, in its order: the tensors by name; and which of them are `scaled`.

    Of int8, first the int8 ones by name, and then what is float32: the others, and each one's scales
    where it would be. So all of it can be sent as it is sampled, but for a few numbers that wait, and
    the float32 ones are not moved to odd places by as many bytes as an int8 tensor may have.
    """
    scales, ints, floats = scaled(graph, sizes, dtype), [], []
    for name in sorted(graph.tensors):
        shape = graph.shape(name, sizes)
        if own := scales.get(name):
            ints.append(Part(name, "int8", shape))
            floats.append(Part(own.name, "float32", own.shape(shape)))
        else:
            floats.append(Part(name, "float32" if dtype == "int8" else dtype, shape))
    return ints + floats, scales
