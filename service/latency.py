"""What sizes take to run, where somebody measured it: a file beside a manifold's.

`benchmarks.latency` writes it. A time depends on a network's shape and not on its weights, so the file
is of shapes, and outlives a manifold that is trained further. Knows no HTTP.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from neumeta.checkpoint import BadCheckpoint

Text = Annotated[str, Field(min_length=1, max_length=200)]
Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Row(BaseModel):
    """One shape, and the median of one image by each runtime."""

    model_config = ConfigDict(extra="forbid", strict=True)
    depth: list[int]
    channels: list[int]
    ms: list[Milliseconds]


class Latency(BaseModel):
    """Where it was measured, with what, and of which shapes."""

    model_config = ConfigDict(extra="forbid", strict=True)
    arch: Text
    hardware: Text
    threads: Annotated[int, Field(ge=1)]
    runtimes: Annotated[list[Text], Field(min_length=1, max_length=8)]
    rows: Annotated[list[Row], Field(max_length=4096)]

    @model_validator(mode="after")
    def _each(self) -> Latency:
        for row in self.rows:
            if len(row.ms) != len(self.runtimes):
                raise ValueError(f"{len(row.ms)} times in a row, of {len(self.runtimes)} runtimes")
        return self


def beside(manifold: Path) -> Path:
    """Where a manifold's latencies lie, if there are any."""
    return manifold.with_suffix(".latency.json")


def read(manifold: Path, arch: str) -> dict[str, Any] | None:
    """What lies beside this manifold's file, or None. Raises BadCheckpoint naming that file and what is
    wrong with it, if it is none or of another architecture."""
    path = beside(manifold)
    try:
        found = Latency.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadCheckpoint(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        told = f"{path}: no table of latencies: {at + ': ' if at else ''}{first['msg']}"
        raise BadCheckpoint(told[:300]) from None
    if found.arch != arch:
        raise BadCheckpoint(f"{path}: arch: {found.arch!r} is not {arch!r}, beside which it lies")
    return found.model_dump()
