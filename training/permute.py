"""Channel orders that make the weights smooth along their axes, leaving the function unchanged.

Total variation is axis-aligned (Neural Metamorphosis, supplement, section 2): a new order of one
axis leaves the variation along every other axis as it is. The objective of Algorithm 1 therefore
splits into one shortest Hamiltonian path per clique, over distances summed over all its sides.

Knows tensors and cliques, not families, networks or INRs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from numpy.typing import NDArray
from torch import Tensor

from training.cliques import Side

Matrix = NDArray[np.float64]
Path = NDArray[np.int64]
Weight = Float[Tensor, "..."]
Orders = dict[str, Int64[Tensor, " axis"]]

EXACT = 16
"""Cliques up to this size are solved by dynamic programming: 2^16 subsets x 16 ends, in 0.2 s."""
STARTS = 8
"""Longer paths: how many nearest-neighbour paths are improved side by side."""
KICKS = 60
"""Longer paths: how often each of them is disturbed and improved again."""


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
    weights: Mapping[str, Weight], sides: Sequence[Side]
) -> Float64[np.ndarray, "axis axis"]:
    """L1 distance between every two channels of an axis, summed over `sides`.

    The total variation along these sides is the length of the path through this matrix.
    """
    channels = weights[sides[0].tensor].shape[sides[0].dimension]
    total = torch.zeros(channels, channels, dtype=torch.float64)
    for tensor, dimension in sides:
        rows = weights[tensor].detach().cpu().double().movedim(dimension, 0).reshape(channels, -1)
        total += torch.cdist(rows, rows, p=1)
    return total.numpy()


def length(path: Path, distance: Matrix) -> float:
    """Length of an open path through all nodes."""
    return float(distance[path[:-1], path[1:]].sum())


# --- solvers: from the clique's distances, those of one layer alone, and a generator to a path ----


def _none(whole: Matrix, layer: Matrix, rng: np.random.Generator) -> Path:
    return np.arange(len(whole))


def _random(whole: Matrix, layer: Matrix, rng: np.random.Generator) -> Path:
    return rng.permutation(len(whole))


def _layer_greedy(whole: Matrix, layer: Matrix, rng: np.random.Generator) -> Path:
    return _nearest(layer, 0)


def _layer_2opt(whole: Matrix, layer: Matrix, rng: np.random.Generator) -> Path:
    path: Path = _descend(_nearest(layer, 0)[None], layer, longest=0)[0]
    return path


def _mshp(whole: Matrix, layer: Matrix, rng: np.random.Generator) -> Path:
    path = _held_karp(whole) if len(whole) <= EXACT else _search(whole, layer, rng)
    return path if path[0] <= path[-1] else path[::-1]  # both directions are equally long


STRATEGIES: dict[str, Callable[[Matrix, Matrix, np.random.Generator], Path]] = {
    "none": _none,
    "random": _random,
    "layer-greedy": _layer_greedy,
    "layer-2opt": _layer_2opt,
    "mshp": _mshp,
}
"""The orders of the supplement's section 5. The `layer-` ones see a single layer of the clique."""


def _nearest(distance: Matrix, start: int) -> Path:
    """The path from `start` that always goes on to the nearest node left."""
    left, path = distance.copy(), [start]
    for _ in range(len(distance) - 1):
        left[:, path[-1]] = np.inf
        path.append(int(left[path[-1]].argmin()))
    return np.array(path)


def _held_karp(distance: Matrix) -> Path:
    """A shortest Hamiltonian path (Held and Karp 1962), subsets of equal size at a time."""
    n = len(distance)
    best = np.full((1 << n, n), np.inf)  # by visited set and last node
    before = np.zeros((1 << n, n), np.int8)
    best[1 << np.arange(n), np.arange(n)] = 0
    sets = np.arange(1 << n)
    sizes = np.bitwise_count(sets)
    for size in range(1, n):
        for node in range(n):
            without = sets[(sizes == size) & (sets >> node & 1 == 0)]
            through = best[without] + distance[:, node]
            before[without | 1 << node, node] = through.argmin(1)
            best[without | 1 << node, node] = through.min(1)
    visited = (1 << n) - 1
    path = [int(best[visited].argmin())]
    while len(path) < n:
        node = path[-1]
        path.append(int(before[visited, node]))
        visited ^= 1 << node
    return np.array(path)


def _search(whole: Matrix, layer: Matrix, rng: np.random.Generator) -> Path:
    """A short path for more nodes than `EXACT`: many starts, each improved, kicked, improved."""
    n = len(whole)
    # The layer-wise solution and the present order are starts, so the result is never above them.
    paths = [_layer_2opt(whole, layer, rng), np.arange(n)]
    paths += [_nearest(whole, int(node)) for node in rng.permutation(n)[:STARTS]]
    kept = _descend(np.stack(paths), whole, longest=3)
    for _ in range(KICKS):
        tried = _descend(np.stack([_kick(path, rng) for path in kept]), whole, longest=3)
        better = [length(a, whole) < length(b, whole) for a, b in zip(tried, kept, strict=True)]
        kept = np.where(np.array(better)[:, None], tried, kept)
    best: Path = min(kept, key=lambda path: length(path, whole))
    return best


def _descend(paths: Path, distance: Matrix, longest: int) -> Path:
    """Paths (B, n), each improved by its best move until none is left.

    Moves: 2-opt (reverse a stretch) and Or-opt (move a stretch of up to `longest` nodes, either
    way round). A node n at distance 0 from all closes each path to a tour; it stays at position 0.
    """
    n = len(distance)
    d = np.pad(distance, (0, 1))
    tours = np.pad(paths, ((0, 0), (1, 0)), constant_values=n)
    at = np.arange(n + 1)
    least = -1e-10 * max(float(distance.max()), 1e-300)  # rounding must not keep the loop going
    live = np.arange(len(tours))
    while len(live):
        t = tours[live]
        between = d[t[:, :, None], t[:, None, :]]
        ahead = np.roll(between, -1, 2)  # [i, k] = distance of position i to k + 1
        edge = np.diagonal(ahead, axis1=1, axis2=2)
        # Reversing i+1..k replaces the edges after i and after k.
        change = between + np.roll(ahead, -1, 1) - edge[:, :, None] - edge[:, None, :]
        change[:, at[:, None] >= at] = 0
        changes = [change]
        for stretch in range(1, longest + 1):
            first = at[1 : n + 2 - stretch]
            last = first + stretch - 1
            closed = between[:, first - 1, (last + 1) % (n + 1)]
            removed = closed - edge[:, first - 1] - edge[:, last]
            change = np.minimum(
                between[:, first] + ahead[:, last], between[:, last] + ahead[:, first]
            )
            change += removed[:, :, None] - edge[:, None, :]
            change[:, (first[:, None] - 1 <= at) & (at <= last[:, None])] = 0
            changes.append(change)
        flat = np.concatenate([change.reshape(len(t), -1) for change in changes], 1)
        chosen = flat.argmin(1)
        moving = flat[np.arange(len(t)), chosen] < least
        for row in np.flatnonzero(moving):
            tours[live[row]] = _move(t[row], int(chosen[row]), d)
        live = live[moving]
    return tours[:, 1:]


def _move(tour: Path, chosen: int, d: Matrix) -> Path:
    """`tour` after move number `chosen` of `_descend`: 2-opt, then stretches of 1, 2, ... nodes."""
    m = len(tour)
    if chosen < m * m:
        i, k = divmod(chosen, m)
        return np.concatenate((tour[: i + 1], tour[k:i:-1], tour[k + 1 :]))
    chosen, stretch = chosen - m * m, 1
    while chosen >= (m - stretch) * m:
        chosen, stretch = chosen - (m - stretch) * m, stretch + 1
    first, k = chosen // m + 1, chosen % m
    moved, rest = tour[first : first + stretch], np.delete(tour, slice(first, first + stretch))
    k = k if k < first else k - stretch
    a, b = rest[k], rest[(k + 1) % len(rest)]
    if d[a, moved[-1]] + d[moved[0], b] < d[a, moved[0]] + d[moved[-1], b]:
        moved = moved[::-1]
    return np.concatenate((rest[: k + 1], moved, rest[k + 1 :]))


def _kick(path: Path, rng: np.random.Generator) -> Path:
    """`path` with two neighbouring stretches exchanged: a move 2-opt and Or-opt cannot undo."""
    a, b, c = np.sort(rng.choice(np.arange(1, len(path)), 3, replace=False))
    return np.concatenate((path[:a], path[b:c], path[a:b], path[c:]))


# --- orders of a whole network --------------------------------------------------------------------


def order(
    weights: Mapping[str, Weight],
    cliques: Mapping[str, Sequence[Side]],
    strategy: str,
    seed: int = 0,
    axes: Collection[str] | None = None,
) -> Orders:
    """A permutation for each of `axes` (every clique if None): new channel i is old `[axis][i]`.

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
            first = next(side for side in sides if side.dimension == 0)
            rng = np.random.default_rng([seed, zlib.crc32(axis.encode())])
            whole, layer = distances(weights, sides), distances(weights, [first])
            path = STRATEGIES[strategy](whole, layer, rng)
            found[axis] = torch.from_numpy(np.ascontiguousarray(path, np.int64))
    return found


def apply(
    weights: Mapping[str, Weight], cliques: Mapping[str, Sequence[Side]], orders: Orders
) -> dict[str, Weight]:
    """Copies of `weights` with every side of each axis in its new order (Algorithm 1, line 4)."""
    permuted = {name: weight.clone() for name, weight in weights.items()}
    for axis, new in orders.items():
        for tensor, dimension in cliques[axis]:
            old = permuted[tensor]
            permuted[tensor] = old.index_select(dimension, new.to(old.device))
    return permuted
