"""What every scored size of a manifold takes to run here: one image, one thread, both runtimes.

    python -m benchmarks.latency [MANIFOLD ...] [--rounds 4] [--figure docs/figures/latency.svg]

The file is written beside each manifold (`NAME.latency.json`), where the service finds it and the page
at `/` shows score over milliseconds. Weights are random: a time depends on the shape. In every round
each size is run for a while after a warm-up; a time is the least of the rounds' medians, in the
thread's processor time, so that other work on this machine counts as little as may be. `--figure` draws
the score over milliseconds, of the first manifold. `--report` measures nothing.
Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from benchmarks.local import hardware
from neumeta import atomic, checkpoint, measure, wire
from neumeta.graph import BATCH, extent
from neumeta.manifold import Manifold
from service.latency import beside

RUNTIMES = {"onnx": "onnxruntime", "torch": "torch"}
NAMES = {"onnx": "ONNX Runtime", "torch": "torch"}


def measured(manifold: Manifold, seconds: float, rounds: int) -> dict[str, Any]:
    """The table of one manifold."""
    space = manifold.space
    about = wire.about(manifold, space.full)
    shape = [extent(dim, {BATCH: 1}) for dim in space.graph.input[1:]]
    sizes = [
        measure.Size((), tuple(row["depth"]), tuple(row["channels"]), row["macs"], row["bytes"])
        for row in manifold.about["evaluation"]
    ]
    least: dict[measure.Size, list[float]] = {size: [math.inf] * len(RUNTIMES) for size in sizes}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes * rounds:
            for place, runtime in enumerate(RUNTIMES):
                kind = "onnx" if runtime == "onnx" else "safetensors"
                path = Path(folder) / f"net.{kind}"
                path.write_bytes(measure.candidate(about, size, "float32", kind))
                run = measure.runner(runtime, path, shape, 1)
                found = measure.latency(run, seconds, clock=time.thread_time).median
                least[size][place] = min(least[size][place], float(f"{found:.3g}"))
            print(f"{space.name} {size.depth} {size.channels}: {least[size]} ms", flush=True)
    rows = [
        {"depth": list(size.depth), "channels": list(size.channels), "ms": taken}
        for size, taken in least.items()
    ]
    return {
        "arch": space.name,
        "hardware": hardware(),
        "threads": 1,
        "runtimes": [
            f"{NAMES[each]} {version(name).partition('+')[0]}" for each, name in RUNTIMES.items()
        ],
        "rows": rows,
    }


def joined(manifold: Manifold, table: dict[str, Any]) -> list[dict[str, Any]]:
    """The scored sizes that have times, with them."""
    times = {(*row["depth"], *row["channels"]): row["ms"] for row in table["rows"]}
    rows = [
        {**row, "ms": times.get((*row["depth"], *row["channels"]))}
        for row in manifold.about["evaluation"]
    ]
    return [row for row in rows if row["ms"]]


def report(manifold: Manifold, table: dict[str, Any]) -> None:
    """The card's table."""
    print(f"\n| blocks | channels | MACs | score | {' | '.join(table['runtimes'])} |")
    print("|---|---|---:|---:|" + "---:|" * len(table["runtimes"]))
    for row in joined(manifold, table):
        cells = [", ".join(map(str, row[key])) for key in ("depth", "channels")]
        cells += [f"{row['macs'] / 1e6:.1f} M", f"{row['score']:.2f}"]
        cells += [f"{each:.2f}" for each in row["ms"]]
        print(f"| {' | '.join(cells)} |")


def draw(manifold: Manifold, table: dict[str, Any], path: Path) -> None:
    """The score over milliseconds: widths at the source's depth, other depths, and the best for
    their time as a line."""
    figure, axes = plt.subplots(figsize=(7, 4.4))
    rows = joined(manifold, table)
    for place, runtime in enumerate(table["runtimes"]):
        rows.sort(key=lambda row: row["ms"][place])
        best: list[dict[str, Any]] = []
        for row in rows:
            if not best or row["score"] > best[-1]["score"]:
                best.append(row)
        own = [row for row in rows if tuple(row["depth"]) == manifold.space.depth]
        for kind, mark, name in (
            (own, "o", f"{runtime}: widths"),
            ([row for row in rows if row not in own], "^", f"{runtime}: depths"),
            (best, "-", ""),
        ):
            if kind:
                axes.plot(
                    [row["ms"][place] for row in kind],
                    [row["score"] for row in kind],
                    mark,
                    color=f"C{place}",
                    label=name or None,
                )
    axes.set(
        xscale="log",
        xlabel=f"milliseconds an image, one thread ({table['hardware']})",
        ylabel="accuracy (%)",
    )
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = [Path("models/resnet20-cifar10.safetensors")]
    parser.add_argument("manifold", type=Path, nargs="*", default=default)
    parser.add_argument("--seconds", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--report", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for place, path in enumerate(asked.manifold):
        manifold = checkpoint.read(path)
        if not asked.report:
            table = measured(manifold, asked.seconds, asked.rounds)
            atomic.write(beside(path), json.dumps(table).replace("{", "\n{").lstrip() + "\n")
        table = json.loads(beside(path).read_text())
        report(manifold, table)
        if asked.figure and not place:
            draw(manifold, table, asked.figure)
        results[path.name] = len(table["rows"])
    print(json.dumps({"benchmark": "latency", "hardware": hardware(), "rows": results}))


if __name__ == "__main__":
    main()
