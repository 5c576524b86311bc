"""Batch norm statistics of any architecture from its weights alone: no images, no stored network.

Two parts. What a channel's mean and variance should be follows from the weights before it, if its
inputs were independent Gaussians behind their ReLUs: batch norm itself says what mean (beta) and
variance (gamma^2) those have. What that leaves out was measured on images at some architectures
("anchors") when the manifold was made, and is interpolated between them by kriging (Matheron 1963;
Gaussian process regression), with coefficients that the checkpoint holds. Knows neither images nor how
weights are made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from neumeta.architecture import Architecture, Space
from neumeta.family import Layer

CORRELATION = 0.6
"""How alike the neighbouring pixels that one kernel sees are taken to be."""
LENGTHS = (1.0, 1.0, 1.0, 4.0, 4.0, 4.0, 4.0)
"""Length scales of the kernel: stage widths, stage depths, place in the stage."""
LEAST = 1e-8

Moments = tuple[Tensor, Tensor]
"""The mean and the variance of each channel, both (C,)."""


def rectified(mean: Float[Tensor, " C"], variance: Float[Tensor, " C"]) -> Moments:
    """Mean and variance of max(0, x) for Gaussian x."""
    deviation = variance.clamp(min=1e-10).sqrt()
    z = mean / deviation
    below = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    first = mean * below + deviation * density
    second = (mean * mean + variance) * below + mean * deviation * density
    return first, (second - first * first).clamp(min=1e-10)


def kernel(a: Float[Tensor, "A 7"], b: Float[Tensor, "B 7"]) -> Float[Tensor, "A B"]:
    """Exponential covariance over a linear trend."""
    lengths = torch.tensor(LENGTHS, dtype=a.dtype)
    a, b = a / lengths, b / lengths
    distance = (a[:, None] - b[None]).square().sum(2).add(1e-12).sqrt()
    return torch.exp(-distance) + 3 * (1 + 0.2 * a @ b.T)


def node(space: Space, layer: Layer) -> int:
    """The block of the source network that a block at this place of its stage corresponds to."""
    blocks = space.repeats(layer)
    place = (layer.block + 0.5) / layer.blocks * blocks - 0.5
    return min(max(round(place), 0), blocks - 1)


def keys(space: Space, layer: Layer) -> tuple[str, str]:
    """Under which names the anchors of a layer and its coefficients are kept."""
    at = node(space, layer)
    return f"{layer.role.rpartition('.')[0]}.{at}.anchors", f"{layer.role}.{at}.coefficients"


def features(space: Space, architecture: Architecture, layer: Layer) -> Float[Tensor, " 7"]:
    """Where an architecture's layer lies for the kernel."""
    full = [space.table.stages[stage] for stage in space.stages]
    widths = [c / f for c, f in zip(architecture.channels, full, strict=True)]
    pairs = zip(architecture.depth, space.depth, strict=True)
    depths = [2 * (blocks - source) / (blocks + source) for blocks, source in pairs]
    place = (layer.block + 0.5) / layer.blocks
    # Three stages have batch norm here; a network with fewer would leave columns empty.
    padded = (widths + [0.0] * 3)[:3] + (depths + [0.0] * 3)[:3]
    return torch.tensor([*padded, place], dtype=torch.float64)


class Propagation:
    """The statistics of one network, layer by layer in the order of the forward pass."""

    def __init__(self, space: Space, architecture: Architecture) -> None:
        self.space, self.architecture = space, architecture
        images = space.table.input_channels
        # Normalised images.
        self._given: Moments = (torch.zeros(images), torch.ones(images))
        self._inner = self._given
        self._sum: tuple[Moments, Moments] | None = None

    def expected(self, layer: Layer, weight: Float[Tensor, "O I *k"]) -> Moments:
        """What independent inputs would give the convolution's output."""
        if layer.branch_end:
            mean, variance = self._inner
        else:
            if layer.kernel > 1 and self._sum is not None:
                (a, b), (c, d) = self._sum
                self._given = rectified(a + c, b + d)
            mean, variance = self._given
        taps = weight.flatten(2)
        across = taps.sum(2)
        apart = taps.square().sum(2) @ variance
        return across @ mean, (1 - CORRELATION) * apart + CORRELATION * across.square() @ variance

    def normalised(
        self, layer: Layer, gamma: Float[Tensor, " O"], beta: Float[Tensor, " O"]
    ) -> None:
        """The layer's output now has mean beta and standard deviation gamma."""
        after = (beta, gamma.square())
        nothing = (torch.zeros_like(beta), torch.zeros_like(beta))
        if layer.branch_end:
            skipped = self._given if len(self._given[0]) == len(beta) else nothing
            self._sum = (after, skipped)
        elif layer.kernel == 1 and self._sum is not None:
            self._sum = (self._sum[0], after)
        else:
            self._inner = rectified(*after)
            if self._sum is None:  # the stem
                self._sum = (after, nothing)

    def measured(
        self, layer: Layer, weight: Float[Tensor, "O I *k"], held: Mapping[str, Tensor]
    ) -> Moments:
        """The expected moments, corrected by what the checkpoint knows of this place."""
        mean, variance = self.expected(layer, weight)
        anchors, coefficients = (held[key] for key in keys(self.space, layer))
        here = features(self.space, self.architecture, layer)[None]
        found = (kernel(here, anchors.double())[0].float() @ coefficients).view(2, -1)
        count = len(mean)
        variance = variance.clamp(min=LEAST)
        return mean + found[0, :count] * variance.sqrt(), variance * found[1, :count].exp()


def residual(expected: Moments, measured: Moments) -> Float[Tensor, "2 C"]:
    """What the anchors hold: the error of the mean in expected deviations, and of the log variance."""
    variance = expected[1].clamp(min=LEAST)
    mean = (measured[0] - expected[0]) / variance.sqrt()
    return torch.stack((mean, measured[1].clamp(min=LEAST).log() - variance.log()))


def krige(
    anchors: Float[Tensor, "A 7"], values: Float[Tensor, "A V"], nugget: float = 1e-3
) -> Float[Tensor, "A V"]:
    """The coefficients with which kernel(x, anchors) @ coefficients interpolates `values`.

    A value that an anchor lacks is NaN: its coefficient is 0.
    """
    found = torch.zeros_like(values)
    held = values.isfinite()
    patterns: dict[tuple[bool, ...], list[int]] = {}
    for column, pattern in enumerate(held.T.tolist()):
        patterns.setdefault(tuple(pattern), []).append(column)
    for pattern, columns in patterns.items():
        rows = torch.tensor(pattern).nonzero()[:, 0]
        here = anchors[rows]
        matrix = kernel(here, here) + nugget * torch.eye(len(rows), dtype=anchors.dtype)
        solved = torch.cholesky_solve(values[rows][:, columns], torch.linalg.cholesky(matrix))
        found[rows[:, None], torch.tensor(columns)] = solved
    return found
