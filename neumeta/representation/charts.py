"""One manifold in several charts: each part of the sizes has a representation of its own.

Knows no files and no training: parts that were trained apart are put together by training/charts.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor, nn

from neumeta.coordinates import Coordinates, Site, Span
from neumeta.representation.base import Representation
from neumeta.representation.grid import Grid
from neumeta.representation.wrappers import Corrected


@dataclass(frozen=True)
class Sizes:
    """The sizes that a chart is for: every group has the channels of some width from `least` to `most`,
    each of its own, and every stage from `blocks` to `most_blocks` blocks. Of `most` and `most_blocks`
    there is one number for all groups or stages, or one for each."""

    least: float
    blocks: int = 0
    most: tuple[float, ...] = (math.inf,)
    most_blocks: tuple[float, ...] = (math.inf,)

    def holds(self, site: Site) -> bool:
        """Whether the network that the tensor belongs to is of such a size."""
        wide = all(width <= self.widest(group) + 1e-9 for group, width in enumerate(site.widest))
        deep = all(blocks <= self.deepest(stage) for stage, blocks in enumerate(site.depth))
        large = self.least - 1e-9 <= site.narrowest and self.blocks <= min(site.depth, default=0)
        return large and wide and deep

    def widest(self, group: int) -> float:
        """The largest width that this group has."""
        return self.most[group % len(self.most)]

    def deepest(self, stage: int) -> float:
        """How many blocks this stage has at most."""
        return self.most_blocks[stage % len(self.most_blocks)]

    def covers(self, other: Sizes) -> bool:
        """Whether every one of the other sizes is one of these."""
        wide, deep = within(other.most, self.most), within(other.most_blocks, self.most_blocks)
        return self.least <= other.least and self.blocks <= other.blocks and wide and deep

    @property
    def bounded(self) -> bool:
        """Whether some networks are too wide or too deep for it."""
        return any(map(math.isfinite, (*self.most, *self.most_blocks)))


def within(bounds: Sequence[float], others: Sequence[float]) -> bool:
    """Whether no bound is larger than its other, where one number may stand for all."""
    count = max(len(bounds), len(others))
    return all(bounds[k % len(bounds)] <= others[k % len(others)] for k in range(count))


class Charts(Representation):
    """A network is drawn from the first chart whose sizes it is of, and from the last if of none.

    Small and large networks share weights only within a chart, so that neither pulls at the other's.
    Across a border the weights jump, though never within one network. Grids, the source's own among
    them, are held in eight bits a number, vectors and corrections in sixteen.
    """

    def __init__(self, parts: Sequence[Representation], sizes: Sequence[Sizes]) -> None:
        super().__init__()
        self.parts, self.sizes = nn.ModuleList(parts), tuple(sizes)
        for module in self.modules():
            if isinstance(module, Grid | Corrected):
                module.compact()

    def forward(self, site: Site, at: Coordinates) -> Float[Tensor, "S O I kk"]:
        """The weights of `site` at these coordinates."""
        held = (k for k, sizes in enumerate(self.sizes) if sizes.holds(site))
        made: Tensor = self.parts[next(held, len(self.sizes) - 1)](site, at)
        return made


def check_sizes(
    sizes: Sequence[Sizes], groups: int | None = None, stages: int | None = None
) -> None:
    """Raises ValueError if there are no charts, one that is for no size, that earlier ones leave none
    to or that bounds another number of groups or stages, or if the last one is not for whatever is wide
    and deep."""
    for later, wanted in enumerate(sizes):
        _check_count(f"charts[{later}].most", len(wanted.most), groups, "groups")
        _check_count(f"charts[{later}].most_blocks", len(wanted.most_blocks), stages, "stages")
    for later, wanted in enumerate(sizes):
        for width in wanted.most:
            if not 0 < wanted.least <= width or math.isinf(wanted.least):
                raise ValueError(f"charts[{later}]: no width is from {wanted.least} to {width}")
        for most in wanted.most_blocks:
            if not 0 <= wanted.blocks <= most:
                told = f"{wanted.blocks} to {most:g}"
                raise ValueError(f"charts[{later}]: no number of blocks is from {told}")
        for earlier, taken in enumerate(sizes[:later]):
            if taken.covers(wanted):
                raise ValueError(f"charts[{earlier}] already takes all sizes of charts[{later}]")
    if not sizes or sizes[-1].bounded:
        raise ValueError("charts: the last one must be for all widths and blocks above its least")


def _check_count(key: str, given: int, there: int | None, of: str) -> None:
    if given != 1 and (not given or there is not None and given != there):
        allowed = "a number" + (f", or one for each of {there} {of}" if there else "")
        raise ValueError(f"{key}: {given} numbers; it must be {allowed}")


def bounded(roles: Mapping[str, Site], sizes: Sizes) -> dict[str, Site]:
    """What networks of these sizes can have: the roles of so few blocks, and of every dimension the
    first channels, which only a grid over absolute indices without noise is content with.

    A dimension of several parts is left whole.
    """
    return {
        role: replace(
            site, rows=_narrowed(site.rows, sizes), columns=_narrowed(site.columns, sizes)
        )
        for role, site in roles.items()
        if site.stage is None or site.occurs <= sizes.deepest(site.stage)
    }


def _narrowed(span: Span, sizes: Sizes) -> Span:
    if span.group is None or not span.leading or (most := sizes.widest(span.group)) >= 1:
        return span
    ((_, full, repeat),) = span.parts
    units = max(1, math.floor((most + 1e-9) * full + 0.5))
    return replace(span, parts=((units, units, repeat),))
