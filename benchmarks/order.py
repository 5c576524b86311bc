"""Channel orders of large cliques: every clique of a random resnet50, and planted paths.

    python -m benchmarks.order

Random weights in the shapes of torchvision's resnet50, traced: 37 cliques of 64 to 2,048 channels.
The planted paths are points on a noisy curve in 200 dimensions, in random order; where fast-tsp is
installed (MIT), it solves the same matrices in five seconds each. Two threads, on the CPU; the last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.local import hardware
from benchmarks.manifolds import SHAPES, graph_of, module
from neumeta.fold import fold
from neumeta.graph import Graph
from training.order import Side, apply, cliques, distances, order, total_variation
from training.tour import STRATEGIES, length, prices

ORDERS = ("none", "layer-greedy", "layer-2opt", "mshp")


def weights_of(net: nn.Module, graph: Graph) -> dict[str, Tensor]:
    """The folded weights of a traced module, as they are ordered."""
    state = {name: net.state_dict()[name] for name in graph.tensors}
    return fold(graph, state)


def planted(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances of points on a noisy curve, shuffled, and the order along the curve."""
    generator = torch.Generator().manual_seed(seed)
    along = torch.rand(n, 1, generator=generator, dtype=torch.float64)
    speed, phase = (6 * torch.randn(1, 200, generator=generator).double() for _ in range(2))
    noise = 0.1 * torch.randn(n, 200, generator=generator).double()
    points = torch.sin(along * speed + phase) + noise
    return distances({"points": points}, [Side("points", 0)]), along.flatten().argsort().numpy()


def fast_tsp(distance: np.ndarray) -> float | None:
    """The length of the path that fast-tsp finds in five seconds, or None where it is missing."""
    if importlib.util.find_spec("fast_tsp") is None:
        return None
    import fast_tsp as solver  # type: ignore[import-not-found,unused-ignore]

    n = len(distance)
    whole = np.pad(distance * (65000 / distance.max()), (0, 1)).round().astype(int)
    tour = solver.find_tour(whole.tolist(), duration_seconds=5)
    start = tour.index(n)
    return length(np.array(tour[start + 1 :] + tour[:start]), distance)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--network", default="resnet50", choices=list(SHAPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--largest", type=int, default=2048, help="leave larger planted paths out")
    asked = parser.parse_args()
    torch.set_num_threads(2)
    graph = graph_of(asked.network)
    weights, sides_of = weights_of(module(asked.network, asked.seed), graph), cliques(graph.folded)
    rows: list[dict[str, object]] = []

    print("| channels | cliques | none | layer-greedy | layer-2opt | mshp | seconds of mshp |")
    print("|---:" * 7 + "|")
    found: dict[int, list[tuple[list[float], float]]] = {}
    all_orders, total = {}, 0.0
    for axis, sides in sides_of.items():
        lengths = []
        distance = distances(weights, sides, graph.full[axis])
        for strategy in ORDERS:
            began = time.perf_counter()
            orders = order(weights, sides_of, strategy, asked.seed, axes=[axis], sizes=graph.full)
            seconds = time.perf_counter() - began
            lengths.append(length(orders[axis].numpy(), distance))
        assert lengths[-1] <= min(lengths), axis
        total += seconds
        all_orders.update(orders)
        found.setdefault(len(distance), []).append((lengths, seconds))
    for channels, each in sorted(found.items()):
        sums = np.sum([lengths for lengths, _ in each], 0)
        seconds = sum(seconds for _, seconds in each)
        print(
            f"| {channels} | {len(each)} | "
            + " | ".join(f"{value:.1f}" for value in sums)
            + f" | {seconds:.1f} |",
            flush=True,
        )
        lengths_by_order = dict(
            zip(ORDERS, (round(float(value), 2) for value in sums), strict=True)
        )
        rows.append(
            {
                "channels": channels,
                "cliques": len(each),
                "length": lengths_by_order,
                "seconds": round(seconds, 2),
            }
        )
    before = total_variation(weights)
    after = total_variation(apply(weights, sides_of, all_orders))
    print(f"{asked.network}: {total:.1f} s, TV {before:.0f} to {after:.0f}\n")

    print("| planted, channels | shuffled | planted | layer-2opt | mshp | fast-tsp | bound | s |")
    print("|---:" * 8 + "|")
    paths: list[dict[str, object]] = []
    for n in (n for n in (64, 256, 512, 1024, 2048) if n <= asked.largest):
        distance, curve = planted(n, asked.seed)
        rng = np.random.default_rng(asked.seed)
        began = time.perf_counter()
        ours = length(STRATEGIES["mshp"](distance, distance, rng), distance)
        seconds = time.perf_counter() - began
        values = {
            "shuffled": length(np.arange(n), distance),
            "planted": length(curve, distance),
            "layer-2opt": length(STRATEGIES["layer-2opt"](distance, distance, rng), distance),
            "mshp": ours,
            "fast-tsp": fast_tsp(distance),
            "bound": prices(distance, ours, 200)[1],
            "seconds": seconds,
        }
        shown = [f"{v:.1f}" if v is not None else "-" for v in values.values()]
        print(f"| {n} | " + " | ".join(shown) + " |", flush=True)
        paths.append({"channels": n, **values})
    print(
        json.dumps(
            {
                "benchmark": "order",
                "hardware": hardware(),
                "threads": 2,
                "torch": torch.__version__,
                "seed": asked.seed,
                "network": asked.network,
                "seconds": round(total, 2),
                "tv_before": before,
                "tv_after": after,
                "cliques": rows,
                "planted": paths,
            }
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
