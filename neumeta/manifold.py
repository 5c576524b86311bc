"""A manifold in memory: the space it covers, its representation, and what does not morph.

Knows neither files nor requests: `checkpoint.py` reads and writes one, `sample.py` draws from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neumeta.architecture import Space
from neumeta.coordinates import Site, sites
from neumeta.inr import REPRESENTATIONS

BN_EPS = 1e-5


@dataclass
class Manifold:
    """Everything needed to sample weights of any architecture in `space`.

    `frozen` are the source network's folded tensors outside the morphing scope. With `norm`, the
    representation makes unnormalised weights, gamma and beta, and `statistics` holds what `moments.py`
    needs to give each batch norm its mean and variance without images. `noise` is a, `samples` the
    default K, `scale` N. `about` is the checkpoint's own account: recipe, source, evaluation table,
    licence.
    """

    space: Space
    representation: nn.Module
    kind: str
    options: dict[str, Any]
    norm: bool
    noise: float
    samples: int
    scale: int
    normalisation: dict[str, list[float]]
    labels: list[str]
    frozen: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    digest: str = ""

    @property
    def device(self) -> torch.device:
        """Where the representation computes."""
        return next(self.representation.parameters()).device


def roles(space: Space, *, norm: bool) -> dict[str, Site]:
    """Every parameter role the representation must make, with its site in the source network."""
    found: dict[str, Site] = {}
    for layer in space.table.layers(space.depth):
        if space.morphing(layer):
            for site in sites(space, space.full, layer, norm=norm):
                found.setdefault(site.role, site)
    return found


def representation(kind: str, space: Space, options: dict[str, Any], *, norm: bool) -> nn.Module:
    """A new representation of this kind. Raises ValueError for an unknown kind or option."""
    if kind not in REPRESENTATIONS:
        raise ValueError(f"representation: {kind!r} is not one of {sorted(REPRESENTATIONS)}")
    try:
        made: nn.Module = REPRESENTATIONS[kind](roles(space, norm=norm), **options)
    except TypeError as error:
        raise ValueError(f"representation: {kind}: {error}") from None
    return made


def fold(
    weight: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Convolution weight (O, I, k, k) and batch norm (O,) -> folded weight and bias."""
    scale = gamma * torch.rsqrt(variance + BN_EPS)
    return weight * scale[:, None, None, None], beta - mean * scale
