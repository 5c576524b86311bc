"""Batch statistics of any size of any graph: kept for the sizes most asked for, else measured.

Measuring is one forward pass over a small batch of images that the manifold carries (the
recalibration of US-Nets, Yu and Huang 2019). Knows neither manifolds nor how weights are made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from neumeta.fold import Moments
from neumeta.graph import Graph, Sizes
from neumeta.program import Program


@dataclass(frozen=True)
class Statistics:
    """What a manifold knows of batch norms.

    `images` (N, C, ...) are calibration images, uint8 pixels, or already normalised float16 ones.
    `kept` holds, by `Architecture.key`, the mean of every channel of every batch norm in the order of
    the graph and then the variance of every channel, (2, channels).
    """

    images: UInt8[Tensor, "N C *S"] | Float[Tensor, "N C *S"] | None = None
    kept: Mapping[str, Float[Tensor, "2 channels"]] = field(default_factory=dict)


def given(graph: Graph, tensors: Mapping[str, Tensor]) -> dict[str, Moments]:
    """The mean and variance of each batch norm that has them among the tensors, by its node's name."""
    return {
        node.name: (tensors[node.tensors["mean"]], tensors[node.tensors["variance"]])
        for node in graph.nodes
        if node.op == "batch_norm" and node.tensors["mean"] in tensors
    }


@torch.no_grad()
def measure(
    graph: Graph, sizes: Sizes, tensors: Mapping[str, Tensor], x: Float[Tensor, "N C *S"]
) -> dict[str, Moments]:
    """Each batch norm's mean and variance on normalised images, by its node's name: those that are
    among the tensors as they are, the others as the images give them.

    The variance is the unbiased one, as torch keeps it for inference.
    """
    norms = {node.name: node for node in graph.nodes if node.op == "batch_norm"}
    own = given(graph, tensors)
    found: dict[str, Moments] = {}
    held = dict(tensors)

    def watch(name: str, value: Tensor) -> None:
        if name in norms:
            if name in own:
                found[name] = own[name]
                return
            across = [dimension for dimension in range(value.ndim) if dimension != 1]
            variance, mean = torch.var_mean(value, across)
            found[name] = (mean, variance)
            # The step that is about to run normalises by them, and need not measure them again: by the
            # biased variance, as a batch norm does in training.
            names, count = norms[name].tensors, value.numel() // value.shape[1]
            held[names["mean"]] = mean
            held[names["variance"]] = variance * ((count - 1) / count)

    if x.ndim == 4:  # the layout in which a CPU convolves fastest
        x = x.contiguous(memory_format=torch.channels_last)
    Program(graph, sizes).run(held, x, watch=watch)
    return found


def flatten(moments: Mapping[str, Moments]) -> Float[Tensor, "2 channels"]:
    """What `Statistics.kept` holds of these moments."""
    return torch.stack([torch.cat([pair[kind] for pair in moments.values()]) for kind in (0, 1)])


def unflatten(graph: Graph, sizes: Sizes, kept: Float[Tensor, "2 channels"]) -> dict[str, Moments]:
    """The moments that `flatten` laid end to end."""
    norms = [node for node in graph.nodes if node.op == "batch_norm"]
    counts = [graph.shape(node.tensors["mean"], sizes)[0] for node in norms]
    means = torch.split(kept[0].float(), counts)
    variances = torch.split(kept[1].float(), counts)
    return {
        node.name: (mean, variance)
        for node, mean, variance in zip(norms, means, variances, strict=True)
    }
