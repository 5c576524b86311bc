"""Batch norm across sizes: the statistics of one architecture, and of all that need them.

A device never sees batch norm and the service never sees an image, so each channel's mean and log
variance are measured over size here, once. Knows no training.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from tqdm import tqdm

from neumeta.architecture import Architecture
from neumeta.family import FAMILIES
from neumeta.manifold import Manifold
from neumeta.network import Network
from neumeta.sample import seed_of
from training.data import Dataset, augment, to_float
from training.fit import generated, parameters_of
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


def measure_statistics(
    manifold: Manifold, data: Dataset, recipe: Recipe, *, mixed: int = 64, images: int = 2000
) -> None:
    """Fill `manifold.statistics`: calibrated at every scalar width and at `mixed` random sizes.

    The same augmented training images serve all sizes. Channels that a size lacks are NaN.
    """
    space = manifold.space
    generator = torch.Generator().manual_seed(seed_of(recipe.seed, "statistics"))
    rows = torch.randperm(len(data.train_labels), generator=generator)[:images]
    x = to_float(augment(data.train_images[rows], data, generator), data)
    low, high = space.width
    factors = low + (high - low) * torch.rand(mixed, len(space.stages), generator=generator)
    anchors = [*space.scaled(), *(space.architecture(row.tolist()) for row in factors)]
    full = torch.tensor([space.table.stages[stage] for stage in space.stages])
    channels = torch.tensor([each.channels for each in anchors])
    tensors = {"anchors": (channels / full).float()}
    for index, each in enumerate(tqdm(anchors, desc="statistics", mininterval=5)):
        for name, (mean, variance) in measured(calibrate(network(manifold, each), x)).items():
            for kind, value in (("mean", mean), ("log_variance", variance.clamp(min=1e-8).log())):
                empty = torch.full((len(anchors), _full_size(manifold, name)), math.nan)
                table = tensors.setdefault(f"{name}.{kind}", empty)
                table[index, : len(value)] = value
    manifold.statistics.update(tensors)


def _full_size(manifold: Manifold, name: str) -> int:
    space = manifold.space
    axis = {layer.name: layer.output_axis for layer in space.table.layers(space.depth)}[name]
    return space.sizes(space.full)[axis]
