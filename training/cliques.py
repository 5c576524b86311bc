"""The permutation cliques of a network: the tensor sides that share a channel axis.

Knows no weights and solves nothing; it does not know batch norm either: tensors are folded ones.
"""

from __future__ import annotations

from typing import NamedTuple

from neumeta.family import Family


class Side(NamedTuple):
    """Dimension `dimension` of the folded tensor `tensor`: 0 its outputs, 1 its inputs.

    Along it channel c of the axis is the `repeat` indices from `offset` + c * `repeat` on: a
    flattened C x H x W repeats H * W times, a concatenation has an offset.
    """

    tensor: str
    dimension: int
    offset: int = 0
    repeat: int = 1


def cliques(family: Family, depth: tuple[int, ...]) -> dict[str, tuple[Side, ...]]:
    """Every axis that may be resized, with the sides that must be permuted together.

    Axes and sides are in order of the forward pass. The image's channels and the classes are no
    clique: nothing outside the network would follow a new order of theirs.
    """
    found: dict[str, list[Side]] = {axis: [] for axis in family.axes(depth)}
    for tensor in family.tensors(depth):
        # Weights are (O, I, k, k) or (O, I), biases (O,): only the first two can be named axes.
        for dimension, axis in enumerate(tensor.axes[:2]):
            if axis in found:
                found[str(axis)].append(Side(tensor.name, dimension))
    return {axis: tuple(sides) for axis, sides in found.items()}
