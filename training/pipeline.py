"""The stages of a run, in order, each stage's result kept in the run's folder.

source -> channel order -> representation fit -> statistics -> evaluation -> checkpoint. Knows no flags
and prints nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from neumeta import atomic, checkpoint
from neumeta.manifold import Manifold, representation
from neumeta.network import Network
from training import cliques, data, evaluate, fit, order, plots, source, statistics
from training.divergence import check_tensors
from training.folded import fold, network_from, reorder
from training.imported import import_resnet_cifar
from training.recipe import BadRecipe, DataSection, Recipe, refused
from training.task import Classification

STATE = ("source.pt", "source.safetensors", "fit.pt")
"""What stages leave in a run's folder to go on with."""


class Stopped(Exception):
    """The time allowed was up before the fit was done; what was done is kept."""


@dataclass(frozen=True)
class Result:
    """What a finished run made: `source` is the source network's accuracy, `rows` the table."""

    source: float
    rows: list[dict[str, Any]]
    digest: str


def dataset(section: DataSection, root: Path | None) -> data.Dataset:
    """The images of a recipe's [data], under `root` or $NEUMETA_DATA.

    Raises ValueError for what is no such data set, DataMissing, and OSError.
    """
    found = data.load_from(section.name or section.path, root, **section.options())
    if not isinstance(found, data.Dataset):
        raise ValueError(
            f"data: {found.name} is read image by image, and training needs its images in memory:"
            " a folder, an archive or .npz, without data.stream"
        )
    return found


def check(asked: Recipe, loaded: data.Dataset, checkpoints: Path, run: Path) -> None:
    """Raises BadRecipe with everything in the recipe that does not fit the data or this machine."""
    problems = list(_misfits(asked, loaded))
    if problems:
        raise BadRecipe(asked.file, problems)
    if asked.network.weights and not (run / "source.safetensors").exists():
        _weights(asked, checkpoints)


def _misfits(asked: Recipe, loaded: data.Dataset) -> Iterator[str]:
    try:
        Classification().check(loaded)
    except ValueError as error:
        yield str(error)
    family, network = asked.family, asked.network
    count, channels, *image = loaded.train_images.shape
    if channels != family.input_channels:
        yield refused(
            "network.network",
            network.network,
            f"it takes images of {family.input_channels} channels, and those of"
            f" {loaded.name!r} have {channels}",
        )
    least = max(layer.resolution for layer in family.layers(asked.depth))
    if min(image) < least:
        yield refused(
            "network.network",
            network.network,
            f"it takes images of {least}x{least} pixels or more, and those of {loaded.name!r}"
            f" have {image[0]}x{image[1]}",
        )
    allowed = f"at most {count}, the training images of {loaded.name!r}"
    if asked.fit.batch > count:
        yield refused("fit.batch", asked.fit.batch, allowed)
    if network.train and network.train.batch > count:
        yield refused("network.train.batch", network.train.batch, allowed)
    if asked.fit.batch < _world():
        allowed = f"at least one image for each of {_world()} processes"
        yield refused("fit.batch", asked.fit.batch, allowed)


def _weights(asked: Recipe, checkpoints: Path) -> Path:
    """The file of the recipe's public checkpoint: beside the recipe, or under `checkpoints`."""
    places = [Path(asked.file).parent, checkpoints]
    for folder in places:
        if (folder / asked.network.weights).is_file():
            return folder / asked.network.weights
    where = " nor in ".join(str(folder) for folder in places)
    allowed = f"it is neither in {where}: see --checkpoints"
    if asked.family.name == "resnet-cifar":
        allowed += "; published at https://github.com/akamaster/pytorch_resnet_cifar10"
    raise BadRecipe(asked.file, [refused("network.weights", asked.network.weights, allowed)])


def depends(asked: Recipe, loaded: data.Dataset) -> dict[str, dict[str, Any]]:
    """What the result of each stage that keeps state depends on, by stage and dotted key."""
    whole = asked.as_dict()
    held = whole["representation"]
    del held["samples"]  # of evaluation and use, not of the fit
    images = {
        "sha256": loaded.digest(),
        "classes": list(loaded.classes),
        "mean": loaded.mean,
        "std": loaded.std,
        "flips": loaded.flips,
        "pad": loaded.pad,
    }
    stages = {
        "source": {"seed": asked.seed, "network": whole["network"], "data": images},
        "fit": {"order": whole["order"], "representation": held, "fit": whole["fit"]},
    }
    return {stage: dict(_flat(keys)) for stage, keys in stages.items()}


def _flat(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def begin(asked: Recipe, loaded: data.Dataset, run: Path, *, resume: bool) -> None:
    """Write `run/recipe.json`, what this run is bound to; on resume only what no stage's result that
    is there depends on may have changed.

    Raises ValueError naming the first key that differs, with both values.
    """
    path, now = run / "recipe.json", depends(asked, loaded)
    left = [name for name in STATE if (run / name).exists()]
    if not resume and (path.exists() or left):
        raise ValueError(f"{run} holds an earlier run: add --resume, or choose another --folder")
    if left:
        before = _bound(path)
        for stage in ("source", "fit") if "fit.pt" in left else ("source",):
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


def _bound(path: Path) -> dict[str, dict[str, Any]]:
    """What an earlier run wrote down. Raises ValueError if that cannot be known."""
    try:
        held = json.loads(path.read_text())["depends"]
        if all(isinstance(held[stage], dict) for stage in ("source", "fit")):
            return held  # type: ignore[no-any-return]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(
        f"{path}: missing, damaged or of another version, so what this run was begun with is"
        " unknown: choose another --folder"
    )


def trained_source(asked: Recipe, loaded: data.Dataset, checkpoints: Path, run: Path) -> Network:
    """The source network of a recipe: kept in the run once it is trained or fine-tuned.

    Of several processes the first trains it, and the others wait for its file.
    """
    family, depth, kept = asked.family, asked.depth, run / "source.safetensors"
    sizes = family.full_sizes(depth, len(loaded.classes))
    sizes["image"] = loaded.train_images.shape[1]
    if not kept.exists() and _rank() == 0:
        if asked.network.weights:
            net = import_resnet_cifar(_weights(asked, checkpoints), depth, len(loaded.classes))
        else:
            torch.manual_seed(asked.seed)
            net = Network(family.name, depth, sizes, norm=True)
        if asked.network.train:
            source.train(
                net,
                loaded,
                epochs=asked.network.train.epochs,
                lr=asked.network.train.lr,
                batch=asked.network.train.batch,
                seed=asked.seed,
                state=run / "source.pt",
            )
        source.save(net, kept)
    if dist.is_initialized():
        dist.barrier()
    return source.restore(kept, family.name, depth, sizes)


def prepare(
    asked: Recipe, loaded: data.Dataset, net: Network
) -> tuple[Manifold, dict[str, Tensor], Network]:
    """The untrained manifold, its targets (smoothed source tensors) and the smoothed network.

    Raises Diverged if a weight of the source is not finite.
    """
    check_tensors("source", net.state_dict())
    height, width = loaded.train_images.shape[2:]
    space = asked.space(len(loaded.classes), (height, width))
    held, strategy = asked.representation, asked.order.strategy
    folded = fold(net)
    found = cliques.cliques(space.table, space.depth)
    axes = [axis for axis in found if space.morphs(axis)]
    orders = order.order(folded, found, strategy, seed=asked.seed, axes=axes)
    # Frozen axes keep their order, so that the source's own prefix stays what it was.
    smooth = order.apply(folded, found, orders)
    smoothed = network_from(smooth, space.family, space.depth)
    torch.manual_seed(asked.seed)
    model = representation(held.kind, space, held.options, norm=held.norm)
    frozen, targets = {}, {}
    raw = reorder(net, orders) if held.norm else {}
    for layer in space.table.layers(space.depth):
        if not space.morphing(layer):
            for kind in ("weight", "bias"):
                frozen[f"{layer.name}.{kind}"] = smooth[f"{layer.name}.{kind}"]
        elif held.norm and layer.norm:
            targets[f"{layer.name}.weight"] = raw[f"{layer.name}.weight"]
            targets[f"{layer.name}.gamma"] = raw[f"{layer.norm}.weight"]
            targets[f"{layer.name}.beta"] = raw[f"{layer.norm}.bias"]
        else:
            for kind in ("weight", "bias"):
                targets[f"{layer.name}.{kind}"] = smooth[f"{layer.name}.{kind}"]
    tv: dict[str, Any] = {
        "strategy": strategy,
        "total_variation_before": order.total_variation(folded),
        "total_variation": order.total_variation(smooth),
    }
    manifold = Manifold(
        space,
        model,
        held.kind,
        held.options,
        held.norm,
        held.noise,
        held.samples,
        held.scale,
        {"mean": loaded.mean, "std": loaded.std},
        list(loaded.classes),
        frozen,
        about={"permutation": tv},
    )
    return manifold, targets, smoothed


def run(
    asked: Recipe,
    loaded: data.Dataset,
    checkpoints: Path,
    folder: Path,
    out: Path,
    *,
    resume: bool,
    max_minutes: float,
) -> Result | None:
    """All stages: the manifold at `out`, its table in `folder`. None in every process but the first.

    Everything that can be checked is checked before the first step. Raises ValueError (BadRecipe, a
    run that may not be resumed, damaged state, divergence), OSError, and Stopped after `max_minutes`.
    """
    check(asked, loaded, checkpoints, folder)
    if _rank() == 0:
        begin(asked, loaded, folder, resume=resume)
    if dist.is_initialized():
        dist.barrier()
    net = trained_source(asked, loaded, checkpoints, folder)
    before = source.accuracy(net, loaded.test_images, loaded.test_labels, loaded)
    manifold, targets, smoothed = prepare(asked, loaded, net)
    if torch.cuda.is_available():
        manifold.representation.to(f"cuda:{_rank() % torch.cuda.device_count()}")
    done = fit.fit(
        manifold,
        targets,
        smoothed,
        loaded,
        asked,
        folder,
        resume=resume,
        max_minutes=max_minutes,
    )
    if not done:
        raise Stopped
    if _rank() > 0:
        return None
    manifold.representation.cpu()
    return _finish(asked, loaded, manifold, before, folder, out)


def _finish(
    asked: Recipe, loaded: data.Dataset, manifold: Manifold, before: float, folder: Path, out: Path
) -> Result:
    """Statistics, evaluation, checkpoint, report."""
    if asked.representation.norm:
        statistics.measure_statistics(manifold, loaded, asked)
    rows = evaluate.evaluate(manifold, loaded, asked)
    train, weights = asked.network.train, asked.network.weights
    manifold.about.update(
        title=asked.title,
        recipe=asked.as_dict(),
        source={
            "kind": ("fine-tune" if train else "import") if weights else "train",
            "file": weights,
            "accuracy": round(before, 2),
        },
        data={
            "name": loaded.name,
            "sha256": loaded.digest(),
            "test_images": len(loaded.test_labels),
        },
        evaluation=rows,
        torch=torch.__version__,
    )
    digest = checkpoint.write(manifold, out)
    report = {"source_accuracy": round(before, 2), "evaluation": rows, "checkpoint": digest}
    atomic.write(folder / "evaluation.json", json.dumps(report, indent=1))
    plots.evaluation(rows, asked, before, folder / "evaluation.svg")
    return Result(before, rows, digest)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
