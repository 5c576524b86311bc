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
from benchmarks.published import DEVICE, all_sites, median, peak, random_manifold
from neumeta import family
from neumeta.architecture import Space
from neumeta.family import Family, Layer
from neumeta.sample import sample


def _resnet18(depth: tuple[int, ...]) -> tuple[Layer, ...]:
    layers = [Layer("conv1", "layer1", "image", 7, "bn1", 0, 0, 1, 2, "conv1")]
    before = "layer1"
    for stage in range(4):
        axis = f"layer{stage + 1}"
        for block in range(2):
            at, inner, place = f"{axis}.{block}", f"{axis}.{block}.inner", (stage, 0, 1, 4 << stage)
            layers.append(Layer(f"{at}.conv1", inner, before, 3, None, *place, f"{at}.conv1"))
            layers.append(Layer(f"{at}.conv2", axis, inner, 3, None, *place, f"{at}.conv2"))
            if before != axis:
                name = f"{at}.shortcut"
                layers.append(Layer(name, axis, before, 1, None, *place, name))
            before = axis
    layers.append(Layer("linear", "classes", before, 0, None, 3, 0, 1, 0, "linear"))
    return tuple(layers)


RESNET18 = Family(
    "resnet-imagenet",
    (64, 128, 256, 512),
    {"resnet18": (2, 2, 2, 2)},
    2,
    3,
    224,
    _resnet18,
    lambda axis: int(axis[5]) - 1 if axis.startswith("layer") else None,
)


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
    family.FAMILIES[RESNET18.name] = RESNET18
    space = Space(RESNET18.name, "resnet18", 1000, ("*",), (0.1, 1.0))
    manifold = random_manifold(space, {"layers": 4, "hidden": 128, "num_freq": 8})
    small = space.architecture(0.1)
    for _ in sample(manifold, small, samples=1):
        pass  # what is loaded once is loaded
    architecture = space.architecture(width)
    before = peak()

    def work() -> None:
        for _ in sample(manifold, architecture, samples=1):
            pass

    spent = median(work, 3)
    pairs = sum(site.outputs * site.inputs for site in all_sites(space, architecture))
    return {
        "parameters": space.cost(architecture)["parameters"],
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
