"""Served batch statistics against recalibration on a thousand augmented training images.

    python -m benchmarks.statistics --manifold FILE --data FOLDER --sizes 12 --images 2500

At random sizes, width of every group and depth of every stage drawn alike, and at four scalar widths:
the same weights, scored with the statistics that the file's calibration batch gives, with those that
it keeps for that very size (where it does), and with statistics measured on `--calibration` augmented
training images. Beside it what a cold request costs at widths 0.5 and 1 and at the first random size.
Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cold import SIZES, cold
from benchmarks.local import hardware
from neumeta import checkpoint
from neumeta.fold import fold
from neumeta.manifold import Manifold
from neumeta.program import Program
from neumeta.sample import sample
from neumeta.space import Architecture, Space
from neumeta.statistics import Statistics, unflatten
from training import data as sets
from training import source
from training import statistics as measured
from training.task import TASKS, Task

WIDTHS = (0.25, 0.5, 0.75, 1.0)
SOURCES = ("recalibrated", "served", "batch", "kept")
"""Where a size's statistics are from; `served` is what a request gets."""


def request(space: Space, chance: random.Random) -> dict[str, Any]:
    """A random size as the body of a request: a width for each group, a depth for each stage."""
    low, high = space.width
    wanted: dict[str, Any] = {}
    if low < high:
        wanted["width"] = [round(chance.uniform(low, high), 4) for _ in space.groups]
    if space.blocks:
        least, most = space.blocks
        stages = space.graph.stages
        wanted["depth"] = [chance.randint(max(least, stage.least), most) for stage in stages]
    return wanted


class Scores:
    """One manifold, its data, and how networks of it are scored."""

    def __init__(self, manifold: Manifold, data: sets.Dataset, calibration: int, seed: int) -> None:
        self.manifold, self.data = manifold, data
        self.task: Task = TASKS[manifold.contract.task]
        self.images = measured.training_images(data, calibration, seed)
        batch = Statistics(manifold.statistics.images)
        self.without_kept = replace(manifold, statistics=batch)

    def score(self, architecture: Architecture, weights: Mapping[str, Tensor]) -> float:
        """Of these folded weights, on the test images."""
        space = self.manifold.space
        program = Program(space.graph_of(architecture).folded, space.sizes(architecture))
        return source.score(lambda x: program.run(weights, x), self.data, self.task)

    def recalibrated(self, architecture: Architecture) -> dict[str, Tensor]:
        """The folded weights with statistics of the training images."""
        space = self.manifold.space
        graph, sizes = space.graph_of(architecture), space.sizes(architecture)
        kept = measured.exact(self.manifold, architecture, self.images)
        raw = measured.raw(self.manifold, architecture)
        return fold(graph, raw, unflatten(graph, sizes, kept))

    def row(self, name: str, architecture: Architecture) -> dict[str, Any]:
        """The scores of one size, by where its statistics are from."""
        found: dict[str, Any] = {"size": name, "architecture": architecture.key}
        batch = dict(sample(self.without_kept, architecture))
        found["recalibrated"] = self.score(architecture, self.recalibrated(architecture))
        found["batch"] = self.score(architecture, batch)
        if architecture.key in self.manifold.statistics.kept:
            found["kept"] = self.score(architecture, dict(sample(self.manifold, architecture)))
        found["served"] = found.get("kept", found["batch"])
        return {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}


def against(rows: list[dict[str, Any]], kind: str, better: int) -> dict[str, float] | None:
    """How far the scores of one kind are above (below 0: worse than) the recalibrated ones."""
    gaps = [better * (row[kind] - row["recalibrated"]) for row in rows if kind in row]
    if not gaps:
        return None
    scores = [row[kind] for row in rows if kind in row]
    return {
        "sizes": len(gaps),
        "mean_score": round(statistics.mean(scores), 2),
        "mean_difference": round(statistics.mean(gaps), 3),
        "worst_difference": round(min(gaps), 3),
    }


def measure(
    manifold: Manifold, data: sets.Dataset, *, sizes: int, calibration: int, seed: int
) -> dict[str, Any]:
    """Every row, and for random and for scalar sizes what each kind of statistics loses."""
    if not any(node.op == "batch_norm" for node in manifold.space.graph.nodes):
        raise SystemExit(f"{manifold.space.name} has no batch norm: there are no statistics")
    space, chance = manifold.space, random.Random(seed)
    wanted = [("random", request(space, chance)) for _ in range(sizes)]
    low, high = space.width
    wanted += [("scalar", {"width": w}) for w in WIDTHS if low <= w <= high and low < high]
    scores, rows = Scores(manifold, data, calibration, seed), []
    for kind, size in wanted:
        row = {"kind": kind, **scores.row(json.dumps(size), space.architecture(**size))}
        rows.append(row)
        told = {name: row[name] for name in SOURCES if name in row}
        print(kind, row["size"], told, flush=True)
    better = 1 if manifold.contract.higher else -1
    report: dict[str, Any] = {"metric": manifold.contract.metric, "rows": rows}
    for kind in ("random", "scalar"):
        chosen = [row for row in rows if row["kind"] == kind]
        report[kind] = {each: against(chosen, each, better) for each in SOURCES} if chosen else {}
    return report


def fewer(data: sets.Dataset, count: int) -> sets.Dataset:
    """The same data with so many of its test images, spread over all: they lie class by class."""
    rows = torch.linspace(0, len(data.test_labels) - 1, min(count, len(data.test_labels))).long()
    return replace(data, test_images=data.test_images[rows], test_labels=data.test_labels[rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifold", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of data sets (default: $NEUMETA_DATA)")
    parser.add_argument("--set", default="cifar10", help="the data set's name or path in it")
    parser.add_argument("--sizes", type=int, default=12)
    parser.add_argument("--images", type=int, default=2500, help="test images scored")
    parser.add_argument("--calibration", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=15, help="of each cold request; 0: none")
    asked = parser.parse_args()
    manifold = checkpoint.read(asked.manifold)
    # Images of any other kind are normalised and moved as the manifold's own were.
    moves = {key: manifold.about["recipe"]["data"].get(key) for key in ("flips", "pad")}
    mean, std = list(manifold.contract.mean), list(manifold.contract.std)
    loaded = sets.load_from(asked.set, asked.data, mean=mean, std=std, **moves)
    if not isinstance(loaded, sets.Dataset):
        raise SystemExit(f"{asked.set}: streamed data cannot be cut to {asked.images} images")
    data = fewer(loaded, asked.images)
    report = measure(
        manifold, data, sizes=asked.sizes, calibration=asked.calibration, seed=asked.seed
    )
    held = manifold.statistics
    report["calibration_images"] = 0 if held.images is None else len(held.images)
    report["kept_sizes"] = len(held.kept)
    report["file_bytes"] = asked.manifold.stat().st_size
    if asked.rounds:
        mixed = {"mixed": request(manifold.space, random.Random(asked.seed))}
        sizes = {**SIZES, **mixed}
        report["cold"] = cold(asked.manifold, manifold.space.name, sizes, asked.rounds)
        print("cold", report["cold"], flush=True)
    told = {"hardware": hardware(), "threads": torch.get_num_threads(), "seed": asked.seed}
    options = {"images": asked.images, "calibration": asked.calibration}
    print(json.dumps({"benchmark": "statistics", **told, **options, "result": report}))


if __name__ == "__main__":
    main()
