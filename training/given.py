"""The manifolds that a recipe goes on from (`fit.start`), copies (`fit.copied`) or puts together
(`charts`).

Knows no training and no run.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neumeta import checkpoint
from neumeta.manifold import Manifold, roles
from neumeta.notation import pack
from neumeta.representation import Charts, Expanded, Sizes, build, within
from neumeta.sites import kept
from neumeta.space import Space
from neumeta.statistics import Statistics
from training import charts, statistics
from training.data import Data
from training.recipe import BadRecipe, Recipe, refused
from training.sections import ChartSection


def files(asked: Recipe, checkpoints: Path) -> dict[str, Path]:
    """The manifolds that `fit.start`, `fit.copied` or `charts` name, by key: each beside the recipe,
    under `checkpoints`, or from here.

    Raises BadRecipe for one that is in none of them.
    """
    wanted = {
        f"charts[{k}].file" + (f"[{cycle}]" if len(chart.file) > 1 else ""): name
        for k, chart in enumerate(asked.charts)
        for cycle, name in enumerate(chart.file)
    }
    named = {"fit.start": asked.fit.start, "fit.copied": asked.fit.copied}
    wanted |= {key: name for key, name in named.items() if name}
    places = [Path(asked.file).parent, checkpoints, Path()]
    found = {}
    for key, name in wanted.items():
        there = [place / name for place in places if (place / name).is_file()]
        if not there:
            where = " nor in ".join(str(place.resolve()) for place in places)
            raise BadRecipe(asked.file, [refused(key, name, f"it is neither in {where}")])
        found[key] = there[0]
    return found


def digest(asked: Recipe, checkpoints: Path) -> str | None:
    """sha256 of all of them, one after the other; None if the recipe names none."""
    raw = [path.read_bytes() for path in files(asked, checkpoints).values()]
    return hashlib.sha256(b"".join(raw)).hexdigest() if raw else None


def opened(asked: Recipe, loaded: Data, covered: Space, key: str, path: Path) -> Manifold:
    """A manifold that the recipe's `key` names. Raises BadRecipe if the file is none, or of another
    network or data set."""
    try:
        found = checkpoint.read(path)
    except checkpoint.BadCheckpoint as error:
        raise BadRecipe(asked.file, [f"{key}: {error}"]) from None
    problems, graph = [], found.space.graph
    if key == "fit.copied" and not covered.graph.stages:
        # Of a manifold of many depths the source's own can be copied alone.
        graph = graph.morphing(tuple(graph.axes), depth=False)
    same = pack(graph) == pack(covered.graph)
    if not same and pack(graph.folded) == pack(covered.graph.folded):
        told = "with" if pack(graph) != pack(graph.folded) else "without"
        allowed = f"{path} is of this network {told} its batch norms"
        problems.append(refused("fit.folded", asked.folded, allowed))
    elif not same:
        axes = "fit.morph, fit.width, fit.blocks"
        allowed = f"{path} is a manifold of another network, or of other axes ({axes})"
        problems.append(refused("network.network", asked.network.network, allowed))
    if found.contract.classes != tuple(loaded.classes) or found.contract.task != asked.task:
        allowed = (
            f"{path} was made for {found.contract.task} of {len(found.contract.classes)} classes"
        )
        problems.append(refused("data", loaded.name, allowed))
    if problems:
        raise BadRecipe(asked.file, problems)
    return found


def joined(asked: Recipe, loaded: Data, covered: Space, checkpoints: Path) -> Manifold:
    """The manifolds of `charts` as one.

    Raises BadRecipe if one does not fit this recipe or another.
    """
    places = files(asked, checkpoints)
    cycles = []
    for k, chart in enumerate(asked.charts):
        own = {key: path for key, path in places.items() if key.startswith(f"charts[{k}].file")}
        held = [(path, opened(asked, loaded, covered, key, path)) for key, path in own.items()]
        some = any(each.kind == "charts" for _, each in held)
        # Beside a file of charts stands what went on from the one that `chart` names.
        cycles.append(
            [
                each if some and each.kind != "charts" else _part(asked, k, chart, each, path)
                for path, each in held
            ]
        )
    try:
        parts = [charts.mean(each) for each in cycles]
        sizes, steps = zip(*((chart.sizes, chart.steps) for chart in asked.charts), strict=True)
        made = charts.joined(parts, sizes, covered, steps)
    except ValueError as error:
        problem = str(error).removeprefix("charts: ")
        raise BadRecipe(asked.file, [f"charts: {problem}"]) from None
    told = [
        {
            **chart.model_dump(exclude={"file", "chart"}, exclude_defaults=True),
            "sha256": ", ".join(part.about.get("sha256", part.digest) for part in each),
            "recipe": each[-1].about.get("recipe", {}),
        }
        for chart, each in zip(asked.charts, cycles, strict=True)
    ]
    contract = replace(made.contract, mean=tuple(loaded.mean), std=tuple(loaded.std))
    return replace(made, contract=contract, about={**made.about, "charts": told})


def begun(
    asked: Recipe, loaded: Data, covered: Space, checkpoints: Path
) -> tuple[Manifold, dict[str, Tensor]]:
    """The manifold that `fit.start` names, as this recipe goes on with it, and all tensors of its full
    size: the source, smoothed. A manifold that is not `expanded` can be, or by more terms: they are
    nothing at first.

    Raises BadRecipe if the file is none, or of another network, data set or representation, or has no
    chart `fit.chart`.
    """
    path = files(asked, checkpoints)["fit.start"]
    before = found = opened(asked, loaded, covered, "fit.start", path)
    if asked.fit.chart is not None or found.kind == "charts":
        before = _chart(asked, found, path)
    built = asked.representation
    model = build(built.kind, built.built, roles(covered))
    try:
        held = before.representation.state_dict()
        if isinstance(model, Expanded):
            if "expanded" not in before.options:
                held = {f"inner.{name}": value for name, value in held.items()}
            own = {n: v for n, v in model.state_dict().items() if not n.startswith("inner.")}
            held = {**own, **held}
        model.load_state_dict(held)
    except RuntimeError:
        now = {"kind": before.kind, **before.options}
        told = refused("representation", {"kind": built.kind, **built.built}, f"{path} has {now}")
        raise BadRecipe(asked.file, [told]) from None
    manifold = replace(
        before, space=covered, representation=model, **_of_recipe(asked, loaded, before)
    )
    return manifold, _smoothed(asked, "fit.start", found, path)


def copied(
    asked: Recipe, loaded: Data, covered: Space, checkpoints: Path
) -> tuple[Manifold, dict[str, Tensor], Manifold]:
    """The untrained manifold of this recipe, all tensors of the source, smoothed, and the manifold that
    `fit.copied` names, of which both are.

    Raises BadRecipe if the file is none, or of another network or data set, or for fewer sizes.
    """
    path = files(asked, checkpoints)["fit.copied"]
    found = opened(asked, loaded, covered, "fit.copied", path)
    problems = []
    deep = found.space.depth
    own = {"width": covered.width, "blocks": covered.blocks or (deep and (min(deep), max(deep)))}
    for key, mine in own.items():
        theirs = getattr(found.space, key)
        if mine and theirs and not theirs[0] <= mine[0] <= mine[1] <= theirs[1]:
            allowed = f"{path} was trained on {theirs[0]:g} to {theirs[1]:g}"
            problems.append(refused(f"fit.{key}", mine, allowed))
    if problems:
        raise BadRecipe(asked.file, problems)
    smoothed = _smoothed(asked, "fit.copied", found, path)
    built = asked.representation
    torch.manual_seed(asked.seed)
    manifold = replace(
        found,
        space=covered,
        representation=build(built.kind, built.built, roles(covered)),
        frozen={name: smoothed[name].contiguous() for name in kept(covered.graph)},
        statistics=Statistics(),
        **_of_recipe(asked, loaded, found),
    )
    return manifold, smoothed, found


def _smoothed(asked: Recipe, key: str, found: Manifold, path: Path) -> dict[str, Tensor]:
    """All tensors of a manifold's full size. Raises BadRecipe if it keeps no statistics of it."""
    try:
        return statistics.whole(found, found.space.full)
    except KeyError:
        allowed = f"{path} keeps no batch statistics of its source"
        raise BadRecipe(asked.file, [refused(key, asked.begun, allowed)]) from None


def _of_recipe(asked: Recipe, loaded: Data, before: Manifold) -> dict[str, Any]:
    """What this recipe says of a manifold that comes from another."""
    built = asked.representation
    return {
        "kind": built.kind,
        "options": built.built,
        "noise": built.noise,
        "samples": built.samples,
        "scale": built.scale,
        "contract": replace(before.contract, mean=tuple(loaded.mean), std=tuple(loaded.std)),
        "about": {"permutation": before.about.get("permutation", {})},
        "digest": "",
    }


def _chart(asked: Recipe, found: Manifold, path: Path) -> Manifold:
    """The chart of a manifold that `fit.chart` names. Raises BadRecipe if there is none, or if it
    does not hold all channels and blocks that this recipe trains."""
    wanted = asked.fit
    chart, sizes = _taken(asked, "fit.chart", wanted.chart, found, path)
    held = f"chart {wanted.chart} of {path} has"
    problems = []
    for group, name in enumerate(found.space.groups):
        most = sizes.widest(group)
        if wanted.widest(group) > most:
            allowed = f"{held} no channels of {name} beyond a width of {most:g}"
            key, given = ("most", wanted.most) if wanted.most else ("width", wanted.width)
            problems.append(refused(f"fit.{key}", given, allowed))
            break
    # Beside the random network, a sandwich has others whose depth is any.
    shallow = set() if wanted.sandwich else set(wanted.shallow_stages)
    for stage, own in enumerate(found.space.depth):
        least, deepest = wanted.blocks or (own, own)
        most = sizes.deepest(stage)
        if (least if shallow == {stage} else deepest) > most:
            allowed = f"{held} no more than {most:g} blocks in stage {stage}"
            problems.append(refused("fit.blocks", wanted.blocks, allowed))
            break
    if sizes.bounded and wanted.sandwich and wanted.full_weight:
        allowed = f"false: {held} not the full size, which it trains"
        problems.append(refused("fit.sandwich", wanted.sandwich, allowed))
    if problems:
        raise BadRecipe(asked.file, problems)
    return chart


def _part(asked: Recipe, k: int, wanted: ChartSection, found: Manifold, path: Path) -> Manifold:
    """The manifold that `charts[k]` names, or the chart of it. Raises BadRecipe if there is none, or if
    it has fewer channels or blocks than the sizes that it shall be for."""
    key = f"charts[{k}]"
    if wanted.chart is None and found.kind != "charts":
        return found
    chart, sizes = _taken(asked, f"{key}.chart", wanted.chart, found, path)
    problems = []
    for bound in ("most", "most_blocks"):
        here, there, given = (getattr(each, bound) for each in (wanted.sizes, sizes, wanted))
        if not within(here, there):
            allowed = f"{', '.join(f'{n:g}' for n in there)} or less, as it was"
            told = given[0] if given and len(given) == 1 else given
            problems.append(refused(f"{key}.{bound}", told, allowed))
    if problems:
        raise BadRecipe(asked.file, problems)
    return chart


def _taken(
    asked: Recipe, key: str, index: int | None, found: Manifold, path: Path
) -> tuple[Manifold, Sizes]:
    """A chart of a manifold, with what the manifold tells of it, and the sizes it is for. Raises
    BadRecipe if there is none, or if none is named."""
    if index is None:
        problem = refused(key, None, f"it must say which chart of {path} it is")
        raise BadRecipe(asked.file, [problem])
    try:
        chart = charts.taken(found, index)
    except ValueError as error:
        raise BadRecipe(asked.file, [refused(key, index, str(error))]) from None
    assert isinstance(found.representation, Charts)
    try:
        told = dict(found.about["charts"][index])
    except (LookupError, TypeError, ValueError):  # whoever wrote the file has told nothing
        told = {}
    about = {
        "permutation": found.about.get("permutation", {}),
        "sha256": told.get("sha256", found.digest),
        "recipe": told.get("recipe", {}),
    }
    return replace(chart, about=about), found.representation.sizes[index]
