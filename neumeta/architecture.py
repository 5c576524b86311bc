"""The space of architectures a manifold covers, and a request's canonical point in it.

Two widths that round to the same channels are the same architecture. Knows no weights and no HTTP;
a request that is out of bounds is answered by `BadArchitecture`, which names the field.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, cached_property

from neumeta.family import FAMILIES, Family, Layer, macs, parameters

MAX_WIDTH = 2.0


class BadArchitecture(ValueError):
    """A requested architecture that is not served: which field, what was given, what is allowed."""

    def __init__(self, field: str, given: object, allowed: str) -> None:
        self.field, self.given, self.allowed = field, str(given)[:80], allowed
        super().__init__(f"{field}: {self.given} is not allowed; {allowed}")


@dataclass(frozen=True)
class Architecture:
    """One network: depth per stage and the size of every morphing stage, in integers."""

    family: str
    depth: tuple[int, ...]
    channels: tuple[int, ...]
    extrapolated: bool = False

    @property
    def key(self) -> str:
        """The canonical name, e.g. 'resnet-cifar/3.3.3/8.16.32'."""
        return "/".join(
            (self.family, ".".join(map(str, self.depth)), ".".join(map(str, self.channels)))
        )


@dataclass(frozen=True)
class Space:
    """The architectures one manifold was trained on.

    `morph` are patterns over axis names (`*`: the whole network); every other axis keeps its full
    size. `width` is the trained range of width factors; `blocks` the trained range of blocks per
    stage, None where depth does not morph. `image` is the height and width in pixels of the images it
    was trained on, which cost is counted at; None: the family's own.
    """

    family: str
    arch: str
    classes: int
    morph: tuple[str, ...]
    width: tuple[float, float]
    blocks: tuple[int, int] | None = None
    image: tuple[int, int] | None = None

    @property
    def table(self) -> Family:
        """The family's axis table."""
        return FAMILIES[self.family]

    @property
    def depth(self) -> tuple[int, ...]:
        """The source network's depth."""
        return self.table.architectures[self.arch]

    @cache  # noqa: B019 (axes are few, and spaces live as long as their manifolds)
    def morphs(self, axis: str) -> bool:
        """Whether this axis is resized by `width`."""
        staged = self.table.stage_of(axis) is not None
        return staged and any(fnmatch(axis, pattern) for pattern in self.morph)

    @cached_property
    def stages(self) -> tuple[int, ...]:
        """The stages with at least one morphing axis: a width list has one factor for each."""
        found = {
            self.table.stage_of(axis) for axis in self.table.axes(self.depth) if self.morphs(axis)
        }
        return tuple(sorted(stage for stage in found if stage is not None))

    @property
    def full(self) -> Architecture:
        """The source network's own architecture."""
        return Architecture(
            self.family, self.depth, tuple(self.table.stages[s] for s in self.stages)
        )

    def distance(self, architecture: Architecture) -> tuple[float, float]:
        """How far from the source's size: the largest relative change of any stage's width or loss of
        its blocks, and the largest relative growth in blocks."""
        widths = zip(architecture.channels, self.full.channels, strict=True)
        changed = [abs(1 - mine / full) for mine, full in widths]
        grown = [
            mine / blocks - 1 for mine, blocks in zip(architecture.depth, self.depth, strict=True)
        ]
        return max([0.0, *changed, *(-more for more in grown)]), max([0.0, *grown])

    def sizes(self, architecture: Architecture) -> dict[str, int]:
        """The size of every axis of the network of this architecture."""
        sizes = self.table.full_sizes(architecture.depth, self.classes)
        channels = dict(zip(self.stages, architecture.channels, strict=True))
        for axis in self.table.axes(architecture.depth):
            if self.morphs(axis):
                stage = self.table.stage_of(axis)
                assert stage is not None
                sizes[axis] = channels[stage]
        return sizes

    @cache  # noqa: B019 (as above)
    def repeats(self, layer: Layer) -> int:
        """How many blocks of the source network share this layer's role."""
        return sum(each.role == layer.role for each in self.table.layers(self.depth))

    def morphing(self, layer: Layer) -> bool:
        """Whether this layer's tensors come from the INR (else: frozen source tensors)."""
        depth_morphs = self.blocks is not None
        return depth_morphs or self.morphs(layer.output_axis) or self.morphs(layer.input_axis)

    def cost(self, architecture: Architecture) -> dict[str, int]:
        """Parameters and multiply-accumulates (one image of the data's own size) of the folded
        network."""
        sizes, side = self.sizes(architecture), self.table.input_size
        return {
            "parameters": parameters(self.table.tensors(architecture.depth), sizes),
            "macs": macs(self.table, architecture.depth, sizes, self.image or (side, side)),
        }

    def scaled(self, depth: Sequence[int] | None = None) -> tuple[Architecture, ...]:
        """Every distinct architecture that one scalar width within the trained range can ask for."""
        low, high = self.width
        steps = 4 * max(self.full.channels, default=1)
        found = (self.architecture(low + (high - low) * i / steps, depth) for i in range(steps + 1))
        return tuple({each.key: each for each in found}.values())

    def architecture(
        self,
        width: float | Sequence[float] = 1.0,
        depth: Sequence[int] | None = None,
        *,
        extrapolate: bool = False,
    ) -> Architecture:
        """The canonical architecture of a width (scalar or per morphing stage) and depth.

        Raises BadArchitecture with the field, the value and what is allowed.
        """
        channels, wide = self._channels(width, extrapolate)
        blocks, deep = self._blocks(depth, extrapolate)
        return Architecture(self.family, blocks, channels, wide or deep)

    def _channels(
        self, width: float | Sequence[float], extrapolate: bool
    ) -> tuple[tuple[int, ...], bool]:
        stages = self.stages
        low, high = self.width
        allowed = f"a number from {low:g} to {high:g}"
        if len(stages) > 1:
            allowed += f", or a list of {len(stages)} of them, one per stage"
        if isinstance(width, (int, float)):
            factors = [float(width)] * len(stages)
        else:
            if len(width) != len(stages):
                raise BadArchitecture("width", f"a list of {len(width)}", allowed)
            factors = [float(factor) for factor in width]
        outside = False
        for factor in factors or [float(width) if isinstance(width, (int, float)) else 1.0]:
            if not math.isfinite(factor) or not 0 < factor <= MAX_WIDTH:
                limit = f'; with "extrapolate": true more than 0 and at most {MAX_WIDTH:g}'
                raise BadArchitecture("width", factor, allowed + limit)
            if not low - 1e-9 <= factor <= high + 1e-9:
                outside = True
                if not extrapolate:
                    raise BadArchitecture(
                        "width", factor, allowed + ' unless "extrapolate" is true'
                    )
        full = [self.table.stages[stage] for stage in stages]
        return tuple(max(1, round(f * c)) for f, c in zip(factors, full, strict=True)), outside

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
        most = self.table.max_blocks
        allowed = f"a list of {len(base)} whole numbers from {low} to {high}"
        if len(depth) != len(base):
            raise BadArchitecture("depth", f"a list of {len(depth)}", allowed)
        outside = False
        for count in depth:
            if not 1 <= count <= most:
                limit = f', up to {most} with "extrapolate": true'
                raise BadArchitecture("depth", list(depth), allowed + limit)
            if not low <= count <= high:
                outside = True
                if not extrapolate:
                    raise BadArchitecture(
                        "depth", list(depth), allowed + ' unless "extrapolate" is true'
                    )
        return tuple(depth), outside
