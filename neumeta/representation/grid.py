"""A learned grid over absolute channel indices. Knows no network and no file."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neumeta.coordinates import Coordinates, Site, Span
from neumeta.representation.base import Representation, module_key

MOST_STEPS = 127
"""From zero to a row's largest number, in eight bits."""


class Grid(Representation):
    """Learned values per role: (nodes along l/L, rows, columns, numbers of a kernel).

    `nodes` 0 means one for each block of the source network. Between nodes the grid is interpolated,
    or, with `stepped`, constant: the blocks of a deep network then repeat those of a shallow one.
    Channels are nested: a smaller size has the source's first ones; noise interpolates between them.
    """

    def __init__(self, roles: Mapping[str, Site], *, nodes: int = 1, stepped: bool = False) -> None:
        super().__init__()
        self.stepped, self.grid, self.unit = stepped, nn.ParameterDict(), nn.ParameterDict()
        for role, site in roles.items():
            depth = (nodes or site.length) if site.length > 1 else 1
            shape = (depth, *self.points(site), math.prod(site.spatial))
            self.grid[module_key(role)] = nn.Parameter(torch.zeros(shape))

    def points(self, site: Site) -> tuple[int, int]:
        """How many points of the grid lie along the rows and the columns."""
        return site.rows.full, site.columns.full

    @torch.no_grad()
    def fill(self, site: Site, value: Tensor) -> bool:
        """Start from the source network's tensor: its mean between the points of the grid."""
        grid = self.grid[module_key(site.role)]
        value = value.reshape(site.rows.full, site.columns.full, -1).movedim(2, 0)
        pooled = nn.functional.adaptive_avg_pool2d(value, self.points(site)).movedim(0, 2)
        nodes = len(grid)
        for node in range(nodes):
            if nodes == 1 or site.cell[0] <= (node + 0.5) / nodes < site.cell[1]:
                grid[node] = pooled
        return True

    @torch.no_grad()
    def compact(self, steps: int = MOST_STEPS) -> None:
        """From here on hold every number of a matrix in eight bits, in units of its row's largest over
        `steps`, and vectors in float16. Fewer steps deflate to fewer bytes. Such a grid is sampled
        from, not trained."""
        for key, value in self.grid.items():
            if key in self.unit:
                continue
            if value.shape[2:].numel() == 1:
                held = value.half()
            else:
                largest = value.float().abs().amax((2, 3), keepdim=True).clamp(min=1e-12)
                unit = largest / steps
                held = (value.float() / unit).round().to(torch.int8)
                self.unit[key] = nn.Parameter(unit, requires_grad=False)
            self.grid[key] = nn.Parameter(held, requires_grad=False)

    @torch.no_grad()
    def widen(self) -> None:
        """Undo `compact`, but for its rounding: numbers in float32, to be trained on."""
        for key, value in self.grid.items():
            wide = value.float()
            if key in self.unit:
                wide = wide * self.unit[key].float()
            self.grid[key] = nn.Parameter(wide)
        self.unit = nn.ParameterDict()

    def forward(self, site: Site, at: Coordinates) -> Float[Tensor, "S O I kk"]:
        """The weights of `site` at these coordinates."""
        if at.exact and site.rows.leading and site.columns.leading:
            # What a small size does not have is not even read.
            return self.at_depth(site.role, at, site.rows.count, site.columns.count)
        return nested(self.at_depth(site.role, at), site, at)

    def at_depth(
        self, role: str, at: Coordinates, rows: int | None = None, columns: int | None = None
    ) -> Float[Tensor, "S A B kk"]:
        """The first rows and columns of a role's grid, or all, at each sample's l/L."""
        key, like = module_key(role), at.layer
        grid = self.grid[key][:, :rows, :columns]
        unit = self.unit[key][:, :rows] if key in self.unit else None
        nodes = len(grid)
        if nodes == 1:
            everywhere = _numbers(grid, unit, like)
            return everywhere.expand(len(like), *everywhere.shape[1:])
        place = like[:, 0] * nodes - 0.5
        if not self.stepped:
            return interpolate(_numbers(grid, unit, like), place, 0)
        index = place.round().clamp(0, nodes - 1).long()
        unit = None if unit is None else unit.index_select(0, index)
        return _numbers(grid.index_select(0, index), unit, like)


def _numbers(held: Tensor, unit: Tensor | None, like: Tensor) -> Tensor:
    """What a grid holds as numbers of the dtype of `like`."""
    held = held.to(like.dtype)
    return held if unit is None else held * unit.to(like.dtype)


def nested(
    grid: Float[Tensor, "S A B kk"], site: Site, at: Coordinates
) -> Float[Tensor, "S O I kk"]:
    """The channels that a size has of the source's: the first ones of every part."""
    if not at.exact:
        return pairs(grid, at.outputs.index, at.inputs.index)
    if site.rows.leading and site.columns.leading:
        return grid[:, : site.rows.count, : site.columns.count]
    return _chosen(
        _chosen(grid, site.rows, at.outputs.index[0], 1), site.columns, at.inputs.index[0], 2
    )


def _chosen(grid: Tensor, span: Span, index: Tensor, dimension: int) -> Tensor:
    if span.leading:
        return grid.narrow(dimension, 0, span.count)
    return grid.index_select(dimension, index.long())


def pairs(
    grid: Float[Tensor, "S A B kk"], outputs: Float[Tensor, "S O"], inputs: Float[Tensor, "S I"]
) -> Float[Tensor, "S O I kk"]:
    """The grid at every pair of real-valued indices, sample by sample."""
    rows = zip(grid, outputs, inputs, strict=True)
    return torch.stack([interpolate(interpolate(g, o, 0), i, 1) for g, o, i in rows])


def interpolate(values: Tensor, index: Float[Tensor, " M"], axis: int) -> Tensor:
    """Linear interpolation of `values` along `axis` at real-valued indices, clamped at both ends."""
    index = index.clamp(0, values.shape[axis] - 1)
    below = index.floor().long()
    part = (index - below).to(values)
    low = values.index_select(axis, below)
    if not bool(part.any()):
        return low
    above = (below + 1).clamp(max=values.shape[axis] - 1)
    part = part.view([-1 if d == axis else 1 for d in range(values.dim())])
    return torch.lerp(low, values.index_select(axis, above), part)
