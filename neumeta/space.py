"""The sizes that one manifold covers, and a request's canonical point among them.

Two widths that round to the same sizes are the same architecture. Knows no weights and no HTTP; a
request that is out of bounds is answered by `BadArchitecture`, which names the field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from neumeta.graph import Graph

MAX_WIDTH = 2.0
MOST_BLOCKS = 64


class BadArchitecture(ValueError):
    """A requested architecture that is not served: which field, what was given, what is allowed."""

    def __init__(self, field: str, given: object, allowed: str) -> None:
        self.field, self.given, self.allowed = field, str(given)[:80], allowed
        super().__init__(f"{field}: {self.given} is not allowed; {allowed}")


@dataclass(frozen=True)
class Architecture:
    """One network, in integers: its depth per stage and the size of every extent of its space."""

    depth: tuple[int, ...]
    channels: tuple[int, ...]
    extrapolated: bool = False

    @property
    def key(self) -> str:
        """The canonical name, e.g. '3.3.3/8.16.32'."""
        return "/".join((".".join(map(str, self.depth)), ".".join(map(str, self.channels))))


@dataclass(frozen=True, eq=False)  # one for each manifold, and its own cache key
class Space:
    """The architectures one manifold was trained on.

    `graph` is the source network: all its axes morph, and its stages do if `blocks`, the trained range
    of children per stage, is given. `width` is the trained range of width factors. `most` bounds
    blocks beyond the trained range. `named` are depths with a name of their own.
    """

    name: str
    graph: Graph
    width: tuple[float, float]
    blocks: tuple[int, int] | None = None
    most: int = 9
    named: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def depth(self) -> tuple[int, ...]:
        """The source network's depth."""
        return self.graph.depth

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of axes: a width list has one factor for each."""
        return self.graph.groups

    @cached_property
    def extents(self) -> tuple[tuple[str, int], ...]:
        """(group, size in the source) of every kind of axis: what an architecture's channels are of."""
        found = dict.fromkeys((axis.group, axis.size) for axis in self.graph.axes.values())
        return tuple(sorted(found, key=lambda extent: self.groups.index(extent[0])))

    @cached_property
    def full(self) -> Architecture:
        """The source network's own architecture."""
        return Architecture(self.depth, tuple(size for _, size in self.extents))

    def distance(self, architecture: Architecture) -> tuple[float, float]:
        """How far from the source's size: the largest relative change of any extent or loss of a
        stage's blocks, and the largest relative growth in blocks."""
        widths = zip(architecture.channels, self.full.channels, strict=True)
        changed = [abs(1 - mine / full) for mine, full in widths]
        grown = [
            mine / blocks - 1 for mine, blocks in zip(architecture.depth, self.depth, strict=True)
        ]
        return max([0.0, *changed, *(-more for more in grown)]), max([0.0, *grown])

    def ends(self, architecture: Architecture) -> tuple[float, tuple[float, ...]]:
        """The largest width that may have been asked for its narrowest extent (1 where none morphs),
        and the smallest for each group: so many channels stand for all widths that round to them."""
        narrowest, widest = [], dict.fromkeys(self.groups, 0.0)
        for (group, full), mine in zip(self.extents, architecture.channels, strict=True):
            narrowest.append((mine + 0.5) / full)
            # One channel is the fewest: no width is too small for it.
            widest[group] = max(widest[group], (mine - 0.5) / full if mine > 1 else 0.0)
        return min(narrowest, default=1.0), tuple(widest.values())

    def graph_of(self, architecture: Architecture) -> Graph:
        """The source's graph at this depth."""
        return self.graph.at(architecture.depth)

    @lru_cache(maxsize=1024)  # noqa: B019 (bounded)
    def sizes(self, architecture: Architecture) -> dict[str, int]:
        """The size of every axis of the network of this architecture."""
        channels = dict(zip(self.extents, architecture.channels, strict=True))
        axes = self.graph_of(architecture).axes
        return {name: channels[axis.group, axis.size] for name, axis in axes.items()}

    @lru_cache(maxsize=1024)  # noqa: B019 (bounded)
    def cost(self, architecture: Architecture) -> dict[str, int]:
        """Parameters and multiply-accumulates (one image) of the folded network."""
        graph, sizes = self.graph_of(architecture).folded, self.sizes(architecture)
        return {"parameters": graph.parameters(sizes), "macs": graph.macs(sizes)}

    @cached_property
    def widths(self) -> tuple[float, ...]:
        """Scalar widths within the trained range, rising, that between them ask for every architecture
        that any of that range can ask for."""
        low, high = self.width
        # The channels of an extent of C change where width passes (c + 1/2) / C.
        sizes = {size for _, size in self.extents}
        turns = {(c + 0.5) / size for size in sizes for c in range(2 * size)}
        edges = sorted({low, high, *(turn for turn in turns if low < turn < high)})
        middles = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
        return tuple(dict.fromkeys((low, *middles, high)))

    def scaled(self, depth: Sequence[int] | None = None) -> tuple[Architecture, ...]:
        """Every distinct architecture that one scalar width within the trained range can ask for,
        smallest first."""
        return tuple(dict.fromkeys(self.architecture(width, depth) for width in self.widths))

    def architecture(
        self,
        width: float | Sequence[float] | Mapping[str, float] = 1.0,
        depth: Sequence[int] | None = None,
        *,
        extrapolate: bool = False,
    ) -> Architecture:
        """The canonical architecture of a width (a number, one per group, or by group) and depth.

        Raises BadArchitecture with the field, the value and what is allowed.
        """
        channels, wide = self._channels(width, extrapolate)
        blocks, deep = self._blocks(depth, extrapolate)
        return Architecture(blocks, channels, wide or deep)

    def factors(self, architecture: Architecture) -> list[float]:
        """Width factors, one per group, that give this architecture's channels.

        Within the trained range for all but extrapolated ones: the channels of a trained width may be
        a smaller fraction than that width.
        """
        found = []
        low, high = self.width
        sizes = list(zip(self.extents, architecture.channels, strict=True))
        for group in self.groups:
            own = [(count, size) for (name, size), count in sizes if name == group]
            count, size = max(own, key=lambda pair: pair[1])
            factor = count / size
            if not all(_scaled(factor, size) == count for count, size in own):
                # Between the last width that is too small for one of them and the first too large.
                # One is the fewest: no width is too small for it.
                least = max((count - 0.5) / size if count > 1 else 0.0 for count, size in own)
                factor = (least + min((count + 0.5) / size for count, size in own)) / 2
            if not architecture.extrapolated:
                factor = min(max(factor, low), high)
            found.append(factor)
        return found

    def _channels(
        self, width: float | Sequence[float] | Mapping[str, float], extrapolate: bool
    ) -> tuple[tuple[int, ...], bool]:
        groups = self.groups
        low, high = self.width
        allowed = f"a number from {low:g} to {high:g}"
        if len(groups) > 1:
            allowed += f", or a list of {len(groups)} of them, one per group ({', '.join(groups)})"
        if isinstance(width, Mapping):
            unknown = [name for name in width if name not in groups]
            if unknown:
                raise BadArchitecture("width", unknown[0], f"names of groups: {', '.join(groups)}")
            factors = [float(width.get(name, high)) for name in groups]
        elif isinstance(width, (int, float)):
            factors = [float(width)] * max(1, len(groups))
        else:
            if len(width) != len(groups):
                raise BadArchitecture("width", f"a list of {len(width)}", allowed)
            factors = [float(factor) for factor in width]
        outside = False
        for factor in factors:
            if not math.isfinite(factor) or not 0 < factor <= MAX_WIDTH:
                limit = f'; with "extrapolate": true more than 0 and at most {MAX_WIDTH:g}'
                raise BadArchitecture("width", factor, allowed + limit)
            if not low - 1e-9 <= factor <= high + 1e-9:
                outside = True
                if not extrapolate:
                    raise BadArchitecture(
                        "width", factor, allowed + ' unless "extrapolate" is true'
                    )
        by_group = dict(zip(groups, factors, strict=False))
        return tuple(_scaled(by_group[group], size) for group, size in self.extents), outside

    def _blocks(
        self, depth: Sequence[int] | None, extrapolate: bool
    ) -> tuple[tuple[int, ...], bool]:
        base = self.depth
        if depth is None:
            return base, False
        if self.blocks is None:
            if tuple(depth) != base:
                allowed = f"only {list(base)} is served by this manifold" if base else "no depth"
                raise BadArchitecture("depth", list(depth)[:8], allowed)
            return base, False
        low, high = self.blocks
        allowed = f"a list of {len(base)} whole numbers from {low} to {high}"
        if len(depth) != len(base):
            raise BadArchitecture("depth", f"a list of {len(depth)}", allowed)
        outside = False
        for count, stage in zip(depth, self.graph.stages, strict=True):
            if not stage.least <= count <= self.most:
                limit = f', up to {self.most} with "extrapolate": true'
                raise BadArchitecture("depth", list(depth), allowed + limit)
            if not low <= count <= high:
                outside = True
                if not extrapolate:
                    raise BadArchitecture(
                        "depth", list(depth), allowed + ' unless "extrapolate" is true'
                    )
        return tuple(depth), outside


def _scaled(factor: float, size: int) -> int:
    return max(1, round(factor * size))
