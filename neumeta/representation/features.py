"""Fourier features of coordinates (the supplement's gamma). Knows no weights."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from neumeta.coordinates import Along, Span, whole


def fourier_features(
    v: Float[Tensor, "*B D"], num_freq: int, blur: tuple[float, ...] = ()
) -> Float[Tensor, "*B F"]:
    """gamma(v): v and the sine and cosine of 2^i * pi * v for i < num_freq; F = (2*num_freq+1)*D.

    With `blur`, one number for each of the D coordinates, every wave is weighted by what uniform noise
    of that size on its coordinate leaves of it on average.
    """
    angles = v[..., None] * _octaves(num_freq, v.dtype, v.device)
    sines, cosines = angles.sin(), angles.cos()
    if any(blur):
        left = remaining(blur, num_freq, v.dtype, v.device)
        sines, cosines = sines * left, cosines * left
    waves = torch.cat((sines, cosines), -1).flatten(-2)
    return torch.cat((v, waves), -1)


@lru_cache(maxsize=1024)
def remaining(
    blur: tuple[float, ...], num_freq: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "D L"]:
    """The mean of a wave over U(-blur, blur), as a share of the wave: the sinc of its octave. In
    float64, so that octaves which the noise wipes out are exactly 0."""
    octaves = 2.0 ** torch.arange(num_freq, dtype=torch.float64)
    left = torch.sinc(torch.tensor(blur, dtype=torch.float64)[:, None] * octaves)
    return torch.where(left.abs() < 1e-12, 0.0, left).to(device, dtype)


@lru_cache(maxsize=16)
def _octaves(num_freq: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " L"]:
    return 2.0 ** torch.arange(num_freq, dtype=dtype, device=device) * math.pi


@lru_cache(maxsize=1024)
def whole_features(
    span: Span,
    scale: int,
    num_freq: int,
    blur: tuple[float, ...],
    is_nested: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Float[Tensor, "1 C F"]:
    """gamma of an axis without noise, nested or not: the layers that share the axis share it too."""
    axis = whole(span, scale, dtype)
    pairs = nested(axis) if is_nested else axis.pairs
    return fourier_features(pairs.to(device), num_freq, blur)


def nested(axis: Along) -> Float[Tensor, "S C 2"]:
    """An axis's pairs with every channel at its place along the source's axis."""
    place = (axis.index + 0.5) / axis.span.full
    return torch.stack((place, axis.pairs[..., 1]), -1)
