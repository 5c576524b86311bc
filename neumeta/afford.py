"""The size that a device can afford: what there is to choose from, and what was chosen before.

Knows no HTTP: who calls brings the questions.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neumeta import atomic, measure, memory
from neumeta.measure import Latency, Size

GRID = 12
"""Scalar widths that are looked at beside the sizes that were scored."""

Parameters = dict[str, str]
Get = Callable[[str, Mapping[str, str]], dict[str, Any]]
"""A path and a query -> the JSON object that is there; empty, if that is refused."""


def sizes(
    get: Get, arch: str, base: Parameters, whole: Mapping[str, Any]
) -> tuple[list[Size], dict[str, Any]]:
    """What can be asked for with these parameters beside a width (and a depth), and what the manifold
    says of itself: scalar widths, and every size whose score was measured. `whole` is the plan of these
    parameters alone."""
    about = get(f"/models/{whole['arch']}", {})
    wanted: dict[tuple[tuple[str, str], ...], None] = {(): None}
    if about["width"]:
        low, high = about["width"]
        for step in range(GRID):
            wanted[(("width", f"{low + (high - low) * step / (GRID - 1):.6g}"),)] = None
    for row in about["evaluation"]:
        asked: Parameters = {}
        if about["width"]:
            width = row.get("width", high)
            asked["width"] = ",".join(map(str, width if isinstance(width, list) else [width]))
        if about["blocks"] and arch == about["arch"] and "depth" not in base:
            asked["depth"] = ",".join(map(str, row["depth"]))
        elif row["depth"] != whole["depth"]:
            continue
        if not row.get("extrapolated") or "extrapolate" in base:
            wanted[tuple(asked.items())] = None
    found: dict[object, Size] = {}
    for pairs in wanted:
        if plan := get(f"/plan/{arch}", {**base, **dict(pairs)}):
            depth, channels = tuple(plan["depth"]), tuple(plan["channels"])
            size = Size(pairs, depth, channels, plan["macs"], plan["bytes"], plan["score"])
            found.setdefault((depth, channels), size)
    return list(found.values()), about


def remembered(record: Path, key: object) -> dict[str, Any]:
    """What was chosen for this key, or an empty object."""
    try:
        state = json.loads(record.read_bytes()[: 1 << 16])
        same = state["key"] == json.loads(json.dumps(key))
        return dict(state["choice"]) if same else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def remember(record: Path, key: object, choice: Mapping[str, Any]) -> None:
    """Keep a choice, whole or not at all."""
    atomic.write(record, json.dumps({"key": key, "choice": choice}))


@dataclass(frozen=True)
class Limits:
    """What a size may take; None: anything."""

    ms: float | None = None
    """Milliseconds an image, at the median and the 95th percentile."""
    ram: int | None = None
    """Bytes of memory beside what the runtime takes itself."""


def choose(
    found: list[Size],
    about: Mapping[str, Any],
    limits: Limits,
    *,
    runtime: str,
    threads: int,
    dtype: str,
    header: Callable[[], Mapping[str, Any]],
    say: Callable[[str], None],
) -> Size:
    """The best of these sizes that this device runs within the limits, of which there is one at least.

    `header` gets what a pulled file of the manifold says of itself. Raises TooMuch and NotMeasured.
    """
    own, shape, higher = header(), about["input"], about["higher"]
    began, count, told = time.monotonic(), len(found), []
    with tempfile.TemporaryDirectory(prefix="neumeta-") as folder:
        path = Path(folder) / "candidate"
        file_format = "onnx" if runtime == "onnx" else "safetensors"
        made: dict[Size, Callable[[], object]] = {}
        times: dict[tuple[Size, float], Latency] = {}
        peaks: dict[Size, list[float]] = {}
        most = math.inf

        def run(size: Size, seconds: float) -> Latency:
            if size not in made:
                made.clear()
                path.write_bytes(measure.candidate(own, size, dtype, file_format))
                made[size] = measure.runner(runtime, path, shape, threads)
            if (size, seconds) not in times:
                times[size, seconds] = measure.latency(made[size], seconds)
            return times[size, seconds]

        def held(size: Size, seconds: float) -> Latency:
            # Processes differ by some pages: what one of several took counts.
            path.write_bytes(measure.candidate(own, size, dtype, file_format))
            for _ in range(2 if seconds == measure.LONGER else 1):
                taken = memory.peak(runtime, path, shape, threads)
                peaks.setdefault(size, []).append(taken)
            highest = max(peaks[size])
            return Latency(highest, highest)

        if limits.ram is not None:
            by, missed = ("bytes",), measure.too_large
            size, _ = measure.choose(found, limits.ram, held, higher=higher, by=by, missed=missed)
            known = {each: max(taken) for each, taken in peaks.items()}
            expected = measure.fitted(list(known.items()), by)
            most = max(measure.MARGIN * limits.ram, known[size])
            found = [each for each in found if known.get(each, expected(each)) <= most]
        while limits.ms is not None:
            size, latency = measure.choose(found, limits.ms, run, higher=higher)
            if limits.ram is None or held(size, measure.LONGER).high <= most:
                told = [
                    f"median {latency.median:.3g} ms, 95th percentile {latency.high:.3g} ms of"
                    f" {limits.ms:g} allowed"
                ]
                break
            found.remove(size)
    if limits.ram is not None:
        told.append(f"{max(peaks[size]):.0f} bytes of memory of {limits.ram} allowed")
    runs = len(times) + sum(map(len, peaks.values()))
    scored = "" if size.score is None else f", {about['metric']} {size.score:g} expected"
    say(
        f"{' '.join('='.join(pair) for pair in size.asked) or 'the whole network'}{scored}:"
        f" {', '.join(told)} ({runtime}, {threads} {'thread' if threads == 1 else 'threads'};"
        f" {runs} runs of {count} sizes, {time.monotonic() - began:.1f} s)"
    )
    return size
