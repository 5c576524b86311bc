"""An architecture's tensors -> normalised coordinates v (Algorithms 2 and 3, step 3 and 4).

v = [l/L, c_in/C_in, c_out/C_out, L/N, C_in/N, C_out/N]. The coordinates of one tensor are a grid:
six numbers that depend on the layer, the input channel or the output channel alone, so they are
kept per axis and combined only where a representation needs every pair. Knows no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from neumeta.architecture import Architecture, Space
from neumeta.family import Layer


@dataclass(frozen=True)
class Site:
    """One sampled tensor: the layer it belongs to, its kind, and its raw integer coordinates.

    `cell` is the layer's stretch of its stage, [l/L, (l+1)/L], and `length` L; `outputs` and
    `inputs` are C_out and C_in (inputs is 1 for tensors without an input axis); `full_*` are the
    sizes at full width and `morphs` says which of both axes morph. `gain` scales the output: by the
    fan-in (a sum over fewer inputs needs larger terms; batch norm makes that needless), and the last
    convolution of a residual branch by its cell, so that blocks are steps of an integrator. `deeper`
    is 2 (L - L_source) / (L + L_source) over all blocks of the layer's stage: 0 at the source.
    `distance` and `growth` say how far the whole network is from the source's size
    (`Space.distance`).
    """

    name: str
    role: str
    kind: str
    cell: tuple[float, float]
    length: int
    outputs: int
    inputs: int
    full_outputs: int
    full_inputs: int
    morphs: tuple[bool, bool]
    spatial: tuple[int, ...]
    gain: float
    deeper: float = 0.0
    distance: float = 0.0
    growth: float = 0.0


@dataclass(frozen=True)
class Coordinates:
    """The coordinates of one tensor, per axis; S is 1 or the number of noisy samples.

    layer (S, 2) = [l/L, L/N], inputs (S, I, 2) = [c_in/C_in, C_in/N], outputs (S, O, 2) =
    [c_out/C_out, C_out/N]; `scale` is N. `exact` says that no channel's coordinate has noise.
    """

    layer: Float[Tensor, "S 2"]
    inputs: Float[Tensor, "S I 2"]
    outputs: Float[Tensor, "S O 2"]
    scale: int
    exact: bool = False

    def to(self, device: torch.device) -> Coordinates:
        """The same coordinates on this device. Noise is drawn on the CPU: equal on every device."""
        if device.type == "cpu":
            return self
        layer, inputs, outputs = self.layer, self.inputs, self.outputs
        moved = (layer.to(device), inputs.to(device), outputs.to(device))
        return Coordinates(*moved, self.scale, self.exact)

    def vectors(self) -> Float[Tensor, "S O I 6"]:
        """Every pair's v, in the order of the supplement."""
        samples, outputs, inputs = len(self.layer), self.outputs.shape[1], self.inputs.shape[1]
        shape = (samples, outputs, inputs, 2)
        layer = self.layer[:, None, None].expand(shape)
        across = self.inputs[:, None].expand(shape)
        down = self.outputs[:, :, None].expand(shape)
        parts = (
            layer[..., 0],
            across[..., 0],
            down[..., 0],
            layer[..., 1],
            across[..., 1],
            down[..., 1],
        )
        return torch.stack(parts, -1)


KINDS = {False: ("weight", "bias"), True: ("weight", "gamma", "beta")}


def sites(
    space: Space,
    architecture: Architecture,
    layer: Layer,
    *,
    norm: bool,
    cell: tuple[float, float] | None = None,
) -> tuple[Site, ...]:
    """The tensors of one layer that the INR makes: weight and bias, or weight, gamma and beta.

    `cell` replaces the block's even share of its stage, [l/L, (l+1)/L].
    """
    sizes = space.sizes(architecture)
    full = space.table.full_sizes(architecture.depth, space.classes)
    low, high = cell or (layer.block / layer.blocks, (layer.block + 1) / layer.blocks)
    step = space.repeats(layer) * (high - low) if layer.branch_end and space.blocks else 1.0
    # Where depth does not morph, every block has a role of its own.
    role = layer.role if space.blocks else layer.name
    fan_in = 1.0 if norm else full[layer.input_axis] / sizes[layer.input_axis]
    deeper = 0.0
    if space.blocks:
        blocks, source = architecture.depth[layer.stage], space.depth[layer.stage]
        deeper = 2 * (blocks - source) / (blocks + source)
    distance, growth = space.distance(architecture)
    found = []
    for kind in KINDS[norm and layer.norm is not None]:
        weight = kind == "weight"
        found.append(
            Site(
                f"{layer.name}.{kind}",
                f"{role}.{kind}",
                kind,
                (low, high),
                layer.blocks,
                sizes[layer.output_axis],
                sizes[layer.input_axis] if weight else 1,
                full[layer.output_axis],
                full[layer.input_axis] if weight else 1,
                (space.morphs(layer.output_axis), weight and space.morphs(layer.input_axis)),
                layer.spatial if weight else (),
                step * fan_in if weight else step,
                deeper,
                distance,
                growth,
            )
        )
    return tuple(found)


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
    middle of its cell and its noise stays within the cell, so it never reaches another layer's.
    `noise_free_first` leaves the first sample exact. `points`, a set in [-1, 1]^6 to average over,
    replaces independent draws: each index mirrors its column of them at random, which no average
    of a symmetric set over even functions can see. All is computed in torch's default dtype.

    Raises ValueError if noise is outside [0, 0.5].
    """
    if not 0 <= noise <= 0.5:
        raise ValueError(f"noise: {noise} is not within [0, 0.5]")

    def draw(column: int, count: int) -> Tensor:
        if not noise:
            return torch.zeros(samples, count)
        if points is None:
            drawn = (torch.rand(samples, count, generator=generator) * 2 - 1) * noise
        else:
            mirrored = torch.randint(0, 2, (1, count), generator=generator) * 2 - 1
            drawn = points[:, column, None].to(torch.get_default_dtype()) * mirrored * noise
        if noise_free_first:
            drawn[0] = 0
        return drawn

    def channels(column: int, count: int) -> Tensor:
        if not noise:
            return whole(count, scale, torch.get_default_dtype()).expand(samples, count, 2)
        index = torch.arange(count) + draw(column, count)
        one = torch.ones(samples, 1)
        total = (count + draw(column + 1, 1)).expand(samples, count) if count > 1 else one
        return torch.stack((index / total, total / scale), -1)

    length = site.length + draw(0, 1) if site.length > 1 else torch.ones(samples, 1)
    # One draw per sample moves the block within its own cell, never into the next one.
    low, high = site.cell
    within = 0.5 + draw(1, 1) if site.length > 1 else torch.full((samples, 1), 0.5)
    layer = torch.cat((low + (high - low) * within, length / scale), -1)
    inputs, outputs = channels(2, site.inputs), channels(4, site.outputs)
    return Coordinates(layer, inputs, outputs, scale, exact=not noise)


@lru_cache(maxsize=1024)
def whole(count: int, scale: int, dtype: torch.dtype) -> Float[Tensor, "1 C 2"]:
    """The noise-free coordinates of an axis of this size."""
    index = torch.arange(count, dtype=dtype)
    return torch.stack((index / count, torch.full_like(index, count / scale)), -1)[None]
