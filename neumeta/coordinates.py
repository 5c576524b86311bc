"""An architecture's tensors -> normalised coordinates v (Algorithms 2 and 3, step 3 and 4).

v = [l/L, c_in/C_in, c_out/C_out, L/N, C_in/N, C_out/N], where l and c are the middles of their cells
(c + 1/2 of channel c), so that the channels of every size spread over the whole of [0, 1]. The
coordinates of one tensor are a grid: six numbers that depend on the layer, the input channel or the
output channel alone, so they are kept per axis and combined only where a representation needs every
pair. Knows no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """One dimension of a tensor at its size and at the source's, part by part.

    A part is (units, units in the source, indices per unit); `morphs` says whether any of it does,
    `group` whose width sizes a dimension of one part (None: none's).
    """

    parts: tuple[tuple[int, int, int], ...]
    morphs: bool
    group: int | None = None

    @cached_property
    def count(self) -> int:
        """How many indices there are."""
        return sum(units * repeat for units, _, repeat in self.parts)

    @cached_property
    def full(self) -> int:
        """How many there are in the source."""
        return sum(units * repeat for _, units, repeat in self.parts)

    @cached_property
    def leading(self) -> bool:
        """Whether the indices are the source's first ones."""
        return len(self.parts) == 1 and self.count <= self.full


ONE = Span(((1, 1, 1),), False)
"""The input axis of a tensor that has none."""


@dataclass(frozen=True)
class Site:
    """One sampled tensor: its name, its place in the network, and its raw integer coordinates.

    `cell` is the layer's stretch of its stage, [l/L, (l+1)/L], and `length` L; `rows` and `columns`
    are its first two dimensions (a vector has one column) and `spatial` the others. `gain` scales the
    output: by the fan-in (a sum over fewer inputs needs larger terms; batch norm makes that needless),
    and the last layer of a residual branch by its cell, so that blocks are steps of an integrator.
    `deeper` is 2 (L - L_source) / (L + L_source) over all blocks of the layer's stage: 0 at the source.
    `distance` and `growth` say how far the whole network is from the source's size (`Space.distance`),
    `narrowest` the largest width that its narrowest extent may have been asked at, `widest` the
    smallest for each group (`Space.ends`), `depth` how many blocks each of its stages has. `stage`
    says among whose blocks that are alike the tensor is (None: no stage's), `occurs` how many blocks
    that must have for it to be.
    `positive` says that what the weight multiplies is never negative: it stands behind a ReLU.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    cell: tuple[float, float]
    length: int
    rows: Span
    columns: Span
    spatial: tuple[int, ...]
    gain: float
    deeper: float
    distance: float
    growth: float
    narrowest: float
    widest: tuple[float, ...]
    depth: tuple[int, ...]
    stage: int | None
    occurs: int
    positive: bool

    @property
    def vector(self) -> bool:
        """Whether the tensor has a single dimension."""
        return len(self.shape) == 1

    @property
    def morphs(self) -> bool:
        """Whether a width resizes the tensor."""
        return self.rows.morphs or self.columns.morphs


@dataclass(frozen=True)
class Along:
    """The coordinates of one dimension; S is 1 or the number of noisy samples.

    `pairs` (S, C, 2) = [(c + 1/2)/C, C/N]; `index` (S, C) is the source's index that each one is nested
    at; `place` (S, C) its middle as a fraction of the whole dimension, whatever noise is on its size.
    """

    span: Span
    pairs: Float[Tensor, "S C 2"]
    index: Float[Tensor, "S C"]
    place: Float[Tensor, "S C"]

    def to(self, device: torch.device) -> Along:
        """The same on this device."""
        moved = (self.pairs.to(device), self.index.to(device), self.place.to(device))
        return Along(self.span, *moved)


@dataclass(frozen=True)
class Coordinates:
    """The coordinates of one tensor: layer (S, 2) = [l/L, L/N], and each of its two axes.

    `scale` is N; `exact` says that no channel's coordinate has noise.
    """

    layer: Float[Tensor, "S 2"]
    inputs: Along
    outputs: Along
    scale: int
    exact: bool

    def to(self, device: torch.device) -> Coordinates:
        """The same coordinates on this device. Noise is drawn on the CPU: equal on every device."""
        if device.type == "cpu":
            return self
        inputs, outputs = (
            _kept(axis.span, self.scale, axis.pairs.dtype, device)
            if axis is whole(axis.span, self.scale, axis.pairs.dtype)
            else axis.to(device)
            for axis in (self.inputs, self.outputs)
        )
        return Coordinates(self.layer.to(device), inputs, outputs, self.scale, self.exact)

    def vectors(self) -> Float[Tensor, "S O I 6"]:
        """Every pair's v, in the order of the supplement."""
        down, across = self.outputs.pairs, self.inputs.pairs
        shape = (len(self.layer), down.shape[1], across.shape[1], 2)
        layer = self.layer[:, None, None].expand(shape)
        across, down = across[:, None].expand(shape), down[:, :, None].expand(shape)
        parts = [each[..., place] for place in (0, 1) for each in (layer, across, down)]
        return torch.stack(parts, -1)


def coordinates(
    site: Site,
    scale: int,
    *,
    noise: float = 0.0,
    samples: int = 1,
    generator: torch.Generator | None = None,
    noise_free_first: bool = False,
    points: Float[Tensor, "S 6"] | None = None,
) -> Coordinates:
    """The coordinates of `samples` noisy copies of one tensor; `scale` is N.

    Noise is uniform in (-noise, noise) on the raw integer coordinates, drawn per index of each
    axis: each single weight sees Algorithm 3's distribution, while pairs that share a channel share
    its draw, which is what lets every representation work per axis. A layer's coordinate is the
    middle of its cell and its noise stays within the cell, so it never reaches another layer's. An axis
    that keeps its size has none: between its channels there is nothing to learn.
    `noise_free_first` leaves the first sample exact. `points`, a set in [-1, 1]^6 to average over,
    replaces independent draws: each index mirrors its column of them at random, which no average
    of a symmetric set over even functions can see. All is computed in torch's default dtype.

    Raises ValueError if noise is outside [0, 0.5].
    """
    if not 0 <= noise <= 0.5:
        raise ValueError(f"noise: {noise} is not within [0, 0.5]")

    if not noise and samples == 1:
        where = (site.cell, site.length, site.rows, site.columns)
        return _exact(*where, scale, torch.get_default_dtype())
    drawn = _Noise(noise, samples, generator, noise_free_first, points)
    length = site.length + drawn(0, 1) if site.length > 1 else torch.ones(samples, 1)
    # One draw per sample moves the block within its own cell, never into the next one.
    low, high = site.cell
    within = 0.5 + drawn(1, 1) if site.length > 1 else torch.full((samples, 1), 0.5)
    layer = torch.cat((low + (high - low) * within, length / scale), -1)
    inputs = _along(2, site.columns, scale, drawn)
    outputs = _along(4, site.rows, scale, drawn)
    return Coordinates(layer, inputs, outputs, scale, exact=not noise)


@dataclass(frozen=True)
class _Noise:
    """Draws of one tensor's noise, in the order in which they are asked for."""

    size: float
    samples: int
    generator: torch.Generator | None
    noise_free_first: bool
    points: Tensor | None

    def __call__(self, column: int, count: int) -> Tensor:
        """(samples, count) draws for one of the six coordinates."""
        if not self.size:
            return torch.zeros(self.samples, count)
        if self.points is None:
            uniform = torch.rand(self.samples, count, generator=self.generator)
            drawn = (uniform * 2 - 1) * self.size
        else:
            mirrored = torch.randint(0, 2, (1, count), generator=self.generator) * 2 - 1
            column_of = self.points[:, column, None].to(torch.get_default_dtype())
            drawn = column_of * mirrored * self.size
        if self.noise_free_first:
            drawn[0] = 0
        return drawn


def _along(column: int, span: Span, scale: int, noise: _Noise) -> Along:
    """One dimension's coordinates, the noise on its indices and then on its size drawn."""
    still = whole(span, scale, torch.get_default_dtype())
    samples, count = noise.samples, span.count
    if not noise.size or not span.morphs:
        fields = (still.pairs, still.index, still.place)
        return Along(span, *(each.expand(samples, *each.shape[1:]) for each in fields))
    moved = noise(column, count)
    size = count + noise(column + 1, 1) if count > 1 else torch.ones(samples, 1)
    place = still.pairs[..., 0] * count + moved
    pairs = torch.stack((place / size, (size / scale).expand(samples, count)), -1)
    return Along(span, pairs, still.index + moved, still.place + moved / count)


@lru_cache(maxsize=4096)
def _exact(
    cell: tuple[float, float],
    length: int,
    rows: Span,
    columns: Span,
    scale: int,
    dtype: torch.dtype,
) -> Coordinates:
    """Coordinates without noise: the same at every step of training."""
    low, high = cell
    middle = low + (high - low) * torch.full((1, 1), 0.5, dtype=dtype)
    layer = torch.cat((middle, torch.full((1, 1), length / scale, dtype=dtype)), -1)
    return Coordinates(
        layer, whole(columns, scale, dtype), whole(rows, scale, dtype), scale, exact=True
    )


@lru_cache(maxsize=4096)
def _kept(span: Span, scale: int, dtype: torch.dtype, device: torch.device) -> Along:
    """A noise-free dimension on this device, where all steps share it."""
    return whole(span, scale, dtype).to(device)


@lru_cache(maxsize=1024)
def whole(span: Span, scale: int, dtype: torch.dtype) -> Along:
    """The noise-free coordinates of a dimension."""
    index, place = [], []
    offset, total = 0, span.full
    for units, full, repeat in span.parts:
        c = torch.arange(units * repeat, dtype=dtype)
        # Where the part lies in the source's dimension, whatever size it has here.
        stretch = full / units if units else 0.0
        index.append(offset + c.clamp(max=full * repeat - 1))
        place.append((offset + (c + 0.5) * stretch) / total)
        offset += full * repeat
    middle = torch.cat(place)
    pairs = torch.stack((middle, torch.full_like(middle, span.count / scale)), -1)
    return Along(span, pairs[None], torch.cat(index)[None], middle[None])
