"""The size that a device can afford: what there is to choose from, and what was chosen before.

Knows no HTTP: who calls brings the questions.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from neumeta import atomic, measure
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


def choose(
    found: list[Size],
    about: Mapping[str, Any],
    limit: float,
    *,
    runtime: str,
    threads: int,
    dtype: str,
    header: Callable[[], Mapping[str, Any]],
    say: Callable[[str], None],
) -> tuple[Size, Latency]:
    """The best of these sizes that this device runs within `limit` milliseconds, and its latency.

    `header` gets what a pulled file of the manifold says of itself. Raises TooSlow.
    """
    file_format = "onnx" if runtime == "onnx" else "safetensors"
    own = header()
    began, runs = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="neumeta-") as folder:
        made: dict[Size, Callable[[], object]] = {}

        def run(size: Size, seconds: float) -> Latency:
            nonlocal runs
            runs += 1
            if size not in made:
                made.clear()
                path = Path(folder) / f"candidate.{file_format}"
                path.write_bytes(measure.candidate(own, size, dtype, file_format))
                made[size] = measure.runner(runtime, path, about["input"], threads)
            return measure.latency(made[size], seconds)

        size, latency = measure.choose(found, limit, run, higher=about["higher"])
    seconds = time.monotonic() - began
    expected = "" if size.score is None else f", {about['metric']} {size.score:g} expected"
    how = f"{runtime}, {threads} {'thread' if threads == 1 else 'threads'}"
    say(
        f"{' '.join('='.join(pair) for pair in size.asked) or 'the whole network'}{expected}: median"
        f" {latency.median:.3g} ms, 95th percentile {latency.high:.3g} ms of {limit:g} allowed"
        f" ({how}; {runs} runs of {len(found)} sizes, {seconds:.1f} s)"
    )
    return size, latency
