"""Algorithm 3: a manifold and an architecture -> (name, tensor), one tensor at a time.

Knows no bytes and no HTTP. Tensors come in the order of the wire (by name).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from neumeta.architecture import Architecture
from neumeta.coordinates import Site, coordinates, sites
from neumeta.family import Layer
from neumeta.manifold import Manifold, fold
from neumeta.moments import Propagation

PAIRS_AT_ONCE = 1 << 14
"""Working memory: at most this many coordinate vectors (times a layer's width) at once."""


def seed_of(seed: int, name: str) -> int:
    """The seed of one tensor's noise: independent of which tensors were sampled before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


@cache
def evenly(samples: int, dimensions: int) -> Float[Tensor, "K 6"]:
    """K points of [-1, 1]^6 to average over instead of independent ones, in its last `dimensions`.

    2 * dimensions of them are a cubature that integrates every cubic exactly (Stroud 1957, C_n:3-1);
    any other number is taken from Sobol's sequence. In float64: kept for users of either precision.
    """
    points = torch.zeros(samples, 6, dtype=torch.float64)
    if samples == 2 * dimensions:
        turn = math.pi / dimensions * torch.arange(1, samples + 1, dtype=torch.float64)
        for wave in range(dimensions // 2):
            column = 6 - dimensions + 2 * wave
            points[:, column] = math.sqrt(2 / 3) * torch.cos((2 * wave + 1) * turn)
            points[:, column + 1] = math.sqrt(2 / 3) * torch.sin((2 * wave + 1) * turn)
    else:
        engine = torch.quasirandom.SobolEngine(6)  # type: ignore[no-untyped-call]
        # The middle of each point's cell: the sequence itself begins in a corner.
        points = 2 * engine.draw(samples, dtype=torch.float64) - 1 + 1 / samples
    return points


@torch.no_grad()
def sample_site(manifold: Manifold, site: Site, samples: int, seed: int) -> Tensor:
    """The mean of `samples` noisy evaluations of one tensor, noise spread by `evenly`.

    One sample is exact: the manifold's value at the integer coordinates.
    """
    noise = manifold.noise if samples > 1 else 0.0
    if noise == 0.0:
        samples = 1
    at_once = max(1, min(samples, PAIRS_AT_ONCE // (site.outputs * site.inputs)))
    own = seed_of(seed, site.name)
    points = evenly(samples, 6 if site.length > 1 else 4)
    device = manifold.device
    total: Tensor | None = None
    for done in range(0, samples, at_once):
        at = coordinates(
            site,
            manifold.scale,
            noise=noise,
            samples=min(at_once, samples - done),
            # The same mirrors in every part.
            generator=torch.Generator().manual_seed(own) if noise else None,
            points=points[done : done + at_once],
        )
        made = manifold.representation(site, at.to(device))
        part = made.sum(0) if len(made) > 1 else made[0]
        total = part if total is None else total + part
    assert total is not None
    shape = (site.outputs, site.inputs, *site.spatial) if site.kind == "weight" else (site.outputs,)
    return (total / samples if samples > 1 else total).reshape(shape).cpu()


@torch.no_grad()
def sample_layer(
    manifold: Manifold,
    architecture: Architecture,
    layer: Layer,
    samples: int,
    seed: int,
    statistics: Propagation,
) -> tuple[Tensor, Tensor]:
    """The folded (weight, bias) of one layer; `statistics` has seen all layers before it."""
    if not manifold.space.morphing(layer):
        return manifold.frozen[f"{layer.name}.weight"], manifold.frozen[f"{layer.name}.bias"]
    normed = manifold.norm and layer.norm is not None
    made = [
        sample_site(manifold, site, samples, seed)
        for site in sites(manifold.space, architecture, layer, norm=manifold.norm)
    ]
    if not normed:
        return made[0], made[1]
    weight, gamma, beta = made
    mean, variance = statistics.measured(layer, weight, manifold.statistics)
    statistics.normalised(layer, gamma, beta)
    return fold(weight, gamma, beta, mean, variance)


def sample(
    manifold: Manifold, architecture: Architecture, *, samples: int | None = None, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Every folded tensor of the network of this architecture, by name, as it becomes ready.

    `samples` is K (None: the manifold's own default). Equal arguments give equal tensors.
    """
    count = manifold.samples if samples is None else samples
    layers = manifold.space.table.layers(architecture.depth)
    statistics = Propagation(manifold.space, architecture)
    # By name is also the order of the forward pass wherever there is batch norm.
    for layer in sorted(layers, key=lambda layer: layer.name):
        weight, bias = sample_layer(manifold, architecture, layer, count, seed, statistics)
        yield f"{layer.name}.bias", bias
        yield f"{layer.name}.weight", weight
