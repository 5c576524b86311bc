"""What a stage keeps so that it can go on: written whole or not at all, and named if it is damaged."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from neumeta import atomic
from training.divergence import Diverged


class BadState(ValueError):
    """A state file that cannot be used: which one, and what to do about it."""


def save(value: Any, path: Path) -> None:
    """torch.save to `path`, synced, whole or not at all."""
    buffer = io.BytesIO()  # torch's own writer answers a full disk with something else than OSError
    torch.save(value, buffer)
    atomic.write(path, buffer.getbuffer())


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around everything that takes a state file's content: what fails in it is the file's fault.

    Raises BadState, naming the file; an OSError (it is not there, it may not be read) stays one, and
    so does Diverged.
    """
    try:
        yield
    except (OSError, Diverged):
        raise
    except Exception as error:
        # torch, pickle, zip and safetensors each have their own exceptions for damage.
        why = f"{type(error).__name__}: {error}".strip().splitlines()[0][:120]
        raise BadState(
            f"{path}: damaged, cut short or of another network ({why}); delete it, and with"
            " --resume this stage starts again"
        ) from None


@contextmanager
def loaded(path: Path, device: torch.device | str = "cpu") -> Iterator[Any]:
    """What `save` wrote, for a block that takes its content; raises as `reading` does."""
    # From memory: torch's own reader answers some damage with an OSError.
    raw = io.BytesIO(path.read_bytes())
    with reading(path):
        yield torch.load(raw, weights_only=True, map_location=device)
