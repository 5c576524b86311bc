"""A learned grid over relative channel positions (integral neural networks)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from neumeta.coordinates import Along, Coordinates, Site, Span
from neumeta.representation.grid import Grid, pairs


class IntegralGrid(Grid):
    """Weights as functions of the relative channel position u = (c + 1/2) / C of each morphing axis.

    The functions are piecewise linear with `density` points per channel of the full size. A layer of
    C channels is then a quadrature, with C points, of an integral over u (integral neural networks,
    Solodskikh et al. 2023), so that a size never seen in training is only another quadrature of it.
    """

    def __init__(
        self, roles: Mapping[str, Site], *, nodes: int = 1, density: float = 0.375
    ) -> None:
        self.density = density
        super().__init__(roles, nodes=nodes)

    def points(self, site: Site) -> tuple[int, int]:
        """How many points of the grid lie along the rows and the columns."""
        rows, columns = (
            max(1, round(self.density * span.full)) if span.morphs else span.full
            for span in (site.rows, site.columns)
        )
        return rows, columns

    def forward(self, site: Site, at: Coordinates) -> Float[Tensor, "S O I kk"]:
        """The weights of `site` at these coordinates."""
        rows, columns = self.points(site)
        grid = self.at_depth(site.role, at)
        return pairs(
            grid, _point(at.outputs, site.rows, rows), _point(at.inputs, site.columns, columns)
        )


def _point(along: Along, span: Span, points: int) -> Float[Tensor, "S C"]:
    samples = len(along.place)
    if span.morphs:
        return along.place * points - 0.5
    # Between the channels of an axis that keeps its size there is nothing to learn: no noise.
    whole = torch.arange(span.count, device=along.place.device, dtype=along.place.dtype)
    return whole.expand(samples, span.count)
