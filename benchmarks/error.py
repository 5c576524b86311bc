"""How far the mean of K samples is from the mean of 10,000, with random and with even points.

    python -m benchmarks.error --manifolds runs/cifar10-resnet20-last-block/manifold.safetensors

And what K does to the score. Always measures the residual MLP on the digits besides. Last line: one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.local import hardware
from benchmarks.prepared import prepare, score
from benchmarks.published import DEVICE, median
from neumeta import checkpoint
from neumeta.coordinates import coordinates
from neumeta.manifold import Manifold
from neumeta.sample import sample, sample_site, seed_of
from neumeta.sites import sites
from neumeta.space import Architecture
from training import data, plots, recipe_file
from training.task import TASKS


def small_mlp(run: Path, root: Path | None) -> Manifold:
    """The residual MLP trained on the digits: regression, then Algorithm 2."""
    options = {"layers": 5, "hidden": 64, "num_freq": 6}
    asked = recipe_file.load("tiny").changed(
        name="tiny-mlp",
        representation={"kind": "mlp", "options": options, "corrected": None, "noise": 0.5},
        fit={"regression_steps": 1500, "optimiser": "adamw", "lr": 5e-4, "reconstruction": 1.0},
    )
    return prepare(asked, root, run).fit(run)


def drawn(manifold: Manifold, architecture: Architecture, samples: int) -> dict[str, Tensor]:
    """The whole network, anew at every call."""
    return dict(sample(manifold, architecture, samples=samples))


def distance(made: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Root mean square over all weights, as a part of that of the weights themselves."""
    error = torch.cat([(made[name] - exact[name]).flatten() for name in exact])
    return float(error.norm() / torch.cat([each.flatten() for each in exact.values()]).norm())


@torch.no_grad()
def random_means(
    manifold: Manifold, architecture: Architecture, samples: int, seed: int
) -> dict[str, Tensor]:
    """The mean of K independent samples (the first exact), tensor by tensor."""
    found = {}
    for site in sites(manifold.space, architecture).values():
        generator = torch.Generator().manual_seed(seed_of(seed, site.name))
        total, chunk = torch.zeros(()), 250
        for done in range(0, samples, chunk):
            at = coordinates(
                site,
                manifold.scale,
                noise=manifold.noise,
                samples=min(chunk, samples - done),
                generator=generator,
                noise_free_first=done == 0 and samples <= 1000,
            )
            total = total + manifold.representation(site, at.to(manifold.device)).sum(0).cpu()
        found[site.name] = total.flatten() * site.gain / samples
    return found


@torch.no_grad()
def even_means(
    manifold: Manifold, architecture: Architecture, samples: int, seed: int
) -> dict[str, Tensor]:
    """The same by `sample_site`."""
    return {
        site.name: sample_site(manifold, site, samples, seed).flatten()
        for site in sites(manifold.space, architecture).values()
    }


def error(asked: argparse.Namespace) -> dict[str, Any]:
    """How far the mean of K samples is from that of 10,000, and what K does to the score."""
    report: dict[str, Any] = {}
    held = {path.parent.name: checkpoint.read(path) for path in asked.manifolds}
    held["tiny-mlp"] = small_mlp(asked.run, asked.data)
    for name, manifold in held.items():
        if not manifold.noise:
            continue
        space = manifold.space
        architecture = space.architecture(space.width[0])
        exact = random_means(manifold, architecture, asked.exact, 99)
        rows = []
        for samples in (1, 2, 4, 5, 8, 16, 32, 50, 64, 128):
            row: dict[str, Any] = {"samples": samples}
            for kind, means in (("random", random_means), ("even", even_means)):
                errors = [
                    distance(means(manifold, architecture, samples, seed), exact)
                    for seed in range(8)
                ]
                row[kind] = round(statistics.median(errors), 5)
            work = partial(drawn, manifold, architecture, samples)
            row["seconds"] = round(median(work, 3), 4)
            rows.append(row)
            print(name, row, flush=True)
        report[name] = {"error": rows, "score": scores(manifold, asked)}
        print(name, report[name]["score"], flush=True)
    draw(report, asked.figure)
    return report


def scores(manifold: Manifold, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """By width and K."""
    loaded = data.load("digits" if manifold.space.name == "lenet" else "cifar10", asked.data)
    task = TASKS[manifold.contract.task]
    rows = []
    for width in (1.0, 0.5, manifold.space.width[0]):
        architecture = manifold.space.architecture(width)
        row: dict[str, Any] = {"width": width}
        for samples in (1, 4, 8, 16, 50):
            weights = dict(sample(manifold, architecture, samples=samples))
            row[str(samples)] = round(score(manifold.space, architecture, weights, loaded, task), 2)
        rows.append(row)
    return rows


def draw(report: dict[str, Any], path: Path) -> None:
    """Error against K, on logarithmic axes."""
    curves = {
        f"{name}, {kind}": [(row["samples"], row[kind]) for row in found["error"]]
        for name, found in report.items()
        for kind in ("random", "even")
    }
    plots.convergence(curves, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifolds", type=Path, nargs="*", default=[])
    parser.add_argument("--exact", type=int, default=10_000, help="samples of the mean compared to")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--run", type=Path, default=Path(tempfile.gettempdir()) / "tiny-mlp")
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/samples.svg"))
    asked = parser.parse_args()
    asked.run.mkdir(parents=True, exist_ok=True)
    told = {"hardware": hardware(), "threads": torch.get_num_threads(), "device": DEVICE.type}
    print(json.dumps({"benchmark": "error", **told, "result": error(asked)}))


if __name__ == "__main__":
    main()
