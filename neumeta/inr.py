"""Continuous representations of weights: coordinates in, weights out.

`ResidualMLP` is the supplement's Figure 3; `LearnedGrid` interpolates a learned grid over the
absolute channel index and corrects it, per channel, by polynomials of the size; `IntegralGrid`
interpolates one over the relative channel position. All implement
`forward(site, coordinates) -> (S, O, I, k*k)`; `REPRESENTATIONS` names them. Knows no network, no
data and no file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neumeta.coordinates import Coordinates, Site, whole


def fourier_features(v: Float[Tensor, "*B D"], num_freq: int) -> Float[Tensor, "*B F"]:
    """gamma(v): v and the sine and cosine of 2^i * pi * v for i < num_freq; F = (2*num_freq+1)*D."""
    angles = v[..., None] * _octaves(num_freq, v.dtype, v.device)
    waves = torch.cat((angles.sin(), angles.cos()), -1).flatten(-2)
    return torch.cat((v, waves), -1)


@lru_cache(maxsize=16)
def _octaves(num_freq: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " L"]:
    return 2.0 ** torch.arange(num_freq, dtype=dtype, device=device) * math.pi


@lru_cache(maxsize=1024)
def _whole_features(
    count: int, scale: int, num_freq: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "1 C F"]:
    """gamma of an axis without noise: the layers that share the axis share it too."""
    return fourier_features(whole(count, scale, dtype).to(device), num_freq)


def module_key(role: str) -> str:
    """A role as a torch module name (which may hold no dots)."""
    return role.replace(".", "/")


BLOCK = 1 << 19
"""Values of a hidden layer made together, 2 MB: 1,024 coordinate vectors at 512 units. They and the
result fit a cache, and a matrix product has enough rows to be at speed."""


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
        inputs = self.inputs(self._along(at.inputs, at))
        outputs = self.outputs(self._along(at.outputs, at))
        if not torch.is_grad_enabled():
            return self._blocked(inputs, layer[:, None] + outputs)
        h = torch.relu(layer[:, None, None] + inputs[:, None] + outputs[:, :, None])
        for hidden, scale in zip(self.hidden, self.scale, strict=False):
            h = h + scale * torch.relu(hidden(h)) if self.residual else torch.relu(hidden(h))
        return self.last(h)  # type: ignore[no-any-return]

    def _along(self, axis: Float[Tensor, "S C 2"], at: Coordinates) -> Float[Tensor, "S C F"]:
        """gamma along one axis of channels."""
        if at.exact:
            key = (axis.shape[1], at.scale, self.num_freq, axis.dtype, axis.device)
            return _whole_features(*key).expand(len(axis), -1, -1)
        return fourier_features(axis, self.num_freq)

    def _blocked(
        self, inputs: Float[Tensor, "S I H"], outputs: Float[Tensor, "S O H"]
    ) -> Float[Tensor, "S O I kk"]:
        """The same from the two first-layer terms, a BLOCK at a time and in place.

        All but the matrix products is then work on data that is still in the cache. Hidden layers in
        a lower precision (`lower`) multiply in it; what is added up stays as it was.
        """
        (samples, count, width), across = outputs.shape, inputs.shape[1]
        rows = outputs.reshape(samples * count, 1, width)
        sample = torch.arange(samples, device=rows.device).repeat_interleave(count)
        made = inputs.new_empty(samples * count, across, self.last.out_features)
        low = self.last.weight.dtype
        step = min(max(1, BLOCK // (across * width)), len(rows))
        h_, t_ = (
            inputs.new_empty(step * across, width, dtype=kind) for kind in (inputs.dtype, low)
        )
        scales = self.scale.tolist()
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            size = len(rows[part]) * across
            h, t = h_[:size], t_[:size]
            first = inputs if samples == 1 else inputs[sample[part]]
            torch.add(first, rows[part], out=h.view(-1, across, width)).relu_()
            for hidden, scale in zip(self.hidden, scales, strict=False):
                assert isinstance(hidden, nn.Linear)
                torch.addmm(hidden.bias, h.to(low), hidden.weight.t(), out=t)
                t.relu_()
                if self.residual:
                    h.add_(t, alpha=scale)
                else:
                    h.copy_(t)
            made[part] = self.last(h.to(low)).view(-1, across, made.shape[-1])
        return made.view(samples, count, across, -1)


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

    def lower(self, dtype: torch.dtype) -> None:
        """Multiply in this dtype when sampling: in all but the first layer, which reads features of
        high frequency. For inference only."""
        for mlp in self.networks.values():
            assert isinstance(mlp, _Mlp)
            mlp.hidden.to(dtype)
            mlp.last.to(dtype)

    def forward(self, site: Site, at: Coordinates) -> Float[Tensor, "S O I kk"]:
        """The weights of `site` at these coordinates. A 1x1 kernel takes the centre of k*k."""
        index = self.order[site.role]
        if self.block_based:
            out = self.networks[module_key(site.role)](at)
        else:
            # One network for all: l/L places each role in a cell of its own.
            place = (index + at.layer[:, :1]) / len(self.order)
            layer = torch.cat((place, at.layer[:, 1:]), 1)
            at = Coordinates(layer, at.inputs, at.outputs, at.scale)
            out = self.networks["all"](at)
            size = math.prod(site.spatial)
            if size < self.widest:
                start = (self.widest - size) // 2
                out = out[..., start : start + size]
        return out * (self.scales[index] * site.gain)  # type: ignore[index, no-any-return]


class Grid(nn.Module):
    """Learned values per role: (nodes along l/L, outputs, inputs, k*k); one node where no depth is.

    `nodes` 0 means one for each block of the source network. Between nodes the grid is interpolated,
    or, with `stepped`, constant: the blocks of a deep network then repeat those of a shallow one.
    """

    def __init__(
        self, roles: Mapping[str, Site], nodes: int, density: float = 1.0, stepped: bool = False
    ) -> None:
        super().__init__()
        self.density, self.stepped, self.grid = density, stepped, nn.ParameterDict()
        for role, site in roles.items():
            depth = (nodes or site.length) if site.role != site.name else 1
            shape = (depth, *self.points(site), math.prod(site.spatial))
            self.grid[module_key(role)] = nn.Parameter(torch.zeros(shape))

    def points(self, site: Site) -> tuple[int, int]:
        """How many points of the grid lie along the output and the input axis."""
        sizes = zip((site.full_outputs, site.full_inputs), site.morphs, strict=True)
        return tuple(  # type: ignore[return-value]
            max(1, round(self.density * full)) if morphs else full for full, morphs in sizes
        )

    @torch.no_grad()
    def fill(self, site: Site, value: Tensor) -> None:
        """Start from the source network's tensor: its mean between the points of the grid."""
        grid = self.grid[module_key(site.role)]
        value = value.reshape(site.full_outputs, site.full_inputs, -1).movedim(2, 0)
        pooled = nn.functional.adaptive_avg_pool2d(value, self.points(site)).movedim(0, 2)
        nodes = len(grid)
        for node in range(nodes):
            if nodes == 1 or site.cell[0] <= (node + 0.5) / nodes < site.cell[1]:
                grid[node] = pooled

    def at_depth(self, grid: Tensor, at: Coordinates) -> Float[Tensor, "S O I kk"]:
        """A role's grid at each sample's l/L."""
        if len(grid) == 1:
            everywhere: Tensor = grid.expand(len(at.layer), *grid.shape[1:])
            return everywhere
        place = at.layer[:, 0] * len(grid) - 0.5
        return interpolate(grid, place.round() if self.stepped else place, 0)


def _channel(axis: Float[Tensor, "S C 2"], scale: int) -> Float[Tensor, "S C"]:
    """The noisy absolute channel index: c/C * C/N * N, in which the noise on the size cancels."""
    index = axis[..., 0] * axis[..., 1] * scale
    # What was a whole number is one again: without noise nothing needs to be interpolated.
    nearest = index.round()
    return torch.where((index - nearest).abs() < 1e-4, nearest, index)


class LearnedGrid(Grid):
    """A learned grid over absolute channel indices (c/N), corrected per channel by size.

    W(o, i) = G(o, i) * (1 + a_o . phi(s_out)) * (1 + b_i . phi(s_in)) with multilinear interpolation
    of G, a and b, s the size as a fraction of the full one and phi(s) = [(1-s), (1-s)^2, (1-s)^3]:
    at full size the correction vanishes and the grid is the source network itself. With `depths`, phi
    also holds how much shallower (and that squared) or deeper the stage is than the source's. Tensors
    without an input axis are corrected additively. Repeated blocks share a grid with `nodes` along
    l/L.

    With `reach`, the source's own size keeps the source's own weights S, held in float16: in place of
    G stands (1 - n) G + n S, where n falls linearly from 1 at the source's size to 0 at a `distance` of
    `reach` (the reconstruction loss of Algorithm 2, exactly; G is free to serve the other sizes).
    Relative growth in blocks is as much distance in training, so that deep networks train G too, and
    `growth` of it afterwards: smaller steps along the source's own path.
    """

    def __init__(
        self,
        roles: Mapping[str, Site],
        *,
        nodes: int = 1,
        orders: int = 3,
        depths: bool = False,
        stepped: bool = False,
        reach: float = 0.0,
        growth: float = 1.0,
    ) -> None:
        super().__init__(roles, nodes, stepped=stepped)
        self.orders, self.depths, self.reach, self.growth = orders, depths, reach, growth
        self.source = nn.Module()
        if reach:
            for key, grid in self.grid.items():
                self.source.register_buffer(key, torch.zeros(grid.shape, dtype=torch.float16))
        terms = orders + 3 * depths
        self.outputs, self.inputs = nn.ParameterDict(), nn.ParameterDict()
        for role, site in roles.items():
            key = module_key(role)
            self.outputs[key] = nn.Parameter(torch.zeros(site.full_outputs, terms))
            if site.kind == "weight":
                self.inputs[key] = nn.Parameter(torch.zeros(site.full_inputs, terms))

    def forward(self, site: Site, at: Coordinates) -> Float[Tensor, "S O I kk"]:
        """The weights of `site` at these coordinates."""
        key = module_key(site.role)
        outputs = inputs = None
        within = site.outputs <= site.full_outputs and site.inputs <= site.full_inputs
        if at.exact and within:  # whole indices: the first channels of every axis as they are
            made = self._near(site, at, site.outputs, site.inputs)
        else:
            outputs = _channel(at.outputs, at.scale).clamp(0, site.full_outputs - 1)
            inputs = _channel(at.inputs, at.scale).clamp(0, site.full_inputs - 1)
            made = _pairs(self._near(site, at), outputs, inputs)
        by_output = self._correction(
            self.outputs[key], outputs, site.outputs, site.full_outputs, site
        )
        if site.kind != "weight":
            return (made + by_output[:, :, None, None]) * site.gain
        by_input = self._correction(self.inputs[key], inputs, site.inputs, site.full_inputs, site)
        return (
            made
            * (1 + by_output)[:, :, None, None]
            * ((1 + by_input)[:, None, :, None] * site.gain)
        )

    @torch.no_grad()
    def fill(self, site: Site, value: Tensor) -> None:
        """Start from the source network's tensor, and keep it where `reach` says so."""
        super().fill(site, value)
        if self.reach:
            key = module_key(site.role)
            self.source.get_buffer(key).copy_(self.grid[key])

    def _near(
        self, site: Site, at: Coordinates, outputs: int | None = None, inputs: int | None = None
    ) -> Float[Tensor, "S O I kk"]:
        """The grid's first channels at each sample's l/L, with the source's share near its size."""
        key = module_key(site.role)
        grid = self.at_depth(self.grid[key], at)[:, :outputs, :inputs]
        grown = site.growth * (1.0 if self.training else self.growth)
        share = 1 - max(site.distance, grown) / self.reach if self.reach else 0.0
        if share <= 0:
            return grid
        source = self.at_depth(self.source.get_buffer(key).to(grid.dtype), at)
        source = source[:, :outputs, :inputs]
        return source if share >= 1 else torch.lerp(grid, source, share)

    def _correction(
        self, modulation: Tensor, index: Tensor | None, count: int, full: int, site: Site
    ) -> Float[Tensor, "S C"]:
        size = count / full
        phi = [(1 - size) ** (k + 1) for k in range(self.orders)]
        if self.depths:
            shallower = max(0.0, -site.deeper)
            phi += [shallower, shallower**2, max(0.0, site.deeper)]
        by_channel = modulation @ torch.tensor(phi).to(modulation)
        if index is None:
            return by_channel[None, :count]
        return torch.stack([interpolate(by_channel, row, 0) for row in index])


class IntegralGrid(Grid):
    """Weights as functions of the relative channel position u = (c + 1/2) / C of each morphing axis.

    The functions are piecewise linear with `density` points per channel of the full size. A layer of
    C channels is then a quadrature, with C points, of an integral over u (integral neural networks,
    Solodskikh et al. 2023), so that a size never seen in training is only another quadrature of it.
    """

    def __init__(
        self, roles: Mapping[str, Site], *, nodes: int = 1, density: float = 0.375
    ) -> None:
        super().__init__(roles, nodes, density)

    def forward(self, site: Site, at: Coordinates) -> Float[Tensor, "S O I kk"]:
        """The weights of `site` at these coordinates."""
        (outputs, inputs), (by_output, by_input) = self.points(site), site.morphs
        rows = self._point(at.outputs, at.scale, outputs, by_output)
        columns = self._point(at.inputs, at.scale, inputs, by_input)
        grid = self.at_depth(self.grid[module_key(site.role)], at)
        return _pairs(grid, rows, columns) * site.gain

    def _point(self, axis: Tensor, scale: int, points: int, morphs: bool) -> Tensor:
        samples, count = axis.shape[:2]
        if morphs:
            return (_channel(axis, scale) + 0.5) / count * points - 0.5
        # Between the channels of an axis that keeps its size there is nothing to learn: no noise.
        return torch.arange(count, device=axis.device, dtype=axis.dtype).expand(samples, count)


def _pairs(
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


REPRESENTATIONS: dict[str, Any] = {
    "mlp": ResidualMLP,
    "grid": LearnedGrid,
    "integral": IntegralGrid,
}
