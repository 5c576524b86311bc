"""What a representation shall make at any size, where it copies another manifold. Knows no training."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from neumeta.graph import Graph
from neumeta.manifold import Manifold
from neumeta.sample import sample_site
from neumeta.sites import sites
from neumeta.space import Architecture, Space

MOST_KEPT = 64
"""Sizes whose tensors stay in memory, those that were asked for last: a recipe's pool of widths repeats
them."""


class Copied:
    """The tensors that `manifold` makes at the sizes of a `space`, which may morph less of the network.

    A weight whose scale is nothing to the network has the mean square, times its gain, of the `goal`'s
    tensor at its place, the tensors at the source's size: one training leaves it at another scale than
    another.
    """

    def __init__(self, manifold: Manifold, space: Space, goal: Mapping[str, Tensor]) -> None:
        self.manifold, self.space = manifold, space
        self.device = next(iter(goal.values())).device
        self.powers: dict[str, list[tuple[float, Tensor]]] = {}
        for name, site in sites(space, space.full).items():
            there = (sum(site.cell), power(goal[name].detach().cpu()))
            self.powers.setdefault(site.role, []).append(there)
        self.kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    @torch.no_grad()
    def at(self, size: Architecture) -> dict[str, Tensor]:
        """The tensors of this size of the space, by name, where the goal is."""
        if size.key not in self.kept:
            self.kept[size.key] = self._made(size)
            if len(self.kept) > MOST_KEPT:
                self.kept.popitem(last=False)
        self.kept.move_to_end(size.key)
        return {name: made.to(self.device) for name, made in self.kept[size.key].items()}

    def _made(self, size: Architecture) -> dict[str, Tensor]:
        manifold = self.manifold
        theirs = replace(size, depth=size.depth or manifold.space.depth)
        free = free_scales(manifold.space.graph_of(theirs))
        copies, found = sites(manifold.space, theirs), {}
        for name, site in sites(self.space, size).items():
            made = sample_site(manifold, copies[name], manifold.samples, 0)
            if name in free:
                middle = sum(site.cell)  # twice that: of the source's blocks the nearest one counts
                _, there = min(self.powers[site.role], key=lambda each: abs(each[0] - middle))
                made = made * site.gain * (there / power(made)).sqrt()
            found[name] = made
        return found


def power(tensor: Tensor) -> Tensor:
    """A tensor's mean square, never nothing."""
    return tensor.square().mean().clamp(min=1e-6)


def free_scales(graph: Graph) -> frozenset[str]:
    """The weights of layers without a bias whose values a batch norm alone reads: at any scale they
    make the same network."""
    return frozenset(
        node.tensors["weight"]
        for node in graph.nodes
        if node.name in graph.folds and {*node.tensors} == {"weight"}
    )
