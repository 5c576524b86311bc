"""Continuous representations of weights: coordinates in, weights out.

`ResidualMLP` is the supplement's Figure 3; `LearnedGrid` interpolates a learned grid over the
absolute channel index and corrects it, per channel, by polynomials of the size. Both implement
`forward(site, coordinates) -> (S, O, I, k*k)`; `REPRESENTATIONS` names them. Knows no network, no
data and no file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neumeta.coordinates import Coordinates, Site


def fourier_features(v: Float[Tensor, "*B D"], num_freq: int) -> Float[Tensor, "*B F"]:
    """gamma(v): v and the sine and cosine of 2^i * pi * v for i < num_freq; F = (2*num_freq+1)*D."""
    octaves = 2.0 ** torch.arange(num_freq, dtype=v.dtype, device=v.device) * math.pi
    angles = v[..., None] * octaves
    waves = torch.cat((angles.sin(), angles.cos()), -1).flatten(-2)
    return torch.cat((v, waves), -1)


def module_key(role: str) -> str:
    """A role as a torch module name (which may hold no dots)."""
    return role.replace(".", "/")


class _Mlp(nn.Module):
    """Figure 3: a first layer over gamma(v), hidden layers with scaled residuals, k*k outputs."""

    def __init__(
        self, spatial: int, layers: int, hidden: int, num_freq: int, residual: bool
    ) -> None:
        super().__init__()
        per_axis = (2 * num_freq + 1) * 2
        self.num_freq, self.residual = num_freq, residual
        # One linear map of (2*num_freq+1)*6 features, kept as its three per-axis column blocks:
        # a sum of three small products broadcast over pairs instead of one product per pair.
        self.layer, self.inputs, self.outputs = (
            nn.Linear(per_axis, hidden, bias=b) for b in (True, False, False)
        )
        for part in (self.layer, self.inputs, self.outputs):
            nn.init.normal_(part.weight, std=1 / math.sqrt(3 * per_axis / 2))
        self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 2))
        self.scale = nn.Parameter(torch.full((max(layers - 2, 1),), 0.1))
        self.last = nn.Linear(hidden, spatial)

    def forward(self, at: Coordinates) -> Float[Tensor, "S O I kk"]:
        layer = self.layer(fourier_features(at.layer, self.num_freq))
        inputs = self.inputs(fourier_features(at.inputs, self.num_freq))
        outputs = self.outputs(fourier_features(at.outputs, self.num_freq))
        h = torch.relu(layer[:, None, None] + inputs[:, None] + outputs[:, :, None])
        for hidden, scale in zip(self.hidden, self.scale, strict=False):
            h = h + scale * torch.relu(hidden(h)) if self.residual else torch.relu(hidden(h))
        return self.last(h)  # type: ignore[no-any-return]


class ResidualMLP(nn.Module):
    """The supplement's INR: one MLP per parameter role (block-based) or one for all.

    The output is scaled by `scales`, the root mean square of the source tensor of each role, so
    that the MLP itself works at unit scale.
    """

    def __init__(
        self,
        roles: Mapping[str, Site],
        *,
        layers: int = 8,
        hidden: int = 512,
        num_freq: int = 16,
        residual: bool = True,
        block_based: bool = True,
    ) -> None:
        super().__init__()
        self.block_based = block_based
        self.order = {role: index for index, role in enumerate(roles)}
        self.register_buffer("scales", torch.ones(len(roles)))
        spatial = {role: math.prod(site.spatial) for role, site in roles.items()}
        self.widest = max(spatial.values())
        shared = {"all": self.widest}
        networks = spatial if block_based else shared
        self.networks = nn.ModuleDict(
            {
                module_key(role): _Mlp(size, layers, hidden, num_freq, residual)
                for role, size in networks.items()
            }
        )

    def forward(self, site: Site, at: Coordinates) -> Float[Tensor, "S O I kk"]:
        """The weights of `site` at these coordinates. A 1x1 kernel takes the centre of k*k."""
        index = self.order[site.role]
        if self.block_based:
            out = self.networks[module_key(site.role)](at)
        else:
            # One network for all: l/L places each role in a cell of its own.
            place = (index + at.layer[:, :1]) / len(self.order)
            at = Coordinates(torch.cat((place, at.layer[:, 1:]), 1), at.inputs, at.outputs)
            out = self.networks["all"](at)
            size = math.prod(site.spatial)
            if size < self.widest:
                start = (self.widest - size) // 2
                out = out[..., start : start + size]
        return out * (self.scales[index] * site.gain)  # type: ignore[index, no-any-return]


class LearnedGrid(nn.Module):
    """A learned grid over absolute channel indices (c/N), corrected per channel by size.

    W(o, i) = G(o, i) * (1 + a_o . phi(s_out)) * (1 + b_i . phi(s_in)) with multilinear interpolation
    of G, a and b, s the size as a fraction of the full one and phi(s) = [(1-s), (1-s)^2, (1-s)^3]:
    at full size the correction vanishes and the grid is the source network itself. Tensors without
    an input axis are corrected additively. Repeated blocks share a grid with `nodes` along l/L.
    """

    def __init__(self, roles: Mapping[str, Site], *, nodes: int = 1, orders: int = 3) -> None:
        super().__init__()
        self.orders, self.nodes = orders, nodes
        self.grid, self.outputs, self.inputs = (
            nn.ParameterDict(),
            nn.ParameterDict(),
            nn.ParameterDict(),
        )
        for role, site in roles.items():
            key, o, i = module_key(role), site.full_outputs, site.full_inputs
            depth = nodes if site.role != site.name else 1
            self.grid[key] = nn.Parameter(torch.zeros(depth, o, i, math.prod(site.spatial)))
            self.outputs[key] = nn.Parameter(torch.zeros(o, orders))
            if site.kind == "weight":
                self.inputs[key] = nn.Parameter(torch.zeros(i, orders))

    def forward(self, site: Site, at: Coordinates) -> Float[Tensor, "S O I kk"]:
        """The weights of `site` at these coordinates."""
        key = module_key(site.role)
        # c/C * C/N * N recovers the absolute, noisy channel index; N cancels against the full size.
        outputs = self._index(at.outputs, site.full_outputs, site.outputs)
        inputs = self._index(at.inputs, site.full_inputs, site.inputs)
        grid = interpolate(self.grid[key], at.layer[:, 0] * len(self.grid[key]) - 0.5, 0)
        made = torch.stack(
            [
                interpolate(interpolate(g, o, 0), i, 1)
                for g, o, i in zip(grid, outputs, inputs, strict=True)
            ]
        )
        size = site.outputs / site.full_outputs
        by_output = self._correction(self.outputs[key], outputs, size)
        if site.kind != "weight":
            return (made + by_output[:, :, None, None]) * site.gain
        by_input = self._correction(self.inputs[key], inputs, site.inputs / site.full_inputs)
        return (
            made
            * (1 + by_output)[:, :, None, None]
            * ((1 + by_input)[:, None, :, None] * site.gain)
        )

    def _index(self, axis: Tensor, full: int, count: int) -> Tensor:
        # total / scale * (1 / scale) is unknown here; index = ratio * (count + noise), and the noise
        # on the size moves an index by less than its own: use the exact count.
        return (axis[..., 0] * count).clamp(0, full - 1)

    def _correction(self, modulation: Tensor, index: Tensor, size: float) -> Tensor:
        powers = torch.tensor([(1 - size) ** (k + 1) for k in range(self.orders)])
        by_channel = modulation @ powers.to(modulation)
        return torch.stack([interpolate(by_channel, row, 0) for row in index])


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


REPRESENTATIONS: dict[str, Any] = {"mlp": ResidualMLP, "grid": LearnedGrid}
