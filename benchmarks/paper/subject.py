"""One network, and four ways to have four sizes of it. Draws no picture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from benchmarks.paper.bench import GAMMAS, UNSEEN, Bench, Changes, stored
from benchmarks.paper.table import Row
from neumeta import atomic, checkpoint
from neumeta.fold import fold
from neumeta.manifold import Manifold
from neumeta.program import Program
from neumeta.sample import sample
from neumeta.space import Architecture
from training import basis, pipeline, recipe, source
from training.data import Dataset
from training.task import TASKS

SOURCE, INDIVIDUAL, SLIMMABLE, NEUMETA = (
    "the source network",
    "individual",
    "slimmable",
    "NeuMeta",
)
FULL, HALF = "γ = 0", "50 %"
TRAINED = (1.0, 0.75, 0.5)
"""Widths of the slimmable network; the manifold's are all between the largest and the smallest."""
SQUARES = "squares.npz"


@dataclass
class Subject:
    """One network of which four sizes are made, each by training what of its widths morphs.

    `asked` is its recipe with the scope and the budget of every row, as NeuMeta is trained; its source
    is kept as `name`. Of the test images every so-manyth is scored.
    """

    bench: Bench
    name: str
    asked: recipe.Recipe
    every: int = 1

    def __post_init__(self) -> None:
        if self.bench.setting.quick:
            self.asked, self.every = tiny(self.asked, self.bench.setting.runs / SQUARES), 1

    @cached_property
    def given(self) -> tuple[Dataset, basis.Traced]:
        """The images, and the source network."""
        if self.bench.setting.quick:
            squares(self.bench.setting.runs / SQUARES)
        loaded, own = self.bench.source(self.name, self.asked)
        assert isinstance(loaded, Dataset)
        return loaded, own

    @cached_property
    def tests(self) -> Dataset:
        """The images with the test images that are scored alone."""
        loaded, _ = self.given
        return replace(
            loaded,
            test_images=loaded.test_images[:: self.every],
            test_labels=loaded.test_labels[:: self.every],
        )

    def changed(self, changes: Changes) -> tuple[recipe.Recipe, Path]:
        """The recipe of one training, and where its run is."""
        asked = self.asked.changed(**changes)
        return asked, self.bench.setting.runs / self.bench.digest(asked)

    def trained(self, changes: Changes) -> Manifold:
        """The manifold of the recipe with these changes: of an earlier run, or trained now.

        Raises Late when the time allowed is up.
        """
        asked, folder = self.changed(changes)
        path = folder / "manifold.safetensors"
        if not path.exists():
            loaded, own = self.given
            manifold, smoothed = pipeline.prepare(asked, loaded, own.graph, own.module)
            self.bench.fit(asked, manifold, smoothed, loaded, folder)
        return checkpoint.read(path)

    def network(self, manifold: Manifold, width: float) -> tuple[Program, dict[str, Tensor]]:
        """The network of this width, trained or not, and its weights."""
        architecture = manifold.space.architecture(width, extrapolate=True)
        graph = manifold.space.graph_of(architecture).folded
        return Program(graph, manifold.space.sizes(architecture)), dict(
            sample(manifold, architecture)
        )

    def score(self, run: source.Run) -> float:
        """Of a network, on the test images."""
        return round(source.score(run, self.tests, TASKS[self.asked.task]), 2)

    def scored(self, manifold: Manifold, width: float) -> float:
        """Of the manifold's network of this width."""
        program, weights = self.network(manifold, width)
        return self.score(lambda x: program.run(weights, x))

    def shared(self, changes: Changes) -> Row:
        """The row of one training for all sizes."""
        manifold = self.trained(changes)
        return {
            **{column: self.scored(manifold, width) for column, width in GAMMAS.items()},
            "parameters, M": round(stored(manifold) / 1e6, 3),
            "minutes": manifold.about["minutes"],
            "training": self.bench.digest(self.changed(changes)[0]),
        }

    def individual(self) -> Row:
        """The row of one training for each size but the source's own."""
        row: Row = {"parameters, M": 0.0, "minutes": 0.0}
        for column, width in GAMMAS.items():
            if width == 1:
                continue
            manifold = self.trained(nested((width,)))
            row[column] = self.scored(manifold, width)
            # A nested grid holds the source's size; this network has so many of its numbers.
            held = numbers(manifold, manifold.space.architecture(width))
            row["parameters, M"] = round(row["parameters, M"] + held / 1e6, 3)
            row["minutes"] = round(row["minutes"] + manifold.about["minutes"], 2)
        return row

    def row(self, name: str) -> Row:
        """The row of this name."""
        if name == SOURCE:
            return {FULL: self.score(self.given[1].module)}
        if name == INDIVIDUAL:
            return self.individual()
        return self.shared(nested(TRAINED) if name == SLIMMABLE else {})

    def networks(self) -> dict[str, tuple[Program, dict[str, Tensor]]]:
        """Those of the figure, by label: the source, the manifold's of all sizes, and the slimmable one
        of the size that it has not seen."""
        manifold, other = self.trained({}), self.trained(nested(TRAINED))
        _, own = self.given
        weights = fold(own.graph, source.tensors(own.module, own.graph.tensors))
        return {
            "source": (Program(own.graph.folded, own.graph.full), weights),
            **{f"{NEUMETA}, {name}": self.network(manifold, w) for name, w in GAMMAS.items()},
            f"{SLIMMABLE}, {UNSEEN}": self.network(other, GAMMAS[UNSEEN]),
        }


def numbers(manifold: Manifold, architecture: Architecture) -> int:
    """How many numbers the tensors have that morph, at this size."""
    made = dict(sample(manifold, architecture))
    return sum(value.numel() for name, value in made.items() if name not in manifold.frozen)


def nested(widths: tuple[float, ...]) -> Changes:
    """A grid of the source's own channels, the first of which every smaller size has, for these widths
    alone."""
    low = min(TRAINED[-1], *widths)
    grid = {"kind": "grid", "options": {}, "noise": 0.0, "samples": 1, "centred": None}
    return {
        "representation": grid,
        "fit": {"widths": list(widths), "width": [low, 1.0], "smallest": 0.0, "regression_steps": 0},
    }  # fmt: skip


def tiny(asked: recipe.Recipe, images: Path) -> recipe.Recipe:
    """The same on these few images, in a few steps."""
    plain = {"path": str(images.resolve()), "name": "", "size": None, "classes": None}
    return asked.changed(
        data={**plain, "ignore": None},
        network={"weights": "", "train": {"epochs": 1, "lr": 1e-3, "batch": 8}},
        order={"strategy": "none"},
        fit={"epochs": 1, "batch": 8},
    )


def squares(path: Path) -> None:
    """Keep 24 images of a bright square each, and their masks."""
    draw = np.random.default_rng(0)
    labels = np.zeros((24, 32, 32), np.uint8)
    for label, row, column in zip(labels, *draw.integers(0, 20, (2, 24)), strict=True):
        label[row : row + 10, column : column + 10] = 1
    images = 60 + 120 * labels + draw.integers(0, 40, labels.shape, np.uint8)
    first = 16  # are for training
    with atomic.writing(path) as file:
        np.savez(
            file,
            train_images=images[:first],
            train_labels=labels[:first],
            test_images=images[first:],
            test_labels=labels[first:],
        )
