"""The stages of a run, in order, each stage's result kept in the run's folder.

source -> graph -> channel order -> representation fit -> statistics -> evaluation -> checkpoint. Knows
no flags and prints nothing.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
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
from neumeta.space import Space
from training import (
    data,
    distillation,
    evaluate,
    fit,
    given,
    modules,
    networks,
    order,
    plots,
    source,
    statistics,
)
from training.divergence import check_tensors
from training.processes import rank, world
from training.recipe import BadRecipe, Recipe, parse, refused
from training.resolution import shrunk
from training.task import TASKS
from training.trace import trace

FITTED = ("teacher.pt", "regression.pt", "fit.pt")
STATE = ("source.pt", "source.safetensors", *FITTED)
"""What stages leave in a run's folder to go on with."""


class Stopped(Exception):
    """The time allowed was up before the fit was done; what was done is kept."""


@dataclass(frozen=True)
class Result:
    """What a finished run made: `source` is the source network's score, `rows` the table."""

    source: float
    rows: list[dict[str, Any]]
    digest: str
    manifold: Manifold


@dataclass(frozen=True)
class Traced:
    """The source network before it is trained: the module, and the graph of all that it does."""

    module: nn.Module
    graph: Graph


def dataset(asked: Recipe, root: Path | None) -> data.Data:
    """The images of a recipe's [data]: a path is looked for beside the recipe, and then, as a name is,
    under `root` or $NEUMETA_DATA.

    Raises DataMissing or ValueError with the option, file or folder that is wrong.
    """
    section = asked.data
    name = section.name or section.path
    if section.path:
        path, colon, function = section.path.rpartition(":")
        beside = Path(asked.file).parent / (path if colon else section.path)
        if beside.exists():
            name = f"{beside}:{function}" if colon else str(beside)
    return data.load_from(name, root, **section.options())


def network(asked: Recipe, loaded: data.Data) -> nn.Module:
    """The untrained source network of a recipe, as its own code makes it. Raises BadRecipe."""
    name, channels = asked.network.network, loaded.shape[0]
    torch.manual_seed(asked.seed)
    if name in networks.BUILT_IN:
        return networks.BUILT_IN[name](len(loaded.classes), channels)
    path, _, function = name.rpartition(":")
    beside = Path(asked.file).parent / path
    try:
        return modules.resolve(
            f"{beside}:{function}" if path.endswith(".py") else name, asked.network.arguments
        )
    except ValueError as error:
        raise BadRecipe(asked.file, [f"network.network: {error}"]) from None


def traced(asked: Recipe, loaded: data.Data, module: nn.Module) -> Traced:
    """The graph of the source network on images of this data.

    Raises BadRecipe if it cannot be traced or does not do the recipe's task on this data.
    """
    task, name = TASKS[asked.task], asked.network.network
    example = torch.zeros(1, *loaded.shape)
    try:
        graph, _ = trace(module, example, groups=asked.network.groups)
    except ValueError as error:
        raise BadRecipe(asked.file, [f"network.network: {name!r}: {error}"]) from None
    training = module.training
    with torch.no_grad():
        outputs = module.eval()(example)
    module.train(training)
    try:
        outputs = task.read(outputs)
    except ValueError as error:
        raise BadRecipe(asked.file, [f"task: {asked.task!r}: {error}"]) from None
    count = len(loaded.classes)
    wanted: tuple[int, ...] = loaded.shape
    if asked.task == "classification":
        wanted = (count,)
    elif asked.task == "segmentation":
        wanted = (count, *loaded.shape[1:])
    found = tuple((outputs[0] if isinstance(outputs, tuple) else outputs).shape[1:])
    if found != wanted:
        allowed = (
            f"for {asked.task} on {loaded.name!r} each image's output is {wanted}, not {found}"
        )
        raise BadRecipe(asked.file, [refused("network.network", name, allowed)])
    return Traced(module, graph)


def space(asked: Recipe, graph: Graph) -> Space:
    """The architectures that the recipe's manifold covers. Raises BadRecipe."""
    fit_, deep, problems = asked.fit, asked.fit.blocks is not None, list[str]()
    made = graph.folded if asked.folded else graph
    if asked.wide and not made.axes:
        allowed = "nothing in this network can be resized"
        raise BadRecipe(asked.file, [refused("fit.width", fit_.width, allowed)])
    try:
        # Width that does not morph keeps its axes' sizes.
        made = made.morphing(fit_.morph if asked.wide else (), depth=deep)
    except ValueError as error:
        raise BadRecipe(asked.file, [f"fit.morph: {error}"]) from None
    if fit_.blocks and not made.stages:
        allowed = "this network has no stages: no container of blocks that are alike"
        problems.append(refused("fit.blocks", fit_.blocks, allowed))
    if fit_.most and len(fit_.most) != len(made.groups):
        allowed = f"one number for each of {', '.join(made.groups)}"
        problems.append(refused("fit.most", fit_.most, allowed))
    for stage in made.stages:
        if fit_.blocks and fit_.blocks[0] < stage.least:
            allowed = f"stage {stage.name} has at least {stage.least} blocks"
            problems.append(refused("fit.blocks", fit_.blocks, allowed))
    if any(stage >= len(made.stages) for stage in fit_.shallow_stages):
        allowed = f"of stages 0 to {len(made.stages) - 1}"
        problems.append(refused("fit.shallow", fit_.shallow, allowed))
    for name, depth in asked.network.named.items():
        if len(depth) != len(made.stages) or not all(
            stage.least <= n <= fit_.most_blocks
            for n, stage in zip(depth, made.stages, strict=True)
        ):
            allowed = f"one number for each of {', '.join(stage.name for stage in made.stages)}"
            problems.append(refused(f"network.named.{name}", depth, allowed))
    if fit_.distill_features and not distillation.places(made):
        allowed = "0: with these fit.morph no value inside has the source's shape at every width"
        problems.append(refused("fit.distill_features", fit_.distill_features, allowed))
    if problems:
        raise BadRecipe(asked.file, problems)
    return Space(
        asked.served, made, fit_.width, fit_.blocks, fit_.most_blocks, dict(asked.network.named)
    )


def check(
    asked: Recipe, loaded: data.Data, checkpoints: Path, run: Path, module: nn.Module | None = None
) -> Traced:
    """Everything in the recipe that does not fit the data, the network or this machine: BadRecipe."""
    problems = list(_misfits(asked, loaded))
    try:
        TASKS[asked.task].check(loaded)
    except ValueError as error:
        raise BadRecipe(asked.file, [*problems, str(error)]) from None
    found = None
    try:
        # A network that is given stays as it is: a copy is trained.
        own = network(asked, loaded) if module is None else copy.deepcopy(module)
        found = traced(asked, loaded, own)
        covered = space(asked, found.graph)
        _check_resolutions(asked, loaded, found)
    except BadRecipe as error:
        told = str(error).splitlines()
        problems += [line.removeprefix(f"{asked.file}: ") for line in told]
    if problems or found is None:
        raise BadRecipe(asked.file, problems)
    if asked.network.weights and not (run / "source.safetensors").exists():
        source.weights_file(asked, checkpoints)
    if asked.fit.start:
        given.begun(asked, loaded, covered, checkpoints)
    if asked.fit.copied:
        given.copied(asked, loaded, covered, checkpoints)
    if asked.charts:
        given.joined(asked, loaded, covered, checkpoints)
    return found


def _check_resolutions(asked: Recipe, loaded: data.Data, found: Traced) -> None:
    """Raises BadRecipe if the network cannot take images as small as its training shall have them."""
    program = Program(found.graph, found.graph.full)
    tensors = source.tensors(found.module, found.graph.tensors)
    wanted = {"fit": asked.fit.resolutions}
    if asked.network.train:
        wanted["network.train"] = asked.network.train.resolutions
    for section, shares in wanted.items():
        for share in sorted(set(shares) - {1.0}):
            x = shrunk(torch.zeros(2, *loaded.shape), share)
            try:
                program.run(tensors, x)
            except RuntimeError:
                size = tuple(x.shape[2:])
                allowed = f"{asked.network.network!r} cannot take images of {size} pixels"
                told = refused(f"{section}.resolutions", share, allowed)
                raise BadRecipe(asked.file, [told]) from None


def _misfits(asked: Recipe, loaded: data.Data) -> Iterator[str]:
    count = len(loaded)
    allowed = f"at most {count}, the training images of {loaded.name!r}"
    if asked.fit.batch > count:
        yield refused("fit.batch", asked.fit.batch, allowed)
    if asked.network.train and asked.network.train.batch > count:
        yield refused("network.train.batch", asked.network.train.batch, allowed)
    if asked.fit.batch < world():
        allowed = f"at least one image for each of {world()} processes"
        yield refused("fit.batch", asked.fit.batch, allowed)


def depends(asked: Recipe, loaded: data.Data, weights: str | None) -> dict[str, dict[str, Any]]:
    """What the result of each stage that keeps state depends on, by stage and dotted key.

    `weights` is the digest of those that the source network begins with.
    """
    whole = asked.as_dict()
    held, built = whole["representation"], whole["network"]
    del held["samples"]  # of evaluation and use, not of the fit
    del built["name"], built["named"]  # of use, likewise
    built["weights_sha256"] = weights
    images = {
        "sha256": loaded.digest(),
        "classes": list(loaded.classes),
        "mean": list(loaded.mean),
        "std": list(loaded.std),
        "flips": getattr(loaded, "flips", asked.data.flips),
        "pad": getattr(loaded, "pad", asked.data.pad),
    }
    stages = {
        "source": {"seed": asked.seed, "task": asked.task, "network": built, "data": images},
        "fit": {"order": whole["order"], "representation": held, "fit": whole["fit"]},
    }
    return {stage: dict(_flat(keys)) for stage, keys in stages.items()}


def _flat(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def begin(
    asked: Recipe, loaded: data.Data, weights: str | None, run: Path, *, resume: bool
) -> None:
    """Write `run/recipe.json`, what this run is bound to; on resume only what no stage's result that
    is there depends on may have changed.

    Raises ValueError naming the first key that differs, with both values.
    """
    path, now = run / "recipe.json", depends(asked, loaded, weights)
    left = [name for name in STATE if (run / name).exists()]
    if not resume and (path.exists() or left):
        raise ValueError(f"{run} holds an earlier run: add --resume, or choose another --folder")
    if left:
        before = _bound(path, now)
        _same_weights(before["source"], now["source"])
        for stage in ("source", "fit") if {*FITTED} & {*left} else ("source",):
            held = before.get(stage, {})
            for key in {**held, **now[stage]}:
                old, new = held.get(key), now[stage].get(key)
                if old != new:
                    raise ValueError(
                        f"{run} was begun with {key} = {json.dumps(old)}, and now it is"
                        f" {json.dumps(new)}: go back to that, or choose another --folder"
                    )
    told = {"recipe": asked.as_dict(), "depends": now}
    atomic.write(path, json.dumps(told, indent=1, sort_keys=True))


def _same_weights(before: dict[str, Any], now: dict[str, Any]) -> None:
    """A file of weights that is gone since is as it was, and so is one whose digest was not written."""
    key = "network.weights_sha256"
    now[key] = now[key] or before.get(key)
    before.setdefault(key, now[key])


def _bound(path: Path, now: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What an earlier run wrote down. Of keys that there were not yet it had what they have by default.

    Raises ValueError if that cannot be known.
    """
    try:
        told = json.loads(path.read_text())
        held = {stage: told["depends"][stage] for stage in now}
        if all(isinstance(keys, dict) for keys in held.values()):
            if any(now[stage].keys() - held[stage].keys() for stage in now):
                begun = dict(_flat(parse(told["recipe"], str(path)).as_dict()))
                for stage, keys in now.items():
                    held[stage] = {k: begun[k] for k in keys if k in begun} | held[stage]
            return held
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(
        f"{path}: missing, damaged or of another version, so what this run was begun with is"
        " unknown: choose another --folder"
    )


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
    covered, task = space(asked, graph), TASKS[asked.task]
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
    found = check(asked, loaded, checkpoints, folder, module)
    if rank() == 0:
        weights = given.digest(asked, checkpoints) or source.weights_digest(
            asked, checkpoints, module
        )
        begin(asked, loaded, weights, folder, resume=resume)
    if dist.is_initialized():
        dist.barrier()
    task = TASKS[asked.task]
    if asked.charts:
        if rank() > 0:
            return None
        made = given.joined(asked, loaded, space(asked, found.graph), checkpoints)
        full = made.space.full
        smoothed = statistics.whole(made, full) if full.key in made.statistics.kept else {}
        return _finish(asked, loaded, made, smoothed, None, folder, out)
    copied = None
    if asked.begun:
        covered = space(asked, found.graph)
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
