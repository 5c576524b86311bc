"""The stages of a run, in order, each stage's result kept in the run's folder.

source -> graph -> channel order -> representation fit -> statistics -> evaluation -> checkpoint. Knows
no flags and prints nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neumeta import atomic, checkpoint
from neumeta.fold import fold
from neumeta.graph import Graph
from neumeta.manifold import Contract, Manifold, roles
from neumeta.program import Program
from neumeta.representation import build
from neumeta.sites import kept
from training import basis, binding, data, evaluate, fit, given, order, plots, source, statistics
from training.divergence import check_tensors
from training.processes import rank
from training.recipe import Recipe
from training.task import TASKS


class Stopped(Exception):
    """The time allowed was up before the fit was done; what was done is kept."""


@dataclass(frozen=True)
class Result:
    """What a finished run made: `source` is the source network's score, `rows` the table."""

    source: float
    rows: list[dict[str, Any]]
    digest: str
    manifold: Manifold


def trained_source(
    asked: Recipe, loaded: data.Data, module: nn.Module, checkpoints: Path, run: Path
) -> nn.Module:
    """The source network of a recipe: kept in the run once it is trained or fine-tuned.

    Of several processes the first trains it, and the others wait for its file.
    """
    held = run / "source.safetensors"
    if not held.exists() and rank() == 0:
        if asked.network.weights:
            source.fill(module, source.weights_file(asked, checkpoints))
        if asked.network.train:
            source.train(
                module,
                loaded,
                TASKS[asked.task],
                epochs=asked.network.train.epochs,
                lr=asked.network.train.lr,
                batch=asked.network.train.batch,
                resolutions=asked.network.train.resolutions,
                bfloat16=asked.network.train.bfloat16,
                seed=asked.seed,
                state=run / "source.pt",
            )
        source.save(module, held)
    if dist.is_initialized():
        dist.barrier()
    return source.restore(module, held)


def prepare(
    asked: Recipe, loaded: data.Data, graph: Graph, net: nn.Module
) -> tuple[Manifold, dict[str, Tensor]]:
    """The untrained manifold, and all tensors of the smoothed source network by name.

    Raises Diverged if a weight of the source is not finite.
    """
    check_tensors("source", net.state_dict())
    covered, task = basis.space(asked, graph), TASKS[asked.task]
    own, held = source.tensors(net, graph.tensors), asked.representation
    # Orders are of the folded network's weights; batch norm's own tensors follow them.
    folded = fold(graph, {name: value.double() for name, value in own.items()})
    found, strategy = order.cliques(graph.folded), asked.order.strategy
    # Frozen axes keep their order, so that the source's own prefix stays what it was.
    orders = order.order(
        folded, found, strategy, seed=asked.seed, axes=covered.graph.axes, sizes=graph.full
    )
    smooth = order.apply(folded, found, orders)
    tv: dict[str, Any] = {
        "strategy": strategy,
        "total_variation_before": order.total_variation(folded),
        "total_variation": order.total_variation(smooth),
    }
    if asked.folded:
        smoothed = {name: value.float().contiguous() for name, value in smooth.items()}
    else:
        smoothed = order.apply(own, order.cliques(graph), orders)
    torch.manual_seed(asked.seed)
    model = build(held.kind, held.built, roles(covered))
    manifold = Manifold(
        covered,
        model,
        held.kind,
        held.built,
        held.noise,
        held.samples,
        held.scale,
        Contract(
            tuple(loaded.mean),
            tuple(loaded.std),
            tuple(loaded.classes),
            asked.task,
            task.metric,
            task.higher_is_better,
        ),
        {name: smoothed[name].contiguous() for name in kept(covered.graph)},
        about={"permutation": tv},
    )
    return manifold, smoothed


def run(
    asked: Recipe,
    loaded: data.Data,
    checkpoints: Path,
    folder: Path,
    out: Path,
    *,
    resume: bool = False,
    max_minutes: float = float("inf"),
    module: nn.Module | None = None,
) -> Result | None:
    """All stages: the manifold at `out`, its table in `folder`. None in every process but the first.

    `module` stands for the network that the recipe names. Everything that can be checked is checked
    before the first step. Raises ValueError (BadRecipe, a run that may not be resumed, damaged state,
    divergence), OSError, and Stopped after `max_minutes`.
    """
    found = basis.check(asked, loaded, checkpoints, folder, module)
    if rank() == 0:
        weights = given.digest(asked, checkpoints) or source.weights_digest(
            asked, checkpoints, module
        )
        binding.begin(asked, loaded, weights, folder, resume=resume)
    if dist.is_initialized():
        dist.barrier()
    task = TASKS[asked.task]
    if asked.charts:
        if rank() > 0:
            return None
        made = given.joined(asked, loaded, basis.space(asked, found.graph), checkpoints)
        full = made.space.full
        smoothed = statistics.whole(made, full) if full.key in made.statistics.kept else {}
        return _finish(asked, loaded, made, smoothed, None, folder, out)
    copied = None
    if asked.begun:
        covered = basis.space(asked, found.graph)
        if asked.fit.start:
            manifold, smoothed = given.begun(asked, loaded, covered, checkpoints)
        else:
            manifold, smoothed, copied = given.copied(asked, loaded, covered, checkpoints)
        program, whole = Program(covered.graph, covered.graph.full), smoothed
        own: source.Run = lambda x: program.run(whole, x)  # noqa: E731
    else:
        own = trained_source(asked, loaded, found.module, checkpoints, folder)
        manifold, smoothed = prepare(asked, loaded, found.graph, own)
    before = source.score(own, loaded, task) if rank() == 0 else 0.0
    if torch.cuda.is_available():
        manifold.representation.to(f"cuda:{rank() % torch.cuda.device_count()}")
    done = fit.fit(
        manifold,
        smoothed,
        loaded,
        task,
        asked,
        folder,
        copied=copied,
        resume=resume,
        max_minutes=max_minutes,
    )
    if not done:
        raise Stopped
    if rank() > 0:
        return None
    manifold.representation.cpu()
    return _finish(asked, loaded, manifold, smoothed, before, folder, out)


def _finish(
    asked: Recipe,
    loaded: data.Data,
    manifold: Manifold,
    smoothed: dict[str, Tensor],
    before: float | None,
    folder: Path,
    out: Path,
) -> Result:
    """Statistics, evaluation, checkpoint, report. `before` is the source's score; without it that of
    the manifold's own full size stands for it."""
    statistics.calibrate(
        manifold,
        loaded,
        calibration=asked.data.calibration,
        images=_images(asked),
        seed=asked.seed,
        source=None if asked.folded else smoothed,
    )
    rows = evaluate.evaluate(manifold, loaded, asked)
    if before is None:
        before = evaluate.evaluate_one(manifold, manifold.space.full, loaded)["score"]
    train, weights = asked.network.train, asked.network.weights
    metric = manifold.contract.metric
    began = ("fine-tune" if train else "import") if weights else "train" if train else "given"
    if asked.begun:
        began, weights = "manifold", asked.begun
    elif asked.charts:
        began, weights = "charts", ", ".join(name for chart in asked.charts for name in chart.file)
    manifold.about.update(
        title=asked.title,
        recipe=asked.as_dict(),
        source={
            "kind": began,
            "file": weights,
            "score": round(before, 2),
            "metric": metric,
        },
        data={
            "name": loaded.name,
            "sha256": loaded.digest(),
            "test_images": _tested(loaded),
        },
        evaluation=rows,
        torch=torch.__version__,
    )
    digest = checkpoint.write(manifold, out)
    report = {
        "source_score": round(before, 2),
        "metric": metric,
        "evaluation": rows,
        "checkpoint": digest,
    }
    atomic.write(folder / "evaluation.json", json.dumps(report, indent=1))
    plots.evaluation(rows, asked, before, folder / "evaluation.svg")
    return Result(before, rows, digest, replace(manifold, digest=digest))


def _images(asked: Recipe) -> str:
    """Which calibration images, a path looked for beside the recipe first."""
    wanted = asked.data.calibration_images
    beside = Path(asked.file).parent / wanted
    return str(beside) if wanted not in ("training", "noise") and beside.exists() else wanted


def _tested(loaded: data.Data) -> int:
    return len(loaded.test_images if isinstance(loaded, data.Dataset) else loaded.test)
