"""A manifold's scores over all it reaches, on raw pixels and on JPEG copies of the same test images.

    python -m benchmarks.reach models/resnet20-cifar10.safetensors --name fifteen-charts

Widths from 1.0 to 0.25 at the source's depth, 1 to 9 blocks in every stage at full width, and 40 random
sizes (a width and a depth for each stage, seed 0; on raw pixels alone). Every network is sampled
and run as a device runs it; sizes whose statistics are not kept are calibrated on the images inside
the file. Rows are kept in RESULTS/NAME.json, and one that is there is not measured again. `--report`
measures nothing: it prints the tables of all that is there, beside networks that were trained
individually (`benchmarks.converged`), and draws the figure. Results of another source network need a
folder of their own (`--results`). Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

from benchmarks.local import hardware
from neumeta import atomic, checkpoint
from neumeta.manifold import Manifold
from neumeta.space import Architecture
from training import data, evaluate
from training.data import pictures, tree

RAW = "cifar10-raw-test-even.tar.xz"
WIDTHS = (1.0, 0.97, 0.95, 0.9, 0.85, 0.75, 0.6, 0.5, 0.4, 0.35, 0.3, 0.25)
RANDOM = 40
KINDS = ["width", "depth", "mixed"]


def raw(jpeg: data.Dataset, root: Path) -> data.Dataset:
    """The same data set with its test images' lossless pixels. Raises OSError without the archive."""
    found = pictures.descend(tree.read_archive(root / RAW))
    names, labels = [], []
    for label, folder in enumerate(jpeg.classes):
        own = [name for name in found.names if name.startswith(f"test/{folder}/")]
        names += own
        labels += [label] * len(own)
    (images,) = pictures.decode_all(found, [names], pictures.Options(channels=3))
    return replace(jpeg, test_images=torch.from_numpy(images), test_labels=torch.tensor(labels))


def points(manifold: Manifold) -> dict[str, list[Architecture]]:
    """The sizes to measure, by kind."""
    space = manifold.space
    generator = torch.Generator().manual_seed(0)
    least, most = space.blocks or (1, 1)
    mixed = []
    for _ in range(RANDOM):
        low, high = space.width
        drawn = torch.rand(len(space.groups), generator=generator)
        depth = torch.randint(least, most + 1, (len(space.depth),), generator=generator)
        mixed.append(
            space.architecture([low + (high - low) * float(x) for x in drawn], depth.tolist())
        )
    return {
        "width": [space.architecture(width) for width in WIDTHS],
        "depth": [
            space.architecture(1.0, [n] * len(space.depth), extrapolate=True) for n in range(1, 10)
        ],
        "mixed": mixed,
    }


def measure(
    manifold: Manifold, sets: dict[str, data.Dataset], kinds: list[str], path: Path
) -> None:
    """Every size of these kinds that has no row in `path` yet."""
    held = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    if held.setdefault("digest", manifold.digest) != manifold.digest:
        raise ValueError(f"{path}: rows of another manifold: choose another --name")
    wanted = points(manifold)
    for kind in kinds:
        for architecture in wanted[kind]:
            row = held["rows"].setdefault(architecture.key, {"kinds": []})
            if kind not in row["kinds"]:
                row["kinds"].append(kind)
            for name, images in sets.items():
                if name in row or (name == "jpeg" and kind == "mixed"):
                    continue
                found = evaluate.evaluate_one(manifold, architecture, images)
                row |= {key: found[key] for key in ("channels", "depth", "macs", "parameters")}
                row[name] = found["score"]
                print(f"{kind:6} {architecture.key:24} {name:5} {found['score']:.2f}", flush=True)
                atomic.write(path, json.dumps(held, indent=1))
    held["hardware"] = hardware()
    atomic.write(path, json.dumps(held, indent=1))


def of_kind(held: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The rows of one kind, by their cost, the largest first."""
    rows = [row for row in held["rows"].values() if kind in row["kinds"] and "raw" in row]
    return sorted(rows, key=lambda row: -row["macs"])


def report(results: Path, figures: Path) -> None:
    """Tables and figures of everything in `results`."""
    single = (
        json.loads((results / "individual.json").read_text())
        if (results / "individual.json").exists()
        else []
    )
    manifolds = {
        path.stem: json.loads(path.read_text())
        for path in sorted(results.glob("*.json"))
        if path.stem != "individual"
    }
    alone = {
        (tuple(row["channels"]), tuple(row["depth"])): row
        for row in sorted(single, key=lambda row: (row["epochs"], -row["seed"]))
    }
    for kind in ("width", "depth"):
        heads = [f"{name}, {pixels}" for name in manifolds for pixels in ("raw", "JPEG")]
        print(f"\n| channels | depth | {' | '.join(heads)} | individual, raw | epochs |")
        print("|---|---|" + "---:|" * (len(heads) + 2))
        first = max(manifolds.values(), key=lambda held: len(held["rows"]))
        for row in of_kind(first, kind):
            channels = ".".join(map(str, row["channels"]))
            keys = [f"{'.'.join(map(str, row['depth']))}/{channels}"]
            if kind == "width":
                keys.append(f"/{channels}")  # of a manifold that has the source's depth alone
            cells = [
                _told(next((held["rows"][k] for k in keys if k in held["rows"]), {}).get(pixels))
                for held in manifolds.values()
                for pixels in ("raw", "jpeg")
            ]
            own = alone.get((tuple(row["channels"]), tuple(row["depth"])))
            cells += [f"{own['raw']:.2f}", str(own["epochs"])] if own else ["", ""]
            print(f"| {row['channels']} | {row['depth']} | {' | '.join(cells)} |")
    for name, held in manifolds.items():
        mixed = of_kind(held, "mixed")
        if mixed:
            print(f"\n{name}: {len(mixed)} random sizes, raw: {beside_widths(mixed, held)}")
            for told, rows in {
                "with a stage of one block": [row for row in mixed if 1 in row["depth"]],
                "with more in every stage": [row for row in mixed if 1 not in row["depth"]],
            }.items():
                if 0 < len(rows) < len(mixed):
                    print(f"- {len(rows)} {told}: {beside_widths(rows, held)}")
    draw(manifolds, single, figures)
    summary = {name: {"rows": len(held["rows"])} for name, held in manifolds.items()}
    print(json.dumps({"benchmark": "reach", "hardware": hardware(), "results": summary}))


def beside_widths(rows: list[dict[str, Any]], held: dict[str, Any]) -> str:
    """The mean and the worst of these, and what widths alone have at the same cost."""
    scores = np.array([row["raw"] for row in rows])
    told = f"mean {scores.mean():.2f}, worst {scores.min():.2f}"
    if not (widths := of_kind(held, "width")[::-1]):
        return told
    costs = [np.log([row["macs"] for row in each]) for each in (rows, widths)]
    equal = np.interp(costs[0], costs[1], [row["raw"] for row in widths])
    return f"{told}; widths alone at the same multiply-accumulates {equal.mean():.2f}"


def _told(score: float | None) -> str:
    return "" if score is None else f"{score:.2f}"


def draw(manifolds: dict[str, Any], single: list[dict[str, Any]], path: Path) -> None:
    """The score over multiply-accumulates: widths as a line, depths and random sizes as points."""
    figure, axes = plt.subplots(figsize=(7, 4.4))
    for color, (name, held) in enumerate(manifolds.items()):
        for kind, mark in (("width", "o-"), ("depth", "^"), ("mixed", ".")):
            rows = of_kind(held, kind)
            if rows:
                axes.plot(
                    [row["macs"] / 1e6 for row in rows],
                    [row["raw"] for row in rows],
                    mark,
                    color=f"C{color}",
                    alpha=0.5 if kind == "mixed" else 1,
                    label=f"{name}: {kind}",
                )
    if single:
        axes.plot(
            [row["macs"] / 1e6 for row in single],
            [row["raw"] for row in single],
            "k*",
            label="trained individually",
        )
    axes.set(
        xscale="log",
        xlabel="multiply-accumulates (millions)",
        ylabel="accuracy on raw test images (%)",
    )
    axes.legend(fontsize=8, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifold", type=Path, nargs="?")
    parser.add_argument("--name", help="of the result (default: the file's)")
    parser.add_argument("--data", type=Path, help="default $NEUMETA_DATA")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/reach.svg"))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        manifold = checkpoint.read(arguments.manifold)
        jpeg = data.load("cifar10", arguments.data)
        root = arguments.data or Path(os.environ.get("NEUMETA_DATA", "data"))
        sets = {"raw": raw(jpeg, root), "jpeg": jpeg}
        name = arguments.name or arguments.manifold.stem
        measure(manifold, sets, arguments.kinds, arguments.results / f"{name}.json")
    report(arguments.results, arguments.figure)


if __name__ == "__main__":
    main()
