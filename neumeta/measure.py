"""What a network of some size takes on this very device, and the best size that stays within a limit.

A network's time depends on its shape, not on its weights: candidates are made here, of the graph that
every pulled file has and random weights. Knows no HTTP. Runtimes are imported when they are used.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neumeta import onnx
from neumeta.notation import sized
from neumeta.plan import layout

RUNTIMES = {"onnx": "onnxruntime", "torch": "torch"}
SECONDS, LONGER = 0.5, 1.5
"""For how long a size is run: to compare it, and before it is chosen."""
LEAST, MOST = 5, 2000
"""Runs of a size."""
TRIES, CONFIRMED = 6, 3
"""How many sizes are run at most beside those that the fit begins with, and how many are run longer."""
MARGIN = 0.95
"""What is measured for seconds differs from what is measured for a day: so much of a limit is used."""
HIGH = 0.95
"""The percentile that has to stay within the limit, beside the median."""


class NoRuntime(RuntimeError):
    """The runtime that candidates are to be run with is not installed."""


class TooMuch(RuntimeError):
    """No size stays within the limit; says by how much the one that is nearest misses it."""


@dataclass(frozen=True)
class Size:
    """One size that can be asked for: how, what is expected of it, and what it costs."""

    asked: tuple[tuple[str, str], ...]
    """Parameters of GET /weights."""
    depth: tuple[int, ...]
    channels: tuple[int, ...]
    macs: int
    bytes: int
    score: float | None = None

    @property
    def blocks(self) -> int:
        """Of all stages."""
        return sum(self.depth)


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one run: the median, and what 95 in 100 stay within."""

    median: float
    high: float

    def within(self, limit: float) -> bool:
        """Whether both are."""
        return self.median <= limit and self.high <= limit


def latency(
    run: Callable[[], object],
    seconds: float = SECONDS,
    *,
    least: int = LEAST,
    most: int = MOST,
    clock: Callable[[], float] = time.perf_counter,
) -> Latency:
    """Run for so long, after a fifth of that to warm up."""
    warm = clock() + seconds / 5
    run()
    while clock() < warm:
        run()
    taken: list[float] = []
    end = clock() + seconds
    while len(taken) < most and (len(taken) < least or clock() < end):
        began = clock()
        run()
        taken.append(1000 * (clock() - began))
    taken.sort()
    return Latency(taken[len(taken) // 2], taken[math.ceil(HIGH * len(taken)) - 1])


def fitted(
    points: Sequence[tuple[Size, float]], by: Sequence[str] = ("macs", "blocks")
) -> Callable[[Size], float]:
    """What any size takes: a constant, and so much for each of what it is fitted `by`, such as
    multiply-accumulates and (where depths differ) blocks, of least relative error at these points;
    more never takes less."""
    import numpy as np

    def row(size: Size, names: Sequence[str]) -> list[float]:
        return [1.0, *(float(getattr(size, name)) for name in names)]

    features = [name for name in by if len({getattr(size, name) for size, _ in points}) > 1]
    while len(features) >= len(points):
        features.pop()
    while True:
        weights = np.array([1 / max(taken, 1e-9) for _, taken in points])
        rows = np.array([row(size, features) for size, _ in points])
        scale = rows.max(axis=0)
        found = np.linalg.lstsq(rows / scale * weights[:, None], np.ones(len(points)), rcond=None)[
            0
        ]
        found = found / scale
        falling = [name for name, each in zip(features, found[1:], strict=True) if each < 0]
        if not falling:
            return lambda size: float(np.dot(row(size, features), found))
        features.remove(falling[-1])


def first(sizes: Sequence[Size]) -> list[Size]:
    """The sizes that a fit begins with: the ends and the middle of what they cost, and of depth."""
    rising = sorted(sizes, key=lambda size: (size.macs, size.blocks))
    deep = sorted(sizes, key=lambda size: (size.blocks, size.macs))
    return list(dict.fromkeys((rising[0], rising[-1], rising[len(rising) // 2], deep[0], deep[-1])))


def too_slow(size: Size, taken: float, limit: float) -> str:
    """How far the fastest size is from a limit of milliseconds."""
    return (
        f"even the fastest size ({size.macs} multiply-accumulates) takes {taken:.3g} ms at the 95th"
        f" percentile, {taken - limit:.3g} ms more than the {limit:g} allowed"
    )


def too_large(size: Size, taken: float, limit: float) -> str:
    """How far the size of the least memory is from a limit of bytes."""
    return (
        f"even the smallest size ({size.bytes} bytes as a file) takes {taken:.0f} bytes of memory to"
        f" run, {taken - limit:.0f} more than the {limit:.0f} allowed"
    )


def choose(
    sizes: Sequence[Size],
    limit: float,
    measure: Callable[[Size, float], Latency],
    *,
    higher: bool = True,
    by: Sequence[str] = ("macs", "blocks"),
    missed: Callable[[Size, float, float], str] = too_slow,
) -> tuple[Size, Latency]:
    """The size of the best expected score (without one, the largest) that stays within `limit`
    milliseconds, and its latency. `measure` runs one for so many seconds.

    A few are run and a time is fitted to them; the best that should stay within the limit is run,
    and run longer before it is taken, until no better one can be expected to. What is limited may be
    another thing, if `measure` gives that, `by` says what it is fitted over, and `missed` how far from
    a limit the nearest size is. Raises TooMuch.
    """
    sign = 1 if higher else -1

    def worth(size: Size) -> tuple[float, float, int]:
        return (
            (1.0, sign * size.score, -size.macs)
            if size.score is not None
            else (0.0, float(size.macs), 0)
        )

    def slowest(each: Latency) -> float:
        return max(each.median, each.high)

    seen = {size: measure(size, SECONDS) for size in first(sizes)}
    confirmed: set[Size] = set()
    tries = 0
    slack = 1.0  # how much longer it takes when it is run longer, on a device that gets hot
    while True:
        median = fitted([(size, each.median) for size, each in seen.items()], by)
        high = fitted([(size, each.high) for size, each in seen.items()], by)
        fastest = min(seen, key=lambda size: slowest(seen[size]))
        hoped = []
        for size in sizes:
            expected = seen.get(size) or Latency(median(size), high(size))
            known = size in seen or tries < TRIES
            if known and expected.within(MARGIN * limit / (1.0 if size in confirmed else slack)):
                hoped.append(size)
        if not hoped:
            if not seen[fastest].within(limit):
                break
            hoped = [fastest]
        best = max(hoped, key=worth)
        if best in confirmed:
            return best, seen[best]
        if best not in seen:
            tries += 1
            seen[best] = measure(best, SECONDS)
        elif len(confirmed) < CONFIRMED or best == fastest:
            before, seen[best] = seen[best], measure(best, LONGER)
            slack = max(slack, slowest(seen[best]) / slowest(before))
            confirmed.add(best)
        else:  # too much of what passed once has failed: the surest is left
            sizes = [size for size in sizes if size in confirmed or size == fastest]
    raise TooMuch(missed(fastest, slowest(seen[fastest]), limit))


def runtime_of(wanted: str, file_format: str) -> str:
    """The runtime that files of this format ('' if any will do) are run with. Raises NoRuntime."""
    fits = {"onnx": "onnx", "torch": "safetensors"}
    if wanted and file_format not in ("", fits[wanted]):
        raise NoRuntime(f"--runtime {wanted} runs {fits[wanted]} files, not {file_format}")
    names = [wanted] if wanted else [n for n in RUNTIMES if file_format in ("", fits[n])]
    for name in names:
        if importlib.util.find_spec(RUNTIMES[name]):
            return name
    packages = " or ".join(RUNTIMES[name] for name in names)
    raise NoRuntime(f"there is no runtime to measure with: install {packages}")


def device(runtime: str, threads: int) -> list[str]:
    """What a latency holds for: this machine, this runtime and its version, so many threads."""
    names = [platform.machine(), platform.processor()]
    if (told := Path("/proc/cpuinfo")).exists():
        lines = told.read_text(errors="replace").splitlines()
        kinds = ("model name", "Hardware", "Model", "CPU part")
        names += sorted({line for line in lines if line.startswith(kinds)})
    version = importlib.metadata.version(RUNTIMES[runtime])
    return [*names, f"{os.cpu_count()} cores", runtime, version, f"{threads} threads"]


def candidate(about: Mapping[str, Any], size: Size, dtype: str, file_format: str) -> bytes:
    """A whole file of this size with random weights; `about` is what any pulled file of the manifold
    says of itself. Raises BadGraph."""
    import numpy as np

    about = {**about, "depth": list(size.depth), "channels": list(size.channels)}
    graph, sizes = sized(about)
    if file_format == "onnx":
        plan = onnx.plan(graph, sizes, about, dtype)
    else:
        from neumeta import wire  # with torch, which alone runs such a file

        plan = wire.plan_graph(graph, sizes, about, dtype)
    chance, found = np.random.default_rng(0), [plan.header]
    for part in layout(graph, sizes, dtype)[0]:
        # As small as trained ones, and none so small that a processor takes longer over it.
        values = chance.uniform(0.5, 1.5, part.shape) * chance.choice((-1, 1), part.shape)
        if part.dtype == "int8":
            raw = (80 * values).astype("i1").tobytes()
        else:
            values /= math.sqrt(math.prod(part.shape[1:]) or 1)
            if part.dtype == "bfloat16":
                raw = (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
            else:
                raw = values.astype("<f4" if part.dtype == "float32" else "<f2").tobytes()
        found += [plan.frames.get(part.name, b""), raw]
    return b"".join(found)


def ready(runtime: str) -> None:
    """Have all that a runtime loads before it has seen a network."""
    importlib.import_module(RUNTIMES[runtime])
    importlib.import_module("numpy.random")
    if runtime == "torch":
        importlib.import_module("neumeta.network")


def runner(runtime: str, path: Path, shape: Sequence[int], threads: int) -> Callable[[], object]:
    """One image of this shape through a file, again and again."""
    import numpy as np

    image = np.random.default_rng(0).random((1, *shape), dtype=np.float32)
    if runtime == "onnx":
        onnxruntime = importlib.import_module("onnxruntime")  # it tells no types
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda: session.run(None, {name: image})
    import torch

    from neumeta import network

    torch.set_num_threads(threads)
    net, given = network.load(path), torch.from_numpy(image)

    def run() -> object:
        with torch.inference_mode():
            return net(given)

    return run
