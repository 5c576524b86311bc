"""Sampling a whole network: every network, INR, K, width and precision, the published way beside ours.

    python -m benchmarks.sample                                     # the table
    python -m benchmarks.sample --inrs paper --samples 50 --networks resnet20

Each network and INR has a process of its own, whose peak memory is told. `paper` is the supplement's
INR (8 layers of 512, 32 frequencies, one per tensor), `mlp` a small one, `grid` and `integral` the
learned grids; parameters are random, which costs the same. The published way exists for the MLPs.
Prints a table; last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch

from benchmarks.local import hardware
from benchmarks.manifolds import random_manifold, space
from benchmarks.published import (
    DEVICE,
    flops,
    matrix_rate,
    peak,
    published,
    seconds,
)
from neumeta import wire
from neumeta.manifold import Manifold
from neumeta.representation.mlp import ResidualMLP
from neumeta.sample import sample
from neumeta.space import Architecture

NETWORKS = {"lenet": None, "resnet-mnist": (1, 3), "resnet20": None}
"""The networks, folded, and the trained range of their depth."""
INRS: dict[str, tuple[str, dict[str, Any]]] = {
    "paper": ("mlp", {"layers": 8, "hidden": 512, "num_freq": 32}),
    "mlp": ("mlp", {"layers": 5, "hidden": 128, "num_freq": 16}),
    "grid": ("grid", {}),
    "integral": ("integral", {}),
}
PRECISIONS = ("float32", "tf32", "bfloat16") if DEVICE.type == "cuda" else ("float32", "bfloat16")


def drain(
    manifold: Manifold, architecture: Architecture, samples: int, dtype: str
) -> tuple[float, float]:
    """Materialize as the service does; the seconds to the first tensor's bytes and to the last's."""
    plan = wire.plan(manifold, architecture, dtype)
    began, first = time.perf_counter(), 0.0
    chunks = wire.stream(plan, sample(manifold, architecture, samples=samples))
    next(chunks)  # the header, which the plan has
    for _ in chunks:
        first = first or time.perf_counter() - began
    return first, time.perf_counter() - began


def lowered(manifold: Manifold, precision: str) -> bool:
    """Whether this precision means anything here; from now on it is the manifold's."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    if not isinstance(manifold.representation, ResidualMLP):
        return precision == "float32"
    if precision == "bfloat16":
        manifold.representation.lower(torch.bfloat16)
    return True


def measured(asked: argparse.Namespace) -> dict[str, Any]:
    """All rows of one network and INR."""
    (network,), (inr,) = asked.networks, asked.inrs
    kind, options = INRS[inr]
    manifold = random_manifold(space(network, blocks=NETWORKS[network]), kind, options, noise=0.5)
    manifold.representation.to(DEVICE)
    is_mlp, loaded, rows = kind == "mlp", peak(), []
    for precision in asked.precisions:
        if not lowered(manifold, precision):
            continue
        for width in asked.widths:
            architecture = manifold.space.architecture(width)
            drain(manifold, architecture, 1, "float32")
            for samples in asked.samples:
                rows.append(row(asked, manifold, architecture, samples, precision))
                rows[-1] = {"network": network, "inr": inr, "width": width, **rows[-1]}
    return {"rows": rows, "published": is_mlp, "loaded_mb": round(loaded), "peak_mb": round(peak())}


def row(
    asked: argparse.Namespace,
    manifold: Manifold,
    architecture: Architecture,
    samples: int,
    precision: str,
) -> dict[str, Any]:
    """One size, K and precision: both ways and the matrix rate, in turn, medians."""
    found: dict[str, list[float]] = {}
    first = []
    for _ in range(asked.rounds):
        found.setdefault("rate", []).append(matrix_rate())
        if isinstance(manifold.representation, ResidualMLP) and precision == "float32":
            work = partial(published, manifold, architecture, asked.baseline)
            found.setdefault("theirs", []).append(seconds(work) / asked.baseline)
        for dtype in wire.KINDS if samples == 1 and precision == "float32" else ("float32",):
            start, whole = drain(manifold, architecture, samples, dtype)
            first.append(start)
            found.setdefault(dtype, []).append(whole)
    middle = {key: statistics.median(values) for key, values in found.items()}
    told: dict[str, Any] = {"samples": samples, "precision": precision}
    told |= {
        f"ms_{dtype}": round(1000 * middle[dtype], 2) for dtype in wire.KINDS if dtype in middle
    }
    told["ms_to_the_first_tensor"] = round(1000 * statistics.median(first), 2)
    told["matrix_gflops"] = round(middle["rate"], 1)
    if isinstance(manifold.representation, ResidualMLP):
        done = flops(manifold, architecture, split=True) * samples / middle["float32"] / 1e9
        told["of_matrix_rate"] = round(done / middle["rate"], 3)
    if "theirs" in middle:
        before = flops(manifold, architecture, split=False) / middle["theirs"] / 1e9
        told["published_ms"] = round(1000 * middle["theirs"] * samples, 2)
        told["published_of_matrix_rate"] = round(before / middle["rate"], 3)
        told["ratio"] = round(middle["theirs"] * samples / middle["float32"], 2)
    return told


def apart(asked: argparse.Namespace, network: str, inr: str) -> dict[str, Any]:
    """`measured` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.sample", "--networks", network, "--inrs", inr]
    for name in ("widths", "samples", "precisions", "baseline", "rounds"):
        value = getattr(asked, name)
        command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(told.splitlines()[-1])["result"][0]
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    columns = (
        ("network", "network"), ("INR", "inr"), ("width", "width"), ("K", "samples"),
        ("precision", "precision"), ("ms", "ms_float32"), ("of matrix rate", "of_matrix_rate"),
        ("published, ms", "published_ms"), ("of matrix rate", "published_of_matrix_rate"),
        ("ratio", "ratio"),
    )  # fmt: skip
    lines = ["| " + " | ".join(title for title, _ in columns) + " |"]
    lines.append("|---|---|" + "---:|" * (len(columns) - 2))
    lines += [
        "| " + " | ".join(str(each.get(key, "")) for _, key in columns) + " |" for each in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--inrs", nargs="+", choices=list(INRS), default=list(INRS))
    parser.add_argument("--widths", type=float, nargs="+", default=[1.0, 0.5])
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 8, 50])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--baseline", type=int, default=3, help="samples of the published way")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    groups = []
    if len(asked.networks) == len(asked.inrs) == 1:
        groups.append(measured(asked))
    else:
        for network in asked.networks:
            for inr in asked.inrs:
                groups.append(apart(asked, network, inr))
                print(f"{network}, {inr}: {groups[-1]['peak_mb']} MB", file=sys.stderr, flush=True)
    print(table([each for group in groups for each in group["rows"]]))
    told = {"hardware": hardware(), "threads": torch.get_num_threads(), "device": DEVICE.type}
    print(json.dumps({"benchmark": "sample", **told, "result": groups}))


if __name__ == "__main__":
    main()
