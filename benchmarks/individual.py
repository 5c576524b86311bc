"""Networks trained individually at each width, beside the manifold's: the honest comparison.

Each is the same ResNet-20 with its channels scaled, trained from scratch on the same images with the
same augmentation, optimiser, batch and number of epochs as the manifold. Resumable per epoch.
Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import replace
from pathlib import Path

import torch

from neumeta.network import Network
from training import data, recipe, source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="cifar10-resnet20")
    parser.add_argument("--widths", type=float, nargs="+", default=[0.25, 0.35, 0.5, 0.75, 1.0])
    parser.add_argument("--run", type=Path, default=Path("runs/individual"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--lr", type=float, default=0.1)
    arguments = parser.parse_args()
    asked = recipe.load(arguments.recipe)
    loaded = data.load(asked.data, arguments.data)
    space = replace(asked.space, width=(0.01, 1.0))
    arguments.run.mkdir(parents=True, exist_ok=True)
    rows = []
    for width in arguments.widths:
        architecture = space.architecture(width)
        torch.manual_seed(asked.seed)
        sizes = space.sizes(architecture)
        net = Network(asked.family, architecture.depth, sizes, norm=True)
        began = time.monotonic()
        source.train(
            net,
            loaded,
            epochs=round(asked.epochs),
            lr=arguments.lr,
            batch=asked.batch,
            seed=asked.seed,
            state=arguments.run / f"{width:g}.pt",
            label=f"width {width:g}",
        )
        score = source.accuracy(net, loaded.test_images, loaded.test_labels, loaded)
        rows.append(
            {
                "width": width,
                "channels": list(architecture.channels),
                "accuracy": round(score, 2),
                "seconds": round(time.monotonic() - began),
            }
        )
        print(f"width {width:<5g} {score:.2f} %", flush=True)
        (arguments.run / "individual.json").write_text(json.dumps(rows, indent=1))
    hardware = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(json.dumps({"hardware": hardware, "epochs": asked.epochs, "individual": rows}))


if __name__ == "__main__":
    main()
