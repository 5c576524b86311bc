"""Manifolds and what they answer: a request -> a job -> bytes. Knows no HTTP and no cache.

A job is everything about a file that is known before any weight is: its architecture, its header,
its length and its identity.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neumeta import checkpoint, wire
from neumeta.architecture import Architecture, BadArchitecture
from neumeta.manifold import Manifold
from neumeta.sample import sample
from service.problem import refuse
from service.request import WeightsRequest

CHUNK = 256 << 10


@dataclass(frozen=True)
class Job:
    """One file to be: what it is of, how it is sampled, how long it will be, and its key."""

    manifold: Manifold
    architecture: Architecture
    dtype: str
    samples: int
    seed: int
    plan: wire.Plan
    key: str
    """Equal keys have equal bytes: architecture, dtype, K, seed, checkpoint and engine."""

    @property
    def location(self) -> str:
        """The canonical URL of the same bytes."""
        space = self.manifold.space
        full = space.full.channels
        pairs = zip(self.architecture.channels, full, strict=True)
        parts = [f"width={','.join(repr(c / f) for c, f in pairs)}"]
        if space.blocks:
            parts.append(f"depth={','.join(map(str, self.architecture.depth))}")
        parts += [f"dtype={self.dtype}", f"samples={self.samples}", f"seed={self.seed}"]
        if self.architecture.extrapolated:
            parts.append("extrapolate=true")
        return f"/weights/{space.arch}?{'&'.join(parts)}"


class Engine:
    """The loaded manifolds, by the name of the architecture they serve."""

    def __init__(
        self,
        files: list[Path],
        *,
        device: str = "auto",
        max_samples: int = 64,
        max_file_bytes: int = 256 << 20,
    ) -> None:
        """Read and verify every file.

        Raises BadCheckpoint naming the tensor or digest, or ValueError for a name served twice or
        a device that is not there.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: 'cuda' was asked for, but torch sees no CUDA device")
        self.device, self.max_samples, self.max_file_bytes = device, max_samples, max_file_bytes
        # Rounding differs between builds and processors: equal bytes are promised within one.
        self.identity = f"torch-{torch.__version__}/{device}/{platform.machine()}"
        self.manifolds: dict[str, Manifold] = {}
        for path in files:
            manifold = checkpoint.read(path)
            name = manifold.space.arch
            if name in self.manifolds:
                raise ValueError(f"{path}: {name!r} is served by an earlier file already")
            manifold.representation.to(device)
            self.manifolds[name] = manifold

    def job(self, asked: WeightsRequest) -> Job:
        """The job of a request. Raises Problem naming the field and what is allowed."""
        manifold = self.manifolds.get(asked.arch)
        if manifold is None:
            raise refuse("arch", asked.arch, f"one of {sorted(self.manifolds)}", 404)
        space = manifold.space
        if asked.samples is not None and asked.samples > self.max_samples:
            raise refuse("samples", asked.samples, f"a whole number from 1 to {self.max_samples}")
        try:
            if asked.budget is not None:
                architecture = self._largest(manifold, asked)
            else:
                width = space.width[1] if asked.width is None else asked.width
                architecture = space.architecture(width, asked.depth, extrapolate=asked.extrapolate)
        except BadArchitecture as error:
            raise refuse(error.field, error.given, error.allowed) from None
        plan = wire.plan(space, architecture, asked.dtype, manifold.normalisation)
        if plan.length > self.max_file_bytes:
            allowed = f"a network of at most {self.max_file_bytes} bytes"
            raise refuse("width", f"{plan.length} bytes", allowed)
        samples = manifold.samples if asked.samples is None else asked.samples
        # Without noise all samples are the same one, and one sample is noise-free.
        samples = samples if manifold.noise else 1
        seed = asked.seed if samples > 1 else 0
        parts = (
            architecture.key,
            asked.dtype,
            str(samples),
            str(seed),
            manifold.digest,
            self.identity,
        )
        key = hashlib.sha256("|".join(parts).encode()).hexdigest()
        return Job(manifold, architecture, asked.dtype, samples, seed, plan, key)

    def _largest(self, manifold: Manifold, asked: WeightsRequest) -> Architecture:
        """The architecture with the most parameters that fits the budget."""
        space = manifold.space
        assert asked.budget is not None
        ((bound, limit),) = asked.budget.model_dump(exclude_none=True).items()
        smallest: int | None = None
        best: tuple[int, Architecture] | None = None
        for architecture in _candidates(manifold, asked.depth):
            cost = space.cost(architecture)
            if bound == "max_bytes":
                need = wire.plan(space, architecture, asked.dtype, manifold.normalisation).length
            else:
                need = cost["parameters" if bound == "max_params" else "macs"]
            smallest = need if smallest is None else min(smallest, need)
            if need <= limit and (best is None or cost["parameters"] > best[0]):
                best = (cost["parameters"], architecture)
        if best is None:
            raise BadArchitecture("budget", {bound: limit}, f"{bound} of at least {smallest}")
        return best[1]

    def chunks(self, job: Job) -> Iterator[bytes]:
        """The file's bytes: the header at once, then each tensor as it is sampled."""
        weights = sample(job.manifold, job.architecture, samples=job.samples, seed=job.seed)
        yield from wire.stream(job.plan, weights)

    def describe(self, job: Job) -> dict[str, Any]:
        """The plan of a job as JSON values: size, cost and expected accuracy."""
        space = job.manifold.space
        return {
            "arch": space.arch,
            "architecture": job.architecture.key,
            "channels": list(job.architecture.channels),
            "depth": list(job.architecture.depth),
            "extrapolated": job.architecture.extrapolated,
            "dtype": job.dtype,
            "samples": job.samples,
            "seed": job.seed,
            **space.cost(job.architecture),
            "bytes": job.plan.length,
            "etag": f'"{job.key}"',
            "location": job.location,
            "accuracy": expected_accuracy(job.manifold, job.architecture),
        }

    def model(self, name: str) -> dict[str, Any]:
        """What is served under one name: ranges, cost at full size, accuracy by size."""
        if name not in self.manifolds:
            raise refuse("arch", name, f"one of {sorted(self.manifolds)}", 404)
        manifold = self.manifolds[name]
        space, about = manifold.space, manifold.about
        return {
            "arch": name,
            "family": space.family,
            "title": about.get("title", ""),
            "checkpoint": manifold.digest,
            "width": list(space.width),
            "stages": [space.table.stages[stage] for stage in space.stages],
            "depth": list(space.depth),
            "blocks": list(space.blocks) if space.blocks else None,
            "classes": manifold.labels,
            "normalisation": manifold.normalisation,
            "samples": manifold.samples,
            "full": space.cost(space.full),
            "source": about.get("source", {}),
            "evaluation": about.get("evaluation", []),
        }


def _candidates(manifold: Manifold, depth: list[int] | None) -> Iterator[Architecture]:
    space = manifold.space
    low, high = space.width
    if space.blocks and depth is None:
        least, most = space.blocks
        for count in range(least, most + 1):
            yield space.architecture(high, [count] * len(space.depth))
        return
    finest = max(space.full.channels, default=1)
    seen = set()
    for step in range(finest * 2 + 1):
        architecture = space.architecture(low + (high - low) * step / (finest * 2), depth)
        if architecture.key not in seen:
            seen.add(architecture.key)
            yield architecture


def expected_accuracy(manifold: Manifold, architecture: Architecture) -> float | None:
    """Measured accuracy of this architecture, else interpolated over parameters; None if unknown."""
    rows = manifold.about.get("evaluation", [])
    for row in rows:
        same = tuple(row["channels"]) == architecture.channels
        if same and tuple(row["depth"]) == architecture.depth:
            return float(row["accuracy"])
    if manifold.space.blocks or len(rows) < 2 or len(set(architecture.channels)) == 0:
        return None
    points = sorted((row["parameters"], row["accuracy"]) for row in rows)
    count = manifold.space.cost(architecture)["parameters"]
    if not points[0][0] <= count <= points[-1][0]:
        return None
    for (a, low), (b, high) in zip(points, points[1:], strict=False):
        if a <= count <= b:
            part = (count - a) / (b - a) if b > a else 0.0
            return round(float(low + part * (high - low)), 2)
    return None
