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
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.local import hardware
from benchmarks.manifolds import random_manifold, space
from benchmarks.published import network_of, per_pair
from neumeta.coordinates import coordinates
from neumeta.manifold import Manifold
from neumeta.program import Program, output
from neumeta.representation.mlp import ResidualMLP
from neumeta.sites import sites
from neumeta.space import Architecture
from training import fit
from training.layout import SoundConvolutions
from training.source import mixed
from training.task import TASKS


def steps(rounds: int, width: float) -> dict[str, Any]:
    """A step's parts, with the residual MLP and the learned grid, the plain way and ours."""
    over = space("resnet20", norm=True)
    x, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    mlp = {"layers": 5, "hidden": 128, "num_freq": 16}
    torch_layout, ours = torch.contiguous_format, torch.channels_last
    ways: tuple[tuple[str, str, dict[str, Any], Any, torch.memory_format], ...] = (
        ("mlp, plain", "mlp", mlp, plain_generated, torch_layout),
        ("mlp, ours", "mlp", mlp, fit.generated, ours),
        ("grid, plain", "grid", {"nodes": 0}, fit.generated, torch_layout),
        ("grid, ours", "grid", {"nodes": 0}, fit.generated, ours),
    )
    found: dict[str, Any] = {}
    architecture = over.architecture(width)
    for name, kind, options, make, layout in ways:
        deviation = None if kind == "mlp" else 0.05
        manifold = random_manifold(over, kind, options, noise=0.5, deviation=deviation)
        parameters = manifold.representation.requires_grad_(True).parameters()
        optimiser = torch.optim.AdamW(parameters, 1e-3)
        parts, losses = [], []
        step = partial(training_step, manifold, optimiser, architecture, make, layout, x, labels)
        for number in range(rounds):
            seconds_of, loss = step(number)
            parts.append(seconds_of)
            losses.append(round(loss, 5))
        medians = {key: round(statistics.median(p[key] for p in parts), 4) for key in parts[0]}
        found[name] = {**medians, "losses": losses}
        print(name, found[name], flush=True)
    return found


@SoundConvolutions()
def training_step(
    manifold: Manifold,
    optimiser: torch.optim.Optimizer,
    architecture: Architecture,
    make: Callable[..., dict[str, Tensor]],
    layout: torch.memory_format,
    x: Tensor,
    labels: Tensor,
    number: int,
) -> tuple[dict[str, float], float]:
    """The seconds of a step's parts, and its loss."""
    held = manifold.space
    program = Program(held.graph_of(architecture), held.sizes(architecture))
    ticks = [time.perf_counter()]
    made = make(manifold, architecture, 0.5, torch.Generator().manual_seed(number))
    leaves = {key: value.detach().requires_grad_() for key, value in made.items()}
    ticks.append(time.perf_counter())
    weights = {
        key: value.contiguous(memory_format=layout) if value.ndim == 4 else value
        for key, value in leaves.items()
    }
    logits = output(program.run(weights, x.contiguous(memory_format=layout)))
    loss = mixed(TASKS["classification"], logits, labels, None, 0.0)
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


def plain_generated(
    manifold: Manifold, architecture: Architecture, noise: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """What `fit.generated` makes, from every pair's own Fourier features."""
    model, found = manifold.representation, {}
    assert isinstance(model, ResidualMLP)
    for name, site in sites(manifold.space, architecture).items():
        at = coordinates(site, manifold.scale, noise=noise, generator=generator)
        made = per_pair(network_of(manifold, site), at.vectors().reshape(-1, 6))
        scale = model.get_buffer("scales")[model.order[site.role]] * site.gain
        found[name] = (made * scale).reshape(site.shape)
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
