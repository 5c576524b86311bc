"""Data sets that are arrays already: `.npz`, CIFAR's batches, IDX files, scikit-learn's digits."""

from __future__ import annotations

import codecs
import gzip
import io
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.data.dataset import DataMissing
from training.data.pictures import Decoded, Options
from training.data.tree import Tree, refused

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IDX = [(part, kind) for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def digits() -> Decoded:
    """scikit-learn's bundled 8x8 digits: no download."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images * (255 / 16)).round().astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).numpy()
    train, test = order[:1297], order[1297:]
    names = tuple(str(digit) for digit in range(10))
    return Decoded(images[train], labels[train], images[test], labels[test], names)


def is_cifar(tree: Tree) -> bool:
    """Whether these are the official CIFAR-10 or CIFAR-100 batches."""
    return "data_batch_1" in tree.names or {"train", "test", "meta"} <= set(tree.names)


def cifar(tree: Tree) -> Decoded:
    """The official CIFAR-10 (`data_batch_1` ...) or CIFAR-100 (`train`, `test`, `meta`) batches."""
    ten = "data_batch_1" in tree.names
    labels_key = b"labels" if ten else b"fine_labels"
    files = (
        [[f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]] if ten else [["train"], ["test"]]
    )
    parts: list[np.ndarray] = []
    for names in files:
        images, labels = [], []
        for name in names:
            where = tree.at(name)
            if name not in tree.names:
                raise DataMissing(f"{where}: this official batch is missing")
            batch = _unpickled(tree.read(name), where)
            try:
                images.append(np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32))
                labels.append(np.asarray(batch[labels_key], np.int64).reshape(len(images[-1])))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{where}: no official CIFAR batch: {error}") from None
        parts += [np.concatenate(images), np.concatenate(labels)]
    if ten:
        return Decoded(parts[0], parts[1], parts[2], parts[3], CIFAR10)
    meta = _unpickled(tree.read("meta"), tree.at("meta"))
    try:
        names = [name.decode() for name in meta[b"fine_label_names"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{tree.at('meta')}: no names of CIFAR-100's classes: {error}") from None
    return Decoded(parts[0], parts[1], parts[2], parts[3], tuple(names))


class _Numbers(pickle.Unpickler):
    """Reads numpy arrays and plain values, and calls nothing else that a file names."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            "_reconstruct": np.zeros(0).__reduce__()[0],
            "_frombuffer": np.zeros(1).__reduce_ex__(5)[0],
            "ndarray": np.ndarray,
            "dtype": np.dtype,
            "encode": codecs.encode,
        }
        if module.split(".")[0] in ("numpy", "_codecs") and name in allowed:
            return allowed[name]
        raise pickle.UnpicklingError(f"it calls {module}.{name}")


def _unpickled(raw: bytes, where: str) -> dict[bytes, Any]:
    try:
        held = _Numbers(io.BytesIO(raw), encoding="bytes").load()
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise ValueError(f"{where}: a damaged batch, or no official one: {error}") from None
    if not isinstance(held, dict):
        raise ValueError(f"{where}: no official CIFAR batch")
    return held


def idx_names(tree: Tree) -> list[str | None]:
    """Training images and labels, test images and labels in IDX format; None where missing."""
    there = set(tree.names)
    return [
        next(
            (
                name
                for mark in (kind, kind.replace("-idx", ".idx"))
                for name in (f"{part}-{mark}-ubyte.gz", f"{part}-{mark}-ubyte")
                if name in there
            ),
            None,
        )
        for part, kind in IDX
    ]


def idx(tree: Tree) -> Decoded:
    """The four IDX files of MNIST or of a data set like it, compressed or not."""
    arrays = []
    for name, (part, kind) in zip(idx_names(tree), IDX, strict=True):
        if name is None:
            raise DataMissing(f"{tree.at(f'{part}-{kind}-ubyte.gz')}: this file is missing")
        arrays.append(_idx(tree.read(name), tree.at(name)))
    a, b, c, d = arrays
    for images, labels, part in ((a, b, "train"), (c, d, "t10k")):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise ValueError(
                f"{tree.at(part)}: images {images.shape} and labels {labels.shape} do not fit"
            )
    names = tuple(str(digit) for digit in range(int(max(b.max(initial=0), d.max(initial=0))) + 1))
    return Decoded(a[:, None], b.astype(np.int64), c[:, None], d.astype(np.int64), names)


def _idx(raw: bytes, where: str) -> np.ndarray:
    try:
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{where}: damaged: {error}") from None
    wrong = f"{where}: not an IDX file of bytes, or cut short"
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(wrong)
    dimensions = raw[3]
    shape = struct.unpack(f">{dimensions}I", raw[4 : 4 + 4 * dimensions])
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions)
    size = 1
    for side in shape:
        size *= side
    if values.size != size:
        raise ValueError(wrong)
    return values.reshape(shape).copy()


def npz(path: Path, options: Options) -> Decoded:
    """`train_images`, `train_labels`, `test_images`, `test_labels` and, if there, `classes`.

    Images are uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels; labels integers
    (N,) or (N, H, W), or left out. Raises ValueError with the file and the array.
    """
    held: dict[str, np.ndarray] = {}
    with refused(str(path)), path.open("rb") as file:
        try:
            with np.load(file) as arrays:
                held = {name: arrays[name] for name in arrays.files}
        except PermissionError:
            raise
        except Exception as error:  # zipfile, zlib and numpy each raise their own on damage
            raise ValueError(f"{path}: damaged, or no .npz of plain arrays: {error}") from None
    parts: list[np.ndarray] = []
    for split in ("train", "test"):
        if f"{split}_images" not in held:
            there = ", ".join(sorted(held)) or "nothing"
            raise ValueError(f"{path}: no array {split}_images, but {there}")
        images = _channels_first(held[f"{split}_images"], f"{path}: {split}_images")
        labels = held.get(f"{split}_labels", np.zeros(len(images), np.int64))
        fits = labels.shape in ((len(images),), (len(images), *images.shape[2:]))
        if labels.dtype.kind not in "iu" or not fits or not len(images):
            raise ValueError(
                f"{path}: {split}_labels: integers (N,) or (N, H, W) for images"
                f" {images.shape} expected, not {labels.dtype} {labels.shape}"
            )
        parts += [images, labels]
    if parts[0].shape[1:] != parts[2].shape[1:] or parts[1].ndim != parts[3].ndim:
        raise ValueError(f"{path}: training and test arrays differ in shape: {_shapes(parts)}")
    if "train_labels" not in held and "test_labels" not in held:
        return Decoded(parts[0], parts[1], parts[2], parts[3], ())
    ignore = options.ignore
    used = [part if ignore is None else part[part != ignore] for part in (parts[1], parts[3])]
    count = 1 + max(int(part.max(initial=0)) for part in used)
    given: Any = options.classes
    if given is None and "classes" in held:
        given = tuple(str(name) for name in held["classes"].tolist())
    if given is None:
        given = count
    classes = tuple(map(str, range(given))) if isinstance(given, int) else given
    for split, part in zip(("train", "test"), used, strict=True):
        if part.size and not 0 <= int(part.min()) <= int(part.max()) < len(classes):
            raise ValueError(
                f"{path}: {split}_labels: {int(part.min())}..{int(part.max())},"
                f" but classes are 0..{len(classes) - 1}"
            )
    kept = [part.astype(np.int64) for part in (parts[1], parts[3])]
    return Decoded(parts[0], kept[0], parts[2], kept[1], classes)


def _channels_first(images: np.ndarray, where: str) -> np.ndarray:
    if images.dtype == np.uint8 and images.ndim == 3:
        return images[:, None]
    if images.dtype == np.uint8 and images.ndim == 4:
        if images.shape[1] in (1, 3):
            return images
        if images.shape[3] in (1, 3):
            return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    raise ValueError(
        f"{where}: uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels expected,"
        f" not {images.dtype} {images.shape}"
    )


def _shapes(parts: list[np.ndarray]) -> str:
    return ", ".join(str(part.shape) for part in parts)
