"""Batch norm across sizes: exact statistics of one architecture, and polynomials of all of them.

A device never sees batch norm and the service never sees an image, so each channel's mean and log
variance are fitted over size here, once. Knows no training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm import tqdm

from neumeta.architecture import Architecture
from neumeta.inr import size_features
from neumeta.manifold import Manifold
from neumeta.network import Network
from neumeta.sample import seed_of
from training.data import Dataset, augment, to_float
from training.fit import generated, parameters_of
from training.recipe import Recipe


@torch.no_grad()
def calibrate(
    manifold: Manifold, architecture: Architecture, images: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Each batch norm's (mean, variance) over `images` (N, C, H, W), layer by layer, at this size.

    The recalibration of US-Nets (Yu and Huang 2019, post-statistics): one cumulative average over
    the given training images with the sampled weights.
    """
    space = manifold.space
    made = generated(manifold, architecture, 0.0, torch.Generator())
    net = Network(space.family, architecture.depth, space.sizes(architecture), norm=True)
    net.load_state_dict(parameters_of(manifold, architecture, made), strict=False)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    net.train()
    for at in range(0, len(images), 500):
        net(images[at : at + 500])
    found = {}
    for layer in space.table.layers(architecture.depth):
        if layer.norm:
            norm = net.get_submodule(layer.norm)
            assert isinstance(norm, nn.BatchNorm2d)
            assert norm.running_mean is not None and norm.running_var is not None
            found[layer.name] = (norm.running_mean, norm.running_var)
    return found


def fit_statistics(
    manifold: Manifold,
    data: Dataset,
    recipe: Recipe,
    *,
    architectures: int = 96,
    images: int = 2000,
) -> None:
    """Fill `manifold.statistics` by least squares over calibrated architectures of random sizes.

    Half of them scale all stages together, half each stage by its own factor; a channel is fitted
    on the architectures that have it. The full size counts ten times.
    """
    space = manifold.space
    generator = torch.Generator().manual_seed(seed_of(recipe.seed, "statistics"))
    rows = torch.randperm(len(data.train_labels), generator=generator)[:images]
    x = to_float(augment(data.train_images[rows], data, generator), data)
    low, high = space.width
    drawn = [space.full]
    for index in range(architectures):
        factors = (low + (high - low) * torch.rand(len(space.stages), generator=generator)).tolist()
        even = low + (high - low) * (index + 0.5) / architectures
        drawn.append(space.architecture(even if index % 2 else factors))
    full = [space.table.stages[stage] for stage in space.stages]
    features = torch.stack(
        [size_features([c / f for c, f in zip(a.channels, full, strict=True)]) for a in drawn]
    )
    weights = torch.ones(len(drawn), 1, dtype=torch.float64)
    weights[0] = 10.0
    measured = [calibrate(manifold, a, x) for a in tqdm(drawn, desc="statistics", mininterval=5)]
    for layer in space.table.layers(space.depth):
        if layer.norm is None:
            continue
        count = len(measured[0][layer.name][0])
        for part, name in enumerate(("mean", "log_variance")):
            columns = []
            for channel in range(count):
                has = [i for i, each in enumerate(measured) if len(each[layer.name][0]) > channel]
                value = torch.stack([measured[i][layer.name][part][channel] for i in has]).double()
                value = value.clamp(min=1e-8).log() if part else value
                scale = weights[has]
                # A small ridge: a channel that few sizes have must not swing.
                left = torch.cat(
                    (features[has] * scale, 1e-2 * torch.eye(features.shape[1]).double())
                )
                right = torch.cat(
                    (value[:, None] * scale, torch.zeros(features.shape[1], 1).double())
                )
                columns.append(torch.linalg.lstsq(left, right).solution[:, 0])
            manifold.statistics[f"{layer.name}.{name}"] = torch.stack(columns, 1).float()
