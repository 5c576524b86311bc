"""A network run on tensors that are not its own: the step from generated weights to logits.

Knows neither where the tensors come from nor what is made of the logits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from neumeta.architecture import Architecture
from neumeta.family import CLASSES, FAMILIES, IMAGE
from neumeta.manifold import Manifold
from neumeta.network import Network

LANES = 8
"""What channels are padded to, for speed: convolutions on a CPU round up to it inside."""


def parameters_of(
    manifold: Manifold, architecture: Architecture, made: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Site names -> the parameter names of a Network (gamma and beta belong to its batch norm)."""
    found = dict(made)
    for layer in manifold.space.table.layers(architecture.depth):
        for kind, name in (("gamma", "weight"), ("beta", "bias")):
            if f"{layer.name}.{kind}" in found:
                found[f"{layer.norm}.{name}"] = found.pop(f"{layer.name}.{kind}")
    return found


def skeleton(manifold: Manifold, architecture: Architecture) -> Network:
    """A Network without storage for functional_call; its batch norm uses each batch's statistics."""
    with torch.device("meta"):
        sizes = manifold.space.sizes(architecture)
        net = Network(architecture.family, architecture.depth, sizes, norm=manifold.norm)
    net.mean = torch.zeros(1, device=manifold.device)
    net.std = torch.ones(1, device=manifold.device)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return net


def aligned(net: Network, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same parameters, every channel axis padded with zeros to a multiple of LANES.

    A channel of zeros leaves convolutions, batch norm and ReLU as zeros, so what the network computes
    is the same, in the channels-last layout: about 5 % faster on a CPU than without. (Not safer: see
    training/layout.py for what keeps the backward pass sound.)
    """
    found = dict(parameters)
    for layer in FAMILIES[net.family].layers(net.depth):
        name = f"{layer.name}.weight"
        weight = found[name]
        rows, columns = (
            0 if axis in (IMAGE, CLASSES) else -count % LANES
            for axis, count in zip(
                (layer.output_axis, layer.input_axis), weight.shape, strict=False
            )
        )
        weight = F.pad(weight, (*[0] * (2 * len(layer.spatial)), 0, columns, 0, rows))
        if layer.spatial:
            weight = weight.contiguous(memory_format=torch.channels_last)
        found[name] = weight
        for vector in (f"{layer.name}.bias", f"{layer.norm}.weight", f"{layer.norm}.bias"):
            if vector in found:
                found[vector] = F.pad(found[vector], (0, rows))
    return found


def logits(net: Network, parameters: Mapping[str, Tensor], x: Tensor, first: int = 0) -> Tensor:
    """What `net` with these `parameters` makes of images, or of what segment `first` takes."""
    x = x.contiguous(memory_format=torch.channels_last)
    return functional_call(net, aligned(net, parameters), (x, first))  # type: ignore[no-any-return]
