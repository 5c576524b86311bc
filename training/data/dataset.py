"""Images and targets in memory: batches of them, normalised, moved and mirrored.

Knows no file: what reads them is beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

NO_LABEL = -100
"""The target of a pixel that no loss and no score counts (torch's own default for it)."""


class DataMissing(FileNotFoundError):
    """The data set is not on this machine; the message says where to get it."""


@runtime_checkable
class Normalised(Protocol):
    """What says how pixels are normalised: mean and standard deviation of each channel, in 0..1."""

    @property
    def mean(self) -> list[float]: ...
    @property
    def std(self) -> list[float]: ...


@dataclass(frozen=True)
class Dataset:
    """Training and test images in memory, uint8 (N, C, H, W), with their targets.

    `train_labels` and `test_labels` are int64 (N,) classes, or uint8 (N, H, W) masks of them, in
    which `ignore` stands for pixels without a class. Data without labels has zeros and no `classes`.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: list[float]
    std: list[float]
    flips: bool
    pad: int
    ignore: int = NO_LABEL

    def __len__(self) -> int:
        """How many training images there are."""
        return len(self.train_images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def targets(self) -> str:
        """What an image comes with: its class ('classes'), 'masks' of them, or 'nothing'."""
        if not self.classes:
            return "nothing"
        return "masks" if self.train_labels.ndim == 3 else "classes"

    def batch(
        self, rows: Tensor, generator: torch.Generator, augment: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The training images `rows`, normalised float32 (N, C, H, W), and their int64 targets.

        With `augment` they are shifted and mirrored as the generator says, masks with them.
        """
        images, labels = self.train_images[rows], self._long(self.train_labels[rows])
        if augment:
            move = draw(len(rows), self, generator)
            images = moved(images, self.pad, *move)
            if labels.ndim == 3:
                labels = moved(labels[:, None], self.pad, *move, fill=NO_LABEL)[:, 0]
        return to_float(images, self), labels

    def batches(
        self, plan: Iterable[tuple[Tensor, int]], augment: bool = True
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One batch for each (rows, seed) of the plan: `batch` with a generator of that seed."""
        for rows, seed in plan:
            yield self.batch(rows, torch.Generator().manual_seed(seed), augment)

    def test_batches(self, size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        """All test images in their order, at most `size` at once, as `batch` gives them."""
        for at in range(0, len(self.test_images), size):
            images, labels = self.test_images[at : at + size], self.test_labels[at : at + size]
            yield to_float(images, self), self._long(labels)

    def _long(self, labels: Tensor) -> Tensor:
        labels = labels.long()
        return labels.masked_fill(labels == self.ignore, NO_LABEL)

    def digest(self) -> str:
        """sha256 of all pixels and labels: which data a result was measured on."""
        sha = hashlib.sha256()
        for part in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            sha.update(part.numpy().tobytes())
        return sha.hexdigest()


def to_float(images: Tensor, data: Normalised) -> Tensor:
    """uint8 (N, C, H, W) pixels -> normalised float32 of the same shape."""
    mean = torch.tensor(data.mean, device=images.device).view(-1, 1, 1)
    std = torch.tensor(data.std, device=images.device).view(-1, 1, 1)
    return (images.float() / 255 - mean) / std


def augment(images: Tensor, data: Dataset, generator: torch.Generator) -> Tensor:
    """Random shifts by up to `data.pad` pixels and, where the data allows, mirroring, per image."""
    return moved(images, data.pad, *draw(len(images), data, generator))


def draw(
    count: int, data: Dataset, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """For each of `count` images: down and right shifts (count, 1) in 0..2 * pad, and mirroring."""
    dy = torch.randint(0, 2 * data.pad + 1, (count, 1), generator=generator)
    dx = torch.randint(0, 2 * data.pad + 1, (count, 1), generator=generator)
    mirrored = torch.rand((count, 1), generator=generator) < 0.5 if data.flips else None
    return dy, dx, mirrored


def moved(
    images: Tensor, pad: int, dy: Tensor, dx: Tensor, mirrored: Tensor | None, fill: int = 0
) -> Tensor:
    """(N, C, H, W) images, padded by `pad` pixels of `fill` and cut out again at (dy, dx).

    A mirrored image is the mirror image of what the same shift cuts out.
    """
    count, _, height, width = images.shape
    padded = F.pad(images, (pad, pad, pad, pad), value=fill)
    columns = torch.arange(width).expand(count, width)
    if mirrored is not None:
        columns = torch.where(mirrored, width - 1 - columns, columns)
    rows = (torch.arange(height) + dy) * padded.shape[3]
    place = (rows[:, :, None] + (columns + dx)[:, None]).view(count, 1, -1)
    places = place.expand(-1, images.shape[1], -1)
    return padded.flatten(2).gather(2, places).view(images.shape)
