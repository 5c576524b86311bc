"""Time and memory of a ResNet-18 of ImageNet shape against its number of parameters.

    python -m benchmarks.scale

From a residual MLP of 4 layers of 128 with random parameters, one exact sample, 0.3 to 11.7 M
parameters, each size in a process of its own. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch

from benchmarks.local import hardware
from benchmarks.manifolds import random_manifold, space
from benchmarks.published import DEVICE, median, peak
from neumeta.sample import sample
from neumeta.sites import sites


def scale() -> dict[str, Any]:
    """Time and memory against the number of parameters, each size in a process of its own."""
    rows = []
    for width in (0.14, 0.25, 0.5, 0.75, 1.0):
        command = [sys.executable, "-m", "benchmarks.scale", "--width", str(width)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows.append(json.loads(told.splitlines()[-1]))
        print(rows[-1], flush=True)
    per = [row["seconds_per_million_pairs"] for row in rows]
    return {"rows": rows, "spread": round(max(per) / min(per) - 1, 3)}


def one(width: float) -> dict[str, Any]:
    """One size of `scale`."""
    covered = space("resnet18", width=(0.1, 1.0))
    options = {"layers": 4, "hidden": 128, "num_freq": 8}
    manifold = random_manifold(covered, "mlp", options)
    manifold.representation.to(DEVICE)
    small = covered.architecture(0.1)
    for _ in sample(manifold, small, samples=1):
        pass  # what is loaded once is loaded
    architecture = covered.architecture(width)
    before = peak()

    def work() -> None:
        for _ in sample(manifold, architecture, samples=1):
            pass

    spent = median(work, 3)
    made = sites(covered, architecture).values()
    pairs = sum(site.rows.count * site.columns.count for site in made)
    return {
        "parameters": covered.cost(architecture)["parameters"],
        "pairs": pairs,
        "seconds": round(spent, 3),
        "seconds_per_million_pairs": round(1e6 * spent / pairs, 3),
        "peak_above_loaded_mb": round(peak() - before, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=float, help="only this size, in this process")
    width = parser.parse_args().width
    if width:
        print(json.dumps(one(width)))
        return
    told = {"hardware": hardware(), "threads": torch.get_num_threads(), "device": DEVICE.type}
    print(json.dumps({"benchmark": "scale", **told, "result": scale()}))


if __name__ == "__main__":
    main()
