"""The published way of sampling, written here as the paper's code works, and what its cost is.

Every sample builds the coordinates and Fourier features of every pair, runs the MLP over all pairs of
a tensor at once, keeps a full copy of the network, and K copies are averaged at the end. Rates count
the multiplications that are really done, in GFLOP/s, beside that of a large matrix product in the
same run.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from neumeta.coordinates import Site
from neumeta.manifold import Manifold
from neumeta.representation.base import module_key
from neumeta.representation.features import fourier_features
from neumeta.representation.mlp import ResidualMLP, _Mlp
from neumeta.sites import sites
from neumeta.space import Architecture

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(work: Callable[[], object]) -> float:
    """Of one run, the device's work included."""
    began = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def median(work: Callable[[], object], times: int) -> float:
    return statistics.median(seconds(work) for _ in range(times))


def matrix_rate(size: int = 2048) -> float:
    """GFLOP/s of a large float32 matrix product."""
    a, b = (torch.randn(size, size, device=DEVICE) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / median(lambda: torch.mm(a, b), 7) / 1e9


def flops(manifold: Manifold, architecture: Architecture, *, split: bool) -> float:
    """Floating-point operations of one sample: two per multiplication of a matrix product."""
    total = 0.0
    for site in sites(manifold.space, architecture).values():
        mlp = network_of(manifold, site)
        outputs, inputs = site.rows.count, site.columns.count
        pairs, width = outputs * inputs, mlp.last.in_features
        features = 3 * mlp.layer.in_features
        first = (1 + inputs + outputs) / 3 if split else pairs
        total += 2 * (first * features * width + pairs * len(mlp.hidden) * width**2)
        total += 2 * pairs * width * mlp.last.out_features
    return total


def network_of(manifold: Manifold, site: Site) -> _Mlp:
    model = manifold.representation
    assert isinstance(model, ResidualMLP)
    found = model.networks[module_key(site.role)]
    assert isinstance(found, _Mlp)
    return found


def per_pair(mlp: _Mlp, v: Float[Tensor, "B 6"]) -> Float[Tensor, "B kk"]:
    """Figure 3 as it is drawn: all Fourier features of every pair, one first layer over them."""
    order = ([0, 3], [1, 4], [2, 5])
    features = torch.cat([fourier_features(v[:, pair], mlp.num_freq) for pair in order], 1)
    weight = torch.cat([part.weight for part in (mlp.layer, mlp.inputs, mlp.outputs)], 1)
    h = torch.relu(features @ weight.t() + mlp.layer.bias)
    for hidden, step in zip(mlp.hidden, mlp.scale, strict=False):
        h = h + step * torch.relu(hidden(h))
    made: Tensor = mlp.last(h)
    return made


@torch.no_grad()
def published(manifold: Manifold, architecture: Architecture, samples: int) -> dict[str, Tensor]:
    """Algorithm 3 as published: K full copies, each from every pair's own coordinates.

    For networks none of whose dimensions joins two axes: LeNet and the ResNets.
    """
    model, noise, scale = manifold.representation, manifold.noise, manifold.scale
    copies: dict[str, list[Tensor]] = {}
    for k in range(samples):
        for site in sites(manifold.space, architecture).values():
            mlp = network_of(manifold, site)
            outputs, inputs = site.rows.count, site.columns.count
            rows, columns = torch.meshgrid(
                torch.arange(outputs), torch.arange(inputs), indexing="ij"
            )
            place = torch.full(rows.shape, sum(site.cell) / 2 * site.length)
            raw = torch.stack(
                [
                    place,
                    columns + 0.5,
                    rows + 0.5,
                    torch.full_like(rows, site.length),
                    torch.full_like(rows, inputs),
                    torch.full_like(rows, outputs),
                ],
                -1,
            ).reshape(-1, 6)
            raw = raw.float().to(DEVICE)
            if k:  # an axis that keeps its size has nothing to be moved to
                deep, across, down = site.length > 1, site.columns.morphs, site.rows.morphs
                moves = torch.tensor([deep, across, down, deep, across, down], device=DEVICE)
                raw = raw + (torch.rand_like(raw) * 2 - 1) * noise * moves
            v = torch.cat((raw[:, :3] / raw[:, 3:], raw[:, 3:] / scale), 1)
            assert isinstance(model, ResidualMLP)
            made = per_pair(mlp, v) * (
                model.get_buffer("scales")[model.order[site.role]] * site.gain
            )
            copies.setdefault(site.name, []).append(made)
    return {name: torch.stack(each).mean(0) for name, each in copies.items()}


def peak() -> float:
    """This process's largest resident memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
