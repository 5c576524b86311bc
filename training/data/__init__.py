"""Images and their targets, from files to batches: a data set by its name, its path or a function.

Knows no network and no task. `Dataset` holds all images in memory, `Stream` reads them when they
are needed; both have the same interface.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from training.data import arrays, cache, pictures, user
from training.data import stream as streaming
from training.data.cache import cache_folder
from training.data.dataset import NO_LABEL, DataMissing, Dataset, augment, to_float
from training.data.pictures import Decoded, Options
from training.data.stream import Stream
from training.data.tree import ARCHIVES, Tree, open_tree, read_archive, refused

__all__ = [
    "IMAGENET",
    "KINDS",
    "KNOWN",
    "NO_LABEL",
    "WHERE",
    "Data",
    "DataMissing",
    "Dataset",
    "Stream",
    "augment",
    "cache_folder",
    "load",
    "load_from",
    "to_float",
]

LOG = logging.getLogger(__name__)
Data = Dataset | Stream
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
KINDS = ("classes", "masks", "images", "arrays", "cifar", "idx", "digits", "function")
WHERE = {
    "cifar10": "unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz there, or an image"
    " folder cifar10/{train,test}/<class>/*.jpg (or cifar10.tar.xz of it)",
    "cifar100": "unpack https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz there, or an image"
    " folder cifar100/{train,test}/<class>/*.jpg (or cifar100.tar.xz of it)",
    "mnist": "put the four IDX files (train-images-idx3-ubyte.gz, ...) of MNIST in mnist/ there",
}
# Of the known data sets: other names, mean and std (public checkpoints expect them), flips, pad.
NAMES = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-python", "cifar10"),
    "cifar100": ("cifar-100-python", "cifar100"),
    "mnist": ("mnist",),
}
NORMALISATION = {
    "digits": ([0.3053], [0.3765]),
    "mnist": ([0.1307], [0.3081]),
    "cifar10": IMAGENET,
    "cifar100": IMAGENET,
}
KNOWN = tuple(NORMALISATION)
AUGMENTATION = {
    "digits": (False, 1),
    "mnist": (False, 2),
    "cifar10": (True, 4),
    "cifar100": (True, 4),
}


def load(name: str, root: Path | None = None) -> Dataset:
    """The data set `name` ('digits', 'mnist', 'cifar10', 'cifar100') under `root` or $NEUMETA_DATA.

    Raises DataMissing with one clear sentence if it is not there, ValueError for another name.
    """
    if name not in NORMALISATION:
        raise ValueError(f"data: {name!r} is not one of {', '.join(map(repr, KNOWN))}")
    found = load_from(name, root)
    assert isinstance(found, Dataset)
    return found


def load_from(
    name: str,
    root: Path | None = None,
    *,
    kind: str | None = None,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    flips: bool | None = None,
    pad: int | None = None,
    stream: bool = False,
    workers: int = 2,
    ignore: int | None = None,
    classes: tuple[str, ...] | list[str] | int | None = None,
) -> Data:
    """The data set of this name, path (from `root`, $NEUMETA_DATA or here) or `module:function`.

    `kind` is one of KINDS, found by looking where it is not given. Images are taken as they are, or
    resized to cover `size` (pixels; height, width) and cut to it; `channels` is 1 or 3. `mean` and
    `std` of each channel in 0..1: known, or those of the training images. `flips` and `pad` say how
    training images are moved (not at all, but for the known data sets). `stream` reads class folders
    when images are needed, with `workers` processes. `ignore` is the mask value without a class;
    `classes` their names or number.

    Raises DataMissing if it is not there, ValueError with the option, file or folder that is wrong.
    """
    if not name:
        raise ValueError("data: name: a name, a path or a function expected, not ''")
    options = _options(kind, size, channels, ignore, classes)
    _check_numbers(mean, std, pad, workers)
    mean, std = mean and list(mean), std and list(std)
    if kind == "function" or (kind is None and user.is_function(name)):
        return _checked(user.load(name, options, mean, std, workers))
    if name in ("cifar10", "cifar100"):
        options = replace(options, channels=options.channels or 3)
    if name == "digits":
        path, made = Path("digits"), arrays.digits()
    else:
        path = _found(name, root or Path(os.environ.get("NEUMETA_DATA", "data")))
        if stream:
            return _checked(_streamed(path, kind, options, mean, std, bool(flips), workers))
        made = _decoded(path, kind, options)
    if stream:
        raise ValueError(f"data: {name}: only class folders can be streamed")
    for note in made.notes:
        LOG.warning("%s", note)
    made = _as_asked(made, options, str(path))
    width = made.train_images.shape[1]
    usual = tuple(each * (width if len(each) == 1 else 1) for each in NORMALISATION.get(name, ()))
    if (mean is None or std is None) and (not usual or len(usual[0]) != width):
        usual = _moments(made.train_images)
    usual_flips, usual_pad = AUGMENTATION.get(name, (False, 0))
    found = Dataset(
        name if name in NORMALISATION else path.name.split(".", 1)[0],
        torch.from_numpy(made.train_images),
        torch.from_numpy(made.train_labels),
        torch.from_numpy(made.test_images),
        torch.from_numpy(made.test_labels),
        made.classes,
        mean or usual[0],
        std or usual[1],
        usual_flips if flips is None else flips,
        usual_pad if pad is None else pad,
        NO_LABEL if ignore is None else ignore,
    )
    return _checked(found)


def _checked(found: Data) -> Data:
    for key, value in (("mean", found.mean), ("std", found.std)):
        if len(value) != found.shape[0]:
            raise ValueError(
                f"data: {key}: {len(value)} values, but images have {found.shape[0]} channels"
            )
    return found


def _streamed(
    path: Path,
    kind: str | None,
    options: Options,
    mean: list[float] | None,
    std: list[float] | None,
    flips: bool,
    workers: int,
) -> Stream:
    if not path.is_dir():
        raise ValueError(f"{path}: only a folder can be streamed: unpack it")
    tree = pictures.descend(open_tree(path)[0])
    held = kind or _kind(tree)
    if held != "classes":
        raise ValueError(f"{path}: only class folders can be streamed, this is of kind {held!r}")
    found, notes = streaming.folders(tree, options, mean, std, flips, workers)
    for note in notes:
        LOG.warning("%s", note)
    return found


def _options(
    kind: str | None,
    size: int | tuple[int, int] | None,
    channels: int | None,
    ignore: int | None,
    classes: tuple[str, ...] | list[str] | int | None,
) -> Options:
    if kind is not None and kind not in KINDS:
        raise ValueError(f"data: kind: {kind!r} is not one of {', '.join(KINDS)}")
    sides = (size, size) if isinstance(size, int) else size
    if sides is not None and (len(sides) != 2 or min(sides) < 1):
        raise ValueError(f"data: size: {size!r}: a number of pixels, or height and width, expected")
    if channels not in (None, 1, 3):
        raise ValueError(f"data: channels: {channels!r} is not 1 or 3")
    if isinstance(classes, int):
        if classes < 1:
            raise ValueError(f"data: classes: {classes!r}: a number from 1 on, or names, expected")
    elif classes is not None:
        classes = tuple(classes)
        if not classes or len(set(classes)) < len(classes):
            raise ValueError(f"data: classes: {list(classes)!r}: names that differ expected")
    height_width = None if sides is None else (sides[0], sides[1])
    return Options(height_width, channels, ignore, classes)


def _check_numbers(
    mean: list[float] | None, std: list[float] | None, pad: int | None, workers: int
) -> None:
    for key, value in (("mean", mean), ("std", std)):
        if value is not None and not all(math.isfinite(each) for each in value):
            raise ValueError(f"data: {key}: {value!r}: finite numbers expected")
    if std is not None and min(std, default=0) <= 0:
        raise ValueError(f"data: std: {std!r}: numbers above 0 expected")
    for key, number in (("pad", pad), ("workers", workers)):
        if number is not None and number < 0:
            raise ValueError(f"data: {key}: {number!r}: 0 or more expected")


def _found(name: str, root: Path) -> Path:
    """The file or folder that holds the data set. Raises DataMissing."""
    for place in NAMES.get(name, (name,)):
        for folder in (root,) if name in NAMES else (root, Path()):
            for suffix in ("", *ARCHIVES, ".npz"):
                path = folder / f"{place}{suffix}"
                with refused(str(path)):
                    if path.is_file() or (path.is_dir() and not suffix):
                        return path
    where = WHERE.get(name, f"a folder, an archive ({', '.join(ARCHIVES)}) or .npz of that name")
    raise DataMissing(f"data set {name!r} is not under {root}: {where}")


def _kind(tree: Tree) -> str:
    if arrays.is_cifar(tree):
        return "cifar"
    if any(arrays.idx_names(tree)):
        return "idx"
    return pictures.kind_of(tree)


def _decoded(path: Path, kind: str | None, options: Options) -> Decoded:
    """What is in this file or folder; images from the decoded cache, if they are there."""
    if path.suffix.lower() == ".npz" or kind == "arrays":
        return arrays.npz(path, options)
    tree: Tree | None = None
    if path.is_dir():
        tree, stamp = open_tree(path)
    elif path.name.lower().endswith(ARCHIVES):
        with refused(str(path)):
            about = path.stat()
        stamp = f"{about.st_size} {about.st_mtime_ns}"
    else:
        raise ValueError(f"{path}: a folder, an archive ({', '.join(ARCHIVES)}) or .npz expected")
    if tree is not None:
        tree = pictures.descend(tree)
        if (kind or _kind(tree)) in ("cifar", "idx"):
            return _of_tree(tree, kind, options)  # fast enough to read each time

    def make() -> Decoded:
        held = tree or pictures.descend(read_archive(path))
        return _of_tree(held, kind, options)

    return cache.kept(path, f"{kind} {options}", stamp, make)


def _of_tree(tree: Tree, kind: str | None, options: Options) -> Decoded:
    held = kind or _kind(tree)
    if held == "cifar":
        return arrays.cifar(tree)
    if held == "idx":
        return arrays.idx(tree)
    return pictures.decode(tree, held, options)


def _as_asked(made: Decoded, options: Options, where: str) -> Decoded:
    """Arrays in the size and channels, with the classes' names or number, that were asked for."""
    count, given = len(made.classes), options.classes
    if given is not None and count:
        if isinstance(given, int):
            given = (*made.classes, *(str(number) for number in range(count, given)))[:given]
        if len(given) < count:
            raise ValueError(f"{where}: {count} classes there, but {len(given)} were given")
        made = replace(made, classes=given)
    shape = made.train_images.shape[1:]
    if (options.channels or shape[0], *(options.size or shape[1:])) == shape:
        return made
    parts = (made.train_images, made.train_labels, made.test_images, made.test_labels)
    a, b, c, d = (
        part if part.ndim == 1 else np.stack([pictures.resized(each, options) for each in part])
        for part in parts
    )
    return Decoded(a, b, c, d, made.classes, made.notes)


def _moments(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 (N, C, H, W), in 0..1."""
    counts = np.zeros((images.shape[1], 256))
    for at in range(0, len(images), 1000):
        for channel, row in enumerate(counts):
            row += np.bincount(images[at : at + 1000, channel].reshape(-1), minlength=256)
    levels, weights = np.arange(256) / 255, counts / counts.sum(1, keepdims=True)
    mean = weights @ levels
    return streaming.rounded(mean, np.sqrt(np.maximum(weights @ levels**2 - mean**2, 0)))
