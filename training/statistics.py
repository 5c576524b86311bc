"""Batch norm across sizes: the statistics of one architecture, and of all that need them.

A device never sees batch norm and the service never sees an image, so what the weights do not say of
each channel's mean and variance is measured over size here, once. Knows no training.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from tqdm import tqdm

from neumeta import moments
from neumeta.architecture import Architecture, Space
from neumeta.family import FAMILIES
from neumeta.manifold import Manifold
from neumeta.network import Network
from neumeta.sample import seed_of
from training.data import Dataset, augment, to_float
from training.divergence import check_tensors
from training.fit import generated
from training.forward import parameters_of
from training.recipe import Recipe


@torch.no_grad()
def calibrate(net: Network, images: Tensor) -> Network:
    """Set each batch norm of `net` to the statistics of `images` (N, C, H, W); returns it, to infer.

    The recalibration of US-Nets (Yu and Huang 2019, post-statistics): one cumulative average.
    """
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    net.train()
    for at in range(0, len(images), 500):
        net(images[at : at + 500])
    return net.eval()


@torch.no_grad()
def network(manifold: Manifold, architecture: Architecture) -> Network:
    """The sampled network of this architecture with batch norm, its statistics not yet measured."""
    space = manifold.space
    made = generated(manifold, architecture, 0.0, torch.Generator())
    net = Network(space.family, architecture.depth, space.sizes(architecture), norm=True)
    net.load_state_dict(parameters_of(manifold, architecture, made), strict=False)
    return net


def measured(net: Network) -> dict[str, tuple[Tensor, Tensor]]:
    """Each batch norm's (mean, variance), by the name of the layer before it."""
    found = {}
    for layer in FAMILIES[net.family].layers(net.depth):
        if layer.norm:
            norm = net.get_submodule(layer.norm)
            assert isinstance(norm, nn.BatchNorm2d)
            assert norm.running_mean is not None and norm.running_var is not None
            found[layer.name] = (norm.running_mean, norm.running_var)
    return found


def anchors(space: Space, seed: int, mixed: int) -> list[Architecture]:
    """Every scalar width; every even depth at some of them; and `mixed` random sizes."""
    generator = torch.Generator().manual_seed(seed)
    low, high = space.width
    found = list(space.scaled())
    if space.blocks:
        for blocks in range(1, space.table.max_blocks + 1):
            for step in range(6):
                width = high - (high - low) * step / 5
                even = [blocks] * len(space.depth)
                found.append(space.architecture(width, even, extrapolate=True))
    for _ in range(mixed):
        factors = low + (high - low) * torch.rand(len(space.stages), generator=generator)
        depth: list[int] | None = None
        if space.blocks and torch.rand((), generator=generator) < 0.75:
            # Beyond the trained depths too, but less often.
            most = (*space.blocks, space.table.max_blocks)[
                1 + int(torch.rand((), generator=generator) < 0.4)
            ]
            depth = torch.randint(1, most + 1, (len(space.depth),), generator=generator).tolist()
        found.append(space.architecture(factors.tolist(), depth, extrapolate=True))
    return list({each.key: each for each in found}.values())


def measure_statistics(
    manifold: Manifold, data: Dataset, recipe: Recipe, *, mixed: int = 160, images: int = 1000
) -> None:
    """Fill `manifold.statistics`: calibrated at the `anchors`, kriged in between.

    The same augmented training images serve all sizes. Channels that a size lacks are NaN.
    Raises Diverged if a statistic is not finite.
    """
    space, seed = manifold.space, seed_of(recipe.seed, "statistics")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(data.train_labels), generator=generator)[:images]
    x = to_float(augment(data.train_images[rows], data, generator), data)
    places: dict[str, dict[tuple[int, int], Tensor]] = {}
    tables: dict[tuple[str, str], list[Tensor]] = {}
    for index, each in enumerate(
        tqdm(anchors(space, seed, mixed), desc="statistics", mininterval=5)
    ):
        net = network(manifold, each)
        state, propagation = net.state_dict(), moments.Propagation(space, each)
        found = measured(calibrate(net, x))
        full = space.table.full_sizes(each.depth, space.classes)
        for layer in space.table.layers(each.depth):
            if layer.norm is None:
                continue
            expected = propagation.expected(layer, state[f"{layer.name}.weight"])
            propagation.normalised(
                layer, state[f"{layer.norm}.weight"], state[f"{layer.norm}.bias"]
            )
            error = moments.residual(expected, found[layer.name])
            check_tensors(f"statistics at {each.key}", {layer.name: error})  # NaN says absent below
            row = torch.full((2, full[layer.output_axis]), math.nan, dtype=torch.float64)
            row[:, : error.shape[1]] = error
            where, what = moments.keys(space, layer)
            places.setdefault(where, {})[index, layer.block] = moments.features(space, each, layer)
            tables.setdefault((where, what), []).append(row.flatten())
    for (where, what), rows_ in tables.items():
        points = torch.stack(list(places[where].values())).float()
        manifold.statistics[where] = points
        manifold.statistics[what] = moments.krige(points.double(), torch.stack(rows_)).float()
