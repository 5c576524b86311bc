"""Decoded images kept between runs, one file for each source as it was when it was read."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from training.data.pictures import Decoded

LOG = logging.getLogger(__name__)
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
WORDS = ("classes", "notes")


def cache_folder() -> Path:
    """Where decoded images are kept between runs: $NEUMETA_CACHE or ~/.cache/neumeta."""
    return Path(os.environ.get("NEUMETA_CACHE", Path.home() / ".cache" / "neumeta"))


def kept(source: Path, options: str, stamp: str, make: Callable[[], Decoded]) -> Decoded:
    """What `make` returns, or what it returned when this source had the same stamp.

    A damaged file is made again, and one of an older stamp deleted. Where nothing can be written
    (a full disk, a read-only folder) a warning says so and the result is the same.
    """
    origin = hashlib.sha256(os.fsencode(f"{source.resolve()}\0{options}")).hexdigest()[:12]
    name = f"{source.name.split('.', 1)[0]}-{origin}"
    path = cache_folder() / f"{name}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}.npz"
    found = _read(path)
    if found is None:
        found = make()
        try:
            _write(path, found)
            for old in path.parent.glob(f"{name}-*.npz"):
                if old != path:
                    old.unlink(missing_ok=True)
        except OSError as error:
            LOG.warning("%s: decoded images are not kept for the next run: %s", path, error)
    return found


def _read(path: Path) -> Decoded | None:
    try:
        # Opened here: numpy leaves a damaged file open.
        with path.open("rb") as file, np.load(file) as held:
            arrays = [held[name] for name in ARRAYS]
            words = [tuple(held[name].tolist()) for name in WORDS]
    except FileNotFoundError:
        return None
    except Exception as error:  # zipfile, zlib and numpy each raise their own on damage
        LOG.warning("%s: damaged, made again: %s", path, error)
        return None
    return Decoded(*arrays, *words)


def _write(path: Path, made: Decoded) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    values = {name: getattr(made, name) for name in ARRAYS}
    values |= {name: np.array(getattr(made, name), dtype=np.str_) for name in WORDS}
    try:
        with temporary.open("wb") as file:
            np.savez(file, **values)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
