"""Images and labels as uint8 arrays, from a folder of images, CIFAR batches, IDX files or digits.

Knows no network: it reads, caches and augments.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
WHERE = {
    "cifar10": "unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz there, or an image"
    " folder cifar10/{train,test}/<class>/*.jpg (or cifar10.tar.xz of it)",
    "mnist": "put the four IDX files (train-images-idx3-ubyte.gz, ...) of MNIST in mnist/ there",
}


@dataclass(frozen=True)
class Dataset:
    """Training and test images, uint8 (N, C, H, W), with int64 labels (N,)."""

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

    def digest(self) -> str:
        """sha256 of all pixels and labels: which data a result was measured on."""
        sha = hashlib.sha256()
        for part in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            sha.update(part.numpy().tobytes())
        return sha.hexdigest()


class DataMissing(FileNotFoundError):
    """The data set is not on this machine; the message says where to get it."""


def load(name: str, root: Path | None = None) -> Dataset:
    """The data set `name` ('digits', 'mnist', 'cifar10') under `root` or $NEUMETA_DATA.

    Raises DataMissing with one clear sentence if it is not there, ValueError for another name.
    """
    if name == "digits":
        return _digits()
    if name not in WHERE:
        raise ValueError(f"data: {name!r} is not one of 'digits', 'mnist', 'cifar10'")
    root = root or Path(os.environ.get("NEUMETA_DATA", "data"))
    found = _mnist(root) if name == "mnist" else _cifar10(root)
    if found is None:
        raise DataMissing(f"data set {name!r} is not under {root}: {WHERE[name]}")
    return found


def _digits() -> Dataset:
    from sklearn.datasets import load_digits  # scikit-learn's bundled 8x8 digits: no download

    bunch = load_digits()
    images = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1297], order[1297:]
    names = tuple(str(digit) for digit in range(10))
    return Dataset(
        "digits",
        images[train],
        labels[train],
        images[test],
        labels[test],
        names,
        [0.3053],
        [0.3765],
        False,
        1,
    )


def _idx(path: Path) -> Tensor:
    with gzip.open(path, "rb") as file:
        raw = file.read()
    dimensions = raw[3]
    shape = struct.unpack(f">{dimensions}I", raw[4 : 4 + 4 * dimensions])
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions)
    if raw[:3] != b"\x00\x00\x08" or values.size != int(np.prod(shape)):
        raise ValueError(f"{path}: not an IDX file of bytes, or cut short")
    return torch.from_numpy(values.reshape(shape).copy())


def _mnist(root: Path) -> Dataset | None:
    folder = root / "mnist"
    files = [
        f"{part}-{kind}-ubyte.gz"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]
    if not all((folder / file).exists() for file in files):
        return None
    a, b, c, d = (_idx(folder / file) for file in files)
    names = tuple(str(digit) for digit in range(10))
    return Dataset(
        "mnist", a[:, None], b.long(), c[:, None], d.long(), names, [0.1307], [0.3081], False, 2
    )


def cache_folder() -> Path:
    """Where decoded images are kept between runs: $NEUMETA_CACHE or ~/.cache/neumeta."""
    folder = Path(os.environ.get("NEUMETA_CACHE", Path.home() / ".cache" / "neumeta"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _cifar10(root: Path) -> Dataset | None:
    batches, folder, archive = (
        root / "cifar-10-batches-py",
        root / "cifar10",
        root / "cifar10.tar.xz",
    )
    if batches.is_dir():
        parts = _cifar_batches(batches)
    elif folder.is_dir() or archive.is_file():
        parts = _decoded(folder, archive)
    else:
        return None
    names = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    return Dataset("cifar10", *parts, names, *IMAGENET, True, 4)


def _cifar_batches(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # The official archive is a pickle of numpy arrays. It is the user's own download of a known
    # file; network weights are never read this way.
    def read(files: list[str]) -> tuple[Tensor, Tensor]:
        loaded = [pickle.loads((folder / file).read_bytes(), encoding="bytes") for file in files]  # noqa: S301
        images = np.concatenate([part[b"data"] for part in loaded]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([part[b"labels"] for part in loaded])
        return torch.from_numpy(images), torch.from_numpy(labels).long()

    return *read([f"data_batch_{i}" for i in range(1, 6)]), *read(["test_batch"])


def _decoded(folder: Path, archive: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    source = folder if folder.is_dir() else archive
    stamp = source.stat()
    key = hashlib.sha256(
        f"{source.resolve()}{stamp.st_size}{stamp.st_mtime_ns}".encode()
    ).hexdigest()
    cached = cache_folder() / f"cifar10-{key[:12]}.npz"
    if not cached.exists():
        parts = _from_folder(folder) if folder.is_dir() else _from_archive(archive)
        temporary = cached.with_suffix(f".{os.getpid()}.npz")
        np.savez(temporary, *parts)
        temporary.replace(cached)
    with np.load(cached) as kept:
        a, b, c, d = (torch.from_numpy(kept[f"arr_{i}"]) for i in range(4))
    return a, b, c, d


def _pixels(file: io.BytesIO | Path) -> np.ndarray:
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def _stack(found: list[tuple[str, np.ndarray]]) -> tuple[np.ndarray, ...]:
    names = sorted({name.split("/")[1] for name, _ in found})
    parts: list[np.ndarray] = []
    for split in ("train", "test"):
        rows = [(name, pixels) for name, pixels in found if name.startswith(split + "/")]
        parts.append(np.stack([pixels for _, pixels in rows]))
        parts.append(np.array([names.index(name.split("/")[1]) for name, _ in rows], np.int64))
    return tuple(parts)


def _from_folder(folder: Path) -> tuple[np.ndarray, ...]:
    files = sorted(path for path in folder.glob("*/*/*") if path.suffix in (".jpg", ".png"))
    return _stack([(path.relative_to(folder).as_posix(), _pixels(path)) for path in files])


def _from_archive(archive: Path) -> tuple[np.ndarray, ...]:
    found = []
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            if file is not None:
                name = member.name.removeprefix("./").split("/", 1)[1]
                found.append((name, _pixels(io.BytesIO(file.read()))))
    return _stack(sorted(found, key=lambda row: row[0]))


def to_float(images: Tensor, data: Dataset) -> Tensor:
    """uint8 (N, C, H, W) pixels -> normalised float32 of the same shape."""
    mean = torch.tensor(data.mean, device=images.device).view(-1, 1, 1)
    std = torch.tensor(data.std, device=images.device).view(-1, 1, 1)
    return (images.float() / 255 - mean) / std


def augment(images: Tensor, data: Dataset, generator: torch.Generator) -> Tensor:
    """Random shifts by up to `data.pad` pixels and, where the data allows, mirroring, per image."""
    count, _, height, width = images.shape
    pad = data.pad
    padded = F.pad(images, (pad, pad, pad, pad))
    dy = torch.randint(0, 2 * pad + 1, (count, 1), generator=generator)
    dx = torch.randint(0, 2 * pad + 1, (count, 1), generator=generator)
    columns = torch.arange(width).expand(count, width)
    if data.flips:
        mirrored = torch.rand((count, 1), generator=generator) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    rows = (torch.arange(height) + dy)[:, None, :, None]
    columns = (columns + dx)[:, None, None, :]
    each = torch.arange(count)[:, None, None, None]
    channel = torch.arange(images.shape[1])[None, :, None, None]
    return padded[each, channel, rows, columns]
