"""One manifold in several charts: each part of the sizes has a representation of its own.

Knows no files and no training: parts that were trained apart are put together by training/charts.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from neumeta.coordinates import Coordinates, Site
from neumeta.representation.base import Representation
from neumeta.representation.grid import Grid
from neumeta.representation.wrappers import Anchored


class Charts(Representation):
    """A network is drawn from the first chart whose `least` width its narrowest group reaches, and
    whose `blocks` its shallowest stage has.

    Small and large networks share weights only within a chart, so that neither pulls at the other's.
    Across a border the weights jump, though never within one network. The last chart takes
    what no other reaches. Grids are held in eight bits a number, but for the source's own.
    """

    def __init__(
        self, parts: Sequence[Representation], least: Sequence[float], blocks: Sequence[int]
    ) -> None:
        super().__init__()
        bounds = list(zip(least, blocks, strict=False))
        falling = bounds == sorted(set(bounds), reverse=True)
        if not parts or not len(parts) == len(least) == len(blocks) or not falling:
            raise ValueError(f"charts: {list(least)} are not {len(parts)} falling bounds")
        self.parts, self.least, self.blocks = nn.ModuleList(parts), tuple(least), tuple(blocks)
        sources = [module.source for module in self.modules() if isinstance(module, Anchored)]
        for module in self.modules():
            if isinstance(module, Grid) and module not in sources:
                module.compact()

    def forward(self, site: Site, at: Coordinates) -> Float[Tensor, "S O I kk"]:
        """The weights of `site` at these coordinates."""
        # A width of 0.5 is 8 of 16 channels, and may be 8 of 17.
        bounds = enumerate(zip(self.least, self.blocks, strict=True))
        reached = (
            k
            for k, (least, blocks) in bounds
            if site.narrowest >= least - 1e-9 and site.shallowest >= blocks
        )
        chart = next(reached, len(self.least) - 1)
        made: Tensor = self.parts[chart](site, at)
        return made
