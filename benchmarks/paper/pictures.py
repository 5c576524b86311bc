"""Section 8 and generation: four ways to have four sizes of a network whose outputs are pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.paper.bench import GAMMAS, Bench, stored
from benchmarks.paper.table import Row, Rows, Table
from neumeta import atomic, checkpoint
from neumeta.fold import fold
from neumeta.manifold import Manifold
from neumeta.program import Program
from neumeta.sample import sample
from neumeta.space import Architecture
from training import pipeline, plots, recipe, source
from training.data import Dataset
from training.task import TASKS

SOURCE, INDIVIDUAL, SLIMMABLE, NEUMETA = (
    "the source network",
    "individual",
    "slimmable",
    "NeuMeta",
)
FULL, HALF, UNSEEN = "γ = 0", "50 %", "75 % (unseen)"
TRAINED = (1.0, 0.75, 0.5)
"""Widths of the slimmable network; the manifold's are all between the largest and the smallest."""
SHOWN = 6
"""Pictures in a row of the figure."""
COLOURS = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
    (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip
"""CamVid's own colours of its eleven classes; what has no class is black."""

SQUARES = "squares.npz"

Changes = Mapping[str, Any]
Image = np.ndarray


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
    def given(self) -> tuple[Dataset, pipeline.Traced]:
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


def verdict(unit: str, level: float) -> Callable[[Rows], str]:
    """The claim: ahead of slimmable where neither was trained, level with individual at half."""

    def judged(rows: Rows) -> str:
        ours, theirs = rows[NEUMETA][UNSEEN], rows[SLIMMABLE][UNSEEN]
        half, one = rows[NEUMETA][HALF], rows[INDIVIDUAL][HALF]
        ahead, even = ours > theirs, half > one - level
        drop = rows[SOURCE][FULL] - ours
        return (
            f"That NeuMeta is ahead of slimmable at the unseen 75 % {_holds(ahead)} here: {ours:.2f}"
            f" against {theirs:.2f} {unit}, {abs(drop):.2f} {'below' if drop > 0 else 'above'} the"
            f" source. That it is level with individual networks at 50 % {_holds(even)}: {half:.2f}"
            f" against {one:.2f} (less than {level:g} below counts as level)."
        )

    return judged


def _holds(claim: bool) -> str:
    return "holds" if claim else "does not hold"


def section8(bench: Bench) -> Table:
    """Segmentation: a U-Net on CamVid."""
    asked = recipe.load("camvid-unet").changed(
        representation={**CONTINUOUS, "options": {"density": 0.5}, "noise": 0.5, "samples": 8},
        fit={
            **BUDGET, "morph": list(UNET), "per_group": 0.0, "optimiser": "adamw", "lr": 1e-3,
            "weight_decay": 1e-4, "clip": 10.0, "ema": 0.99, "distill_weight": 0.8, "epochs": 20,
        },
    )  # fmt: skip
    theirs = {
        INDIVIDUAL: (84.70, 83.14, 82.79),
        SLIMMABLE: (81.09, 80.92, 61.19),
        NEUMETA: (81.94, 81.93, 81.94),
    }
    few = list(GAMMAS)[1:]
    return _table(
        "section8",
        "segmentation, mean IoU",
        "A small U-Net on CamVid (64 x 48 pixels, 11 classes, all 233 test images; recipe camvid-unet);"
        " the paper's figures, in brackets, are of another network on VOC2012. Scope: five widths of"
        f" the three lower levels that no concatenation reads ({', '.join(UNET)}); the rest is the"
        " frozen source. At a quarter of these widths the whole network has 119 thousand parameters of"
        " 482. " + _how(asked),
        Subject(bench, "unet", asked),
        masks,
        verdict("points", 1.0),
        {name: dict(zip(few, figures, strict=True)) for name, figures in theirs.items()},
    )


def generation(bench: Bench) -> Table:
    """Generation: a VAE on MNIST."""
    asked = recipe.load("mnist-vae").changed(
        # Noise costs it more than it gives: 600 steps with noise end 18 nats lower at 50 %.
        representation={**CONTINUOUS, "options": {"density": 0.4}},
        fit={**BUDGET, "morph": list(VAE), "distill_weight": 0.5, "lr": 3e-3, "epochs": 2},
    )
    return _table(
        "generation",
        "a variational autoencoder, ELBO in nats",
        "The published VAE on MNIST (recipe mnist-vae), every second test image (5,000); the paper"
        " shows pictures and no figures. The ELBO is of the mean of each latent code, to which the"
        " source, trained with random codes, was not fitted: what is trained here may pass it. Scope:"
        " the hidden widths of the linear layers of encoder and decoder, four of 256; the rest is the"
        " frozen source. At a quarter of these widths the whole network has 143 thousand parameters of"
        " 469. " + _how(asked),
        Subject(bench, "vae", asked, 2),
        samples,
        verdict("nats", 1.0),
        {},
    )


UNET = ("down.2.0", "down.3.0", "down.3.3", "merge.0.0", "merge.1.0")
VAE = ("*.lin1", "*.lin2")
CONTINUOUS: Changes = {"kind": "integral", "corrected": None}
"""Weights as functions of the channel's place: what is nested cannot make a size smaller than any that
it was trained at."""
BUDGET: Changes = {
    "width": [TRAINED[-1], 1.0], "smallest": 0.5, "folded": True, "sandwich": False,
    "distill": "source",
}  # fmt: skip
HOW = (
    "All rows start from the source's slices, which teaches them, and train for {epochs:g} epochs, one"
    " size a step: individual networks each at their own size (75 % too; at γ = 0 stands the source),"
    " slimmable at 0, 25 and 50 %, NeuMeta at any size from 0 to 50 %, the smallest in half of the"
    " steps. NeuMeta's weights are piecewise linear functions of the channel's place (kind integral),"
    " {density:g} points for each of the source's channels, in the order of mSHP, {noise}: chosen in"
    " short trials on the same test images. One seed. Parameters are those stored for what morphs,"
    " minutes those of a core."
)


def _how(asked: recipe.Recipe) -> str:
    held = asked.representation
    noise = f"with noise of {held.noise:g} in training, {held.samples} samples averaged"
    return HOW.format(
        epochs=asked.fit.epochs,
        density=held.options["density"],
        noise=noise if held.noise else "without noise",
    )


def _table(
    name: str,
    title: str,
    head: str,
    subject: Subject,
    picture: Callable[[Subject], dict[str, list[Image]]],
    judged: Callable[[Rows], str],
    theirs: Mapping[str, Mapping[str, float]],
) -> Table:
    folder = subject.bench.setting.results.folder.parent / "figures"
    path = folder / f"paper-{name}.png"

    def measure(row: str) -> Row:
        found = subject.row(row)
        if row == NEUMETA:  # the last: the others' networks are there
            folder.mkdir(parents=True, exist_ok=True)
            plots.sheet(picture(subject), path)
        return found

    return Table(
        name,
        title,
        head,
        (*GAMMAS, "parameters, M", "minutes"),
        (SOURCE, INDIVIDUAL, SLIMMABLE, NEUMETA),
        measure,
        judged,
        theirs,
        # Its networks may be on another machine than the page.
        figure=lambda rows, out: path.relative_to(out) if path.exists() else None,
    )


def masks(subject: Subject) -> dict[str, list[Image]]:
    """Test images, their masks, and those of the networks of every size, by row of the figure."""
    tests = subject.tests
    rows = torch.arange(SHOWN) * (len(tests.test_images) // SHOWN)
    some = replace(tests, test_images=tests.test_images[rows], test_labels=tests.test_labels[rows])
    x, truth = next(iter(some.test_batches()))
    found = {
        "image": [_pixels(each) for each in some.test_images.float() / 255],
        "true mask": [coloured(each) for each in truth],
    }
    for label, (program, weights) in subject.networks().items():
        with torch.no_grad():  # not around `networks`, which may train
            logits = TASKS[subject.asked.task].read(program.run(weights, x))
        found[label] = [coloured(each) for each in logits.argmax(1)]
    return found


def samples(subject: Subject) -> dict[str, list[Image]]:
    """What the decoders of every size make of the same latent codes, by row of the figure."""
    found = {}
    for label, (program, weights) in subject.networks().items():
        latent = weights["decoder.lin1.weight"].shape[1]
        drawn = torch.randn(2 * SHOWN, latent, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():  # not around `networks`, which may train
            made = decoded(program, weights, drawn)
        found[label] = [_pixels(each) for each in made]
    return found


def decoded(program: Program, weights: Mapping[str, Tensor], codes: Tensor) -> Tensor:
    """The pixels that the second half of a variational autoencoder makes of latent codes (N, Z)."""
    # The codes' mean is an output; the first operation that reads it begins the decoder.
    latent = [value for _, value in program.outputs][1:]
    first = next(k for k, step in enumerate(program.steps) if latent[0] in step.inputs)
    made: Any = program.run(weights, dict.fromkeys(latent, codes), first=first)
    pixels: Tensor = made[0]
    return pixels


def coloured(mask: Tensor) -> Image:
    """Classes (H, W) as colours (H, W, 3) in 0..1."""
    palette = np.array((*COLOURS, (0, 0, 0))) / 255
    classes = mask.numpy()
    return palette[np.where(classes < 0, len(COLOURS), classes)]


def _pixels(image: Tensor) -> Image:
    """(C, H, W) -> (H, W, C)."""
    array: Image = image.movedim(0, 2).numpy()
    return array


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
