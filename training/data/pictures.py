"""Image files to arrays: class folders, folders of images and masks, and images alone.

    {train,test}/<class>/*.jpg                classes are the folders' names, sorted
    {train,test}/*.png {train,test}annot/*.png    a mask's grey value is the class
    *.png                                     images without labels: every tenth is a test image

`val`, `valid` or `validation` stands for `test` where there is no `test`. Knows no cache.
"""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from training.data.tree import Tree

if TYPE_CHECKING:
    from PIL.Image import Image

LOG = logging.getLogger(__name__)
SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".ppm",
    ".pgm",
    ".bmp",
    ".tif",
    ".tiff",
    ".webp",
    ".gif",
)  # of images, in any case
TESTS = ("test", "val", "valid", "validation")
GREY = frozenset({"1", "L", "LA"})
LAYOUT = "expected {train,test}/<class>/*.jpg"


@dataclass(frozen=True)
class Options:
    """How images are decoded: (height, width) or as they are, 1 or 3 channels or as they are."""

    size: tuple[int, int] | None = None
    channels: int | None = None
    ignore: int | None = None
    classes: tuple[str, ...] | int | None = None


@dataclass(frozen=True)
class Decoded:
    """Training and test images, uint8 (N, C, H, W), with classes int64 (N,) or masks uint8 (N, H, W).

    `notes` say what a reader should know, such as that `val` stood for `test`.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.lower().endswith(SUFFIXES)


def descend(tree: Tree) -> Tree:
    """The tree from the folder where the data starts: the only folder beside other files, if any."""
    while True:
        heads = tree.heads()
        if len(heads) != 1 or heads & {"train", *TESTS}:
            return tree
        if any("/" not in name and is_image(name) for name in tree.names):
            return tree
        tree = tree.below(f"{heads.pop()}/")


def kind_of(tree: Tree) -> str:
    """What a tree holds, by looking: 'classes', 'masks' or 'images'. Raises ValueError if none."""
    heads = tree.heads()
    if {"train", "trainannot"} <= heads:
        return "masks"
    if heads & {"train", *TESTS}:
        return "classes"
    if any("/" not in name and is_image(name) for name in tree.names):
        return "images"
    there = ", ".join(sorted(heads)[:5]) or "no images"
    raise ValueError(f"{tree.at('')}: no folder train/ there, but {there}: {LAYOUT}")


def halves(tree: Tree) -> tuple[str, str, tuple[str, ...]]:
    """The names of the training and the test folder, and what to say about them."""
    heads = tree.heads()
    test = next((name for name in TESTS if name in heads), None)
    if "train" not in heads or test is None:
        missing = "train" if "train" not in heads else "test (nor val, valid, validation)"
        there = ", ".join(sorted(heads)[:5]) or "nothing"
        raise ValueError(f"{tree.at('')}: no folder {missing} there, but {there}: {LAYOUT}")
    if test == "test":
        return "train", test, ()
    return "train", test, (f"{tree.at('')}: no test/ there: {test}/ is used as the test images",)


def labelled(tree: Tree, options: Options) -> tuple[list[list[tuple[str, int]]], Decoded]:
    """(name, class) of each image, class by class, of the training and the test folder; and the
    classes and notes in an otherwise empty `Decoded`.

    Raises ValueError with the folder's name: no class folders, one without training images, a class
    that is only in the test folder, other classes than were given.
    """
    *both, notes = halves(tree)
    found: dict[str, dict[str, list[str]]] = {}
    for split in both:
        inside = tree.below(f"{split}/")
        found[split] = {name: [] for name in sorted(inside.heads())}
        others = []
        for name in inside.names:
            if is_image(name) and "/" not in name:
                raise ValueError(f"{inside.at(name)}: lies in no class folder: {LAYOUT}")
            if is_image(name):
                found[split][name.split("/", 1)[0]].append(f"{split}/{name}")
            elif "/" in name:
                others.append(name)
        if others:
            more = f" (and {len(others) - 1} more)" if others[1:] else ""
            notes += (f"{inside.at(others[0])}: left out, it is no image{more}",)
    train, test = (found[split] for split in both)
    for name, rows in train.items():
        if not rows:
            raise ValueError(f"{tree.at(f'train/{name}')}: a class folder without images")
    for name, rows in test.items():
        if rows and name not in train:
            raise ValueError(f"{tree.at(f'{both[1]}/{name}')}: a class without training images")
    if len(train) < 2:
        there = f"only {next(iter(train))}/" if train else "none"
        raise ValueError(f"{tree.at('train')}: two class folders or more are needed, but {there}")
    if not any(test.values()):
        raise ValueError(f"{tree.at(both[1])}: no test images there: {LAYOUT}")
    without = [name for name in train if not test.get(name)]
    if without:
        notes += (f"{tree.at(both[1])}: no test images of {', '.join(without)}",)
    classes = named(tuple(train), options.classes, tree.at("train"))
    rows_of = [
        [(name, classes.index(label)) for label, names in split.items() for name in names]
        for split in (train, test)
    ]
    empty = np.zeros(0, np.uint8)
    return rows_of, Decoded(empty, empty, empty, empty, classes, notes)


def named(
    there: tuple[str, ...], given: tuple[str, ...] | int | None, where: str
) -> tuple[str, ...]:
    """The classes in order: as given, if they are those that are there."""
    if given is None or given == len(there):
        return there
    if isinstance(given, int):
        raise ValueError(f"{where}: {len(there)} classes there, but classes = {given}")
    if sorted(given) != sorted(there):
        odd = sorted(set(given) ^ set(there))[:5]
        raise ValueError(f"{where}: classes there and classes given differ: {', '.join(odd)}")
    return given


def decode(tree: Tree, kind: str, options: Options) -> Decoded:
    """All images of a tree of this kind ('classes', 'masks', 'images').

    Raises ValueError with the name of the image or folder that does not fit.
    """
    if kind == "classes":
        rows, about = labelled(tree, options)
        images = decode_all(tree, [[name for name, _ in part] for part in rows], options)
        labels = [np.array([label for _, label in part], np.int64) for part in rows]
        return Decoded(images[0], labels[0], images[1], labels[1], about.classes, about.notes)
    if kind == "masks":
        return _masks(tree, options)
    return _unlabelled(tree, options)


def _masks(tree: Tree, options: Options) -> Decoded:
    *both, notes = halves(tree)
    names: list[list[str]] = []
    masks: list[np.ndarray] = []
    for split in both:
        inside = [name for name in tree.names if name.startswith(f"{split}/") and is_image(name)]
        by_stem = {_stem(name, f"{split}annot/"): name for name in tree.names if is_image(name)}
        by_stem.pop("", None)
        names.append(inside)
        read = []
        for name in inside:
            mask = by_stem.pop(_stem(name, f"{split}/"), None)
            if mask is None:
                raise ValueError(f"{tree.at(name)}: no mask of this name in {split}annot/")
            image_size = opened(tree.read(name), tree.at(name)).size
            read.append(_mask(tree, mask, image_size, options))
        for name in by_stem.values():
            raise ValueError(f"{tree.at(name)}: no image of this name in {split}/")
        if not read:
            raise ValueError(f"{tree.at(split)}: no images there")
        masks.append(_stacked(read, [tree.at(name) for name in inside]))
    highest = max(int(part[part != _ignored(options)].max(initial=0)) for part in masks)
    there = tuple(str(number) for number in range(highest + 1))
    given = options.classes
    classes = tuple(map(str, range(given))) if isinstance(given, int) else given or there
    images = decode_all(tree, names, options)
    return Decoded(images[0], masks[0], images[1], masks[1], classes, notes)


def _stem(name: str, folder: str) -> str:
    return name.removeprefix(folder).rsplit(".", 1)[0] if name.startswith(folder) else ""


def _ignored(options: Options) -> int:
    return -1 if options.ignore is None else options.ignore


def _mask(tree: Tree, name: str, image_size: tuple[int, int], options: Options) -> np.ndarray:
    from PIL.Image import Resampling

    where = tree.at(name)
    mask = opened(tree.read(name), where)
    if mask.mode not in ("L", "P", "1"):
        raise ValueError(f"{where}: a mask of mode {mask.mode}: grey values or a palette expected")
    if mask.size != image_size:
        raise ValueError(f"{where}: a mask of {_by(mask.size)}, but its image is {_by(image_size)}")
    if options.size:
        mask = fitted(mask, options.size, Resampling.NEAREST)
    values = np.array(mask, np.uint8)
    given = options.classes
    if given is not None:
        count = given if isinstance(given, int) else len(given)
        odd = values[(values >= count) & (values != _ignored(options))]
        if odd.size:
            raise ValueError(
                f"{where}: class {odd[0]} in this mask, but classes are 0..{count - 1}"
            )
    return values


def _unlabelled(tree: Tree, options: Options) -> Decoded:
    names = [name for name in tree.names if is_image(name)]
    if {"train"} <= tree.heads():
        *both, notes = halves(tree)
        parts = [[name for name in names if name.startswith(f"{split}/")] for split in both]
    else:
        if len(names) < 2:
            raise ValueError(f"{tree.at('')}: two images or more are needed, but {len(names)}")
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
        held = set(order[: max(1, len(names) // 10)])
        parts = [
            [name for row, name in enumerate(names) if row not in held],
            [name for row, name in enumerate(names) if row in held],
        ]
        notes = (f"{tree.at('')}: {len(held)} of {len(names)} images are kept back as test images",)
    if not all(parts):
        raise ValueError(f"{tree.at('')}: no training or no test images there")
    images = decode_all(tree, parts, options)
    labels = [np.zeros(len(part), np.int64) for part in parts]
    return Decoded(images[0], labels[0], images[1], labels[1], (), notes)


def decode_all(tree: Tree, parts: list[list[str]], options: Options) -> list[np.ndarray]:
    """Each part's images, uint8 (N, C, H, W); all parts have the same C, H and W."""
    read = [[pixels(tree.read(name), tree.at(name), options) for name in part] for part in parts]
    colour = any(len(image) == 3 for part in read for image in part)
    if colour:
        for part in read:
            part[:] = [np.broadcast_to(image, (3, *image.shape[1:])) for image in part]
    places = [[tree.at(name) for name in part] for part in parts]
    first = (read[0][0], places[0][0])
    return [_stacked(part, at, first) for part, at in zip(read, places, strict=True)]


def _stacked(
    images: list[np.ndarray], places: list[str], first: tuple[np.ndarray, str] | None = None
) -> np.ndarray:
    if not images:
        return np.zeros((0, *first[0].shape), np.uint8) if first else np.zeros(0, np.uint8)
    model, where = first or (images[0], places[0])
    for image, place in zip(images, places, strict=True):
        if image.shape != model.shape:
            ours, theirs = image.shape[-2:][::-1], model.shape[-2:][::-1]
            raise ValueError(
                f"{place}: {_by(ours)}, but {where} is {_by(theirs)}: all images of a data set must"
                " have one size: give `size`, or `stream`"
            )
    return np.stack(images)


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]} pixels (width x height)"


def opened(raw: bytes, where: str) -> Image:
    """The decoded image. Raises ValueError with its name if it is damaged, empty or no image."""
    from PIL import Image

    if not raw:
        raise ValueError(f"{where}: an empty file, no image")
    try:
        with Image.open(io.BytesIO(raw)) as image:
            image.load()
            return image
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they like on damaged files
        reason = str(error).split(" <_io", 1)[0].replace("\n", " ")
        raise ValueError(f"{where}: a damaged image, or none: {reason}") from None


def pixels(raw: bytes, where: str, options: Options) -> np.ndarray:
    """One image file as uint8 (C, H, W), of the size and channels asked for, if any are."""
    from PIL.Image import Resampling

    image = coloured(opened(raw, where), where, options.channels)
    if options.size:
        image = fitted(image, options.size, Resampling.BILINEAR)
    return as_array(image)


def resized(values: np.ndarray, options: Options) -> np.ndarray:
    """uint8 (C, H, W) pixels, or an integer (H, W) mask, as `pixels` makes them of a file."""
    from PIL import Image

    if values.ndim == 2:
        mask = Image.fromarray(values.astype(np.int32))
        size = options.size or (values.shape[0], values.shape[1])
        return np.asarray(fitted(mask, size, Image.Resampling.NEAREST)).astype(values.dtype)
    channels = options.channels or len(values)
    flat = values[0] if len(values) == 1 else values.transpose(1, 2, 0)
    image = Image.fromarray(flat).convert("L" if channels == 1 else "RGB")
    if options.size:
        image = fitted(image, options.size, Image.Resampling.BILINEAR)
    return as_array(image)


def coloured(image: Image, where: str, channels: int | None) -> Image:
    """The image in grey or colour: as asked for, or else as it is."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{where}: pixels of mode {image.mode}: 8 bits a channel expected")
    grey = channels == 1 or (channels is None and image.mode in GREY)
    return image.convert("L" if grey else "RGB")


def as_array(image: Image) -> np.ndarray:
    """An 'L' or 'RGB' image as uint8 (C, H, W)."""
    values = np.asarray(image)
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def fitted(image: Image, size: tuple[int, int], how: int, cover: float = 1.0) -> Image:
    """The middle (height, width) = `size` of the image, resized to cover it `cover` times."""
    height, width = size
    factor = cover * max(height / image.height, width / image.width)
    grown = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
    if grown != image.size:
        image = image.resize(grown, how)
    left, top = round((grown[0] - width) / 2), round((grown[1] - height) / 2)
    return image.crop((left, top, left + width, top + height))
