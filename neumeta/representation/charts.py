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
from neumeta.representation.wrappers import Anchored


@dataclass(frozen=True)
class Sizes:
    """The sizes that a chart is for: every group has from `least` to `most` of the source's channels,
    rounded as those of a width are, and every stage so many `blocks` or more."""

    least: float
    blocks: int = 0
    most: float = math.inf

    def holds(self, site: Site) -> bool:
        """Whether the network that the tensor belongs to is of such a size."""
        wide = self.least - 1e-9 <= site.narrowest and site.widest <= self.most + 1e-9
        return wide and site.shallowest >= self.blocks

    def covers(self, other: Sizes) -> bool:
        """Whether every one of the other sizes is one of these."""
        wide = self.least <= other.least and other.most <= self.most
        return wide and self.blocks <= other.blocks


class Charts(Representation):
    """A network is drawn from the first chart whose sizes it is of, and from the last if of none.

    Small and large networks share weights only within a chart, so that neither pulls at the other's.
    Across a border the weights jump, though never within one network. Grids are held in eight bits a
    number, but for the source's own.
    """

    def __init__(self, parts: Sequence[Representation], sizes: Sequence[Sizes]) -> None:
        super().__init__()
        check(sizes)
        self.parts, self.sizes = nn.ModuleList(parts), tuple(sizes)
        sources = [module.source for module in self.modules() if isinstance(module, Anchored)]
        for module in self.modules():
            if isinstance(module, Grid) and module not in sources:
                module.compact()

    def forward(self, site: Site, at: Coordinates) -> Float[Tensor, "S O I kk"]:
        """The weights of `site` at these coordinates."""
        held = (k for k, sizes in enumerate(self.sizes) if sizes.holds(site))
        made: Tensor = self.parts[next(held, len(self.sizes) - 1)](site, at)
        return made


def check(sizes: Sequence[Sizes]) -> None:
    """Raises ValueError if there are no charts, or one that an earlier one leaves no size to."""
    if not sizes:
        raise ValueError("charts: there is none")
    for later, wanted in enumerate(sizes):
        for earlier, taken in enumerate(sizes[:later]):
            if taken.covers(wanted):
                raise ValueError(f"charts: all sizes of {later} are drawn from {earlier} before it")


def narrowed(roles: Mapping[str, Site], most: float) -> dict[str, Site]:
    """What networks of at most `most` of every group's channels can have of each role: the first ones.

    A dimension of several parts is left whole.
    """
    return {
        role: replace(site, rows=_narrowed(site.rows, most), columns=_narrowed(site.columns, most))
        for role, site in roles.items()
    }


def _narrowed(span: Span, most: float) -> Span:
    if not span.morphs or not span.leading or most >= 1:
        return span
    ((_, full, repeat),) = span.parts
    units = math.floor(most * full + 0.5 + 1e-9)
    return Span(((units, units, repeat),), span.morphs)
