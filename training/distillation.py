"""Feature distillation: what a smaller network makes inside, where that has the source's own shape,
beside what the source makes there (the hints of FitNets, Romero et al. 2015).

Knows no recipe and no representation.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from neumeta.graph import Graph
from neumeta.operations import WEIGHTED
from neumeta.program import Watch
from neumeta.sites import POOLING, reached

SMALLEST = 1e-6
"""A source that makes nothing but zeros is divided by that."""


def places(graph: Graph) -> tuple[str, ...]:
    """The first weighted or pooling operation that reads each value of one shape at every width which
    morphing tensors had a part in: in a residual network of whose blocks the hidden widths morph, what
    reads the outputs of these blocks and of all behind them. None where every width morphs."""
    shapes = {node.name: node.shape for node in graph.nodes}
    found: dict[str, str] = {}
    for node in graph.nodes:
        if node.op not in (*WEIGHTED, *POOLING) or node.inputs[0] not in reached(graph):
            continue
        if not any(axis for dim in shapes[node.inputs[0]][1:] for axis, _ in dim):
            found.setdefault(node.inputs[0], node.name)
    return tuple(found.values())


def recorder(names: tuple[str, ...], kept: dict[str, Tensor]) -> Watch:
    """What a program calls to keep what these operations read."""

    def watch(name: str, value: Tensor) -> None:
        if name in names:
            kept[name] = value

    return watch


def distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
    """The squared differences as a share of the source's own squares on this batch, the mean over
    places: 0 where all are equal."""
    errors = [
        (found[name].float() - value).square().sum() / value.square().sum().clamp(min=SMALLEST)
        for name, value in wanted.items()
    ]
    return torch.stack(errors).mean()
