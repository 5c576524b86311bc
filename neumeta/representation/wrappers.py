"""Representations around a representation: centred behind ReLUs, anchored to the source, corrected and
expanded by size. They compose."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neumeta.coordinates import Along, Coordinates, Site, Span
from neumeta.representation.base import Representation, module_key
from neumeta.representation.grid import Grid, interpolate, nested


class Centred(Representation):
    """Every filter that stands behind a ReLU sums to zero: the mean of its numbers is taken off.

    One step of training moves all that a shared network makes the same way, and a filter's inputs are
    positive there, so that a common shift of its numbers moves its output by many times as much, and
    whole channels are switched off for good. What a source filter's sum adds belongs into its bias
    (training/regression.py).
    """

    def __init__(self, inner: Representation, roles: Mapping[str, Site]) -> None:
        super().__init__()
        self.inner = inner

    def fill(self, site: Site, value: Tensor) -> bool:
        """Let the inner representation start from the source's tensor if it can."""
        return self.inner.fill(site, value)

    def forward(self, site: Site, at: Coordinates) -> Float[Tensor, "S O I kk"]:
        """The weights of `site` at these coordinates."""
        made: Tensor = self.inner(site, at)
        return made - made.mean((2, 3), keepdim=True) if site.positive else made


class Anchored(Representation):
    """Keeps the source's own size as the source's own weights S, held in float16
    (in `charts` in eight bits, as everything there).

    In place of the inner W stands (1 - n) W + n S, where n falls linearly from 1 at the source's
    size to 0 at a `distance` of `reach`: the reconstruction loss of Algorithm 2, exactly, which
    leaves W free to serve the other sizes. Relative growth in blocks counts `growth` times as
    distance: less than once means smaller steps along the source's own path in deeper networks.
    """

    growth: float
    """May be raised while training, so that deep networks train the inner representation too."""

    def __init__(
        self,
        inner: Representation,
        roles: Mapping[str, Site],
        *,
        reach: float,
        growth: float = 1.0,
        nodes: int = 0,
        stepped: bool = True,
    ) -> None:
        super().__init__()
        self.inner, self.reach, self.growth = inner, reach, growth
        self.source = Grid(roles, nodes=nodes, stepped=stepped).half().requires_grad_(False)

    @torch.no_grad()
    def fill(self, site: Site, value: Tensor) -> bool:
        """Keep the source's tensor, and let the inner representation start from it if it can."""
        self.source.fill(site, value.half())
        return self.inner.fill(site, value)

    def forward(self, site: Site, at: Coordinates) -> Float[Tensor, "S O I kk"]:
        """The weights of `site` at these coordinates."""
        share = 1 - max(site.distance, self.growth * site.growth) / self.reach
        if share <= 0:
            made: Tensor = self.inner(site, at)
            return made
        source = nested(self.source.at_depth(site.role, at), site, at)
        return source if share >= 1 else torch.lerp(self.inner(site, at), source, share)


class Corrected(Representation):
    """Corrects an inner representation W, per channel, by polynomials of the size.

    W(o, i) * (1 + a_o . phi(s_out)) * (1 + b_i . phi(s_in)), s the size as a fraction of the full
    one and phi(s) = [(1-s), (1-s)^2, (1-s)^3]: nothing at full size. With `depths`, phi also holds
    how much shallower (and that squared) or deeper the stage is than the source's. Vectors are
    corrected additively.
    """

    def __init__(
        self,
        inner: Representation,
        roles: Mapping[str, Site],
        *,
        orders: int = 3,
        depths: bool = False,
    ) -> None:
        super().__init__()
        self.inner, self.orders, self.depths = inner, orders, depths
        terms = orders + 3 * depths
        self.rows, self.columns = nn.ParameterDict(), nn.ParameterDict()
        for role, site in roles.items():
            key = module_key(role)
            self.rows[key] = nn.Parameter(torch.zeros(site.rows.full, terms))
            if not site.vector:
                self.columns[key] = nn.Parameter(torch.zeros(site.columns.full, terms))

    def fill(self, site: Site, value: Tensor) -> bool:
        """Let the inner representation start from the source's tensor if it can."""
        return self.inner.fill(site, value)

    def compact(self) -> None:
        """From here on hold the corrections in float16. Such a one is sampled from, not trained."""
        for held in (self.rows, self.columns):
            for key, value in held.items():
                held[key] = nn.Parameter(value.detach().half(), requires_grad=False)

    def widen(self) -> None:
        """Undo `compact`, but for its rounding: numbers in float32, to be trained on."""
        for held in (self.rows, self.columns):
            for key, value in held.items():
                held[key] = nn.Parameter(value.detach().float())

    def forward(self, site: Site, at: Coordinates) -> Float[Tensor, "S O I kk"]:
        """The weights of `site` at these coordinates."""
        made: Tensor = self.inner(site, at)
        key = module_key(site.role)
        held = self.rows[key].to(at.layer.dtype)
        by_row = self._correction(held, site, site.rows, at.outputs, at.exact)
        if site.vector:
            return made + by_row[:, :, None, None]
        held = self.columns[key].to(at.layer.dtype)
        by_column = self._correction(held, site, site.columns, at.inputs, at.exact)
        return made * (1 + by_row)[:, :, None, None] * (1 + by_column)[:, None, :, None]

    def _correction(
        self, modulation: Tensor, site: Site, span: Span, along: Along, exact: bool
    ) -> Float[Tensor, "S C"]:
        deeper = site.deeper if self.depths else None
        size = span.count / span.full
        by_channel = modulation @ _powers(
            size, deeper, self.orders, modulation.dtype, modulation.device
        )
        if not exact:
            return torch.stack([interpolate(by_channel, row, 0) for row in along.index])
        if span.leading:
            return by_channel[None, : span.count]
        return by_channel[along.index[0].long()][None]


@lru_cache(maxsize=4096)
def _powers(
    size: float, deeper: float | None, orders: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, " T"]:
    """phi(s), and where `deeper` is given that of the depth: made once for all tensors of a size."""
    phi = [(1 - size) ** (k + 1) for k in range(orders)]
    if deeper is not None:
        shallower = max(0.0, -deeper)
        phi += [shallower, shallower**2, max(0.0, deeper)]
    return torch.tensor(phi).to(device, dtype)


class Expanded(Representation):
    """Expands an inner representation W around the full size: W + (1 - s) W_1 + (1 - s)^2 W_2 + ...

    s is the mean of both axes' sizes as fractions of the full ones; every W_k is a grid, zero at first.
    What `Corrected` does for a channel this does for every weight: large and small networks, which
    share most of theirs, need not agree on them.
    """

    def __init__(
        self,
        inner: Representation,
        roles: Mapping[str, Site],
        *,
        orders: int = 1,
        nodes: int = 0,
        stepped: bool = True,
    ) -> None:
        super().__init__()
        self.inner = inner
        self.terms = nn.ModuleList(Grid(roles, nodes=nodes, stepped=stepped) for _ in range(orders))

    def fill(self, site: Site, value: Tensor) -> bool:
        """Let the inner representation start from the source's tensor if it can."""
        return self.inner.fill(site, value)

    def forward(self, site: Site, at: Coordinates) -> Float[Tensor, "S O I kk"]:
        """The weights of `site` at these coordinates."""
        made: Tensor = self.inner(site, at)
        rows, columns = site.rows, site.columns
        less = 1 - (rows.count / rows.full + columns.count / columns.full) / 2
        if less == 0:
            return made
        for order, term in enumerate(self.terms, 1):
            made = made + less**order * term(site, at)
        return made
