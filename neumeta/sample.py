"""Algorithm 3: a manifold and an architecture -> (name, tensor), one tensor at a time.

Knows no bytes and no HTTP. Tensors come in the order of the wire (by name).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from neumeta.coordinates import Site, coordinates
from neumeta.fold import Moments, folded_node, scale_and_shift
from neumeta.graph import Node
from neumeta.manifold import Manifold
from neumeta.sites import sites
from neumeta.space import Architecture
from neumeta.statistics import given, measure, unflatten

PAIRS_AT_ONCE = 1 << 14
"""Working memory: at most this many coordinate vectors (times a layer's width) at once."""


def seed_of(seed: int, name: str) -> int:
    """The seed of one tensor's noise: independent of which tensors were sampled before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


@lru_cache(maxsize=64)
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
def sample_site(
    manifold: Manifold, site: Site, samples: int, seed: int, device: torch.device | None = None
) -> Tensor:
    """The mean of `samples` noisy evaluations of one tensor, noise spread by `evenly`.

    One sample is exact: the manifold's value at the integer coordinates. `device` is the manifold's,
    for a caller who has looked it up.
    """
    noise = manifold.noise if samples > 1 else 0.0
    if noise == 0.0:
        samples = 1
    at_once = max(1, min(samples, PAIRS_AT_ONCE // (site.rows.count * site.columns.count)))
    own = seed_of(seed, site.name) if noise else 0
    points = evenly(samples, 6 if site.length > 1 else 4)
    device = device or manifold.device
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
        made: Tensor = manifold.representation(site, at.to(device))
        part = made.sum(0) if len(made) > 1 else made[0]
        total = part if total is None else total + part
    assert total is not None
    return (total * (site.gain / samples)).reshape(site.shape).cpu()


class _Sampling:
    """The tensors of one architecture, each made once, when it is first asked for."""

    def __init__(
        self, manifold: Manifold, architecture: Architecture, samples: int, seed: int
    ) -> None:
        self.manifold, self.samples, self.seed = manifold, samples, seed
        self.device = manifold.device
        self.graph = manifold.space.graph_of(architecture)
        self.sizes = manifold.space.sizes(architecture)
        self.sites = sites(manifold.space, architecture)
        self.originals = {node.name: node for node in self.graph.nodes}
        self.held: dict[str, Tensor] = {}
        self.moments: Mapping[str, Moments] = {}
        kept = manifold.statistics.kept.get(architecture.key)
        if any(node.op == "batch_norm" for node in self.graph.nodes):
            found = self._measured() if kept is None else unflatten(self.graph, self.sizes, kept)
            # Those are kept in sixteen bits, and a request for any size shall give one front.
            self.moments = found | given(self.graph, manifold.frozen)

    def raw(self, name: str) -> Tensor:
        """A tensor before folding; kept only where measuring has made it before it is yielded."""
        if name in self.held:
            return self.held[name]
        site = self.sites.get(name)
        if site is None:
            return self.manifold.frozen[name]
        return sample_site(self.manifold, site, self.samples, self.seed, self.device)

    def _measured(self) -> dict[str, Moments]:
        images = self.manifold.statistics.images
        if images is None:
            raise ValueError("the manifold has batch norm but no calibration images")
        x = normalised(self.manifold, images)
        names = {name for node in self.graph.nodes for name in node.tensors.values()}
        there = names & {*self.sites, *self.manifold.frozen}
        self.held = {name: self.raw(name) for name in sorted(there)}
        return measure(self.graph, self.sizes, self.held, x)

    def folded(self, node: Node) -> dict[str, Tensor]:
        """The tensors that a node of the folded graph holds, by name."""
        before = self.originals[node.name]
        norm = before if before.op == "batch_norm" else self.graph.folds.get(node.name)
        if norm is None:
            return {name: self.raw(name) for name in node.tensors.values()}
        own = [*before.tensors.values(), *norm.tensors.values()]
        measured = {norm.tensors[key] for key in ("mean", "variance")}
        tensors = {name: self.raw(name) for name in own if name not in measured}
        moments = self.moments[norm.name]
        if before is norm:
            weight, bias = scale_and_shift(norm, tensors, moments)
        else:
            weight, bias = folded_node(before, norm, tensors, moments)
        return {node.tensors["weight"]: weight, node.tensors["bias"]: bias}


def normalised(manifold: Manifold, images: Tensor) -> Float[Tensor, "N C *S"]:
    """Calibration images as the network reads them."""
    if images.dtype != torch.uint8:
        return images.float()
    around = (1, -1, *[1] * (images.ndim - 2))
    mean, std = (
        torch.tensor(each).view(around) for each in (manifold.contract.mean, manifold.contract.std)
    )
    return (images.float() / 255 - mean) / std


def sample(
    manifold: Manifold, architecture: Architecture, *, samples: int | None = None, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Every folded tensor of the network of this architecture, by name, as it becomes ready.

    `samples` is K (None: the manifold's own default). Equal arguments give equal tensors.
    """
    count = manifold.samples if samples is None else samples
    sampling = _Sampling(manifold, architecture, count, seed)
    graph = manifold.space.graph_of(architecture).folded
    ready: dict[str, Tensor] = {}
    for name in sorted(graph.tensors):
        if name not in ready:
            ready |= sampling.folded(graph.owners[name])
        yield name, ready.pop(name).detach()
