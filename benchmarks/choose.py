"""What `neumeta-pull --max-ms` chooses on this machine, and what that then takes.

    python -m benchmarks.choose [--models FILE] [--runs 1000] [--load N] [--ram [--processes 20]]

Five limits, spread between what the smallest and the largest size take here (95th percentile). Each
choice is made anew and then run so often in this process. With --load, N processes are busy meanwhile.
With --ram the same of `--max-ram`: each choice is run in so many processes, and the most that one took
counts. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from benchmarks.local import Service, hardware
from neumeta import measure, memory
from neumeta.command import main as neumeta_pull


def busy() -> None:
    while True:
        math.factorial(2000)


@contextlib.contextmanager
def load(count: int) -> Iterator[None]:
    """So many processes that never wait, until the block ends."""
    processes = [multiprocessing.Process(target=busy, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models/resnet20-cifar10.safetensors"))
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--load", type=int, default=0)
    parser.add_argument("--ram", action="store_true")
    parser.add_argument("--processes", type=int, default=20)
    given = parser.parse_args()
    rows = []
    with (
        Service(given.models) as service,
        tempfile.TemporaryDirectory() as folder,
        load(given.load),
    ):
        shape = httpx.get(f"{service.url}/models/{given.arch}").json()["input"]
        out = Path(folder) / "net.onnx"
        asked = ["--arch", given.arch, "--url", service.url, "--out", str(out), "--format", "onnx"]

        def peaks() -> list[float]:
            return sorted(memory.peak("onnx", out, shape, 1) for _ in range(given.processes))

        def taken() -> measure.Latency:
            if given.ram:
                found = peaks()
                return measure.Latency(found[len(found) // 2], found[-1])
            run = measure.runner("onnx", out, shape, 1)
            return measure.latency(run, 0.5, least=given.runs, most=given.runs)

        ends = []
        for width in ("0.25", "1"):
            assert neumeta_pull([*asked, "--width", width]) == 0
            ends.append(taken().high)
        low, high = sorted(ends)
        for step in range(5):
            if given.ram:  # most of what the smallest takes is what the runtime does once
                limit = int(1.02 * low + step / 4 * (1.1 * high - 1.02 * low))
            else:
                limit = round(1.1 * low * (1.3 * high / low) ** (step / 4), 3)
            out.unlink(missing_ok=True)
            began = time.monotonic()
            flag = "--max-ram" if given.ram else "--max-ms"
            code = neumeta_pull([*asked, flag, str(limit), "--measure"])
            seconds = time.monotonic() - began
            row: dict[str, object] = {"limit": limit, "exit": code, "seconds": round(seconds, 1)}
            if code == 0:
                kept = json.loads((Path(folder) / ".net.onnx.choice").read_text())["choice"]
                plan = httpx.get(
                    f"{service.url}/plan/{given.arch}", params=kept["parameters"]
                ).json()
                then = taken()
                row |= {
                    "size": plan["architecture"],
                    "score": plan["score"],
                    "macs": plan["macs"],
                    "median": round(then.median, 3),
                    "high": round(then.high, 3),
                    "within": then.within(limit),
                }
            rows.append(row)
            print(row, flush=True)
    print(
        json.dumps(
            {
                "benchmark": "choose",
                "of": "bytes of memory" if given.ram else "ms",
                "runs": given.processes if given.ram else given.runs,
                "load": given.load,
                "load_average": round(os.getloadavg()[0], 1),
                "smallest_largest": [round(each, 3) for each in ends],
                "rows": rows,
                "hardware": hardware(),
            }
        )
    )


if __name__ == "__main__":
    main()
