"""What a network of some size takes of this device's memory at most, while it is loaded and run.

Measured in a process of its own, which is this file too: what a runtime lays out, copies and keeps
for itself is not in the graph, and what a process has given back it may still hold.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from neumeta import measure

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
LEAST, SECONDS = 3, 0.1
"""Runs of one image, and for how long they go on: what is kept between runs is kept by then."""
PATIENCE = 600.0
"""Seconds a size may take."""


class NotMeasured(RuntimeError):
    """This device does not tell what a process takes, or none could be run."""


def check() -> None:
    """Raises NotMeasured where memory cannot be measured."""
    if not STATUS.exists():
        raise NotMeasured(f"memory is measured on Linux alone: there is no {STATUS}")


def peak(runtime: str, path: Path, shape: Sequence[int], threads: int) -> float:
    """Bytes by which a process that holds the runtime grows, at most, until it has loaded this file
    and run single images of this shape; infinity if it was killed for them. Raises NotMeasured.
    """
    check()
    asked = [runtime, path.name, ",".join(map(str, shape)), str(threads)]
    command = [sys.executable, "-m", "neumeta.memory", *asked]
    try:
        # In the file's folder, so that no module of another passes for the runtime's.
        ran = subprocess.run(  # noqa: S603
            command,
            cwd=path.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        if ran.returncode == -9:  # killed: there was no more memory
            return math.inf
        return float(ran.stdout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotMeasured(f"no process to measure memory in: {error}") from None
    except ValueError:
        lines = ran.stderr.strip().splitlines() or [f"it ended with {ran.returncode}"]
        raise NotMeasured(f"a network could not be run: {lines[-1][:300]}") from None


def _resident() -> tuple[int, int]:
    """Bytes this process holds, and the most it held since the last reset."""
    pairs = (line.split() for line in STATUS.read_text().splitlines())
    told = {pair[0]: 1024 * int(pair[1]) for pair in pairs if pair[0] in ("VmRSS:", "VmHWM:")}
    return told["VmRSS:"], told["VmHWM:"]


def main(runtime: str, path: str, shape: str, threads: str) -> None:
    """Run this file, and print by how much that made this process grow."""
    measure.ready(runtime)
    with suppress(OSError):  # else what the runtime took to load may count too
        RESET.write_text("5")
    before, _ = _resident()
    sizes = [int(size) for size in shape.split(",")]
    run = measure.runner(runtime, Path(path), sizes, int(threads))
    measure.latency(run, SECONDS, least=LEAST)
    print(_resident()[1] - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
