"""Scores of sampled networks, exactly as a device would run them, at every requested size."""

from __future__ import annotations

import itertools
from typing import Any

from tqdm import tqdm

from neumeta import wire
from neumeta.manifold import Manifold
from neumeta.program import Program
from neumeta.sample import sample
from neumeta.space import Architecture
from training.data import Data
from training.recipe import Recipe
from training.source import score
from training.task import TASKS, Task


def evaluate_one(
    manifold: Manifold,
    architecture: Architecture,
    data: Data,
    *,
    samples: int | None = None,
    task: Task | None = None,
) -> dict[str, Any]:
    """One row of the table: the architecture, its cost, and its score on the test images.

    Raises ValueError, naming the architecture, if a weight or an output is not a finite number.
    """
    task = task or TASKS[manifold.contract.task]
    space = manifold.space
    weights = dict(sample(manifold, architecture, samples=samples))
    for name, weight in weights.items():
        if not bool(weight.isfinite().all()):
            raise ValueError(
                f"{architecture.key}: sampled weights of {name} are not finite numbers"
            )
    program = Program(space.graph_of(architecture).folded, space.sizes(architecture))
    try:
        found = score(lambda x: program.run(weights, x), data, task)
    except ValueError as error:
        raise ValueError(f"{architecture.key}: {error}") from None
    return {
        "channels": list(architecture.channels),
        "depth": list(architecture.depth),
        "extrapolated": architecture.extrapolated,
        **space.cost(architecture),
        "bytes": wire.plan(manifold, architecture, "float32").length,
        "score": round(found, 2),
        "metric": task.metric,
    }


def evaluate(
    manifold: Manifold, data: Data, recipe: Recipe, *, samples: int | None = None
) -> list[dict[str, Any]]:
    """The evaluation table: every width, or every depth, that the recipe lists; where it lists
    both, the widths at the source's depth and even depths at full width."""
    wanted: list[tuple[float, list[int] | None]]
    stages = manifold.space.graph.stages
    if recipe.evaluate.blocks:
        least, most = recipe.evaluate.blocks
        high = recipe.fit.width[1]
        if len(recipe.evaluate.widths) > 1 or len(stages) > 2:
            wanted = [(width, None) for width in recipe.evaluate.widths]
            wanted += [(high, [n] * len(stages)) for n in range(least, most + 1)]
        else:
            depths = itertools.product(range(least, most + 1), repeat=len(stages))
            wanted = [(high, list(depth)) for depth in depths]
    else:
        wanted = [(width, None) for width in recipe.evaluate.widths]
    found: dict[Architecture, float] = {}
    for width, depth in wanted:
        if depth is not None:
            depth = [max(n, stage.least) for n, stage in zip(depth, stages, strict=True)]
        # Full size at the source's depth may be in both lists, and is one row.
        found.setdefault(manifold.space.architecture(width, depth, extrapolate=True), width)
    rows = []
    for architecture, width in tqdm(found.items(), desc="evaluate", mininterval=5):
        row = evaluate_one(manifold, architecture, data, samples=samples)
        rows.append({"width": width, **row})
    return rows
