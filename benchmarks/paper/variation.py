"""Section 2 and Figure 2: which order moves total variation, and what each strategy leaves of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.paper.bench import Bench
from benchmarks.paper.table import Row, Rows, Table, holds
from neumeta.fold import fold
from neumeta.graph import Graph
from training import networks, plots, recipe_file, source
from training.order import apply, cliques, order, total_variation, tv_in, tv_out
from training.tour import STRATEGIES
from training.trace import trace

SEEDS = 5
DRAWS = 20
PUBLIC = {
    "resnet20": "resnet20-12fca82f.th",
    "resnet32": "resnet32-d509ac18.th",
    "resnet44": "resnet44-014dd654.th",
    "resnet56": "resnet56-4bfd9763.th",
}

OWN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "LeNet (MNIST)": (
        "lenet",
        "tiny",
        {"data": {"name": "mnist"}, "network": {"train": {"epochs": 1, "lr": 0.05}}},
    ),
    "depth network (MNIST)": (
        "depth",
        "mnist-resnet-depth",
        {"network": {"train": {"epochs": 1, "lr": 0.02}}},
    ),
    "U-Net (CamVid)": ("unet", "camvid-unet", {}),
    "VAE (MNIST)": ("vae", "mnist-vae", {}),
}
"""By name: folder, recipe, and what of it is changed. The VAE is public, the others are trained."""


def diagonal(weight: Tensor) -> float:
    """Sum of |w[o+1, i+1] - w[o, i]|: what section 2 says is not axis-aligned."""
    return float((weight[1:, 1:] - weight[:-1, :-1]).double().abs().sum())


def section2(bench: Bench) -> Table:
    """What a new order of rows or of columns does to the variation along either axis."""
    real = "a convolution of the source"

    def measure(name: str) -> Row:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(64, 48, generator=generator)
        if name == real:
            weight = max(
                (p.detach() for p in bench.traced.module.parameters() if p.ndim == 4),
                key=torch.Tensor.numel,
            )
        found: Row = {}
        for side, dimension in (("rows", 0), ("columns", 1)):
            moved: dict[str, list[float]] = {"TV_in": [], "TV_out": [], "diagonal": []}
            for _ in range(DRAWS):
                new = torch.randperm(weight.shape[dimension], generator=generator)
                other = weight.index_select(dimension, new)
                for key, of in (("TV_in", tv_in), ("TV_out", tv_out), ("diagonal", diagonal)):
                    moved[key].append(abs(of(other) / of(weight) - 1))
            for key, values in moved.items():
                # Sums of the same numbers in another order differ by rounding.
                found[f"{key}, {side} moved"] = f"{100 * max(values):.1e} %"
                found[f"_{key}_{side}"] = max(values)
        return found

    def verdict(rows: Rows) -> str:
        still = max(max(row["_TV_in_rows"], row["_TV_out_columns"]) for row in rows.values())
        moves = min(min(row["_diagonal_rows"], row["_diagonal_columns"]) for row in rows.values())
        aligned = still < 1e-6 < 1e-4 < moves
        return (
            f"The claim {holds(aligned)}: the variation along an axis feels"
            " the order of that axis alone, the diagonal one that of both."
        )

    columns = [
        f"{key}, {side} moved"
        for side in ("rows", "columns")
        for key in ("TV_in", "TV_out", "diagonal")
    ]
    return Table(
        "section2",
        "total variation is axis-aligned, the diagonal variation is not",
        f"The largest relative change over {DRAWS} random orders of one side.",
        tuple(columns),
        ("a random matrix", real),
        measure,
        verdict,
    )


def _folded(bench: Bench, name: str) -> tuple[Graph, dict[str, Tensor]]:
    """The folded graph of the network of this name, and its trained weights."""
    if name in PUBLIC:
        blocks = (int(name.removeprefix("resnet")) - 2) // 6
        net: nn.Module = networks.resnet_cifar((blocks,) * 3).eval()
        source.fill(net, bench.setting.checkpoints / PUBLIC[name])
        graph, _ = trace(net, torch.zeros(1, 3, 32, 32))
    elif name in OWN:
        short, like, changes = OWN[name]
        asked = recipe_file.load(like).changed(**changes)
        _, own = bench.source(short, asked)
        net, graph = own.module, own.graph
    else:
        net, graph = bench.traced.module, bench.traced.graph
    return graph.folded, fold(graph, source.tensors(net, graph.tensors))


def figure2(bench: Bench) -> Table:
    """Total variation after each strategy: mean and deviation of five runs."""
    names = ("lenet",) if bench.setting.quick else (*PUBLIC, *OWN)

    def measure(name: str) -> Row:
        graph, weights = _folded(bench, name)
        found: Row = {}
        groups = cliques(graph)
        for strategy in STRATEGIES:
            values = [
                total_variation(apply(weights, groups, order(weights, groups, strategy, seed=seed)))
                for seed in range(1 if bench.setting.quick else SEEDS)
            ]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            found[strategy] = f"{statistics.mean(values):,.1f} ± {spread:.1f}"
            found[f"_{strategy}"] = [statistics.mean(values), spread]
        return found

    def verdict(rows: Rows) -> str:
        least = all(
            row["_mshp"][0] <= min(row[f"_{s}"][0] for s in STRATEGIES) for row in rows.values()
        )
        return f"The claim {holds(least)}: mSHP leaves the least variation in every network."

    return Table(
        "figure2",
        "total variation after each strategy",
        f"Mean and deviation of {SEEDS} seeds over every folded weight and bias, whole networks,"
        " all axes permuted: the public CIFAR-10 ResNets and VAE; LeNet and the"
        " depth network (one epoch each) and the U-Net (20 epochs) are trained here.",
        tuple(STRATEGIES),
        names,
        measure,
        verdict,
        figure=_drawn,
    )


def _drawn(rows: Rows, folder: Path) -> Path:
    path = folder / "figures" / "paper-figure2.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    bars = {
        name: {
            s: (100 * row[f"_{s}"][0] / row["_none"][0], 100 * row[f"_{s}"][1] / row["_none"][0])
            for s in STRATEGIES
        }
        for name, row in rows.items()
    }
    plots.bars(
        bars, "Total variation after each strategy", path, value="% of the unpermuted", legend=""
    )
    return path.relative_to(folder)


Make = Callable[[Bench], Table]
