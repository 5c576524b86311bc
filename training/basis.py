"""What a recipe builds on: its images, its source network and that one's graph, the sizes that its
manifold covers; and whether all of these fit together.

Knows no training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from neumeta.graph import Graph
from neumeta.program import Program
from neumeta.space import Space
from training import data, distillation, given, modules, networks, source
from training.processes import world
from training.recipe import BadRecipe, Recipe, refused
from training.resolution import shrunk
from training.task import TASKS
from training.trace import trace


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
    fit, deep, problems = asked.fit, asked.fit.blocks is not None, list[str]()
    made = graph.folded if asked.folded else graph
    if asked.wide and not made.axes:
        allowed = "nothing in this network can be resized"
        raise BadRecipe(asked.file, [refused("fit.width", fit.width, allowed)])
    try:
        # Width that does not morph keeps its axes' sizes.
        made = made.morphing(fit.morph if asked.wide else (), depth=deep)
    except ValueError as error:
        raise BadRecipe(asked.file, [f"fit.morph: {error}"]) from None
    if fit.blocks and not made.stages:
        allowed = "this network has no stages: no container of blocks that are alike"
        problems.append(refused("fit.blocks", fit.blocks, allowed))
    if fit.most and len(fit.most) != len(made.groups):
        allowed = f"one number for each of {', '.join(made.groups)}"
        allowed = allowed if made.groups else "left out: no width morphs"
        problems.append(refused("fit.most", fit.most, allowed))
    for stage in made.stages:
        if fit.blocks and fit.blocks[0] < stage.least:
            allowed = f"stage {stage.name} has at least {stage.least} blocks"
            problems.append(refused("fit.blocks", fit.blocks, allowed))
    if any(stage >= len(made.stages) for stage in fit.shallow_stages):
        allowed = f"of stages 0 to {len(made.stages) - 1}"
        problems.append(refused("fit.shallow", fit.shallow, allowed))
    for name, depth in asked.network.named.items():
        if len(depth) != len(made.stages) or not all(
            stage.least <= n <= fit.most_blocks for n, stage in zip(depth, made.stages, strict=True)
        ):
            allowed = f"one number for each of {', '.join(stage.name for stage in made.stages)}"
            problems.append(refused(f"network.named.{name}", depth, allowed))
    if fit.distill_features and not distillation.places(made):
        allowed = "0: with these fit.morph no value inside has the source's shape at every width"
        problems.append(refused("fit.distill_features", fit.distill_features, allowed))
    if problems:
        raise BadRecipe(asked.file, problems)
    return Space(
        asked.served, made, fit.width, fit.blocks, fit.most_blocks, dict(asked.network.named)
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
