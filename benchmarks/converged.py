"""Networks trained individually until they have converged: what one manifold has to be as good as.

    python -m benchmarks.converged --size 3.3.3/8.16.32 --pixels runs/pixels/cifar10-pixels.npz
    python -m benchmarks.converged --manifold runs/cifar10-vgg/manifold.safetensors --size /16.32.64 \\
        --build training/recipes/vgg.py:build --results docs/results/vgg --pixels ...

One network of one size from scratch, taught by the manifold's own source, with its optimiser,
augmentation and growing images, on JPEG copies or (`--pixels`) on what the manifold was trained on.
`--build` makes the network, called with `classes` and `widths`; without it, it is a CIFAR ResNet.
The row (size, seed, epochs, precision, scores on raw and on JPEG test images, passes, seconds) goes to
RESULTS/individual.json, so that no run is made twice; training resumes from RUN. Last line: one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.local import hardware
from benchmarks.passes import area
from benchmarks.reach import raw
from neumeta import atomic, checkpoint
from neumeta.program import Program
from training import data, modules, networks, source, statistics
from training.task import TASKS
from training.teacher import Views

VIEWS, RESOLUTIONS, TEACHER_WEIGHT = 4, (0.5, 0.75, 1.0, 1.0), 0.8
"""Those of the recipes of its charts for few blocks and small sizes."""
LR = 0.1
"""At a batch of 128; it grows with the batch (Goyal et al., 2017)."""


def made(build: str, depth: list[int], channels: list[int], classes: int) -> nn.Module:
    """A network of this size, untrained."""
    if build:
        return modules.resolve(build, {"classes": classes, "widths": channels})
    return networks.resnet_cifar(tuple(depth), classes, tuple(channels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--manifold", type=Path, default=Path("models/resnet20-cifar10.safetensors")
    )
    parser.add_argument("--size", required=True, help="blocks/channels by stage: 3.3.3/8.16.32")
    parser.add_argument("--build", default="", help="'file.py:function' or 'module:function'")
    parser.add_argument("--bfloat16", action="store_true", help="as in a recipe's [fit]")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--pixels", type=Path, help="training images of benchmarks.pixels; else the JPEG copies"
    )
    parser.add_argument("--run", type=Path, default=Path("runs/converged"))
    parser.add_argument("--data", type=Path, help="default $NEUMETA_DATA")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args()
    path = arguments.results / "individual.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    depth, channels = ([int(n) for n in part.split(".") if n] for part in arguments.size.split("/"))
    named = {
        "channels": channels,
        "depth": depth,
        "seed": arguments.seed,
        "epochs": arguments.epochs,
        "batch": arguments.batch,
        "images": "pixels" if arguments.pixels else "jpeg",
        "bfloat16": arguments.bfloat16,
    }
    manifold = checkpoint.read(arguments.manifold)
    taught = {"teacher": manifold.digest[:16]}
    # Of the first rows the precision is known and the teacher was not written down.
    if any(
        (named | taught).items() <= ({"bfloat16": False} | taught | row).items() for row in rows
    ):
        print(json.dumps({"benchmark": "converged", "kept": named}))
        return
    space, task = manifold.space, TASKS[manifold.contract.task]
    if not arguments.build and space.name != "resnet20":
        parser.error(f"--build: what makes a network of {space.name} of any width")
    jpeg = data.load("cifar10", arguments.data)
    images = jpeg
    if arguments.pixels:
        with np.load(arguments.pixels) as held:
            images = replace(jpeg, train_images=torch.from_numpy(held["train_images"]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    card = f"{torch.cuda.get_device_name()}; " if device == "cuda" else ""
    arguments.run.mkdir(parents=True, exist_ok=True)
    program, weights = (
        Program(space.graph, space.graph.full),
        {name: value.to(device) for name, value in statistics.whole(manifold, space.full).items()},
    )

    def teacher(x: torch.Tensor) -> torch.Tensor:
        held: torch.Tensor = task.read(program.run(weights, x.to(device)))
        return held

    own = f"{named['images']}-{manifold.digest[:16]}"
    answers = arguments.run / f"teacher-{own}-{arguments.seed}.pt"
    views = Views(images, teacher, VIEWS, arguments.seed, answers)
    torch.manual_seed(arguments.seed)
    net = made(arguments.build, depth, channels, len(jpeg.classes))
    size = arguments.size.replace("/", "-")
    bits = 16 if arguments.bfloat16 else 32
    run = f"{arguments.epochs}-{arguments.seed}-{arguments.batch}-{bits}-{own}"
    label = f"{size}-{run}"
    began = time.monotonic()
    source.train(
        net,
        images,
        task,
        epochs=arguments.epochs,
        lr=LR * arguments.batch / 128,
        batch=arguments.batch,
        seed=arguments.seed,
        state=arguments.run / f"{label}.pt",
        label=label,
        teacher=views,
        teacher_weight=TEACHER_WEIGHT,
        resolutions=RESOLUTIONS,
        bfloat16=arguments.bfloat16,
    )
    widths = [here / whole for here, whole in zip(channels, space.full.channels, strict=True)]
    cost = space.cost(space.architecture(widths, depth or None, extrapolate=True))
    relative = cost["macs"] / space.cost(space.full)["macs"]
    root = arguments.data or Path(os.environ.get("NEUMETA_DATA", "data"))
    row = {
        **named,
        **taught,
        "macs": cost["macs"],
        "raw": round(source.score(net, raw(jpeg, root), task), 2),
        "jpeg": round(source.score(net, jpeg, task), 2),
        "passes": round(arguments.epochs * len(images) * relative * area(RESOLUTIONS)),
        "seconds": round(time.monotonic() - began),
        "hardware": f"{card}{hardware()}",
    }
    # Another run may have written a row meanwhile.
    rows = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, json.dumps([*rows, row], indent=1))
    print(json.dumps({"benchmark": "converged", **row}))


if __name__ == "__main__":
    main()
