"""Manifolds of random parameters over traced networks: what is served is as large as the real thing,
and costs as much to make. Knows no benchmark, no data and no training.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from benchmarks import imagenet
from neumeta.graph import Graph
from neumeta.manifold import Contract, Manifold, roles
from neumeta.representation import ResidualMLP, build
from neumeta.space import Space
from training import networks
from training.trace import trace

SHAPES: dict[str, tuple[int, int, int]] = {
    "lenet": (1, 8, 8),
    "resnet-mnist": (1, 28, 28),
    "resnet20": (3, 32, 32),
    "resnet56": (3, 32, 32),
    "resnet18": (3, 224, 224),
    "resnet50": (3, 224, 224),
}
"""The networks there are, and one image of each."""


BUILD: dict[str, Callable[[], nn.Module]] = {
    "lenet": networks.lenet,
    "resnet-mnist": networks.resnet_mnist,
    "resnet20": networks.resnet_cifar,
    "resnet56": lambda: networks.resnet_cifar((9, 9, 9)),
    "resnet18": imagenet.resnet18,
    "resnet50": imagenet.resnet50,
}


def module(name: str, seed: int = 0) -> nn.Module:
    """A network of this name with random weights."""
    torch.manual_seed(seed)
    return BUILD[name]()


@cache
def graph_of(name: str) -> Graph:
    """The traced graph of a network of this name."""
    graph, _ = trace(module(name), torch.zeros(1, *SHAPES[name]))
    return graph


def space(
    name: str,
    *,
    norm: bool = False,
    width: tuple[float, float] = (0.25, 1.0),
    blocks: tuple[int, int] | None = None,
) -> Space:
    """All its axes, and its stages where `blocks` is given; folded unless `norm`."""
    graph = graph_of(name) if norm else graph_of(name).folded
    return Space(name, graph.morphing(["*"], depth=blocks is not None), width, blocks)


def random_manifold(
    over: Space | str,
    kind: str = "grid",
    options: dict[str, Any] | None = None,
    *,
    noise: float = 0.0,
    samples: int = 1,
    deviation: float | None = None,
    seed: int = 0,
) -> Manifold:
    """A manifold of this representation with parameters as it was built (but for an MLP's last layers,
    which are zero then), or drawn with `deviation`."""
    covered = space(over) if isinstance(over, str) else over
    chosen = options or {}
    torch.manual_seed(seed)
    made = build(kind, chosen, roles(covered)).eval().requires_grad_(False)
    for parameter in made.parameters() if deviation is not None else ():
        nn.init.normal_(parameter, std=deviation or 0.0)
    for part in made.modules() if deviation is None else ():
        if isinstance(part, ResidualMLP):
            for mlp in part.networks.values():
                mlp.last.reset_parameters()
    channels = sum(repeat for _, repeat in covered.graph.input[1])
    contract = Contract((0.5,) * channels, (0.25,) * channels, tuple(map(str, range(10))))
    return Manifold(covered, made, kind, chosen, noise, samples, 64, contract)


def served(noise: float = 0.5, samples: int = 4, seed: int = 0) -> Manifold:
    """A small residual MLP over LeNet's widths: small files, and K makes them as slow as is wished."""
    options = {"layers": 3, "hidden": 16, "num_freq": 4}
    return random_manifold(
        "lenet", "mlp", options, noise=noise, samples=samples, deviation=0.3, seed=seed
    )
