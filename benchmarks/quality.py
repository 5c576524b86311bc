"""One manifold beside everything it competes with: the score over width, depth and both.

    python -m benchmarks.quality --run runs/quality --manifold models/resnet20-cifar10.safetensors

Every method starts from the same source network (trained or fine-tuned once, as the recipe says), sees
the same images with the same augmentation for as many epochs, and is measured on the same test images
at the same architectures. Methods with batch norm get statistics calibrated on 2,000 training images
at each architecture; the manifold is measured as a device receives it. A point that has a result in
RUN/results is not measured again; training resumes. `--report` measures nothing: it prints the table
and draws the figure of what is there. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.local import hardware
from benchmarks.prepared import Prepared, prepare, score
from neumeta import checkpoint
from neumeta.fold import fold
from neumeta.manifold import Manifold
from neumeta.sample import sample
from neumeta.sites import measured
from neumeta.space import Architecture, Space
from neumeta.statistics import measure as moments_of
from training import networks, order, plots, recipe, recipe_file, sizes, source, statistics

WIDTHS = (1.0, 0.75, 0.6, 0.5, 0.35, 0.25)
CALIBRATION = 2000
TEACHER = 1 / 3
"""What the source's forward pass alone costs, in its passes forward and back."""

Width = float | list[float]
Point = tuple[Width, list[int]]
POINTS: dict[str, list[Point]] = {
    "width": [(width, [3, 3, 3]) for width in WIDTHS],
    "depth": [(1.0, [n] * 3) for n in range(1, 10)],
    "mixed": [
        ([0.25, 0.5, 1.0], [3, 3, 3]),
        ([1.0, 0.5, 0.25], [3, 3, 3]),
        ([0.5, 1.0, 0.5], [3, 3, 3]),
        (0.5, [1, 1, 1]),
        (0.5, [5, 5, 5]),
        (0.75, [2, 4, 5]),
        (0.35, [9, 9, 9]),
        ([0.4, 0.7, 0.9], [5, 3, 2]),
    ],
}
BASELINES: dict[str, dict[str, Any]] = {
    "slimmable": {"representation": {"corrected": None}, "fit": {"distill": "inplace"}},
    "paper": {
        "representation": {
            "kind": "mlp",
            "options": {"layers": 5, "hidden": 128, "num_freq": 16},
            "corrected": None,
            "noise": 0.5,
        },
        "fit": {
            "optimiser": "adamw",
            "lr": 1e-3,
            "weight_decay": 1e-2,
            "clip": 10.0,
            "sandwich": False,
            "per_group": 0.0,
            "distill": "none",
            "reconstruction": 1.0,
            "regularisation": 1e-4,
            "regression_steps": 600,
        },
    },
}


class Bench:
    """The recipe's data, source and space; and what each method shares with the others."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.run: Path = arguments.run
        self.root: Path | None = arguments.data
        self.asked = recipe_file.load(arguments.recipe)
        self.epochs = arguments.epochs or round(self.asked.fit.epochs)
        root = arguments.data or Path(os.environ.get("NEUMETA_DATA", "data"))
        self.checkpoints: Path = arguments.checkpoints or root.parent / "checkpoints"
        self.ready: Prepared = prepare(self.asked, arguments.data, self.run, self.checkpoints)
        self.data, self.task, self.source = self.ready.data, self.ready.task, self.ready.net
        if not (self.run / "source.json").exists():
            held = {"score": round(source.score(self.source, self.data, self.task), 2)}
            (self.run / "source.json").write_text(json.dumps(held))
        # Any size, whatever the manifold was trained on.
        covered = self.ready.manifold.space
        self.space = replace(covered, width=(0.01, 1.0), blocks=(1, 9))
        self.calibration = statistics.training_images(self.data, CALIBRATION, self.asked.seed)

    def score(self, architecture: Architecture, weights: dict[str, Tensor]) -> float:
        """Of folded weights."""
        return score(self.space, architecture, weights, self.data, self.task)

    def calibrated(self, architecture: Architecture, tensors: Mapping[str, Tensor]) -> float:
        """Of tensors with batch norm, whose statistics are measured here, whatever is among them."""
        graph, sizes = self.space.graph_of(architecture), self.space.sizes(architecture)
        free = {name: value for name, value in tensors.items() if name not in measured(graph)}
        moments = moments_of(graph, sizes, free, self.calibration)
        return self.score(architecture, fold(graph, tensors, moments))


def relative_cost(space: Space, architecture: Architecture) -> float:
    """Multiply-accumulates of one pass, in passes of the source network."""
    return space.cost(architecture)["macs"] / space.cost(space.full)["macs"]


def individual(bench: Bench, architecture: Architecture, *, distilled: bool) -> dict[str, Any]:
    """A network of this size trained by itself from scratch."""
    space, name = bench.space, architecture.key.replace("/", "-")
    folder = bench.run / ("distilled" if distilled else "individual")
    folder.mkdir(exist_ok=True)
    torch.manual_seed(bench.asked.seed)
    # One extent in each stage: its channels are the stage's width.
    classes = len(bench.data.classes)
    net = networks.resnet_cifar(architecture.depth, classes, architecture.channels)
    source.train(
        net,
        bench.data,
        bench.task,
        epochs=bench.epochs,
        lr=0.1,
        batch=bench.asked.fit.batch,
        seed=bench.asked.seed,
        state=folder / f"{name}.pt",
        label=f"{folder.name} {name}",
        teacher=bench.source.eval() if distilled else None,
    )
    each = relative_cost(space, architecture) + (TEACHER if distilled else 0.0)
    passes = bench.epochs * len(bench.data) * each
    return {"score": source.score(net, bench.data, bench.task), "passes": passes}


def interpolated(bench: Bench, architecture: Architecture, *, mode: str) -> dict[str, Any]:
    """The smoothed source, resampled along its channels (integral networks; supplement section 3)."""
    graph, sizes = bench.space.graph_of(architecture), bench.space.sizes(architecture)
    tensors = {}
    for name in graph.tensors:
        value, wanted = bench.ready.smoothed[name], graph.shape(name, sizes)
        rows, columns = (*value.shape, 1)[:2]
        flat = value.reshape(1, rows, columns, -1).movedim(3, 1)
        made = F.interpolate(flat, (*wanted, 1)[:2], mode=mode, align_corners=False)
        tensors[name] = made.movedim(1, 3).reshape(wanted)
    return {"score": bench.calibrated(architecture, tensors), "passes": 0}


def pruned(bench: Bench, architecture: Architecture) -> dict[str, Any]:
    """The source without its channels of least L1 norm, over every tensor side that has the axis."""
    graph, sizes = bench.ready.graph, bench.space.sizes(architecture)
    own = source.tensors(bench.source, graph.tensors)
    folded, orders = fold(graph, own), {}
    for axis, sides in order.cliques(graph.folded).items():
        norm = torch.zeros(graph.full[axis])
        for side in sides:
            along = folded[side.tensor].movedim(side.dimension, 0)
            if along.dim() > 1:
                part = along[side.offset : side.offset + len(norm) * side.repeat]
                norm += part.reshape(len(norm), -1).abs().sum(1)
        keep = norm.topk(sizes[axis]).indices.sort().values
        gone = torch.tensor(sorted(set(range(len(norm))) - set(keep.tolist())), dtype=torch.long)
        orders[axis] = torch.cat((keep, gone))
    tensors = {
        name: value[tuple(slice(count) for count in graph.shape(name, sizes))]
        for name, value in order.apply(own, order.cliques(graph), orders).items()
    }
    return {"score": bench.calibrated(architecture, tensors), "passes": 0}


@cache
def baseline(bench: Bench, name: str) -> Prepared:
    """A whole-network manifold of another kind, trained by the same Algorithm 2."""
    changes = BASELINES[name]
    asked = recipe_file.load("cifar10-resnet20").changed(
        name=name, **{**changes, "fit": {**changes["fit"], "epochs": bench.epochs}}
    )
    run = bench.run / name
    run.mkdir(exist_ok=True)
    # The same source: it is trained once.
    kept = run / "source.safetensors"
    if not kept.exists():
        kept.write_bytes((bench.run / "source.safetensors").read_bytes())
    ready = prepare(asked, bench.root, run, bench.checkpoints)
    ready.fit(run)
    return ready


def trained(bench: Bench, architecture: Architecture, *, name: str) -> dict[str, Any]:
    """What a baseline makes of this size; with batch norm, calibrated."""
    ready = baseline(bench, name)
    passes = passes_of(ready.asked, len(bench.data), ready.manifold.space)
    # Its own space has no depth.
    own = Architecture(ready.manifold.space.depth, architecture.channels)
    if ready.asked.folded:
        found = bench.score(architecture, dict(sample(ready.manifold, own)))
    else:
        found = bench.calibrated(architecture, statistics.raw(ready.manifold, own))
    return {"score": found, "passes": passes}


def passes_of(asked: recipe.Recipe, images: int, space: Space) -> float:
    """Training passes of a recipe, in passes of the source network, over the sizes it really drew.

    A pass is forward and back.
    """
    batches = images // asked.fit.batch
    steps = round(asked.fit.epochs * batches)
    total = TEACHER * steps if asked.fit.distill == "source" else 0.0
    for step in range(0, steps, 10):
        generator = torch.Generator().manual_seed(step)
        total += 10 * sum(
            relative_cost(space, each) for each in sizes.choose(asked, space, generator)
        )
    return total * asked.fit.batch


def sampled(
    bench: Bench, architecture: Architecture, *, manifold: Manifold, path: Path
) -> dict[str, Any]:
    """What a device receives from the manifold's file."""
    if manifold.about["title"] != bench.asked.title:
        raise ValueError(f"{path}: {manifold.about['title']!r} is not what --recipe makes")
    weights = dict(sample(manifold, architecture))
    passes = passes_of(bench.asked, len(bench.data), bench.ready.manifold.space)
    found = bench.score(architecture, weights)
    return {"score": found, "passes": passes, "bytes": path.stat().st_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="cifar10-resnet")
    parser.add_argument("--run", type=Path, default=Path("runs/quality"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--manifold", type=Path, help="a trained manifold's file")
    parser.add_argument("--epochs", type=int, help="of every method (default: the recipe's)")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--points", nargs="+", default=list(POINTS), choices=list(POINTS))
    parser.add_argument("--only", nargs="+", help="only these architectures, e.g. 3.3.3/8.16.32")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/quality.svg"))
    arguments = parser.parse_args()
    if not arguments.report:
        measure(Bench(arguments), arguments)
    report(arguments.run, recipe_file.load(arguments.recipe), arguments.figure)


def measure(bench: Bench, arguments: argparse.Namespace) -> None:
    """Every method at every point that has no result yet."""
    methods: dict[str, Callable[[Bench, Architecture], dict[str, Any]]] = {
        "interpolated, linear": partial(interpolated, mode="bilinear"),
        "interpolated, bicubic": partial(interpolated, mode="bicubic"),
        "pruned by L1": pruned,
        "individual": partial(individual, distilled=False),
        "individual, distilled": partial(individual, distilled=True),
        "slimmable": partial(trained, name="slimmable"),
        "paper's recipe": partial(trained, name="paper"),
    }
    deep = {"individual", "individual, distilled", "manifold"}
    if arguments.manifold:
        held = checkpoint.read(arguments.manifold)
        methods["manifold"] = partial(sampled, manifold=held, path=arguments.manifold)
    results = bench.run / "results"
    for method in arguments.methods or methods:
        for group in arguments.points:
            for width, depth in POINTS[group]:
                architecture = bench.space.architecture(width, depth)
                key = architecture.key
                path = results / method / f"{key.replace('/', '-')}.json"
                unasked = arguments.only and key not in arguments.only
                shallow = depth != list(bench.space.depth) and method not in deep
                if path.exists() or unasked or shallow:
                    continue
                began = time.monotonic()
                found = methods[method](bench, architecture)
                row = {
                    "width": width,
                    "depth": depth,
                    **found,
                    "metric": bench.task.metric,
                    "epochs": bench.epochs,
                    "seconds": round(time.monotonic() - began),
                }
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(row))
                print(f"{method:24} {key:20} {found['score']:.2f}", flush=True)


def report(run: Path, asked: recipe.Recipe, figure: Path) -> None:
    """Print what is there, draw accuracy over width, and end with one JSON object."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((run / "results").glob("*/*.json")):
        found.setdefault(path.parent.name, []).append(json.loads(path.read_text()))
    points = [point for group in POINTS.values() for point in group]
    print("| width, depth | " + " | ".join(found) + " |")
    print("|---|" + "---:|" * len(found))
    for at, (width, depth) in enumerate(points):
        if (width, depth) in points[:at]:
            continue
        row = [
            next(
                (
                    f"{each['score']:.2f}"
                    for each in rows
                    if (each["width"], each["depth"]) == (width, depth)
                ),
                "",
            )
            for rows in found.values()
        ]
        if any(row):
            print(f"| {width}, {tuple(depth)} | " + " | ".join(row) + " |")
    before = json.loads((run / "source.json").read_text())["score"]
    curves = {
        method: [row for row in rows if row["depth"] == [3, 3, 3] and row["width"] in WIDTHS]
        for method, rows in found.items()
    }
    figure.parent.mkdir(parents=True, exist_ok=True)
    plots.width_curve({m: rows for m, rows in curves.items() if rows}, asked, before, figure)
    deep = {
        method: [row for row in rows if row["width"] == 1.0 and len(set(row["depth"])) == 1]
        for method, rows in found.items()
        if any(row["depth"] != [3, 3, 3] for row in rows)
    }
    if deep:
        plots.depth_curve(deep, asked, figure.with_name(f"{figure.stem}-depth{figure.suffix}"))
    print(
        json.dumps(
            {
                "benchmark": "quality",
                "hardware": hardware(),
                "threads": torch.get_num_threads(),
                "source": before,
                "results": found,
            }
        )
    )


if __name__ == "__main__":
    main()
