"""Accuracy of sampled networks, exactly as a device would run them, at every requested size."""

from __future__ import annotations

import itertools
from typing import Any

from tqdm import tqdm

from neumeta import wire
from neumeta.architecture import Architecture
from neumeta.manifold import Manifold
from neumeta.sample import sample
from training.data import Dataset
from training.folded import network_from
from training.recipe import Recipe
from training.source import accuracy


def evaluate_one(
    manifold: Manifold, architecture: Architecture, data: Dataset, *, samples: int | None = None
) -> dict[str, Any]:
    """One row of the table: the architecture, its cost, and its accuracy on the test images.

    Raises ValueError, naming the architecture, if a weight or an output is not a finite number.
    """
    weights = dict(sample(manifold, architecture, samples=samples))
    for name, weight in weights.items():
        if not bool(weight.isfinite().all()):
            raise ValueError(
                f"{architecture.key}: sampled weights of {name} are not finite numbers"
            )
    net = network_from(weights, architecture.family, architecture.depth)
    try:
        score = accuracy(net, data.test_images, data.test_labels, data)
    except ValueError as error:
        raise ValueError(f"{architecture.key}: {error}") from None
    plan = wire.plan(manifold.space, architecture, "float32", manifold.normalisation)
    return {
        "channels": list(architecture.channels),
        "depth": list(architecture.depth),
        "extrapolated": architecture.extrapolated,
        **manifold.space.cost(architecture),
        "bytes": plan.length,
        "accuracy": round(score, 2),
    }


def evaluate(
    manifold: Manifold, data: Dataset, recipe: Recipe, *, samples: int | None = None
) -> list[dict[str, Any]]:
    """The evaluation table: every width, or every depth, that the recipe lists; where it lists
    both, the widths at the source's depth and even depths at full width."""
    wanted: list[tuple[float, list[int] | None]]
    if recipe.evaluate.blocks:
        least, most = recipe.evaluate.blocks
        stages = len(manifold.space.depth)
        if len(recipe.evaluate.widths) > 1:
            wanted = [(width, None) for width in recipe.evaluate.widths]
            wanted += [(recipe.fit.width[1], [n] * stages) for n in range(least, most + 1)]
        else:
            depths = itertools.product(range(least, most + 1), repeat=stages)
            wanted = [(recipe.fit.width[1], list(depth)) for depth in depths]
    else:
        wanted = [(width, None) for width in recipe.evaluate.widths]
    found: dict[Architecture, float] = {}
    for width, depth in wanted:
        # Full size at the source's depth may be in both lists, and is one row.
        found.setdefault(manifold.space.architecture(width, depth, extrapolate=True), width)
    rows = []
    for architecture, width in tqdm(found.items(), desc="evaluate", mininterval=5):
        row = evaluate_one(manifold, architecture, data, samples=samples)
        rows.append({"width": width, **row})
    return rows
