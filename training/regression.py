"""Before any image: the representation takes the smoothed weights as they are, or regresses on them.

Every random choice of a step follows from (seed, step). Knows neither networks' files nor the task.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from neumeta.compute import COMPUTE
from neumeta.coordinates import Along, Coordinates, coordinates
from neumeta.manifold import Manifold
from neumeta.program import Program
from neumeta.representation.mlp import ResidualMLP, _Mlp
from neumeta.representation.wrappers import Anchored, Centred
from neumeta.sample import seed_of
from neumeta.sites import made, sites
from training import state as states
from training.copied import Copied, power
from training.data import Data
from training.divergence import check_step, check_tensors, gradient_norm
from training.processes import rank, world
from training.recipe import Recipe
from training.sizes import choose
from training.source import one_cycle
from training.statistics import training_images

Tensors = Mapping[str, Tensor]
"""Tensors of the graph by name: those of the smoothed source, or generated ones."""

ROWS = 16
"""Of each tensor in a step."""
IMAGES = 256
"""How many training images say what a filter's inputs are on average."""
WARM = 0.1
SAVE_EVERY = 500
"""Steps between two states on disk."""
LOG_EVERY = 20
"""Steps between two errors in the log."""


@torch.no_grad()
def targets(manifold: Manifold, source: Tensors, data: Data, seed: int) -> dict[str, Tensor]:
    """What the representation shall make of the source's tensors, at the source's size: the tensors
    themselves, or, where filters are centred, each filter without its mean, and each bias with what the
    filter's mean adds on average over training images."""
    space = manifold.space
    found = {name: source[name] for name in made(space.graph)}
    if not any(isinstance(each, Centred) for each in manifold.representation.modules()):
        return found
    device = manifold.device
    steps = {step.name: step for step in Program(space.graph, space.graph.full).steps}
    own = sites(space, space.full)

    def watch(name: str, value: Tensor) -> None:
        weight = steps[name].tensors.get("weight", "")
        if weight not in own or not own[weight].positive:
            return
        mean = source[weight].flatten(1).mean(1)
        even = mean.view(-1, *[1] * (source[weight].ndim - 1)).expand_as(source[weight])
        found[weight] = source[weight] - even
        bias = steps[name].tensors.get("bias")
        if bias is not None:
            added = COMPUTE[steps[name].op]((value,), {"weight": even}, steps[name].attributes)
            # A linear map's outputs are its last dimension, a convolution's channels its second.
            channel = added.ndim - 1 if steps[name].op == "linear" else 1
            others = [dimension for dimension in range(added.ndim) if dimension != channel]
            found[bias] = source[bias] + added.mean(others)

    x = training_images(data, IMAGES, seed_of(seed, "regression/images")).to(device)
    Program(space.graph, space.graph.full).run(source, x, watch=watch)
    return found


def initialise(
    manifold: Manifold,
    source: Tensors,
    goal: Tensors,
    recipe: Recipe,
    log: Callable[[str, float, int], None],
    copied: Copied | None = None,
    *,
    state: Path | None = None,
    resume: bool = False,
    deadline: float = math.inf,
) -> float | None:
    """Let the representation take the `goal`, which `targets` made of the `source`, or regress it on
    that: on ROWS random rows of every tensor in each step, with the noise of Algorithm 2. With a
    manifold that is `copied`, on what that one makes at the sizes that training draws. The file `state`
    is written every SAVE_EVERY steps, at the end and at the `deadline` (time.monotonic); with `resume`
    the regression goes on from it.

    Returns the relative error at the source's size: the mean over tensors of ||w - goal||^2 /
    ||goal||^2; None if the time was up before. Raises Diverged.
    """
    space, model = manifold.space, manifold.representation
    own = sites(space, space.full)
    filled = [model.fill(site, goal[name]) for name, site in own.items()]
    for each in model.modules():
        if isinstance(each, Anchored):  # which holds the source as it is
            for name, site in own.items():
                each.source.fill(site, source[name].half())
    done = all(filled) or _regress(manifold, goal, recipe, log, copied, state, resume, deadline)
    return error(manifold, goal) if done else None


def _regress(
    manifold: Manifold,
    goal: Tensors,
    recipe: Recipe,
    log: Callable[[str, float, int], None],
    copied: Copied | None,
    state: Path | None,
    resume: bool,
    deadline: float,
) -> bool:
    """Whether all steps were done."""
    model, steps = manifold.representation, recipe.fit.regression_steps
    space = manifold.space
    wanted_at = copied.at if copied else lambda size: goal
    ends = (space.full, *map(space.architecture, space.width)) if copied else (space.full,)
    values: dict[str, list[Tensor]] = {}
    for size in dict.fromkeys(ends):
        wanted = wanted_at(size)
        for name, site in sites(space, size).items():
            values.setdefault(site.role, []).append(wanted[name].flatten() / site.gain)
    networks: list[_Mlp] = []
    for each in model.modules():
        if isinstance(each, ResidualMLP):
            scales = each.get_buffer("scales")
            for role, index in each.order.items():
                scales[index] = torch.cat(values[role]).square().mean().sqrt().clamp(min=1e-3)
        if isinstance(each, _Mlp):
            networks.append(each)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(trained, recipe.fit.regression_lr)
    start = 0
    if state and resume and state.exists():
        with states.loaded(state) as kept:  # Adam's counts stay on the CPU
            check_tensors(str(state), kept["model"])
            model.load_state_dict(kept["model"])
            optimiser.load_state_dict(kept["optimiser"])
            start = kept["step"]
    bar = tqdm(
        range(start, steps),
        desc="regression",
        initial=start,
        total=steps,
        mininterval=2,
        disable=rank() > 0,
    )
    for step in bar:
        rate = recipe.fit.regression_lr * one_cycle(step, steps, WARM)
        for group in optimiser.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(seed_of(recipe.seed, f"regression/{step}"))
        errors = []
        for size in choose(recipe, space, generator) if copied else (space.full,):
            wanted = wanted_at(size)
            for name, site in sites(space, size).items():
                rows = torch.randperm(site.rows.count, generator=generator)[:ROWS]
                noise = recipe.representation.noise
                at = coordinates(site, manifold.scale, noise=noise, generator=generator)
                # Far from the source nothing is anchored to it.
                free = replace(site, distance=math.inf)
                weights = model(free, _some(at, rows).to(manifold.device))
                missed = weights[0] * site.gain - wanted[name][rows].reshape(weights.shape[1:])
                errors.append(missed.square().mean() / power(wanted[name]))
        loss = torch.stack(errors).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        # At one size alone the coordinates of size are constants: what they would learn says nothing
        # of another size.
        for each in () if copied else networks:
            for gradient in each.of_size():
                gradient.zero_()
        where = f"regression step {step + 1} of {steps}"
        norm = gradient_norm(model.parameters())
        check_step(where, rate, loss, norm, "a lower fit.regression_lr")
        optimiser.step()
        if step % LOG_EVERY == 0:
            bar.set_postfix(error=f"{loss.item():.4f}")
            log("regression/error", loss.item(), step)
        late = _late(deadline, manifold.device)
        if state and (late or step + 1 == steps or (step + 1) % SAVE_EVERY == 0):
            check_tensors(where, model.state_dict())
            if rank() == 0:
                held = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
                states.save(held | {"step": step + 1}, state)
        if late and step + 1 < steps:
            return False
    return True


def _late(deadline: float, device: torch.device) -> bool:
    """Whether the time is up by the first process's clock, for all of them alike."""
    late = time.monotonic() > deadline
    if math.isfinite(deadline) and world() > 1:
        told = torch.tensor(float(late), device=device)
        dist.broadcast(told, 0)
        late = bool(told)
    return late


def _some(at: Coordinates, rows: Tensor) -> Coordinates:
    """The coordinates of some rows alone."""
    every = at.outputs
    outputs = Along(every.span, every.pairs[:, rows], every.index[:, rows], every.place[:, rows])
    return replace(at, outputs=outputs, exact=False)


@torch.no_grad()
def error(manifold: Manifold, goal: Tensors) -> float:
    """The mean over tensors of ||w - goal||^2 / ||goal||^2 at the source's size, without noise; of an
    anchored representation, of what is inside."""
    found = {}
    for name, site in sites(manifold.space, manifold.space.full).items():
        at = coordinates(site, manifold.scale).to(manifold.device)
        weights = manifold.representation(replace(site, distance=math.inf), at)
        found[name] = (weights * site.gain).reshape(site.shape)
    return float(relative(found, goal))


def reconstruction(weights: Tensors, goal: Tensors) -> Tensor:
    """L_recon: the mean over tensors of ||w - goal||^2 / ||goal||^2, at the source's size."""
    return relative({n: w for n, w in weights.items() if w.requires_grad}, goal)


def relative(weights: Tensors, goal: Tensors) -> Tensor:
    """The mean over tensors of ||w - goal||^2 / ||goal||^2."""
    errors = [
        (weights[name] - wanted).square().sum() / wanted.square().sum().clamp(min=1e-6)
        for name, wanted in goal.items()
        if name in weights
    ]
    return torch.stack(errors).mean()
