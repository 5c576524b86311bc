"""Algorithm 2: the representation learns the smoothed weights, then the task at random sizes.

Every random choice of a step follows from (seed, step), so a run that was killed continues to the
same result. Knows neither files of networks nor how results are evaluated.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from neumeta.architecture import Architecture, Space
from neumeta.coordinates import coordinates, sites
from neumeta.inr import Grid
from neumeta.manifold import Manifold, roles
from neumeta.network import Network
from neumeta.sample import seed_of
from training import state as states
from training.data import Dataset, augment, to_float
from training.divergence import check_step, check_tensors, gradient_norm
from training.forward import logits, parameters_of, skeleton
from training.layout import SoundConvolutions
from training.recipe import Recipe
from training.source import one_cycle, task_loss

Targets = Mapping[str, Tensor]
"""The smoothed source tensors by site name: weight and bias, or weight, gamma and beta."""


def partition(blocks: int, noise: float, generator: torch.Generator) -> list[tuple[float, float]]:
    """The cells [l/L, (l+1)/L] of one stage's blocks, inner bounds moved by up to `noise` / L.

    Algorithm 2's coordinate noise on l: the network learns that a stage is an integral, whatever
    steps it is cut into.
    """
    moved = (torch.rand(blocks - 1, generator=generator) * 2 - 1) * noise
    bounds = [0.0, *((i + 1 + float(e)) / blocks for i, e in enumerate(moved)), 1.0]
    return list(itertools.pairwise(bounds))


def generated(
    manifold: Manifold,
    architecture: Architecture,
    noise: float,
    generator: torch.Generator,
    depth_noise: float = 0.0,
) -> dict[str, Tensor]:
    """The differentiable tensors of the network at this architecture, by site name."""
    layers = manifold.space.table.layers(architecture.depth)
    repeated = {layer.stage: layer.blocks for layer in layers if layer.blocks > 1}
    cells = {stage: partition(n, depth_noise, generator) for stage, n in repeated.items()}
    found: dict[str, Tensor] = {}
    for layer in layers:
        if not manifold.space.morphing(layer):
            for kind in ("weight", "bias"):
                name = f"{layer.name}.{kind}"
                found[name] = manifold.frozen[name].to(manifold.device)
            continue
        cell = cells[layer.stage][layer.block] if depth_noise and layer.blocks > 1 else None
        for site in sites(manifold.space, architecture, layer, norm=manifold.norm, cell=cell):
            at = coordinates(site, manifold.scale, noise=noise, generator=generator)
            made = manifold.representation(site, at.to(manifold.device))
            weight = (site.outputs, site.inputs, *site.spatial)
            found[site.name] = made.reshape(weight if site.kind == "weight" else (site.outputs,))
    return found


def initialise(
    manifold: Manifold, targets: Targets, recipe: Recipe, log: Callable[[str, float, int], None]
) -> float:
    """Regress the representation on the smoothed weights, before any image is seen.

    A grid takes the values as they are. Returns the relative error: the mean over tensors of
    ||w - target||^2 / ||target||^2. Raises Diverged.
    """
    space, model = manifold.space, manifold.representation
    if isinstance(model, Grid):
        for layer in space.table.layers(space.depth):
            if space.morphing(layer):
                for site in sites(space, space.full, layer, norm=manifold.norm):
                    model.fill(site, targets[site.name])
        return 0.0
    scales = model.get_buffer("scales")
    for index, (role, site) in enumerate(roles(space, norm=manifold.norm).items()):
        names = [name for name in targets if name == site.name or _role(space, name) == role]
        values = torch.cat([targets[name].flatten() for name in names])
        scales[index] = values.square().mean().sqrt().clamp(min=1e-3)
    optimiser = torch.optim.Adam(model.parameters(), recipe.fit.regression_lr)
    error = math.inf
    bar = tqdm(range(recipe.fit.regression_steps), desc="regression", mininterval=2)
    for step in bar:
        for group in optimiser.param_groups:
            rate = recipe.fit.regression_lr * one_cycle(step, recipe.fit.regression_steps, 0.05)
            group["lr"] = rate
        generator = torch.Generator().manual_seed(seed_of(recipe.seed, f"regression/{step}"))
        made = generated(
            manifold, space.full, 0.0 if step % 2 else recipe.representation.noise, generator
        )
        loss = reconstruction(made, targets)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        where = f"regression step {step + 1} of {recipe.fit.regression_steps}"
        norm = gradient_norm(model.parameters())
        check_step(where, rate, loss, norm, "a lower fit.regression_lr")
        optimiser.step()
        error = loss.item()
        if step % 20 == 0:
            bar.set_postfix(error=f"{error:.4f}")
            log("regression/error", error, step)
    return error


def _role(space: Space, name: str) -> str:
    layer, kind = name.rsplit(".", 1)
    by_name = {entry.name: entry.role for entry in space.table.layers(space.depth)}
    return f"{by_name[layer] if space.blocks else layer}.{kind}"


def reconstruction(made: Targets, targets: Targets) -> Tensor:
    """L_recon: the mean over tensors of ||w - w_source||^2 / ||w_source||^2, at the source's size."""
    errors = [
        (made[name] - target).square().sum() / target.square().sum().clamp(min=1e-6)
        for name, target in targets.items()
        if made[name].requires_grad
    ]
    return torch.stack(errors).mean()


def choose(recipe: Recipe, space: Space, generator: torch.Generator) -> tuple[Architecture, ...]:
    """This step's architectures: one from the pool, or the sandwich of largest, smallest, random."""
    low, high = space.width

    def uniform() -> float:
        return float(torch.rand((), generator=generator))

    def blocks() -> list[int] | None:
        if space.blocks is None:
            return None
        least, most = space.blocks
        return [int(torch.randint(least, most + 1, (), generator=generator)) for _ in space.depth]

    both = space.blocks is not None and low < high
    depth = None if both else blocks()
    if recipe.fit.widths:
        index = int(torch.randint(len(recipe.fit.widths), (), generator=generator))
        width: float | list[float] = recipe.fit.widths[index]
    elif uniform() < recipe.fit.per_stage:
        width = [low + (high - low) * uniform() for _ in space.stages]
    else:
        width = low + (high - low) * uniform()
    drawn = space.architecture(width, depth)
    if not recipe.fit.sandwich:
        return (drawn,)
    if both:
        assert space.blocks is not None
        deep = blocks() or []
        if uniform() < 0.5:  # the same for all stages; as often as not the fewest
            deep = [space.blocks[0] if uniform() < 0.5 else deep[0]] * len(deep)
        wide = high if uniform() < 0.5 else low + (high - low) * uniform()
        others = (space.architecture(low), drawn, space.architecture(wide, deep))
        if recipe.fit.full_weight:
            return (space.full, *others)
        # The source's own size needs no training: two more take its place.
        shallow = space.architecture(high, [space.blocks[0]] * len(deep))
        return (*others, space.architecture(low + (high - low) * uniform()), shallow)
    if space.blocks is not None:
        least, most = space.blocks
        ends = [space.architecture(high, [n] * len(space.depth)) for n in (most, least)]
    else:
        ends = [space.architecture(end) for end in (high, low)]
    return (ends[0], ends[1], drawn)


def frozen_segments(space: Space, net: Network) -> int:
    """How many leading segments of the network hold no morphing layer."""
    count = 0
    for prefix, _ in net.segments():
        layers = [
            entry
            for entry in space.table.layers(net.depth)
            if f"{entry.name}.".startswith(f"{prefix}.")
        ]
        if any(space.morphing(entry) for entry in layers):
            return count
        count += 1
    return count


@torch.no_grad()
def frozen_features(
    source: Network, first: int, data: Dataset, recipe: Recipe
) -> tuple[Tensor, ...]:
    """What the morphing part sees: (N, C, H, W) float16 for each of `feature_views` passes.

    The first pass is unaugmented, so that one view is the plain training set.
    """
    views = []
    for view in range(recipe.fit.feature_views):
        generator = torch.Generator().manual_seed(seed_of(recipe.seed, f"view/{view}"))
        parts = []
        for at in tqdm(
            range(0, len(data.train_images), 500),
            desc=f"frozen part, view {view + 1}",
            mininterval=2,
        ):
            images = data.train_images[at : at + 500]
            x = to_float(augment(images, data, generator) if view else images, data)
            x = (x.to(source.mean.device) - source.mean) / source.std
            for _, segment in source.segments()[:first]:
                x = segment(x)
            parts.append(x.half().cpu())
        views.append(torch.cat(parts))
    return tuple(views)


@SoundConvolutions()
def fit(
    manifold: Manifold,
    targets: Targets,
    source: Network,
    data: Dataset,
    recipe: Recipe,
    run: Path,
    *,
    resume: bool = False,
    max_minutes: float = math.inf,
    save_every: int = 200,
) -> bool:
    """Train `manifold.representation` in place by Algorithm 2; it ends with its moving average.

    State goes to `run/fit.pt` every `save_every` steps and at the end of the time allowed. Returns
    whether all steps were done. With several processes (torch.distributed initialised) each takes
    its share of every batch and gradients are averaged.

    Raises Diverged, with the last good state left on disk, at the first loss, gradient or weight
    that is not finite, and before the first step if the source has such a weight.
    """
    check_tensors("source", {**source.state_dict(), **targets})
    model, space, device = manifold.representation, manifold.space, manifold.device
    source = source.to(device)
    targets = {name: target.to(device) for name, target in targets.items()}
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    per_epoch = len(data.train_labels) // recipe.fit.batch
    steps = max(1, round(recipe.fit.epochs * per_epoch))
    optimiser = _optimiser(model, recipe)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    start, state = 0, run / "fit.pt"
    writer = SummaryWriter(str(run / "log")) if rank == 0 else None

    def log(name: str, value: float, step: int) -> None:
        if writer:
            writer.add_scalar(name, value, step)

    if resume and state.exists():
        with states.loaded(state, device) as kept:
            check_tensors(str(state), {**kept["model"], **kept["average"]})
            model.load_state_dict(kept["model"])
            optimiser.load_state_dict(kept["optimiser"])
            average, start = kept["average"], kept["step"]
    elif recipe.fit.regression_steps or isinstance(model, Grid):
        error = initialise(manifold, targets, recipe, log)
        average = {name: value.clone() for name, value in model.state_dict().items()}
        tqdm.write(f"regression on the smoothed weights: relative error {error:.4f}")

    first = frozen_segments(space, source) if recipe.fit.feature_views else 0
    views = frozen_features(source, first, data, recipe) if recipe.fit.feature_views else ()
    nets: dict[str, Network] = {}
    deadline = time.monotonic() + 60 * max_minutes
    began = time.monotonic()

    def save(step: int) -> None:
        check_tensors(f"fit, after step {step} of {steps}", model.state_dict())
        if rank == 0:
            states.save(
                {
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "average": average,
                    "step": step,
                },
                state,
            )

    bar = tqdm(
        range(start, steps),
        desc=recipe.name,
        initial=start,
        total=steps,
        mininterval=5,
        disable=rank > 0,
    )
    for step in bar:
        generator = torch.Generator().manual_seed(seed_of(recipe.seed, f"step/{step}"))
        epoch, place = divmod(step, per_epoch)
        shuffle = torch.Generator().manual_seed(seed_of(recipe.seed, f"epoch/{epoch}"))
        order = torch.randperm(len(data.train_labels), generator=shuffle)
        rows = order[place * recipe.fit.batch : (place + 1) * recipe.fit.batch]
        if views:
            x = views[epoch % len(views)][rows].float()
        else:
            images = data.train_images[rows]
            x = to_float(augment(images, data, generator) if recipe.fit.augment else images, data)
        labels = data.train_labels[rows]
        x, labels = x[rank::world].to(device), labels[rank::world].to(device)
        rate = recipe.fit.lr * one_cycle(step, steps, recipe.fit.warm)
        for group in optimiser.param_groups:
            group["lr"] = rate * group["factor"]
        optimiser.zero_grad()
        teacher = None
        if recipe.fit.distill == "source":
            with torch.no_grad():
                teacher = source(x, first)
        total = torch.zeros((), device=device)
        for architecture in choose(recipe, space, generator):
            if architecture.key not in nets:
                nets[architecture.key] = skeleton(manifold, architecture)
            made = generated(
                manifold,
                architecture,
                recipe.representation.noise,
                generator,
                recipe.fit.depth_noise,
            )
            net = nets[architecture.key]
            weights = parameters_of(manifold, architecture, made)
            predicted = logits(net, weights, x, first)
            is_full = (
                architecture.channels == space.full.channels and architecture.depth == space.depth
            )
            loss = task_loss(predicted, labels, teacher, recipe.fit.distill_weight)
            total += loss.detach()
            if is_full:
                loss = recipe.fit.full_weight * loss
            if recipe.fit.reconstruction and is_full:
                loss = loss + recipe.fit.reconstruction * reconstruction(made, targets)
            if recipe.fit.regularisation:
                norms = [value.norm() for value in made.values() if value.requires_grad]
                loss = loss + recipe.fit.regularisation * torch.stack(norms).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            if recipe.fit.distill == "inplace" and teacher is None:
                teacher = predicted.detach()
        _finish(model, optimiser, recipe, world, total, f"fit, step {step + 1} of {steps}", rate)
        decay = min(recipe.fit.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in model.state_dict().items():
                average[name].lerp_(value, 1 - decay)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{total:.3f}")
            log("fit/task_loss", float(total), step)
            log("fit/learning_rate", rate, step)
            log("fit/seconds_per_step", (time.monotonic() - began) / (step - start + 1), step)
        if (step + 1) % save_every == 0:
            save(step + 1)
        if time.monotonic() > deadline and step + 1 < steps:
            save(step + 1)
            return False
    save(steps)
    model.load_state_dict(average)
    model.eval()
    if writer:
        writer.close()
    return True


def _optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    # Vectors (biases, gamma, beta) and the corrections by size are not decayed.
    matrices: list[Tensor] = []
    vectors: list[Tensor] = []
    for name, parameter in model.named_parameters():
        correction = name.startswith(("outputs.", "inputs."))
        matrix = parameter.squeeze().dim() > 1 and not correction
        (matrices if matrix else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": recipe.fit.weight_decay, "factor": 1.0},
        {"params": vectors, "weight_decay": 0.0, "factor": 1.0},
    ]
    if recipe.fit.optimiser == "sgd":
        return torch.optim.SGD(groups, recipe.fit.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, recipe.fit.lr)


def _finish(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    recipe: Recipe,
    world: int,
    loss: Tensor,
    where: str,
    rate: float,
) -> None:
    """Average gradients over processes, clip them by value and step; raises Diverged instead."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if world > 1:
        for gradient in gradients:
            dist.all_reduce(gradient)
            gradient /= world
        loss = loss.clone()
        dist.all_reduce(loss)  # so that all processes stop, or none
    attempt = "a lower fit.lr, a longer warm-up (fit.warm) or a tighter fit.clip"
    check_step(where, rate, loss, gradient_norm(model.parameters()), attempt)
    if recipe.fit.clip:
        nn.utils.clip_grad_value_(model.parameters(), recipe.fit.clip)
    optimiser.step()
