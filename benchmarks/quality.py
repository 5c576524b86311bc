"""One manifold beside everything it competes with: accuracy over width, depth and both.

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
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from neumeta.architecture import Architecture, Space
from torch import Tensor

from neumeta import checkpoint
from neumeta.manifold import Manifold
from neumeta.network import Network
from neumeta.sample import sample
from training import cliques, data, fit, order, pipeline, plots, recipe, source, statistics
from training.folded import fold, network_from, reorder

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
    "slimmable": {"representation": {"options": {"orders": 0}}, "fit": {"distill": "inplace"}},
    "paper": {
        "representation": {
            "kind": "mlp",
            "options": {"layers": 5, "hidden": 128, "num_freq": 16},
            "norm": False,
            "noise": 0.5,
        },
        "fit": {
            "optimiser": "adamw",
            "lr": 1e-3,
            "weight_decay": 1e-2,
            "clip": 10.0,
            "sandwich": False,
            "per_stage": 0.0,
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
        self.asked = recipe.load(arguments.recipe)
        self.epochs = arguments.epochs or round(self.asked.fit.epochs)
        self.data = data.load(self.asked.data.name, arguments.data)
        root = arguments.data or Path(os.environ.get("NEUMETA_DATA", "data"))
        self.run.mkdir(parents=True, exist_ok=True)
        checkpoints = arguments.checkpoints or root.parent / "checkpoints"
        self.source = pipeline.trained_source(self.asked, self.data, checkpoints, self.run)
        if not (self.run / "source.json").exists():
            held = {"accuracy": round(self.accuracy(self.source), 2)}
            (self.run / "source.json").write_text(json.dumps(held))
        # Any size of the family, whatever the manifold was trained on.
        covered = self.asked.space(len(self.data.classes))
        self.space = replace(covered, width=(0.01, 1.0), blocks=(1, 9))
        generator = torch.Generator().manual_seed(self.asked.seed)
        rows = torch.randperm(len(self.data.train_labels), generator=generator)[:CALIBRATION]
        augmented = data.augment(self.data.train_images[rows], self.data, generator)
        self.calibration = data.to_float(augmented, self.data)

    def accuracy(self, net: Network) -> float:
        return source.accuracy(net, self.data.test_images, self.data.test_labels, self.data)

    def calibrated(self, net: Network) -> float:
        return self.accuracy(statistics.calibrate(net, self.calibration))


def relative_cost(space: Space, architecture: Architecture) -> float:
    """Multiply-accumulates of one pass, in passes of the source network."""
    return space.cost(architecture)["macs"] / space.cost(space.full)["macs"]


def individual(bench: Bench, architecture: Architecture, *, distilled: bool) -> dict[str, Any]:
    """A network of this size trained by itself from scratch."""
    space, name = bench.space, architecture.key.replace("/", "-")
    folder = bench.run / ("distilled" if distilled else "individual")
    folder.mkdir(exist_ok=True)
    torch.manual_seed(bench.asked.seed)
    net = Network(space.family, architecture.depth, space.sizes(architecture), norm=True)
    source.train(
        net,
        bench.data,
        epochs=bench.epochs,
        lr=0.1,
        batch=bench.asked.fit.batch,
        seed=bench.asked.seed,
        state=folder / f"{name}.pt",
        label=f"{folder.name} {name}",
        teacher=bench.source.eval() if distilled else None,
    )
    each = relative_cost(space, architecture) + (TEACHER if distilled else 0.0)
    passes = bench.epochs * len(bench.data.train_labels) * each
    return {"accuracy": bench.accuracy(net), "passes": passes}


@cache
def smoothed(bench: Bench) -> dict[str, Tensor]:
    """The source's tensors with batch norm kept, channels in the recipe's order."""
    folded = fold(bench.source)
    found = cliques.cliques(bench.space.table, bench.space.depth)
    orders = order.order(folded, found, bench.asked.order.strategy, seed=bench.asked.seed)
    return reorder(bench.source, orders)


def interpolated(bench: Bench, architecture: Architecture, *, mode: str) -> dict[str, Any]:
    """The smoothed source, resampled along its channels (integral networks; supplement section 3)."""
    state = dict(smoothed(bench))
    net = Network(
        bench.space.family, architecture.depth, bench.space.sizes(architecture), norm=True
    )
    for name, wanted in net.state_dict().items():
        value = state[name]
        if value.shape == wanted.shape or value.dim() == 0:
            continue
        rows, columns = (*value.shape, 1)[:2]
        flat = value.reshape(1, rows, columns, -1).movedim(3, 1)
        size = (*wanted.shape, 1)[:2]
        made = F.interpolate(flat, size, mode=mode, align_corners=False).movedim(1, 3)
        state[name] = made.reshape(wanted.shape)
    net.load_state_dict(state)
    return {"accuracy": bench.calibrated(net), "passes": 0}


def pruned(bench: Bench, architecture: Architecture) -> dict[str, Any]:
    """The source without its channels of least L1 norm, over every tensor side that has the axis."""
    folded = fold(bench.source)
    found = cliques.cliques(bench.space.table, bench.space.depth)
    sizes, keep = bench.space.sizes(architecture), {}
    for axis, sides in found.items():
        norm = torch.stack(
            [
                folded[side.tensor].movedim(side.dimension, 0).flatten(1).abs().sum(1)
                for side in sides
                if folded[side.tensor].dim() > 1
            ]
        ).sum(0)
        keep[axis] = norm.topk(sizes[axis]).indices.sort().values
    net = Network(bench.space.family, architecture.depth, sizes, norm=True)
    net.load_state_dict(reorder(bench.source, keep))
    return {"accuracy": bench.calibrated(net), "passes": 0}


@cache
def baseline(bench: Bench, name: str) -> tuple[recipe.Recipe, Manifold]:
    """A whole-network manifold of another kind, trained by the same Algorithm 2."""
    changes = BASELINES[name]
    asked = recipe.load("cifar10-resnet20").changed(
        name=name, **{**changes, "fit": {**changes["fit"], "epochs": bench.epochs}}
    )
    run = bench.run / name
    run.mkdir(exist_ok=True)
    manifold, targets, smoothed = pipeline.prepare(asked, bench.data, bench.source)
    if not fit.fit(manifold, targets, smoothed, bench.data, asked, run, resume=True):
        raise RuntimeError(f"{name}: stopped early")
    return asked, manifold


def trained(bench: Bench, architecture: Architecture, *, name: str) -> dict[str, Any]:
    """What a baseline makes of this size; with batch norm, calibrated."""
    asked, manifold = baseline(bench, name)
    passes = passes_of(asked, len(bench.data.train_labels), bench.space)
    if asked.representation.norm:
        accuracy = bench.calibrated(statistics.network(manifold, architecture))
    else:
        weights = dict(sample(manifold, architecture))
        accuracy = bench.accuracy(network_from(weights, architecture.family, architecture.depth))
    return {"accuracy": accuracy, "passes": passes}


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
            relative_cost(space, each)
            for each in fit.choose(asked, asked.space(space.classes), generator)
        )
    return total * asked.fit.batch


def sampled(
    bench: Bench, architecture: Architecture, *, manifold: Manifold, path: Path
) -> dict[str, Any]:
    """What a device receives from the manifold's file."""
    weights = dict(sample(manifold, architecture))
    net = network_from(weights, architecture.family, architecture.depth)
    if manifold.about["title"] != bench.asked.title:
        raise ValueError(f"{path}: {manifold.about['title']!r} is not what --recipe makes")
    passes = passes_of(bench.asked, len(bench.data.train_labels), bench.space)
    return {"accuracy": bench.accuracy(net), "passes": passes, "bytes": path.stat().st_size}


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
    report(arguments.run, recipe.load(arguments.recipe), arguments.figure)


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
                key = architecture.key.removeprefix(f"{bench.space.family}/")
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
                    "epochs": bench.epochs,
                    "seconds": round(time.monotonic() - began),
                }
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(row))
                print(f"{method:24} {key:20} {found['accuracy']:.2f} %", flush=True)


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
                    f"{each['accuracy']:.2f}"
                    for each in rows
                    if (each["width"], each["depth"]) == (width, depth)
                ),
                "",
            )
            for rows in found.values()
        ]
        if any(row):
            print(f"| {width}, {tuple(depth)} | " + " | ".join(row) + " |")
    before = json.loads((run / "source.json").read_text())["accuracy"]
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
    plots.depth_curve(deep, asked, figure.with_name(f"{figure.stem}-depth{figure.suffix}"))
    hardware = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(
        json.dumps(
            {"benchmark": "quality", "hardware": hardware, "source": before, "results": found}
        )
    )


if __name__ == "__main__":
    main()
