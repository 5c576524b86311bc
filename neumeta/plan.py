"""A file before it exists: every byte of it that is no weight, and each tensor's place between them.

What the formats share. Knows neither of them, no manifold and no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """The file of one architecture: `header`, then the tensors in this order."""

    header: bytes
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    length: int
    """Total bytes, header included."""
    frames: tuple[bytes, ...]
    """The bytes in front of each tensor's own; where a format has none, they are empty."""
