"""Channel orders that make the weights smooth along their axes, leaving the function unchanged.

Total variation is axis-aligned (Neural Metamorphosis, supplement, section 2): a new order of one
axis leaves the variation along every other axis as it is. The objective of Algorithm 1 therefore
splits into one shortest Hamiltonian path per clique, over distances summed over all its sides.

Knows tensors and cliques, not networks or representations.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from neumeta.graph import Graph
from training.tour import STRATEGIES

Weight = Float[Tensor, "..."]
Orders = dict[str, Int64[Tensor, " axis"]]


class Side(NamedTuple):
    """Dimension `dimension` of a tensor, along which channel c of an axis is the `repeat` indices from
    `offset` + c * `repeat` on: a flattened C x H x W repeats H * W times, a concatenation has an
    offset."""

    tensor: str
    dimension: int
    offset: int = 0
    repeat: int = 1


def cliques(graph: Graph) -> dict[str, tuple[Side, ...]]:
    """Every axis of a graph, with the sides that must be permuted together."""
    return {axis: tuple(Side(*side) for side in sides) for axis, sides in graph.cliques().items()}


def tv_out(weight: Float[Tensor, "O ..."]) -> float:
    """Sum of |w[o+1, ...] - w[o, ...]| (supplement, equation 2); a bias (O,) is one column."""
    return float(weight.double().diff(dim=0).abs().sum())


def tv_in(weight: Float[Tensor, "O ..."]) -> float:
    """Sum of |w[:, i+1, ...] - w[:, i, ...]| over every kernel position (supplement, equation 1).

    A bias (O,) has no input axis: 0.
    """
    return float(weight.double().diff(dim=1).abs().sum()) if weight.ndim > 1 else 0.0


def total_variation(weights: Mapping[str, Weight]) -> float:
    """TV_in + TV_out, summed over all tensors of the network (supplement, section 2)."""
    return sum(tv_out(weight) + tv_in(weight) for weight in weights.values())


def distances(
    weights: Mapping[str, Weight], sides: Sequence[Side], channels: int | None = None
) -> Float64[np.ndarray, "axis axis"]:
    """L1 distance between every two of an axis' `channels`, summed over `sides`, in float64.

    The total variation along these sides is the length of the path through this matrix. Without
    `channels` they are as many as every side has room for: all, if one side is the axis alone.

    Raises ValueError if a side has no room for `channels`.
    """
    n = min(_room(weights, side) for side in sides) if channels is None else channels
    pairs = torch.zeros(n * (n - 1) // 2, dtype=torch.float64)
    for side in sides:
        if n > _room(weights, side):
            raise ValueError(
                f"{side.tensor}: dimension {side.dimension} has room for "
                f"{_room(weights, side)} channels, not {n}"
            )
        along = weights[side.tensor].detach().cpu().movedim(side.dimension, 0)
        rows = along[side.offset : side.offset + n * side.repeat].reshape(n, -1).double()
        pairs += torch.nn.functional.pdist(rows, p=1)
    total = np.zeros((n, n))
    total[np.triu_indices(n, 1)] = pairs.numpy()
    return total + total.T


def _room(weights: Mapping[str, Weight], side: Side) -> int:
    return (weights[side.tensor].shape[side.dimension] - side.offset) // side.repeat


def order(
    weights: Mapping[str, Weight],
    cliques: Mapping[str, Sequence[Side]],
    strategy: str,
    seed: int = 0,
    axes: Collection[str] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Orders:
    """A permutation for each of `axes` (every clique if None): new channel i is old `[axis][i]`.
    `sizes` are their numbers of channels (None: as many as every side has room for).

    Deterministic: the generator depends on `seed` and the axis alone, so the order of an axis is
    the same whichever others are permuted beside it.

    Raises ValueError if the strategy or an axis is unknown.
    """
    if strategy not in STRATEGIES:
        raise ValueError(
            f"unknown permutation strategy {strategy!r}: one of {', '.join(STRATEGIES)}"
        )
    unknown = sorted(set(axes or ()) - set(cliques))
    if unknown:
        raise ValueError(f"no clique for axis {unknown[0]!r}: one of {', '.join(cliques)}")
    found = {}
    for axis, sides in cliques.items():
        if axes is None or axis in axes:
            rng = np.random.default_rng([seed, zlib.crc32(axis.encode())])
            room = min(_room(weights, side) for side in sides)
            channels = sizes[axis] if sizes else room
            writer = next((k for k, side in enumerate(sides) if side.dimension == 0), 0)
            layer = distances(weights, [sides[writer]], channels)
            others = [*sides[:writer], *sides[writer + 1 :]]
            whole = layer + distances(weights, others, channels)
            path = STRATEGIES[strategy](whole, layer, rng)
            found[axis] = torch.from_numpy(np.ascontiguousarray(path, np.int64))
    return found


def apply(
    weights: Mapping[str, Weight], cliques: Mapping[str, Sequence[Side]], orders: Orders
) -> dict[str, Weight]:
    """Copies of `weights` with every side of each axis in its new order (Algorithm 1, line 4)."""
    permuted = {name: weight.clone() for name, weight in weights.items()}
    for axis, new in orders.items():
        for tensor, dimension, offset, repeat in cliques[axis]:
            old = permuted[tensor]
            index = torch.arange(old.shape[dimension])
            moved = new.cpu()[:, None] * repeat + torch.arange(repeat)
            index[offset : offset + moved.numel()] = offset + moved.flatten()
            permuted[tensor] = old.index_select(dimension, index.to(old.device))
    return permuted
