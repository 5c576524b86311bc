"""Algorithm 2: the representation learns the smoothed weights, then the task at random sizes.

Every random choice of a step follows from (seed, step), so a run that was killed continues to the
same result. Knows neither files of networks nor how results are evaluated.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from neumeta.coordinates import coordinates
from neumeta.manifold import Manifold
from neumeta.program import Program
from neumeta.representation.mlp import _Mlp
from neumeta.representation.wrappers import Anchored, Corrected
from neumeta.sample import seed_of
from neumeta.sites import sites
from neumeta.space import Architecture
from training import distillation, frozen, processes, regression
from training import state as states
from training.copied import Copied
from training.data import Data, Dataset
from training.divergence import check_step, check_tensors, gradient_norm
from training.layout import channels_last, soundly
from training.recipe import Recipe
from training.regression import Tensors, initialise, reconstruction
from training.resolution import resolution, shrunk
from training.sizes import choose
from training.source import epoch_plan, mixed, one_cycle, predicted
from training.task import Task
from training.teacher import Views


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
    """The differentiable tensors of the network at this architecture, by name, and the frozen ones.

    Batch norms behind what morphs get no statistics: a program then takes those of the batch.
    """
    cells: dict[str, dict[int, tuple[float, float]]] = {}
    if depth_noise:
        for stage in manifold.space.graph_of(architecture).stages:
            if stage.blocks > 1:
                drawn = partition(stage.blocks, depth_noise, generator)
                cells[stage.name] = dict(enumerate(drawn))
    device = manifold.device
    found = {name: value.to(device) for name, value in manifold.frozen.items()}
    for name, site in sites(manifold.space, architecture, cells or None).items():
        at = coordinates(site, manifold.scale, noise=noise, generator=generator)
        weights: Tensor = manifold.representation(site, at.to(device))
        if site.gain != 1:
            weights = weights * site.gain
        found[name] = weights.reshape(site.shape)
    return found


@contextmanager
def whole_growth(model: nn.Module) -> Iterator[None]:
    """While it is entered, a deeper network counts as fully far from the source: what is anchored then
    trains the inner representation in deep networks too. What is sampled afterwards is as before."""
    anchored = [each for each in model.modules() if isinstance(each, Anchored)]
    kept = [each.growth for each in anchored]
    for each in anchored:
        each.growth = 1.0
    try:
        yield
    finally:
        for each, growth in zip(anchored, kept, strict=True):
            each.growth = growth


@soundly(lambda manifold, *_, **__: manifold.device)
def fit(
    manifold: Manifold,
    source: Tensors,
    data: Data,
    task: Task,
    recipe: Recipe,
    run: Path,
    *,
    copied: Manifold | None = None,
    resume: bool = False,
    max_minutes: float = math.inf,
    save_every: int = 200,
    views: list[dict[str, Tensor]] | None = None,
) -> bool:
    """Train `manifold.representation` in place by Algorithm 2; it ends with its moving average.

    `source` are all tensors of the smoothed source network; what is `copied` is another manifold, which
    the regression aims at in their place. State goes to `run/fit.pt` every
    `save_every` steps and at the end of the time allowed. `views` are what `frozen.features` gives,
    where the caller has them already. Returns whether all steps were done. With
    several processes (torch.distributed initialised) each takes its share of every batch and gradients
    are averaged; the first one's clock decides when the time is up.

    Raises Diverged, with the last good state left on disk, at the first loss, gradient or weight
    that is not finite, and before the first step if the source has such a weight.
    """
    check_tensors("source", source)
    if bool(recipe.fit.copied) != bool(copied):
        there = "no manifold was" if recipe.fit.copied else "a manifold was"
        raise ValueError(f"fit.copied: {recipe.fit.copied!r}, and {there} given to be copied")
    deadline = time.monotonic() + 60 * max_minutes
    views = views or []
    model, space, device = manifold.representation, manifold.space, manifold.device
    source = {name: value.to(device) for name, value in source.items()}
    targets = regression.targets(manifold, source, data, recipe.seed)
    rank, world = processes.rank(), processes.world()
    per_epoch = max(1, len(data) // recipe.fit.batch)
    steps = max(1, round(recipe.fit.epochs * per_epoch))
    optimiser = _optimiser(model, recipe)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    start, state = 0, run / "fit.pt"
    writer = SummaryWriter(str(run / "log")) if rank == 0 else None

    def log(name: str, value: float, step: int) -> None:
        if writer:
            writer.add_scalar(name, value, step)

    if resume and state.exists():
        with states.loaded(state) as kept:  # Adam's counts stay on the CPU
            check_tensors(str(state), {**kept["model"], **kept["average"]})
            model.load_state_dict(kept["model"])
            optimiser.load_state_dict(kept["optimiser"])
            average = {name: value.to(device) for name, value in kept["average"].items()}
            start = kept["step"]
    elif not recipe.fit.start:
        error = initialise(
            manifold,
            source,
            targets,
            recipe,
            log,
            Copied(copied, space, targets) if copied else None,
            state=run / "regression.pt",
            resume=resume,
            deadline=deadline,
        )
        if error is None:
            return False
        if world > 1:  # sums on a GPU need not be the same in all processes
            for value in model.state_dict().values():
                dist.broadcast(value, 0)
        average = {name: value.clone() for name, value in model.state_dict().items()}
        if math.isfinite(error) and rank == 0:
            tqdm.write(f"the smoothed weights at full size: relative error {error:.4f}")

    for each in model.modules():
        # Not in the regression, whose few rows are made faster than they are converted.
        if isinstance(each, _Mlp):
            each.autocast = recipe.fit.bfloat16
    first = frozen.steps(space) if recipe.fit.feature_views else 0
    if recipe.fit.feature_views and not views:
        assert isinstance(data, Dataset)
        views = frozen.features(space, source, first, data, recipe, device)
    places = distillation.places(space.graph) if recipe.fit.distill_features else ()
    programs: dict[str, Program] = {}
    full = Program(space.graph, space.graph.full)
    taught: Views | None = None
    if recipe.fit.teacher_views:
        assert isinstance(data, Dataset)

        def teach(x: Tensor) -> Tensor:
            outputs: Tensor = task.read(full.run(source, channels_last(x.to(device))))
            return outputs

        taught = Views(data, teach, recipe.fit.teacher_views, recipe.seed, run / "teacher.pt")
    began = time.monotonic()

    def at_size(x: Tensor, step: int) -> Tensor:
        return shrunk(x, resolution(recipe.fit.resolutions, step, steps))

    def batches() -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
        """What the operations from `first` on read, and the images and targets of the data."""
        rows = epoch_plan(recipe.seed, "fit", len(data), recipe.fit.batch, start, steps)
        if views:
            assert isinstance(data, Dataset)
            for step, (some, _) in enumerate(rows, start):
                view = views[step // per_epoch % len(views)]
                _, y = data.batch(some, torch.Generator(), augment=False)
                x = torch.zeros(len(some), 1)  # classification does not read it
                yield {name: value[some].float() for name, value in view.items()}, x, y
            return
        if taught:
            for step, (some, _) in enumerate(rows, start):
                x, y, outputs = taught.batch(some, step // per_epoch % len(taught.outputs))
                yield {"input": at_size(x, step), "teacher": outputs}, x, y
            return
        if not isinstance(data, Dataset):  # each process reads its own images alone
            rows = ((some[rank::world], seed + rank) for some, seed in rows)
        for step, (x, y) in enumerate(data.batches(rows, recipe.fit.augment), start):
            yield {"input": at_size(x, step)}, x, y

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

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    bar = tqdm(
        batches(),
        desc=recipe.name,
        initial=start,
        total=steps,
        mininterval=5,
        disable=rank > 0,
    )
    for step, (values, x, y) in enumerate(bar, start):
        generator = torch.Generator().manual_seed(seed_of(recipe.seed, f"step/{step}"))
        if isinstance(data, Dataset):
            values = {name: value[rank::world] for name, value in values.items()}
            x, y = x[rank::world], y[rank::world]
        values = {name: channels_last(value.to(device)) for name, value in values.items()}
        labels = task.targets(x.to(device), y.to(device), data)
        rate = recipe.fit.lr * one_cycle(step, steps, recipe.fit.warm)
        for group in optimiser.param_groups:
            group["lr"] = rate * group["factor"]
        optimiser.zero_grad()
        teacher = values.pop("teacher", None)
        inside: dict[str, Tensor] = {}
        if recipe.fit.distill == "source" and teacher is None:
            watch = distillation.recorder(places, inside) if places else None
            with torch.no_grad():
                teacher = task.read(full.run(source, values, first=first, watch=watch))
        total = torch.zeros((), device=device)
        for architecture in choose(recipe, space, generator):
            if architecture.key not in programs:
                programs[architecture.key] = Program(
                    space.graph_of(architecture), space.sizes(architecture)
                )
            noise, depth_noise = recipe.representation.noise, recipe.fit.depth_noise
            with whole_growth(model):
                weights = generated(manifold, architecture, noise, generator, depth_noise)
            laid_out = {name: channels_last(value) for name, value in weights.items()}
            made: dict[str, Tensor] = {}
            watch = distillation.recorder(places, made) if places else None
            program = programs[architecture.key]
            answer = partial(program.run, laid_out, values, first=first, watch=watch)
            outputs = predicted(task, answer, device, recipe.fit.bfloat16)
            is_full = architecture == space.full
            loss = mixed(task, outputs, labels, teacher, recipe.fit.distill_weight)
            if places:
                loss = loss + recipe.fit.distill_features * distillation.distance(made, inside)
            total += loss.detach()
            if is_full:
                loss = recipe.fit.full_weight * loss
            if recipe.fit.reconstruction and is_full:
                loss = loss + recipe.fit.reconstruction * reconstruction(weights, targets)
            if recipe.fit.regularisation:
                norms = [value.norm() for value in weights.values() if value.requires_grad]
                loss = loss + recipe.fit.regularisation * torch.stack(norms).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            if recipe.fit.distill == "inplace" and teacher is None:
                teacher = _detached(outputs)
        late = time.monotonic() > deadline
        where = f"fit, step {step + 1} of {steps}"
        late = _finish(model, optimiser, recipe, world, total, where, rate, late and rank == 0)
        decay = min(recipe.fit.ema, (1 + step) / (10 + step))
        # All at once: on a GPU a call for each tensor takes longer than the arithmetic.
        update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        update([average[name] for name in trained], [*trained.values()], 0)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{total:.3f}")
            log("fit/task_loss", float(total), step)
            log("fit/learning_rate", rate, step)
            log("fit/seconds_per_step", (time.monotonic() - began) / (step - start + 1), step)
        if (step + 1) % save_every == 0:
            save(step + 1)
        if late and step + 1 < steps:
            save(step + 1)
            return False
    save(steps)
    model.load_state_dict(average)
    model.eval()
    if writer:
        writer.close()
    return True


def _detached(outputs: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    if isinstance(outputs, tuple):
        return tuple(each.detach() for each in outputs)
    return outputs.detach()


def _optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    # Vectors (biases, gamma, beta) and the corrections by size are not decayed.
    corrections = {
        id(parameter)
        for each in model.modules()
        if isinstance(each, Corrected)
        for held in (each.rows, each.columns)
        for parameter in held.values()
    }
    matrices: list[Tensor] = []
    vectors: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix = parameter.squeeze().dim() > 1 and id(parameter) not in corrections
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
    late: bool = False,
) -> bool:
    """Average gradients over processes, clip them by value and step; raises Diverged instead.

    Returns whether any process was `late`.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if world > 1:
        for gradient in gradients:
            dist.all_reduce(gradient)
            gradient /= world
        # So that all processes stop, or none.
        shared = torch.stack((loss, loss.new_tensor(float(late))))
        dist.all_reduce(shared)
        loss, late = shared[0], bool(shared[1] > 0)
    attempt = "a lower fit.lr, a longer warm-up (fit.warm) or a tighter fit.clip"
    check_step(where, rate, loss, gradient_norm(model.parameters()), attempt)
    if recipe.fit.clip:
        nn.utils.clip_grad_value_(model.parameters(), recipe.fit.clip)
    optimiser.step()
    return late
