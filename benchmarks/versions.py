"""Version 0.1 beside this one in one run: size of each manifold's file, cold and cached latency.

    git worktree add /tmp/old ad16539
    python -m benchmarks.versions --old /tmp/old

Both are started as real services with this Python, each from its own code and with its own models,
and asked in turn: cold requests of services that keep nothing, then cached ones of services that do.
Medians of `--rounds`, and new divided by old. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cold import Client
from benchmarks.local import Service, hardware

REPOSITORY = Path(__file__).parent.parent
SIZES: dict[str, dict[str, Any]] = {
    "lenet, width 0.5": {"arch": "lenet", "width": 0.5},
    "lenet, width 1": {"arch": "lenet", "width": 1.0},
    "resnet-mnist, depth 2, 2": {"arch": "resnet-mnist", "depth": [2, 2]},
    "resnet20, width 0.5": {"arch": "resnet20", "width": 0.5},
    "resnet20, width 1": {"arch": "resnet20", "width": 1.0},
    "resnet20, mixed": {"arch": "resnet20", "width": [0.4, 0.7, 0.9], "depth": [5, 3, 2]},
}
OTHER = {"arch": "lenet", "width": 0.3}


@contextlib.contextmanager
def both(folders: dict[str, Path], *flags: str) -> Iterator[dict[str, Client]]:
    """A client of each version's service."""
    with contextlib.ExitStack() as stack:
        started = {
            name: Service(folder / "models", "--device", "cpu", *flags, code=folder)
            for name, folder in folders.items()
        }
        for service in started.values():
            stack.callback(service.stop)
        yield {name: Client(service.port) for name, service in started.items()}


def version(folder: Path) -> str:
    """The version of the code that a service in this folder runs, and its commit."""
    code = "import neumeta; print(neumeta.__file__, neumeta.__version__)"
    run = partial(subprocess.run, check=True, capture_output=True, text=True, cwd=folder)
    told = run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(folder)}).stdout
    place, number = told.split()
    assert Path(place).is_relative_to(folder), f"{place} is not in {folder}"
    commit = run(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    return f"{number}, {commit}"


def asked_in_turn(
    clients: dict[str, Client], size: dict[str, Any], rounds: int, *, cold: bool
) -> dict[str, Any]:
    """Milliseconds to the last byte by version, medians of requests in turn, and their ratio."""
    seconds: dict[str, list[float]] = {name: [] for name in clients}
    sizes: dict[str, int] = {}
    for client in clients.values():
        client.post(size)
    for _ in range(rounds):
        for name, client in clients.items():
            if cold:
                client.post(OTHER)
            _, whole, sizes[name] = client.post(size)
            seconds[name].append(whole)
    median = {name: statistics.median(each) for name, each in seconds.items()}
    told: dict[str, Any] = {f"{name}_ms": round(1000 * each, 2) for name, each in median.items()}
    told |= {f"{name}_bytes": each for name, each in sizes.items()}
    return {**told, "ratio": round(median["new"] / median["old"], 2)}


def files(folders: dict[str, Path]) -> dict[str, Any]:
    """Bytes of each manifold that both have."""
    held = {
        name: {path.name: path.stat().st_size for path in (folder / "models").glob("*.safetensors")}
        for name, folder in folders.items()
    }
    return {
        name: {
            "old_bytes": held["old"][name],
            "new_bytes": held["new"][name],
            "ratio": round(held["new"][name] / held["old"][name], 3),
        }
        for name in sorted(held["old"].keys() & held["new"].keys())
    }


def compare(folders: dict[str, Path], sizes: dict[str, dict[str, Any]], rounds: int) -> Any:
    """Cold and cached latencies of every size."""
    found: dict[str, Any] = {"files": files(folders), "cold": {}, "cached": {}}
    for kind, flags in (("cold", ("--cache-bytes", "0")), ("cached", ())):
        with both(folders, *flags) as clients:
            for name, size in sizes.items():
                row = asked_in_turn(clients, size, rounds, cold=kind == "cold")
                found[kind][name] = row
                print(kind, name, row, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--old", type=Path, required=True, help="a worktree of version 0.1")
    parser.add_argument("--new", type=Path, default=REPOSITORY, help="default: this one")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--quick", action="store_true", help="LeNet alone, three rounds")
    asked = parser.parse_args()
    folders = {"old": asked.old.resolve(), "new": asked.new.resolve()}
    chosen = {name: size for name, size in SIZES.items() if not asked.quick or "lenet" in name}
    began = time.monotonic()
    told = {name: version(folder) for name, folder in folders.items()}
    result = compare(folders, chosen, 3 if asked.quick else asked.rounds)
    seconds = round(time.monotonic() - began)
    about = {"benchmark": "versions", "hardware": hardware(), **told, "seconds": seconds}
    print(json.dumps({**about, "result": result}))


if __name__ == "__main__":
    main()
