"""Total variation of the public CIFAR-10 ResNets under every permutation strategy.

    NEUMETA_DATA=... python -m benchmarks.permutation

Needs the four public checkpoints (github.com/akamaster/pytorch_resnet_cifar10) in --checkpoints.
Prints a markdown table; the last line is one JSON object. One thread, on the CPU. "Above bound"
is the distance to a proven lower bound on what any permutation could reach, so it also bounds how far
`mshp` is from the optimum.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch

from benchmarks.local import hardware
from neumeta.fold import fold
from neumeta.program import Program, output
from training import networks, source
from training.order import apply, cliques, distances, order, total_variation
from training.tour import EXACT, STRATEGIES, length, prices
from training.trace import trace


@torch.no_grad()
def measure(path: Path, seed: int) -> list[dict[str, object]]:
    """One row per strategy for the network in `path`."""
    # "resnet20" has 6 n + 2 layers.
    blocks = (int(path.name.removeprefix("resnet").partition("-")[0]) - 2) // 6
    net = networks.resnet_cifar((blocks,) * 3).eval()
    source.fill(net, path)
    graph, _ = trace(net, torch.zeros(1, 3, 32, 32))
    weights, groups = fold(graph, source.tensors(net, graph.tensors)), cliques(graph.folded)
    program = Program(graph.folded, graph.full)
    # The source network takes normalised images: mean 0 and deviation 1 in each channel.
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    logits = output(program.run(weights, images))
    before = total_variation(weights)
    shortest = order(weights, groups, "mshp", seed)
    bound = total_variation(apply(weights, groups, shortest))
    for axis, sides in groups.items():
        distance = distances(weights, sides)
        reached = length(shortest[axis].numpy(), distance)
        if len(distance) > EXACT:
            bound -= reached - prices(distance, reached, 400)[1]
    rows: list[dict[str, object]] = []
    for strategy in STRATEGIES:
        began = time.process_time()
        orders = order(weights, groups, strategy, seed)
        seconds = time.process_time() - began
        permuted = apply(weights, groups, orders)
        after = total_variation(permuted)
        difference = output(program.run(permuted, images)) - logits
        rows.append(
            {
                "network": path.name.partition("-")[0],
                "cliques": len(groups),
                "strategy": strategy,
                "tv_before": round(before, 2),
                "tv_after": round(after, 2),
                "change_percent": round(100 * (after / before - 1), 2),
                "above_bound_percent": round(100 * (after / bound - 1), 2),
                "seconds": round(seconds, 2),
                "max_logit_difference": float(f"{difference.abs().max():.1e}"),
            }
        )
    return rows


def main() -> int:
    data = os.environ.get("NEUMETA_DATA")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=Path(data).parent / "checkpoints" if data else None,
        help="folder of the .th files (default: $NEUMETA_DATA/../checkpoints)",
    )
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    paths = sorted(asked.checkpoints.glob("resnet*.th")) if asked.checkpoints else []
    if not paths:
        parser.error(
            f"no resnet*.th in {asked.checkpoints}: pass --checkpoints or set NEUMETA_DATA"
        )
    torch.set_num_threads(1)
    heads = ("network", "strategy", "TV before", "TV after", "change", "above bound", "seconds")
    print("|", " | ".join((*heads, "max logit difference")), "|")
    print("|---|---" + "|---:" * 6 + "|")
    rows = []
    for path in paths:
        for row in measure(path, asked.seed):
            rows.append(row)
            print(
                f"| {row['network']} | {row['strategy']} | {row['tv_before']:.2f} "
                f"| {row['tv_after']:.2f} | {row['change_percent']:+.2f} % "
                f"| {row['above_bound_percent']:.2f} % | {row['seconds']:.2f} "
                f"| {row['max_logit_difference']:.1e} |",
                flush=True,
            )
    told = {"hardware": hardware(), "threads": 1, "torch": torch.__version__, "seed": asked.seed}
    print(json.dumps({"benchmark": "permutation", **told, "rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
