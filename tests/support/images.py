"""Small images, as files, folders and archives of them."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(seed: int, height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    """Random uint8 (H, W, 3), or (H, W) for one channel."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    """The image as a file's bytes."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind)
    return out.getvalue()


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    """These files below the folder; a name that ends in '/' is an empty folder."""
    for name, raw in files.items():
        place = folder / name
        if name.endswith("/"):
            place.mkdir(parents=True, exist_ok=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(raw)
    return folder


def pack(path: Path, files: Mapping[str, bytes]) -> Path:
    """These files in an archive of the kind that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, raw in files.items():
                archive.writestr(name, raw)
        return path
    mode = {".xz": "w:xz", ".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2", ".tar": "w"}
    with tarfile.open(path, mode[path.suffix]) as tar:  # type: ignore[call-overload]
        for name, raw in files.items():
            entry = tarfile.TarInfo(name.rstrip("/"))
            if name.endswith("/"):
                entry.type = tarfile.DIRTYPE
            entry.size = len(raw)
            tar.addfile(entry, io.BytesIO(raw))
    return path


def classes(
    *names: str, each: int = 2, test: str = "test", top: str = "", size: tuple[int, int] = (8, 8)
) -> dict[str, bytes]:
    """Class folders with `each` training and test images of each class, all different."""
    places = [
        f"{top}{split}/{name}/{number}.png"
        for split in ("train", test)
        for name in names
        for number in range(each)
    ]
    return {place: encoded(pixels(seed, *size)) for seed, place in enumerate(places)}
