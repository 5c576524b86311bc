"""The README's pictures, from what training runs and benchmarks left behind.

    python -m benchmarks.figures --runs runs --out docs/figures

Draws what it finds: RUNS/<recipe>/evaluation.json, and the source network of RUNS/cifar10-resnet for
the weights before and after permutation (`benchmarks.quality --report` draws the comparison). Equal
results give equal files. Last line: one JSON object with the files written.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from neumeta.fold import fold
from training import networks, order, plots, recipe, recipe_file, source
from training.trace import trace

TENSOR = "layer3.1.conv1.weight"


def rows_of(path: Path) -> Any:
    """The JSON of a result file, or None where the run was not made."""
    return json.loads(path.read_text()) if path.exists() else None


def permuted(run: Path, asked: recipe.Recipe) -> dict[str, torch.Tensor]:
    """One tensor of the run's source network under 'none' and under the recipe's strategy."""
    net = networks.BUILT_IN[asked.network.network](10, 3)
    source.restore(net, run / "source.safetensors")
    graph, _ = trace(net, torch.zeros(1, 3, 32, 32))
    folded = fold(graph, source.tensors(net, graph.tensors))
    found = order.cliques(graph.folded)
    orders = order.order(folded, found, asked.order.strategy, seed=asked.seed, sizes=graph.full)
    after = order.apply(folded, found, orders)
    return {"as trained": folded[TENSOR], f"after {asked.order.strategy}": after[TENSOR]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    written = []
    for name in ("tiny", "cifar10-resnet", "cifar10-resnet20-last-block", "mnist-resnet-depth"):
        run, asked = arguments.runs / name, recipe_file.load(name)
        report = rows_of(run / "evaluation.json")
        if report is None:
            continue
        path = arguments.out / f"{name}.svg"
        rows, before = report["evaluation"], report["source_score"]
        plots.evaluation(rows, asked, before, path)
        written.append(str(path))
        if name == "cifar10-resnet" and (run / "source.safetensors").exists():
            path = arguments.out / "permutation.svg"
            plots.kernels(permuted(run, asked), TENSOR, path)
            written.append(str(path))
    print(json.dumps({"written": written}))


if __name__ == "__main__":
    main()
