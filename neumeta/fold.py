"""Batch norm folded into the layer before it, or into a scale and a shift: weights, not the graph.

The graph's part is `Graph.folded`. Knows no manifold and no images.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from neumeta.graph import Graph, Node

Moments = tuple[Tensor, Tensor]
"""The mean and the variance of each channel, both (C,)."""


def scale_and_shift(norm: Node, tensors: Mapping[str, Tensor], moments: Moments) -> Moments:
    """What a batch norm does to a channel, as a factor and a summand, both (C,)."""
    mean, variance = moments
    scale = torch.rsqrt(variance + norm.attributes["eps"])
    if "weight" in norm.tensors:
        scale = tensors[norm.tensors["weight"]].to(scale) * scale
    shift = -mean * scale
    if "bias" in norm.tensors:
        shift = tensors[norm.tensors["bias"]].to(scale) + shift
    return scale, shift


def folded_node(
    node: Node, norm: Node, tensors: Mapping[str, Tensor], moments: Moments
) -> tuple[Tensor, Tensor]:
    """The weight and bias of a convolution or linear map that has taken up the batch norm behind it."""
    scale, shift = scale_and_shift(norm, tensors, moments)
    weight = tensors[node.tensors["weight"]].to(scale)
    if node.op == "conv_transpose":
        # (inputs, outputs of a group, ...): a group's outputs are consecutive channels.
        inputs, outputs = weight.shape[:2]
        groups = len(scale) // outputs
        by_group = weight.reshape(groups, inputs // groups, outputs, -1)
        weight = (by_group * scale.view(groups, 1, outputs, 1)).reshape(weight.shape)
    else:
        weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
    if "bias" in node.tensors:
        shift = shift + tensors[node.tensors["bias"]].to(scale) * scale
    return weight, shift


def fold(
    graph: Graph, tensors: Mapping[str, Tensor], moments: Mapping[str, Moments] | None = None
) -> dict[str, Tensor]:
    """The tensors of `graph.folded`. `moments` are each batch norm's by its node's name (None: those
    among the tensors). Computed in the tensors' own precision."""
    found: dict[str, Tensor] = {}
    into = {norm.name: name for name, norm in graph.folds.items()}
    originals = {node.name: node for node in graph.nodes}
    for node in graph.folded.nodes:
        before = originals[node.name]
        norm = graph.folds.get(node.name)
        if before.op == "batch_norm":
            norm = before
        if norm is None:
            found.update({name: tensors[name] for name in node.tensors.values()})
            continue
        held = (
            moments[norm.name]
            if moments is not None
            else (tensors[norm.tensors["mean"]], tensors[norm.tensors["variance"]])
        )
        if norm.name in into:
            weight, bias = folded_node(before, norm, tensors, held)
        else:
            weight, bias = scale_and_shift(norm, tensors, held)
        found[node.tensors["weight"]], found[node.tensors["bias"]] = weight, bias
    return found
