"""POST /weights of sizes that are in no cache: the first and the last byte.

    python -m benchmarks.cold
    python -m benchmarks.cold --formats safetensors onnx --dtypes float32 int8

With `--formats`, also the first byte of sizes that nobody has asked for, whose header is made then, and
the processor time of that header alone, which other work on the machine does not change.

One request after the other on one connection to a service of its own. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.local import Service, hardware, replicas
from neumeta import checkpoint, wire

SIZES: dict[str, dict[str, Any]] = {"width 0.5": {"width": 0.5}, "width 1": {"width": 1.0}}


class Client:
    """One connection that is kept, as a device's proxy keeps it."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port)

    def post(self, body: Mapping[str, Any]) -> tuple[float, float, int]:
        """Seconds to the first byte and to the last, and how many bytes."""
        began = time.perf_counter()
        headers = {"content-type": "application/json"}
        self.connection.request("POST", "/weights", json.dumps(body), headers)
        answer = self.connection.getresponse()
        size = len(answer.read(1))
        first = time.perf_counter() - began
        size += len(answer.read())
        if answer.status != 200:
            raise SystemExit(f"{answer.status} for {body}")
        return first, time.perf_counter() - began, size


def latencies(
    service: Service, arch: str, sizes: Mapping[str, Mapping[str, Any]], rounds: int
) -> dict[str, Any]:
    """Each size `rounds` times, another one before it every time; medians in milliseconds."""
    client, other = Client(service.port), {"arch": arch, "width": 0.3}
    for _ in range(5 if rounds > 1 else 1):
        client.post(other)
    found: dict[str, Any] = {}
    for name, size in sizes.items():
        rows = []
        for _ in range(rounds):
            rows.append(client.post({"arch": arch, **size}))
            client.post(other)
        first, whole, count = (statistics.median(column) for column in zip(*rows, strict=True))
        found[name] = {
            "bytes": int(count),
            "first_byte_ms": round(1000 * first, 1),
            "last_byte_ms": round(1000 * whole, 1),
            "worst_ms": round(1000 * max(row[1] for row in rows), 1),
        }
    return found


def headers(service: Service, arch: str, asked: Mapping[str, Any], rounds: int) -> float:
    """Milliseconds to the first byte of a size asked for once: the median of so many sizes."""
    client = Client(service.port)
    widths = [0.31 + 0.68 * step / rounds for step in range(rounds)]
    taken = [client.post({"arch": arch, "width": width, **asked})[0] for width in widths]
    return round(1000 * statistics.median(taken), 1)


def planned(models: Path, arch: str, asked: Mapping[str, str], rounds: int) -> float:
    """Milliseconds of processor time to make a header: the median of so many sizes."""
    (manifold,) = (
        found
        for path in sorted(models.glob("*.safetensors"))
        if (found := checkpoint.read(path)).space.name == arch
    )
    taken = []
    for step in range(-1, rounds):
        size = manifold.space.architecture(0.31 + 0.68 * max(step, 0) / rounds)
        began = time.thread_time()
        wire.plan(manifold, size, asked["dtype"], asked["format"])
        taken.append(time.thread_time() - began)
    return round(1000 * statistics.median(taken[1:]), 2)  # the first one made what all share


def cold(
    models: Path, arch: str, sizes: Mapping[str, Mapping[str, Any]], rounds: int
) -> dict[str, Any]:
    """The latencies of a service of its own that keeps nothing."""
    with replicas(1, models, "--cache-bytes", "0") as (service,):
        return latencies(service, arch, sizes, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--formats", nargs="+", choices=wire.FORMATS, default=[])
    parser.add_argument("--dtypes", nargs="+", choices=list(wire.KINDS), default=["float32"])
    asked = parser.parse_args()
    if not asked.formats:
        found = cold(asked.models, asked.arch, SIZES, asked.rounds)
    else:
        pairs = [
            {"format": form, "dtype": dtype} for form in asked.formats for dtype in asked.dtypes
        ]
        found = {}
        with replicas(1, asked.models, "--cache-bytes", "0") as (service,):
            for pair in pairs:
                told = " ".join(pair.values())
                sizes = {f"{told}, {name}": {**size, **pair} for name, size in SIZES.items()}
                found |= latencies(service, asked.arch, sizes, asked.rounds)
                new = headers(service, asked.arch, pair, 2 * asked.rounds)
                header = planned(asked.models, asked.arch, pair, 2 * asked.rounds)
                found[f"{told}, new sizes"] = {"first_byte_ms": new, "header_ms": header}
    for name, row in found.items():
        print(name, row)
    print(json.dumps({"benchmark": "cold", "hardware": hardware(), "result": found}))


if __name__ == "__main__":
    main()
