"""A training step by parts: INR forward, network, INR backward, optimiser.

    python -m benchmarks.step

With the residual MLP and with the learned grid, each the plain way (Fourier features of every pair; the
network in torch's own layout) and ours, at a width whose channels are no multiple of 8 as most
are; the losses of both ways are printed. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from neumeta.architecture import Architecture, Space
from torch import Tensor

from benchmarks.local import hardware
from benchmarks.published import NORMALISATION, network_of, per_pair
from neumeta.coordinates import coordinates, sites
from neumeta.manifold import Manifold, representation
from neumeta.network import Network
from training import fit, forward, layout, source


def steps(rounds: int, width: float) -> dict[str, Any]:
    """A step's parts, with the residual MLP and the learned grid, the plain way and ours."""
    space = Space("resnet-cifar", "resnet20", 10, ("*",), (0.25, 1.0))
    x, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    found: dict[str, Any] = {}
    mlp = {"layers": 5, "hidden": 128, "num_freq": 16}
    ways: tuple[tuple[str, str, dict[str, Any], Any, Any], ...] = (
        ("mlp, plain", "mlp", mlp, plain_generated, plain_logits),
        ("mlp, ours", "mlp", mlp, fit.generated, forward.logits),
        ("grid, plain", "grid", {}, fit.generated, plain_logits),
        ("grid, ours", "grid", {}, fit.generated, forward.logits),
    )
    architecture = space.architecture(width)
    for name, kind, options, make, run in ways:
        torch.manual_seed(0)
        model = representation(kind, space, options, norm=True)
        names = [str(i) for i in range(10)]
        manifold = Manifold(space, model, kind, options, True, 0.5, 1, 64, NORMALISATION, names)
        optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
        parts, losses = [], []
        for number in range(rounds):
            seconds_of, loss = training_step(
                manifold, optimiser, architecture, make, run, x, labels, number
            )
            parts.append(seconds_of)
            losses.append(round(loss, 5))
        medians = {key: round(statistics.median(p[key] for p in parts), 4) for key in parts[0]}
        found[name] = {**medians, "losses": losses}
        print(name, found[name], flush=True)
    return found


@layout.SoundConvolutions()
def training_step(
    manifold: Manifold,
    optimiser: torch.optim.Optimizer,
    architecture: Architecture,
    make: Callable[..., dict[str, Tensor]],
    run: Callable[..., Tensor],
    x: Tensor,
    labels: Tensor,
    number: int,
) -> tuple[dict[str, float], float]:
    """The seconds of a step's parts, and its loss."""
    net = forward.skeleton(manifold, architecture)
    ticks = [time.perf_counter()]
    made = make(manifold, architecture, 0.5, torch.Generator().manual_seed(number))
    leaves = {key: value.detach().requires_grad_() for key, value in made.items()}
    ticks.append(time.perf_counter())
    weights = forward.parameters_of(manifold, architecture, leaves)
    loss = source.task_loss(run(net, weights, x), labels, None, 0.0)
    loss.backward()  # type: ignore[no-untyped-call]
    ticks.append(time.perf_counter())
    optimiser.zero_grad()
    torch.autograd.backward(list(made.values()), [leaf.grad for leaf in leaves.values()])
    ticks.append(time.perf_counter())
    optimiser.step()
    ticks.append(time.perf_counter())
    names = ("inr_forward", "network", "inr_backward", "optimiser")
    spans = [after - before for before, after in pairwise(ticks)]
    return dict(zip(names, spans, strict=True)), loss.item()


def plain_logits(net: Network, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network as it is: no padding, torch's own layout."""
    return torch.func.functional_call(net, weights, (x, 0))  # type: ignore[no-any-return]


def plain_generated(
    manifold: Manifold, architecture: Architecture, noise: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """What `fit.generated` makes, from every pair's own Fourier features."""
    found, layers = {}, manifold.space.table.layers(architecture.depth)
    for blocks in {layer.stage: layer.blocks for layer in layers if layer.blocks > 1}.values():
        fit.partition(blocks, 0.0, generator)  # the same draws afterwards
    for layer in layers:
        for site in sites(manifold.space, architecture, layer, norm=manifold.norm):
            at = coordinates(site, manifold.scale, noise=noise, generator=generator)
            mlp = network_of(manifold, site)
            v = at.vectors().reshape(-1, 6)
            made = per_pair(mlp, v) * site.gain
            shape = (site.outputs, site.inputs, *site.spatial)
            found[site.name] = made.reshape(shape if site.kind == "weight" else (site.outputs,))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=float, default=0.6)
    asked = parser.parse_args()
    told = {"hardware": hardware(), "threads": torch.get_num_threads()}
    print(json.dumps({"benchmark": "step", **told, "result": steps(asked.rounds, asked.width)}))


if __name__ == "__main__":
    main()
