"""Figure 1: depth on MNIST from one single MLP for all layers, beside the grid that ships."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.paper.bench import Bench
from benchmarks.paper.table import Row, Rows, Table, holds
from neumeta import checkpoint
from training import evaluate, pipeline, plots, recipe, recipe_file
from training.data import Dataset

MLP = "one MLP for all layers"
GRID = "grid, as it ships"
SHIPPED = "resnet-mnist-depth.safetensors"
INSIDE = (1, 3)
EVERY = 2
"""Of the test images every so-manyth one is scored by the MLP's networks."""
FREQUENCIES = 6
"""Octaves of every coordinate: the highest tells 32 channels apart, and along l/L, where depths that
were never trained lie between others, waves stay long."""


def asked(bench: Bench) -> recipe.Recipe:
    """The depth recipe with one MLP in place of the grid."""
    # A filter behind a ReLU sums to zero, as at the paper's scope. Noise reaches all of a block's cell
    # of l/L, so that depths between the source's blocks begin with weights like theirs.
    held: dict[str, Any] = {"kind": "mlp", "corrected": None, "centred": {}, "noise": 0.5}
    options = {"layers": 5, "hidden": 256, "num_freq": FREQUENCIES, "block_based": False}
    budget: dict[str, Any] = {"regression_steps": 1200, "epochs": 14.0, "lr": 7e-5}
    changed = {
        "representation": held | {"options": options},
        "fit": {**budget, "sandwich": False},
        "network": {"weights": SHIPPED, "train": None},
    }
    found = recipe_file.load("mnist-resnet-depth")
    if bench.setting.quick:
        options |= {"layers": 2, "hidden": 8, "num_freq": 2}
        changed["fit"] |= {"regression_steps": 2, "epochs": 0.1}
        changed |= {
            "data": {"name": "digits"},
            "network": {"weights": "", "train": {"epochs": 1, "lr": 0.01}},
            "evaluate": {"blocks": [1, 2]},
        }
    return found.changed(**changed)


def scores(bench: Bench) -> list[dict[str, Any]]:
    """The score of the single MLP at every depth, and before them the source's. Raises Late."""
    wanted = asked(bench)
    folder = bench.setting.runs / f"depth-{bench.digest(wanted)}"
    held = folder / "rows.json"
    if held.exists():
        return list(json.loads(held.read_text()))
    loaded, own = bench.source("depth", wanted)
    manifold, smoothed = pipeline.prepare(wanted, loaded, own.graph, own.module)
    bench.fit(wanted, manifold, smoothed, loaded, folder)
    print(f"figure1: trained in {manifold.about['minutes']:.1f} minutes", flush=True)
    assert isinstance(loaded, Dataset)
    few = replace(
        loaded,
        test_images=loaded.test_images[::EVERY],
        test_labels=loaded.test_labels[::EVERY],
    )
    rows = evaluate.evaluate(manifold, few, wanted)
    held.write_text(json.dumps(rows))
    return rows


def summary(rows: list[dict[str, Any]]) -> Row:
    """What the columns say of the scores of all depths."""
    by_depth = {tuple(row["depth"]): row["score"] for row in rows}
    inside = [s for d, s in by_depth.items() if max(d) <= INSIDE[1]]
    outside = {d: s for d, s in by_depth.items() if max(d) > INSIDE[1]}
    found: Row = {"inside, lowest": min(inside), "inside, mean": sum(inside) / len(inside)}
    for n in (7, 9):
        if (n, n) in by_depth:
            found[f"({n}, {n})"] = by_depth[n, n]
    if outside:
        found["outside, lowest"] = min(outside.values())
        found["outside, mean"] = sum(outside.values()) / len(outside)
    found["_scores"] = [[*row["depth"], row["score"]] for row in rows]
    return found


def figure1(bench: Bench) -> Table:
    """Depth: trained on {1,2,3}^2, scored at every depth of {1..9}^2."""

    def measure(name: str) -> Row:
        if name == MLP or bench.setting.quick:
            return summary(scores(bench))
        held = checkpoint.read(bench.setting.models / SHIPPED)
        return summary(held.about["evaluation"])

    def verdict(rows: Rows) -> str:
        row = rows[MLP]
        far: float = row["(7, 7)"] if "(7, 7)" in row else row["inside, lowest"]
        near, above = row["inside, lowest"] >= 98.5, far > 56.97
        return (
            "Claimed of one INR for all layers: about 99 % inside, and far above chance at L1 = L2 = 7."
            f" The first {holds(near)} here (lowest {row['inside, lowest']:.2f}), the second"
            f" {holds(above)} ({far:.2f}; the paper's: 56.97)."
        )

    def drawn(rows: Rows, folder: Path) -> Path:
        path = folder / "figures" / "paper-figure1.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shown = [
            {"depth": [a, b], "score": score, "metric": "accuracy"}
            for a, b, score in rows[MLP]["_scores"]
        ]
        title = "Depth on MNIST, one MLP for all layers, trained on {1,2,3}²"
        plots.depth_heatmap(shown, asked(bench).changed(title=title), path)
        return path.relative_to(folder)

    theirs = {MLP: {"inside, mean": 99.0, "(7, 7)": 56.97}}
    columns = (
        "inside, lowest",
        "inside, mean",
        "(7, 7)",
        "(9, 9)",
        "outside, lowest",
        "outside, mean",
    )
    fitted = asked(bench).fit
    return Table(
        "figure1",
        "depth on MNIST, one INR for all layers",
        "Trained on depths {1,2,3}² (inside), scored on {1..9}², one seed. The MLP (5 layers of 256"
        f" units, {FREQUENCIES} frequencies) makes every tensor of the network, of all layers and"
        f" blocks; {fitted.regression_steps:,} steps of regression, then {fitted.epochs:g} epochs, one"
        " random depth in each step, borders between blocks moved at random, noise of half a cell;"
        " scored on every second test image (5,000). Its source is the network of L1 = L2 = 2 of the"
        " manifold that ships (the paper trains one). Branches are scaled by their block's share of"
        " the stage, which the paper does not do. The grid is the one that ships: five epochs, three"
        " depths a step, all images.",
        columns,
        (MLP, GRID),
        measure,
        verdict,
        theirs,
        figure=drawn,
    )
