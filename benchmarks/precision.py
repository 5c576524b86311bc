"""What lower precision does to weights and scores: bytes on the wire, and an MLP's products.

    python -m benchmarks.precision --manifold models/resnet20-cifar10.safetensors

The wire: a manifold's networks rounded to float16 and bfloat16. Products: a residual MLP regressed on
the digits' network, in bfloat16 (`ResidualMLP.lower`) and in TF32, which is imitated where there is no
CUDA by rounding both factors of every product to 10 bits. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ablation import variants
from benchmarks.error import distance
from benchmarks.local import hardware
from benchmarks.prepared import prepare, score
from neumeta import checkpoint, wire
from neumeta.coordinates import coordinates
from neumeta.manifold import Manifold
from neumeta.representation.mlp import ResidualMLP
from neumeta.sample import sample
from neumeta.sites import sites
from training import data, fit
from training.task import TASKS


def on_the_wire(path: Path, root: Path | None, widths: list[float]) -> list[dict[str, Any]]:
    """Score of what a device receives, by dtype."""
    manifold, loaded = checkpoint.read(path), data.load("cifar10", root)
    rows = []
    for width in widths:
        architecture = manifold.space.architecture(width)
        exact = dict(sample(manifold, architecture))
        row: dict[str, Any] = {"width": width}
        for name, (dtype, _) in wire.KINDS.items():
            if name == "int8":  # benchmarks.dtypes
                continue
            made = {key: value.to(dtype).float() for key, value in exact.items()}
            task = TASKS[manifold.contract.task]
            found = score(manifold.space, architecture, made, loaded, task)
            row[name] = {"score": round(found, 2), "error": distance(made, exact)}
        rows.append(row)
        print(row, flush=True)
    return rows


def to_tf32(value: Tensor) -> Tensor:
    """Float32 rounded to TF32's 10 bits of mantissa, ties away from zero."""
    bits = value.detach().contiguous().view(torch.int32)
    return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def imitated(manifold: Manifold) -> dict[str, Tensor]:
    """The full-size network with every product of the MLP in imitated TF32."""

    def round_input(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (to_tf32(given[0]),)

    linear = [each for each in manifold.representation.modules() if isinstance(each, nn.Linear)]
    kept = [each.weight.data for each in linear]
    hooks = [each.register_forward_pre_hook(round_input) for each in linear]
    for each in linear:
        each.weight.data = to_tf32(each.weight.data)
    made, space = dict(manifold.frozen), manifold.space
    for site in sites(space, space.full).values():
        # With gradients on, for the hooks: the modules are called one by one.
        value = manifold.representation(site, coordinates(site, manifold.scale)).detach()[0]
        made[site.name] = (value * site.gain).reshape(site.shape)
    for each, weight, hook in zip(linear, kept, hooks, strict=True):
        each.weight.data = weight
        hook.remove()
    return made


def products(root: Path | None, run: Path, steps: int) -> dict[str, Any]:
    """Error and score of the network that an MLP makes, by the precision of its products."""
    asked = variants()["MLP, no noise"].changed(fit={"regression_steps": steps})
    ready = prepare(asked, root, run)
    manifold = ready.manifold
    fit.initialise(manifold, ready.smoothed, ready.targets, asked, lambda name, value, step: None)
    full, made = manifold.space.full, {}
    made["float32"] = dict(sample(manifold, full, samples=1))
    made["tf32, imitated"] = imitated(manifold)
    assert isinstance(manifold.representation, ResidualMLP)
    manifold.representation.lower(torch.bfloat16)
    made["bfloat16"] = dict(sample(manifold, full, samples=1))
    morphing = [name for name in made["float32"] if name not in manifold.frozen]
    found: dict[str, Any] = {}
    for name, weights in made.items():
        reached = score(manifold.space, full, weights, ready.data, ready.task)
        ours, exact = ({key: each[key] for key in morphing} for each in (weights, made["float32"]))
        found[name] = {"score": round(reached, 2), "error": distance(ours, exact)}
        print(name, found[name], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--manifold", type=Path, default=Path("models/resnet20-cifar10.safetensors")
    )
    parser.add_argument("--widths", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--steps", type=int, default=3000, help="of the MLP's regression")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--run", type=Path, default=Path(tempfile.gettempdir()) / "tiny-mlp")
    asked = parser.parse_args()
    report = {
        "products": products(asked.data, asked.run, asked.steps),
        "wire": on_the_wire(asked.manifold, asked.data, asked.widths),
    }
    told = {"hardware": hardware(), "threads": torch.get_num_threads()}
    print(json.dumps({"benchmark": "precision", **told, "result": report}))


if __name__ == "__main__":
    main()
