"""A network's tensors: batch norm folded into them, channels reordered, and a network of them again.

Knows nothing of training, nor what an order is good for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from neumeta.family import FAMILIES
from neumeta.network import Network

BN_EPS = 1e-5


def fold(net: Network) -> dict[str, Tensor]:
    """The tensors of `net` with batch norm folded into its convolutions; computed in float64."""
    state, folded = net.state_dict(), {}
    for layer in FAMILIES[net.family].layers(net.depth):
        weight = state[f"{layer.name}.weight"].double()
        if net.norm and layer.norm is not None:
            gamma, beta, mean, var = (
                state[f"{layer.norm}.{kind}"].double()
                for kind in ("weight", "bias", "running_mean", "running_var")
            )
            scale = gamma / torch.sqrt(var + BN_EPS)
            weight, bias = weight * scale[:, None, None, None], beta - mean * scale
        else:
            bias = state[f"{layer.name}.bias"].double()
        folded[f"{layer.name}.weight"] = weight.float().contiguous()
        folded[f"{layer.name}.bias"] = bias.float().contiguous()
    return folded


def sizes_of(weights: Mapping[str, Tensor], family: str, depth: tuple[int, ...]) -> dict[str, int]:
    """The size of every axis, read off a network's own tensors."""
    sizes: dict[str, int] = {}
    for layer in FAMILIES[family].layers(depth):
        weight = weights[f"{layer.name}.weight"]
        sizes[layer.output_axis], sizes[layer.input_axis] = weight.shape[0], weight.shape[1]
    return sizes


def network_from(weights: dict[str, Tensor], family: str, depth: tuple[int, ...]) -> Network:
    """A folded Network that holds these tensors (not copies)."""
    with torch.device("meta"):
        net = Network(family, depth, sizes_of(weights, family, depth))
    net.mean, net.std = torch.zeros(net.channels, 1, 1), torch.ones(net.channels, 1, 1)
    net.load_state_dict(weights, assign=True)
    return net.eval()


def reorder(net: Network, orders: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `net`, batch norm kept, with the channels of each axis in the given order."""
    state = {name: value.clone() for name, value in net.state_dict().items()}
    for layer in FAMILIES[net.family].layers(net.depth):
        vectors = [f"{layer.name}.bias"]
        if net.norm and layer.norm:
            vectors = [
                f"{layer.norm}.{k}" for k in ("weight", "bias", "running_mean", "running_var")
            ]
        name = f"{layer.name}.weight"
        if layer.output_axis in orders:
            for each in (name, *vectors):
                state[each] = state[each][orders[layer.output_axis]]
        if layer.input_axis in orders:
            state[name] = state[name][:, orders[layer.input_axis]]
    return state
