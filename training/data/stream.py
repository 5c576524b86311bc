"""Images read from disk when a batch needs them, by worker processes: data that fits no memory.

Has the interface of `Dataset`: len, batch, batches, test_batches, classes, mean, std, shape, digest.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from training.data.dataset import NO_LABEL, to_float
from training.data.pictures import Options, as_array, coloured, fitted, labelled, opened
from training.data.tree import Tree, refused

EVAL_COVER = 256 / 224  # torchvision: the shorter side to 256, the middle 224 of it
AREA, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10  # torchvision's RandomResizedCrop


@runtime_checkable
class Items(Protocol):
    """Images with their targets, one at a time."""

    def __len__(self) -> int: ...

    def item(self, row: int, seed: int | None) -> tuple[np.ndarray, Any]:
        """uint8 or float32 (C, H, W) and its target; augmented as the seed says, if there is one."""


@dataclass(frozen=True)
class Stream:
    """Training and test images that are read when they are needed; memory holds their names alone.

    `identity` is what `digest` returns. `workers` processes read ahead in `batches` and
    `test_batches`; with 0 this process reads.
    """

    name: str
    train: Items
    test: Items
    classes: tuple[str, ...]
    targets: str
    mean: list[float]
    std: list[float]
    shape: tuple[int, int, int]
    identity: str
    ignore: int = NO_LABEL
    workers: int = 2

    def __len__(self) -> int:
        """How many training images there are."""
        return len(self.train)

    def batch(
        self, rows: Tensor, generator: torch.Generator, augment: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The training images `rows`, normalised float32 (N, C, H, W), and their int64 targets."""
        seed = int(torch.randint(2**31, (), generator=generator))
        return self._tensors(_Reader(self.train, augment)[rows.tolist(), seed])

    def batches(
        self, plan: Iterable[tuple[Tensor, int]], augment: bool = True
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One batch for each (rows, seed) of the plan, read ahead: the same batches as `batch`
        gives with a generator of that seed, however many workers there are."""
        seeds = (
            (rows.tolist(), int(torch.randint(2**31, (), generator=_seeded(seed))))
            for rows, seed in plan
        )
        yield from self._read(self.train, seeds, augment)

    def test_batches(self, size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        """All test images in their order, at most `size` at once."""
        count = len(self.test)
        plan = ((list(range(at, min(at + size, count))), 0) for at in range(0, count, size))
        yield from self._read(self.test, plan, False)

    def digest(self) -> str:
        """sha256 of what identifies the data: which data a result was measured on."""
        return self.identity

    def _read(
        self, items: Items, plan: Iterable[tuple[list[int], int]], augment: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader: DataLoader[Any] = DataLoader(
            _Reader(items, augment),  # type: ignore[arg-type]
            sampler=plan,
            batch_size=None,  # an item of the reader is a whole batch
            num_workers=self.workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # or it would draw from the global one
        )
        for found in loader:
            yield self._tensors(found)

    def _tensors(self, found: str | tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
        if isinstance(found, str):
            raise ValueError(found)
        images, labels = (torch.from_numpy(part) for part in found)
        x = to_float(images if images.dtype == torch.uint8 else images * 255, self)
        labels = labels.masked_fill(labels == self.ignore, NO_LABEL)
        if self.classes and labels.numel():
            odd = labels[(labels != NO_LABEL) & ((labels < 0) | (labels >= len(self.classes)))]
            if odd.numel():
                raise ValueError(
                    f"{self.name}: a label {int(odd[0])}, but classes are 0..{len(self.classes) - 1}"
                )
        return x, labels


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _as_it_is(found: Any) -> Any:
    # Arrays travel through a pipe. Tensors would go through /dev/shm, which is small in containers.
    return found


@dataclass
class _Reader:
    """A batch for ([rows], seed): arrays, or the message of what went wrong (in one line; an
    exception would come back from a worker with its traceback in its text)."""

    items: Items
    augment: bool

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, asked: tuple[list[int], int]) -> str | tuple[np.ndarray, np.ndarray]:
        rows, seed = asked
        try:
            found = [
                self.items.item(row, seed * 1_000_003 + place if self.augment else None)
                for place, row in enumerate(rows)
            ]
        except ValueError as error:
            return str(error)
        images, labels = zip(*found, strict=True)
        return np.stack(images), np.array(labels, np.int64)


class FolderImages:
    """The images of class folders, resized and cropped as torchvision does for ImageNet.

    Augmented: a random part of the image (`RandomResizedCrop`), mirrored half of the time with
    `flips`. Else: the shorter side to 256/224 of `size`, and its middle.
    """

    def __init__(
        self,
        top: Path,
        rows: list[tuple[str, int]],
        size: tuple[int, int],
        channels: int,
        flips: bool,
    ) -> None:
        # One block of memory each: forked workers copy every page whose reference counts they touch.
        self.top, self.size, self.channels, self.flips = top, size, channels, flips
        self.names = np.array([os.fsencode(name) for name, _ in rows])
        self.labels = np.array([label for _, label in rows], np.int64)

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.labels)

    def item(self, row: int, seed: int | None) -> tuple[np.ndarray, int]:
        """uint8 (C, H, W) and its class. Raises ValueError with the name of a damaged image."""
        from PIL.Image import Resampling, Transpose

        path = self.top / os.fsdecode(self.names[row].item())
        with refused(str(path)):
            raw = path.read_bytes()
        image = coloured(opened(raw, str(path)), str(path), self.channels)
        if seed is None:
            image = fitted(image, self.size, Resampling.BILINEAR, EVAL_COVER)
        else:
            draws = torch.rand(2 * TRIES + 3, generator=_seeded(seed)).tolist()
            box = part(image.width, image.height, draws)
            height, width = self.size
            image = image.resize((width, height), Resampling.BILINEAR, box)
            if self.flips and draws[-1] < 0.5:
                image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
        return as_array(image), int(self.labels[row])


def part(width: int, height: int, draws: list[float]) -> tuple[int, int, int, int]:
    """A random part of an image: (left, top, right, bottom), 8 to 100 % of its area, of a ratio of
    3:4 to 4:3; the middle where ten tries found none. `draws` are uniform numbers in 0..1."""
    for first, second in zip(draws[0 : 2 * TRIES : 2], draws[1 : 2 * TRIES : 2], strict=True):
        area = width * height * (AREA[0] + (AREA[1] - AREA[0]) * first)
        low, high = math.log(RATIO[0]), math.log(RATIO[1])
        ratio = math.exp(low + (high - low) * second)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(draws[2 * TRIES] * (width - w + 1))
            top = int(draws[2 * TRIES + 1] * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def folders(
    tree: Tree,
    options: Options,
    mean: list[float] | None,
    std: list[float] | None,
    flips: bool,
    workers: int,
) -> tuple[Stream, tuple[str, ...]]:
    """The stream of a folder of class folders, and what to say about it.

    Without `mean` and `std` they are those of up to 1,000 training images, evenly chosen.
    """
    size = options.size or (224, 224)
    channels = options.channels or 3
    rows, about = labelled(tree, options)
    top = tree.where / tree.top
    train, test = (FolderImages(top, part, size, channels, flips) for part in rows)
    sha = hashlib.sha256()
    for half in rows:
        for name, label in half:
            sha.update(os.fsencode(f"{name}\0{tree.sizes[name]}\0{label}\0"))
    if mean is None or std is None:
        found = moments_of(train)
        mean, std = mean or found[0], std or found[1]
    shape = (channels, *size)
    stream = Stream(
        tree.where.name,
        train,
        test,
        about.classes,
        "classes",
        mean,
        std,
        shape,
        sha.hexdigest(),
        workers=workers,
    )
    return stream, about.notes


def moments_of(items: Items, most: int = 1000) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, in 0..1, of up to `most` images, evenly chosen."""
    count, total, squares = 0, np.zeros(1), np.zeros(1)
    for row in evenly(len(items), most):
        image, _ = items.item(row, None)
        values = image.reshape(len(image), -1).astype(np.float64)
        if image.dtype == np.uint8:
            values /= 255
        count += values.shape[1]
        total = total + values.sum(1)
        squares = squares + np.square(values).sum(1)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return rounded(mean, std)


def rounded(mean: np.ndarray, std: np.ndarray) -> tuple[list[float], list[float]]:
    """To four digits, as published constants are; a channel that never changes is not scaled."""
    kept = [round(float(value), 4) or 1.0 for value in std]
    return [round(float(value), 4) for value in mean], kept


def evenly(count: int, most: int) -> list[int]:
    """Up to `most` rows of `count`, evenly spaced."""
    return sorted({i * count // min(count, most) for i in range(min(count, most))})
