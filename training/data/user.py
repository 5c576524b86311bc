"""A user's own function that returns (train, test), two torch Datasets, as a stream.

Knows no file but the one that holds the function.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.data.dataset import NO_LABEL
from training.data.pictures import Options, as_array, coloured
from training.data.stream import Stream, evenly, moments_of


class UserItems:
    """A user's own torch Dataset. Its items are images, or (image, target).

    An image is uint8 (C, H, W) in 0..255, a PIL image, or float (C, H, W) in 0..1 (any values where
    the caller gave mean and std). A target is a class or a mask (H, W). Random choices that the user's
    code makes with `torch`, `numpy` or `random` follow from the seed.
    """

    def __init__(self, held: Any, where: str, free: bool) -> None:
        self.held, self.where, self.free = held, where, free
        self.shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.held)

    def item(self, row: int, seed: int | None) -> tuple[np.ndarray, Any]:
        """Raises ValueError that names the function, and the row that does not fit."""
        seed = row if seed is None else seed
        kept = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed % 2**32)
                found = self.held[row]
        except Exception as error:  # the user's code, which may raise anything
            reason = str(error).replace("\n", " ")
            raise ValueError(
                f"{self.where}, item {row}: {type(error).__name__}: {reason}"
            ) from error
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
        image, target = found if isinstance(found, (tuple, list)) else (found, 0)
        return self._image(image, row), np.asarray(target, np.int64)

    def _image(self, image: Any, row: int) -> np.ndarray:
        where = f"{self.where}, item {row}"
        if hasattr(image, "convert"):
            values = as_array(coloured(image, where, None))
        else:
            values = np.asarray(image)
        if values.dtype != np.uint8:
            values = values.astype(np.float32)
            if not np.isfinite(values).all():
                raise ValueError(f"{where}: values that are not finite")
            if not self.free and (values.min() < 0 or values.max() > 1):
                raise ValueError(
                    f"{where}: values {values.min():.3g}..{values.max():.3g}, but 0..1 is expected:"
                    " leave normalisation out and give mean and std, which devices need too"
                )
        if values.ndim != 3 or values.shape[0] not in (1, 3):
            raise ValueError(f"{where}: shape {values.shape}: (1 or 3, H, W) expected")
        self.shape = self.shape or values.shape
        if values.shape != self.shape:
            raise ValueError(f"{where}: shape {values.shape}, but others are {self.shape}")
        return values


def is_function(name: str) -> bool:
    """Whether a name means a user's function: `module:function` or `file.py:function`."""
    module, colon, function = name.rpartition(":")
    named = module.endswith(".py") or all(each.isidentifier() for each in module.split("."))
    return bool(colon) and function.isidentifier() and named


def function(name: str) -> Any:
    """The function that `module:function` or `file.py:function` names. Raises ValueError."""
    module, _, attribute = name.rpartition(":")
    try:
        if module.endswith(".py"):
            path = Path(module).resolve()
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None and spec.loader is not None
            held = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(path.stem, held)  # or its classes could not be pickled
            spec.loader.exec_module(held)
        else:
            held = importlib.import_module(module)
        return getattr(held, attribute)
    except Exception as error:  # the user's code, which may raise anything
        reason = str(error).replace("\n", " ")
        raise ValueError(f"{name}: {type(error).__name__}: {reason}") from error


def load(
    name: str,
    options: Options,
    mean: list[float] | None,
    std: list[float] | None,
    workers: int,
) -> Stream:
    """The stream of a user's function that returns (train, test), two torch Datasets."""
    try:
        both = function(name)()
        if not isinstance(both, (tuple, list)) or len(both) != 2:
            raise TypeError(f"it returned {type(both).__name__}")
        sets = [UserItems(held, name, mean is not None and std is not None) for held in both]
        train, test = sets
        counts = [len(train), len(test)]
    except ValueError as error:
        raise ValueError(f"{error}" if name in f"{error}" else f"{name}: {error}") from error
    except Exception as error:  # the user's code, which may raise anything
        reason = str(error).replace("\n", " ")
        raise ValueError(
            f"{name}: expected to return (train, test), two torch Datasets:"
            f" {type(error).__name__}: {reason}"
        ) from error
    if not all(counts):
        raise ValueError(f"{name}: {counts[0]} training and {counts[1]} test images")
    image, target = train.item(0, None)
    test.shape = train.shape
    bare = not isinstance(train.held[0], (tuple, list))
    classes = _classes(name, train.held, options, bare)
    sha = hashlib.sha256(f"{name}\0{counts}".encode())
    for items in sets:
        for row in evenly(len(items), 256):
            pixels, label = items.item(row, None)
            sha.update(pixels.tobytes() + np.asarray(label).tobytes())
    if mean is None or std is None:
        found = moments_of(train)
        mean, std = mean or found[0], std or found[1]
    targets = "nothing" if not classes else "masks" if np.ndim(target) == 2 else "classes"
    channels, height, width = image.shape
    shape = (channels, height, width)
    ignore = NO_LABEL if options.ignore is None else options.ignore
    return Stream(
        name,
        train,
        test,
        classes,
        targets,
        mean,
        std,
        shape,
        sha.hexdigest(),
        ignore=ignore,
        workers=workers,
    )


def _classes(name: str, held: Any, options: Options, bare: bool) -> tuple[str, ...]:
    given = options.classes
    if given is None and bare:
        return ()
    if given is None:
        given = getattr(held, "classes", None)
    if given is None:
        raise ValueError(f"{name}: how many classes? Give `classes`, or set it on the training set")
    return tuple(map(str, range(given) if isinstance(given, int) else given))
