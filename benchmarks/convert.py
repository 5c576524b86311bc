"""Manifolds of version 0.1 -> version 0.2, once: the hand-written family becomes a traced graph, kriged
batch statistics become a calibration batch and statistics kept for the sizes people ask for most.

    python -m benchmarks.convert OLD.safetensors NEW.safetensors --data FOLDER

Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from neumeta import checkpoint, wire
from neumeta.manifold import Contract, Manifold, roles
from neumeta.representation import build
from neumeta.representation.base import module_key
from neumeta.space import Space
from training import data, networks, statistics
from training.trace import trace


def source_module(family: str, depth: tuple[int, ...]) -> tuple[torch.nn.Module, tuple[int, ...]]:
    """The built-in network of a 0.1 family, and the shape of its images."""
    if family == "resnet-cifar":
        return networks.resnet_cifar(depth, shortcut="conv"), (3, 32, 32)
    if family == "resnet-mnist":
        return networks.resnet_mnist(depth), (1, 28, 28)
    return networks.lenet(), (1, 8, 8)


DEPTHS = {f"resnet{6 * n + 2}": (n, n, n) for n in (3, 5, 7, 9)}
NORMS = {"conv1": "bn1", "conv2": "bn2", "shortcut": "bn3"}


def renamed(role: str) -> str:
    """A role of version 0.1 -> the tensor's name in the graph."""
    # The MNIST network's roles had no place for the block's number.
    role = re.sub(r"^(stage\d)\.(conv\d)", r"\1.n.\2", role)
    layer, _, kind = role.rpartition(".")
    if kind not in ("gamma", "beta"):
        return role
    stem, dot, last = layer.rpartition(".")
    return f"{stem}{dot}{NORMS[last]}.{'weight' if kind == 'gamma' else 'bias'}"


def account(about: dict[str, Any], space: Space) -> dict[str, Any]:
    """The file's account of itself in the words of 0.2: scores, and channels by extent."""
    about["source"] |= {"score": about["source"].pop("accuracy"), "metric": "accuracy"}
    for row in about["evaluation"]:
        row |= {"score": row.pop("accuracy"), "metric": "accuracy"}
        width = row["width"] if space.extents else 1.0
        here = space.architecture(width, row["depth"] or None, extrapolate=True)
        row["channels"] = list(here.channels)
        cost = space.cost(here)
        assert cost == {key: row[key] for key in cost}, row
    return about


def convert(path: Path) -> Manifold:
    """The manifold of a 0.1 file, without batch statistics."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["neumeta"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    given = header["space"]
    depth = {"lenet": (), "resnet-mnist": (2, 2), **DEPTHS}[given["arch"]]
    module, shape = source_module(given["family"], depth)
    graph, _ = trace(module, torch.zeros(1, *shape))
    if not header["norm"]:
        graph = graph.folded
    blocks = tuple(given["blocks"]) if given["blocks"] else None
    # Width that does not morph keeps its axes constant.
    patterns = given["morph"] if given["width"][0] < given["width"][1] else []
    graph = graph.morphing(patterns, depth=blocks is not None)
    named = {n: d for n, d in DEPTHS.items() if blocks and given["family"] == "resnet-cifar"}
    space = Space(given["arch"], graph, tuple(given["width"]), blocks, 9, named)
    old: dict[str, Any] = header["representation"]["options"]
    options: dict[str, Any] = {
        "nodes": old.get("nodes", 1),
        "stepped": old.get("stepped", False),
        "corrected": {"orders": old.get("orders", 3), "depths": old.get("depths", False)},
    }
    if old.get("reach"):
        options["anchored"] = {
            "reach": old["reach"],
            "growth": old.get("growth", 1.0),
            "nodes": old.get("nodes", 1),
            "stepped": old.get("stepped", False),
        }
    made = build("grid", options, roles(space))
    state: dict[str, Tensor] = {}
    inner = "inner.inner" if "anchored" in options else "inner"
    places = {
        "grid": f"{inner}.grid",
        "source": "inner.source.grid",
        "outputs": "rows",
        "inputs": "columns",
    }
    for name, tensor in tensors.items():
        if name.startswith("inr."):
            part, _, key = name.removeprefix("inr.").partition(".")
            state[f"{places[part]}.{module_key(renamed(key.replace('/', '.')))}"] = tensor
    made.load_state_dict(state)
    normalisation = header["normalisation"]
    contract = Contract(
        tuple(normalisation["mean"]), tuple(normalisation["std"]), tuple(header["labels"])
    )
    frozen = {k.removeprefix("frozen."): v for k, v in tensors.items() if k.startswith("frozen.")}
    return Manifold(
        space,
        made.eval().requires_grad_(False),
        "grid",
        options,
        header["noise"],
        header["samples"],
        header["scale"],
        contract,
        frozen,
        about=account(header["about"], space),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--data", type=Path, help="folder of the data sets (default $NEUMETA_DATA or data)"
    )
    parser.add_argument("--calibration", type=int, default=128, help="images that are carried")
    arguments = parser.parse_args()
    manifold = convert(arguments.old)
    name = manifold.about.get("data", {}).get("name") or manifold.about["recipe"]["data"]
    loaded = data.load(name if isinstance(name, str) else name["name"], arguments.data)
    statistics.calibrate(manifold, loaded, calibration=arguments.calibration)
    for row in manifold.about["evaluation"]:  # a pulled file now holds its graph
        width = row["width"] if manifold.space.extents else 1.0
        size = manifold.space.architecture(width, row["depth"] or None, extrapolate=True)
        row["bytes"] = wire.plan(manifold, size, "float32").length
    digest = checkpoint.write(manifold, arguments.new)
    print(json.dumps({"bytes": arguments.new.stat().st_size, "sha256": digest}))


if __name__ == "__main__":
    main()
