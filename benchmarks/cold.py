"""POST /weights of sizes that are in no cache: the first and the last byte.

    python -m benchmarks.cold

One request after the other on one connection to a service of its own. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.local import hardware, replicas


def cold(asked: argparse.Namespace) -> dict[str, Any]:
    """POST /weights for sizes nobody asked for before, one after the other."""
    found: dict[str, Any] = {}
    with replicas(1, asked.models, "--cache-bytes", "0") as (service,):
        connection = http.client.HTTPConnection("127.0.0.1", service.port)

        def post(body: dict[str, Any]) -> tuple[float, float, int]:
            began = time.perf_counter()
            connection.request(
                "POST", "/weights", json.dumps(body), {"content-type": "application/json"}
            )
            answer = connection.getresponse()
            size = len(answer.read(1))
            first = time.perf_counter() - began
            size += len(answer.read())
            if answer.status != 200:
                raise SystemExit(f"{answer.status} for {body}")
            return first, time.perf_counter() - began, size

        for _ in range(5):
            post({"arch": "resnet20", "width": 0.3})
        for width in (0.5, 1.0):
            rows = []
            for _ in range(asked.rounds):
                rows.append(post({"arch": "resnet20", "width": width}))
                post({"arch": "resnet20", "width": 0.3})
            first, whole, size = (statistics.median(column) for column in zip(*rows, strict=True))
            found[str(width)] = {
                "bytes": size,
                "first_byte_ms": round(1000 * first, 1),
                "last_byte_ms": round(1000 * whole, 1),
                "worst_ms": round(1000 * max(row[1] for row in rows), 1),
            }
            print(width, found[str(width)], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    print(json.dumps({"benchmark": "cold", "hardware": hardware(), "result": cold(asked)}))


if __name__ == "__main__":
    main()
