"""What a manifold of charts cost to train, beside the networks that were trained individually.

    python -m benchmarks.passes cifar10-resnet-charts --manifold models/resnet20-cifar10.safetensors

Costs are in passes of one image of full size through the source, forward and back: a smaller network or
image counts by its multiply-accumulates. Counted are the recipes of all charts and what they went on
from (`fit.start`), each once, whether its file was made on this machine or not. What a step trains is
drawn as training draws it; the source's own answers, made once for a few views, are counted for neither
side. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.local import hardware
from neumeta import checkpoint
from neumeta.sample import seed_of
from neumeta.space import Space
from training import sizes
from training.recipe import BadRecipe, Recipe
from training.recipe_file import of_run

IMAGES = 50_000
STEPS = 2_000
"""How many steps are drawn of each recipe: the mean cost is right to a percent or two."""


def begun(name: str, seen: set[str], only: int | None = None) -> Iterator[Recipe]:
    """The built-in recipe, or if it is one of charts those of all charts or of `only` one, each after
    all that it goes on from; none twice. A file's recipe is the one whose run its folder is named
    after."""
    if name in seen:
        return
    if not name:
        raise SystemExit("a file in no folder: no built-in recipe is named so")
    try:
        asked = of_run(name)
    except BadRecipe as error:
        raise SystemExit(str(error)) from None
    for k, chart in enumerate(asked.charts):
        for each in chart.file if only in (None, k) else ():
            yield from begun(Path(each).parent.name, seen, chart.chart)
    if asked.fit.start:
        yield from begun(Path(asked.fit.start).parent.name, seen, asked.fit.chart)
    if not asked.charts:
        seen.add(name)
        yield asked


def cost(asked: Recipe, space: Space) -> float:
    """The mean cost of one step for each of its images, in passes of the source at full size."""
    covered = replace(space, width=asked.fit.width, blocks=asked.fit.blocks)
    full, total = space.cost(space.full)["macs"], 0.0
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(seed_of(asked.seed, f"step/{step}"))
        drawn = sizes.choose(asked, covered, generator)
        total += sum(space.cost(size)["macs"] for size in drawn) / full
    return total / STEPS * area(asked.fit.resolutions)


def area(resolutions: Sequence[float]) -> float:
    """The mean number of pixels of images that grow so, in images of full size."""
    return sum(share**2 for share in resolutions) / len(resolutions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="a built-in recipe of charts, or one of a chart")
    parser.add_argument(
        "--manifold", type=Path, default=Path("models/resnet20-cifar10.safetensors")
    )
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args()
    space, rows = checkpoint.read(arguments.manifold).space, {}
    print("| recipe | epochs | cost of a step | source passes |\n|---|---:|---:|---:|")
    for asked in begun(arguments.recipe, set()):
        each = cost(asked, space)
        own = asked.network.train
        source = own.epochs * area(own.resolutions) if own else 0.0
        rows[asked.name] = round(IMAGES * (asked.fit.epochs * each + source))
        print(f"| {asked.name} | {asked.fit.epochs:g} | {each:.2f} | {rows[asked.name]:,} |")
    held = json.loads((arguments.results / "individual.json").read_text())
    alone = {f"{row['depth']}/{row['channels']}": row["passes"] for row in reversed(held)}
    print(f"\nall: {sum(rows.values()):,}; {len(alone)} networks alone: {sum(alone.values()):,}")
    summary = {"manifold": sum(rows.values()), "alone": sum(alone.values()), "recipes": rows}
    print(json.dumps({"benchmark": "passes", "hardware": hardware(), "result": summary}))


if __name__ == "__main__":
    main()
