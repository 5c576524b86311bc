"""Manifolds and what they answer: a request -> a job -> bytes. Knows no HTTP and no cache.

A job is everything about a file that is known before any weight is: its architecture, its header,
its length and its identity.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from neumeta import checkpoint, onnx, wire
from neumeta.graph import BATCH, extent
from neumeta.manifold import Manifold
from neumeta.plan import DTYPES, Plan
from neumeta.representation.mlp import ResidualMLP
from neumeta.sample import sample
from neumeta.space import Architecture, BadArchitecture, Space
from service import latency
from service.device import chosen, identity
from service.problem import Problem, refuse
from service.request import MOST, WeightsRequest
from service.settings import Settings

Row = tuple[int, float, Architecture]
"""Parameters, measured score and the architecture that was evaluated."""


@dataclass(frozen=True)
class Job:
    """One file to be: what it is of, how it is sampled, how long it will be, and its key."""

    manifold: Manifold
    architecture: Architecture
    dtype: str
    format: str
    samples: int
    seed: int
    plan: Plan
    key: str
    """Equal keys have equal bytes: architecture, dtype, format, K, seed, checkpoint and engine."""

    @property
    def etag(self) -> str:
        """The strong entity tag; known before any weight is."""
        return f'"{self.key}"'

    @property
    def location(self) -> str:
        """The canonical URL of the same bytes."""
        space, parts = self.manifold.space, []
        if factors := space.factors(self.architecture):
            one = len(set(factors)) == 1
            parts.append(f"width={','.join(map(repr, factors[:1] if one else factors))}")
        if space.blocks:
            parts.append(f"depth={','.join(map(str, self.architecture.depth))}")
        parts += [f"dtype={self.dtype}", f"samples={self.samples}", f"seed={self.seed}"]
        if self.format != wire.FORMATS[0]:
            parts.append(f"format={self.format}")
        if self.architecture.extrapolated:
            parts.append("extrapolate=true")
        return f"/weights/{space.name}?{'&'.join(parts)}"

    @property
    def address(self) -> str:
        """The URL of these bytes and of no others, ever."""
        return f"{self.location}&etag={self.key}"


class Engine:
    """The loaded manifolds, by the name of the architecture they serve."""

    def __init__(
        self,
        files: list[Path],
        *,
        device: str = "auto",
        threads: int = 1,
        precision: str = "float32",
        max_samples: int = 64,
        max_file_bytes: int = 64 << 20,
    ) -> None:
        """Read and verify every file.

        Raises BadCheckpoint naming the tensor, digest or table of latencies, or ValueError for a name
        served twice, or a device or precision that is not there.
        """
        self.device, self.threads = chosen(device, precision), threads
        self.max_samples, self.max_file_bytes = max_samples, max_file_bytes
        self.identity = identity(self.device, threads, precision)
        self.manifolds: dict[str, Manifold] = {}
        self._latency: dict[str, dict[str, Any] | None] = {}
        for path in files:
            manifold = checkpoint.read(path)
            name = manifold.space.name
            if name in self.manifolds:
                raise ValueError(f"{path}: {name!r} is served by an earlier file already")
            if (count := len(manifold.space.groups)) > MOST:
                told = f"{path}: width: {count} groups, where a request may list {MOST}"
                raise checkpoint.BadCheckpoint(told)
            manifold.representation.to(self.device)
            if precision == "bfloat16":
                for part in manifold.representation.modules():
                    if isinstance(part, ResidualMLP):  # wherever wrappers have put it
                        part.lower(torch.bfloat16)
            self.manifolds[name] = manifold
            self._latency[name] = latency.read(path, name)
            self._try(path, manifold)
        self._measured = {name: _measured(found) for name, found in self.manifolds.items()}
        self._forget()

    @staticmethod
    def _try(path: Path, manifold: Manifold) -> None:
        """Sample its smallest network, so that what cannot be served is not adopted.

        Raises BadCheckpoint naming the tensor.
        """
        architecture = growing(manifold.space, None, False)(0)
        plan = wire.plan(manifold, architecture, "float32")
        try:
            for _ in wire.stream(plan, sample(manifold, architecture, samples=1)):
                pass
        except (ValueError, RuntimeError) as error:
            told = f"{path}: {architecture.key} cannot be sampled: {error}"
            raise checkpoint.BadCheckpoint(told) from None

    @classmethod
    def of(cls, settings: Settings) -> Engine:
        """The engine of these settings; raises what they or their files are refused for."""
        return cls(
            settings.files(),
            device=settings.device,
            threads=settings.threads,
            precision=settings.precision,
            max_samples=settings.max_samples,
            max_file_bytes=settings.max_file_bytes,
        )

    def adopt(self, other: Engine) -> None:
        """Serve what `other` has loaded. A job holds its manifold: those under way are as before."""
        self.manifolds, self._measured = other.manifolds, other._measured
        self._latency = other._latency
        self._forget()

    @property
    def device_bytes(self) -> int:
        """What torch holds on the CUDA device; 0 without one."""
        return torch.cuda.memory_reserved() if self.device == "cuda" else 0

    def _forget(self) -> None:
        # A header takes a millisecond to make, which is most of a cached answer's time.
        self._plan = lru_cache(maxsize=256)(self._make_plan)

    def prepare_thread(self) -> None:
        """To be called first in every thread that samples: bytes depend on torch's thread count."""
        torch.set_num_threads(self.threads)

    def job(self, asked: WeightsRequest) -> Job:
        """The job of a request. Raises Problem naming the field and what is allowed."""
        asked = self._by_depth(asked)
        manifold = self.manifold(asked.arch)
        most = max(self.max_samples, manifold.samples)
        if asked.samples is not None and asked.samples > most:
            raise refuse("samples", asked.samples, f"a whole number from 1 to {most}")
        try:
            if asked.budget is not None:
                architecture = self._best(manifold, asked)
            else:
                width = manifold.space.width[1] if asked.width is None else asked.width
                architecture = _architecture(manifold.space, width, asked.depth, asked.extrapolate)
        except BadArchitecture as error:
            entry = {"field": error.field, "given": error.given, "allowed": error.allowed}
            raise Problem(422, str(error), [entry]) from None
        plan = self._plan(asked.arch, architecture, asked.dtype, asked.format)
        if asked.dtype == "int8" and not plan.scales:
            allowed = (
                "'float32', 'float16' or 'bfloat16': this network's weights are too small for int8"
            )
            raise refuse("dtype", asked.dtype, allowed)
        most = self.max_file_bytes
        if asked.format == "onnx":
            most = min(most, onnx.LONGEST)
        if plan.length > most:
            allowed = f"a network of at most {most} bytes"
            raise refuse("width", f"{plan.length} bytes", allowed)
        samples = manifold.samples if asked.samples is None else asked.samples
        # Without noise all samples are the same one, and one sample is noise-free.
        samples = samples if manifold.noise else 1
        seed = asked.seed if samples > 1 else 0
        parts = (
            architecture.key,
            asked.dtype,
            asked.format,
            str(samples),
            str(seed),
            manifold.digest,
            self.identity,
        )
        key = hashlib.sha256("|".join(parts).encode()).hexdigest()
        return Job(manifold, architecture, asked.dtype, asked.format, samples, seed, plan, key)

    def _by_depth(self, asked: WeightsRequest) -> WeightsRequest:
        """A manifold's named depths are networks of it."""
        if asked.arch in self.manifolds:
            return asked
        for manifold in self.manifolds.values():
            space = manifold.space
            depth = space.named.get(asked.arch)
            if depth is None:
                continue
            if asked.depth is not None:
                allowed = f"no depth with {asked.arch!r}, which is {list(depth)} of {space.name!r}"
                raise refuse("depth", asked.depth, allowed)
            return asked.model_copy(update={"arch": space.name, "depth": list(depth)})
        return asked

    def manifold(self, name: str) -> Manifold:
        """The manifold of this name. Raises Problem 404 with the names there are."""
        if name not in self.manifolds:
            raise refuse("arch", name, f"one of {sorted(self.manifolds)}", 404)
        return self.manifolds[name]

    def _make_plan(
        self, name: str, architecture: Architecture, dtype: str, file_format: str
    ) -> Plan:
        return wire.plan(self.manifolds[name], architecture, dtype, file_format)

    def _best(self, manifold: Manifold, asked: WeightsRequest) -> Architecture:
        """The largest scalar width within the budget, found by bisection: cost grows with size. Where
        depth is open too, a measured size that fits and has a better score: fewer blocks can be
        better than fewer channels.
        """
        space = manifold.space
        assert asked.budget is not None
        ((bound, limit),) = asked.budget.model_dump(exclude_none=True).items()

        def need(architecture: Architecture) -> int:
            if bound == "max_bytes":
                return self._make_plan(space.name, architecture, asked.dtype, asked.format).length
            return space.cost(architecture)["parameters" if bound == "max_params" else "macs"]

        depth = None if asked.depth is None else tuple(asked.depth)
        sizes = growing(space, depth, asked.extrapolate)
        if (least := need(sizes(0))) > limit:
            raise BadArchitecture("budget", {bound: limit}, f"{bound} of at least {least}")
        low, high = 0, sizes.count
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if need(sizes(middle)) <= limit else (low, middle)
        largest = sizes(low)
        expected, _ = self.expected_score(space.name, largest)
        if expected is None or asked.depth is not None or not (space.blocks and space.extents):
            return largest
        sign = 1 if manifold.contract.higher else -1
        rows = self._measured[space.name].values()
        for _, score, architecture in sorted(rows, key=lambda row: (-sign * row[1], row[0])):
            if sign * score <= sign * expected:
                break
            served = asked.extrapolate or not architecture.extrapolated
            if served and need(architecture) <= limit:
                return architecture
        return largest

    def weights(self, job: Job) -> Iterator[bytes]:
        """The file's bytes after its header, each tensor as soon as it is sampled."""
        tensors = sample(job.manifold, job.architecture, samples=job.samples, seed=job.seed)
        chunks = wire.stream(job.plan, tensors)
        next(chunks)  # the header, which the plan has
        yield from chunks

    def describe(self, job: Job) -> dict[str, Any]:
        """The plan of a job as JSON values: size, cost and expected score."""
        space = job.manifold.space
        score, measured = self.expected_score(space.name, job.architecture)
        return {
            "arch": space.name,
            "architecture": job.architecture.key,
            "channels": list(job.architecture.channels),
            "depth": list(job.architecture.depth),
            "extrapolated": job.architecture.extrapolated,
            "dtype": job.dtype,
            "format": job.format,
            "samples": job.samples,
            "seed": job.seed,
            **space.cost(job.architecture),
            "bytes": job.plan.length,
            "metric": job.manifold.contract.metric,
            "score": score,
            "score_measured": measured,
            "etag": job.etag,
            "location": job.location,
            "address": job.address,
        }

    def expected_score(self, name: str, architecture: Architecture) -> tuple[float | None, bool]:
        """The score measured at this architecture, or interpolated over the parameters of those
        measured at its depth (across depths a score is no function of the size alone); whether it
        was measured. None outside the measured range."""
        rows = self._measured[name]
        if architecture.key in rows:
            return rows[architecture.key][1], True
        count = self.manifolds[name].space.cost(architecture)["parameters"]
        points = sorted(row[:2] for row in rows.values() if row[2].depth == architecture.depth)
        for (a, low), (b, high) in zip(points, points[1:], strict=False):
            if a <= count <= b:
                part = (count - a) / (b - a) if b > a else 0.0
                return round(low + part * (high - low), 2), False
        return None, False

    def model(self, name: str) -> dict[str, Any]:
        """What is served under one name: ranges, the input's contract, cost at full size, score by
        size."""
        manifold = self.manifold(name)
        space, contract, about = manifold.space, manifold.contract, manifold.about
        return {
            "arch": name,
            "title": about.get("title", ""),
            "checkpoint": manifold.digest,
            "task": contract.task,
            "metric": contract.metric,
            "higher": contract.higher,
            "width": list(space.width) if space.extents else None,
            "groups": [
                {"name": group, "sizes": [size for owner, size in space.extents if owner == group]}
                for group in space.groups
            ],
            "depth": list(space.depth),
            "stages": [stage.name for stage in space.graph.stages] if space.blocks else [],
            "blocks": list(space.blocks) if space.blocks else None,
            "named": {each: list(depth) for each, depth in space.named.items()},
            "dtypes": list(DTYPES),
            "formats": list(wire.FORMATS),
            "samples": manifold.samples,
            "input": [extent(dim, {BATCH: 1}) for dim in space.graph.input[1:]],
            "normalisation": {"mean": list(contract.mean), "std": list(contract.std)},
            "classes": list(contract.classes),
            "full": {
                **space.cost(space.full),
                "bytes": self._plan(name, space.full, "float32", wire.FORMATS[0]).length,
            },
            "source": about.get("source", {}),
            "evaluation": about.get("evaluation", []),
            "latency": self._latency[name],
        }


def _architecture(
    space: Space,
    width: float | list[float] | dict[str, float],
    depth: list[int] | None,
    extrapolate: bool,
) -> Architecture:
    """The canonical architecture; marked as extrapolated only if no trained width gives it."""
    found = space.architecture(width, depth, extrapolate=extrapolate)
    if not found.extrapolated:
        return found
    inside = Architecture(found.depth, found.channels)
    try:
        again = space.architecture(space.factors(inside), found.depth)
    except BadArchitecture:
        return found
    return inside if again == inside else found


@dataclass(frozen=True)
class Growing:
    """Architectures from the smallest to the largest, each made when it is asked for: a space may
    have thousands, and a search looks at a dozen."""

    count: int
    at: Callable[[int], Architecture]

    def __call__(self, index: int) -> Architecture:
        return self.at(index)


def growing(space: Space, depth: tuple[int, ...] | None, extrapolate: bool) -> Growing:
    """The architectures a budget chooses from: every scalar width; or, where depth alone morphs and
    none is given, every depth, grown by one block at a time, the first stage first.
    """
    if space.blocks and depth is None and not space.extents:
        least, most = space.blocks
        stages = space.graph.stages

        def deeper(step: int) -> Architecture:
            counts = [
                max(stage.least, least + (step + len(stages) - 1 - place) // len(stages))
                for place, stage in enumerate(stages)
            ]
            return space.architecture(space.width[1], counts)

        return Growing(len(stages) * (most - least) + 1, deeper)
    widths = space.widths
    return Growing(
        len(widths), lambda step: space.architecture(widths[step], depth, extrapolate=extrapolate)
    )


def _measured(manifold: Manifold) -> dict[str, Row]:
    """The evaluation table by architecture key; rows of other tables are left out."""
    space, found = manifold.space, {}
    most = max(space.most, *space.depth, 0)
    least = tuple(stage.least for stage in space.graph.stages)
    for row in manifold.about.get("evaluation", []):
        try:
            depth, channels = tuple(row.get("depth", space.depth)), tuple(row["channels"])
            sized = len(channels) == len(space.extents) and min(channels, default=1) >= 1
            if sized and all(a <= n <= most for a, n in zip(least, depth, strict=True)):
                architecture = Architecture(depth, channels, bool(row.get("extrapolated")))
                score, count = float(row["score"]), int(row["parameters"])
                found[architecture.key] = (count, score, architecture)
        except (KeyError, TypeError, ValueError):
            continue
    return found
