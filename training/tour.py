"""Short paths through all nodes of a matrix of distances: exact for few nodes, searched for many; and
how short none can be.

Knows no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Path = NDArray[np.int64]

EXACT = 16
"""Up to so many nodes a path is found by dynamic programming: 2^16 subsets x 16 ends, in 0.2 s."""
STARTS = 4
"""Longer paths: how many nearest-neighbour paths are tried as a start, beside the layer-wise ones."""
ROUNDS = 60
"""Longer paths: how often the prices of `prices` are changed."""
NEAR = 5
"""Longer paths: how many nodes are tried as a new neighbour of a node."""
LONGEST = 3
"""Longer paths: the most nodes that one Or-opt move takes along."""
REACH = 10
"""Longer paths: the most nodes in each of the two stretches that a kick exchanges."""
KICKS = 3
"""Longer paths: kicks per node, and `FEWEST` at least."""
FEWEST = 1000


def length(path: Path, distance: Matrix) -> float:
    """Length of an open path through all nodes."""
    return float(distance[path[:-1], path[1:]].sum())


def _none(whole: Matrix, layer: Matrix, rng: np.random.Generator) -> Path:
    return np.arange(len(whole))


def _random(whole: Matrix, layer: Matrix, rng: np.random.Generator) -> Path:
    return rng.permutation(len(whole))


def _layer_greedy(whole: Matrix, layer: Matrix, rng: np.random.Generator) -> Path:
    return _nearest(layer, 0)


def _layer_2opt(whole: Matrix, layer: Matrix, rng: np.random.Generator) -> Path:
    tour = _Tour(_nearest(layer, 0), layer, np.zeros(len(layer)), near=len(layer))
    tour.descend(range(len(layer) + 1), longest=0)
    return tour.path()


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
    """A short path for more nodes than `EXACT`: a start, improved, kicked, improved again."""
    n = len(whole)
    # The layer-wise solutions and the present order are starts: the result is never above them.
    starts = [np.arange(n), _layer_greedy(whole, layer, rng), _layer_2opt(whole, layer, rng)]
    starts += [_nearest(whole, int(node)) for node in rng.permutation(n)[:STARTS]]
    best = min(starts, key=lambda path: length(path, whole))
    price, _ = prices(whole, length(best, whole), ROUNDS)
    tour = _Tour(best, whole, price, NEAR)
    tour.descend(range(n + 1), LONGEST)
    reach = max(1, min(REACH, n // 3))
    for _ in range(max(KICKS * n, FEWEST)):
        low = int(rng.integers(0, n + 2 - 2 * reach))
        first, second = (int(size) for size in rng.integers(1, reach + 1, 2))
        if tour.kick(low, first, second) + tour.descend(tour.cut, LONGEST) < 0:
            tour.back()
        tour.undo.clear()
    return min(best, tour.path(), key=lambda path: length(path, whole))


def prices(distance: Matrix, reached: float, rounds: int) -> tuple[Matrix, float]:
    """A price for each node, and a length below which no path through all nodes can be.

    The bound of Held and Karp (1971) by subgradients: a path is a spanning tree whose nodes all
    have degree 2, counting a node at distance 0 from all that joins both ends. Prices on degrees
    move the cheapest tree towards a path; `reached` is the length of a known one. Paid at both ends
    of an edge they lengthen all paths alike, and bring near what a short path would join.
    """
    n, best = len(distance), -np.inf
    step, shrink = 2.0, 0.02 ** (1 / rounds)
    price = found = np.zeros(n)
    for _ in range(rounds):
        degree, total = _tree(distance + price[:, None] + price)
        ends = np.argsort(price, kind="stable")[:2]
        degree[ends] += 1
        bound = total + float(price[ends].sum() - 2 * price.sum())
        if bound > best:
            best, found = bound, price
        slope = degree - 2
        if not slope.any() or reached <= bound:
            break
        price = price + step * (reached - bound) / (slope**2).sum() * slope
        step *= shrink
    return found, best


def _tree(distance: Matrix) -> tuple[Path, float]:
    """Every node's degree in a shortest spanning tree (Prim 1957), and the tree's length."""
    n, total = len(distance), 0.0
    degree, parent = np.zeros(n, np.int64), np.zeros(n, np.int64)
    cheapest, left = distance[0].copy(), np.ones(n, np.bool_)
    cheapest[0], left[0] = np.inf, False
    for _ in range(n - 1):
        node = int(cheapest.argmin())
        total += float(cheapest[node])
        degree[node] += 1
        degree[parent[node]] += 1
        cheapest[node], left[node] = np.inf, False
        closer = left & (distance[node] < cheapest)
        np.copyto(cheapest, distance[node], where=closer)
        parent[closer] = node
    return degree, total


class _Tour:
    """A path closed to a tour by one more node, changed a stretch at a time and changed back.

    The closing node is the last, at distance 0 from all. `nodes` is the tour, `at` every node's
    position in it, `far` the distances with the prices of both ends, `close` the nodes worth
    joining to each node, nearest first, and `cut` the nodes that lost a neighbour in a kick.
    Lists, since the search reads single numbers: those of an array cost several times as much.
    """

    def __init__(self, path: Path, distance: Matrix, price: Matrix, near: int) -> None:
        n = len(path)
        priced = np.pad(distance + price[:, None] + price, (0, 1))
        # Any price will do for the closing node: its edges shall look like those of the path.
        own = distance[path[:-1], path[1:]].mean() if n > 1 else 0.0
        priced[n, :n] = priced[:n, n] = price - price.min() + own
        np.fill_diagonal(priced, np.inf)
        self.close: list[list[int]] = priced.argsort(1, kind="stable")[:, : min(near, n)].tolist()
        self.far: list[list[float]] = priced.tolist()
        self.nodes: list[int] = [n, *path.tolist()]
        self.at: list[int] = np.argsort(self.nodes).tolist()
        # Rounding must not keep the search going.
        self.least = 1e-10 * max(float(np.abs(priced[np.isfinite(priced)]).max(initial=0)), 1e-290)
        self.undo: list[tuple[int, list[int]]] = []
        self.cut: list[int] = []

    def path(self) -> Path:
        """The nodes in their order, without the one that closes the tour."""
        start = self.at[-1]
        return np.array(self.nodes[start + 1 :] + self.nodes[:start])

    def put(self, low: int, stretch: list[int]) -> None:
        """Let the positions from `low` on hold `stretch`: the same nodes in a new order."""
        self.undo.append((low, self.nodes[low : low + len(stretch)]))
        self.nodes[low : low + len(stretch)] = stretch
        for position, node in enumerate(stretch, low):
            self.at[node] = position

    def back(self) -> None:
        """Take back every change that `undo` holds."""
        for low, stretch in self.undo[::-1]:
            self.put(low, stretch)

    def kick(self, low: int, first: int, second: int) -> float:
        """Exchange the `first` nodes from `low` on with the `second` after them; what is gained."""
        nodes, far = self.nodes, self.far
        middle, high = low + first, low + first + second
        a, b, c = nodes[low - 1], nodes[low], nodes[middle - 1]
        d, e, f = nodes[middle], nodes[high - 1], nodes[high % len(nodes)]
        self.cut = [a, b, c, d, e, f]
        if a == e:  # the two are the whole tour: it only turns
            return 0.0
        self.put(low, nodes[middle:high] + nodes[low:middle])
        return far[a][b] + far[c][d] + far[e][f] - far[a][d] - far[e][b] - far[c][f]

    def descend(self, nodes: Iterable[int], longest: int) -> float:
        """What is gained by improving the surroundings of `nodes` until they have no move left.

        Moves: 2-opt (turn a stretch) and Or-opt (move a stretch of up to `longest` nodes, either
        way round). Only nodes that got another neighbour are looked at again: what a turned stretch
        opens for the others is rare, and is left to the next kick or call.
        """
        waiting, gained = dict.fromkeys(nodes), 0.0
        while waiting:
            node, _ = waiting.popitem()
            gain, low, stretch, ends = self._move(node, longest)
            if stretch:
                self.put(low, stretch)
                gained += gain
                waiting.update(dict.fromkeys(ends))
        return gained

    def _move(self, a: int, longest: int) -> tuple[float, int, list[int], list[int]]:
        """The best move that gives `a` a nearer neighbour: gain, position, nodes there, ends."""
        nodes, at, far = self.nodes, self.at, self.far
        m, i, from_a = len(nodes), at[a], far[a]
        best, ends = self.least, list[int]()
        turn: tuple[int, int, int] | None = None
        shift: tuple[int, int, int, int] | None = None
        for way in (1, -1):
            b = nodes[(i + way) % m]
            from_b, edge = far[b], from_a[b]
            for c in self.close[a]:
                won = edge - from_a[c]
                if won <= self.least:
                    break
                j, from_c = at[c], far[c]
                e = nodes[(j + way) % m]
                gain = won + from_c[e] - from_b[e]
                if gain > best:
                    best, turn, shift = gain, (i, j, way), None
                    ends = [a, b, c, e]
                if not longest:
                    continue
                # A stretch from a to s, away from b, comes between c and one of its neighbours f.
                for side in (1, -1):
                    f = nodes[(j + side) % m]
                    from_f, so_far = far[f], won + from_c[f]
                    for k in range(i, i - way * longest, -way):
                        s = nodes[k] if 0 <= k < m else c
                        if s in (c, f):
                            break
                        q = nodes[(k - way) % m]
                        gain = so_far + far[s][q] - from_f[s] - from_b[q]
                        if gain > best:
                            best, shift = gain, (i, k, j, side)
                            ends = [a, b, c, f, s, q]
                # A stretch from c to s, away from p, comes between a and b.
                for side in (1, -1):
                    p = nodes[(j - side) % m]
                    from_p, so_far = far[p], won + from_c[p]
                    for k in range(j, j + side * longest, side):
                        s = nodes[k] if 0 <= k < m else a
                        if s in (a, b):
                            break
                        q = nodes[(k + side) % m]
                        gain = so_far + far[s][q] - from_b[s] - from_p[q]
                        if gain > best:
                            best, shift = gain, (j, k, i, way)
                            ends = [a, b, c, p, s, q]
        if shift:
            # Positions i..k of the tour go to the side `side` of position j, that of i next to it.
            i, k, j, side = shift
            stretch = nodes[i : k + 1] if i <= k else nodes[k : i + 1][::-1]
            low, high = min(i, k), max(i, k) + 1
            if side < 0:
                stretch, j = stretch[::-1], (j - 1) % m
            if j < low:
                return best, j + 1, stretch + nodes[j + 1 : low], ends
            return best, low, nodes[high : j + 1] + stretch, ends
        if turn:
            i, j, way = turn
            low, high = min(i, j), max(i, j)
            low, high = (low + 1, high) if way > 0 else (low, high - 1)
            return best, low, nodes[low : high + 1][::-1], ends
        return 0.0, 0, [], []
