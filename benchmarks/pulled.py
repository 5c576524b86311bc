"""A run's manifold served, pulled at some sizes, loaded as a device does, and scored on test images.

    python -m benchmarks.pulled RUN --data FOLDER [--widths 1.0 0.5 ...] [--mixed 3] [--seed 0]

RUN is a folder of neumeta-train. A real neumeta-serve gets its manifold, neumeta-pull fetches each
file, `network.load` makes the module. Beside the listed widths, `--mixed` sizes with a random width for
each group, which no table holds. Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.local import Service, hardware
from neumeta import checkpoint, network
from neumeta.manifold import Manifold
from training import basis, recipe, recipe_file, source
from training.data import Data
from training.task import TASKS


def mixed(groups: int, low: float, high: float, chance: random.Random) -> str:
    """A random width for each group, as neumeta-pull takes them."""
    return ",".join(f"{chance.uniform(low, high):.3f}" for _ in range(groups))


def pull(service: Service, arch: str, width: str, out: Path) -> None:
    """One file through neumeta-pull."""
    asked = ["--url", service.url, "--arch", arch, "--width", width, "--out", str(out)]
    command = [sys.executable, "-m", "neumeta.command", *asked]
    subprocess.run(command, check=True, capture_output=True)


def score(path: Path, data: Data, task: str) -> float:
    """Of a pulled file on the test images, as a device runs it: pixels in 0..1 go in."""
    net = network.load(path)
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (data.mean, data.std))
    return source.score(lambda x: net((x * std + mean).clamp(0, 1)), data, TASKS[task])


def rows(
    service: Service, manifold: Manifold, data: Data, widths: list[str]
) -> list[dict[str, Any]]:
    """Size and score of each width's file."""
    found, space = [], manifold.space
    with tempfile.TemporaryDirectory() as folder:
        for number, width in enumerate(widths):
            path = Path(folder) / f"{number}.safetensors"
            pull(service, space.name, width, path)
            numbers = [float(part) for part in width.split(",")]
            architecture = space.architecture(numbers if len(numbers) > 1 else numbers[0])
            cost, value = space.cost(architecture), score(path, data, manifold.contract.task)
            row = {"width": width, **cost, "bytes": path.stat().st_size, "score": round(value, 2)}
            found.append(row)
            shown = (width, row["parameters"], row["macs"], row["bytes"], f"{value:.2f}")
            print("| " + " | ".join(map(str, shown)) + " |", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, help="folder of data sets (default: $NEUMETA_DATA)")
    parser.add_argument("--widths", nargs="+", default=["1.0", "0.75", "0.5", "0.25"])
    parser.add_argument("--mixed", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    file = asked.run / "manifold.safetensors"
    manifold = checkpoint.read(file)
    made = recipe.parse(manifold.about["recipe"], str(recipe_file.BUILT_IN / "of-the-run.toml"))
    data, space, chance = (
        basis.dataset(made, asked.data),
        manifold.space,
        random.Random(asked.seed),
    )
    widths = [*asked.widths]
    widths += [mixed(len(space.groups), *space.width, chance) for _ in range(asked.mixed)]
    before, metric = manifold.about["source"]["score"], manifold.contract.metric
    print(f"| width | parameters | MACs | bytes | {metric} (source: {before}) |")
    print("|---" + "|---:" * 4 + "|")
    with Service(file, "--device", "cpu") as service:
        found = rows(service, manifold, data, widths)
    told = {"hardware": hardware(), "seed": asked.seed, "file_bytes": file.stat().st_size}
    told |= {"source": before, "metric": metric, "rows": found}
    print(json.dumps({"benchmark": "pulled", **told}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
