"""What coordinate noise in training is worth, and the samples that Algorithm 3 averages."""

from __future__ import annotations

import numpy as np

from benchmarks.paper.bench import GAMMAS, UNSEEN, Bench
from benchmarks.paper.lead import LEAD, ahead
from benchmarks.paper.scope import COLUMNS, SCOPE, SHIPS, budget
from benchmarks.paper.table import Row, Rows, Table
from training import recipe

NOISES = (0.5, 0.25, 0.0)
COUNTS = (1, 4, 8, 16, 50, 100)


def _row(noise: float, count: int) -> str:
    return f"a = {noise:g}, K = {count}"


def judged(rows: Rows) -> str:
    """Whether averaging pays, and what noise is worth: on average over the sizes, and at the unseen."""
    return (
        f"On average over the four sizes the claim that averaging pays {_worth(rows, 'mean')} At"
        f" {UNSEEN} it {_worth(rows, UNSEEN)}"
    )


def _worth(rows: Rows, column: str) -> str:
    def by(one: str, other: str) -> tuple[float, bool, str]:
        gain, needed = ahead(rows[one], rows[other], column)
        decided = abs(gain) > needed
        return gain, decided, f"{gain:+.2f} points" + ("" if decided else " (undecided)")

    pays = {a: by(_row(a, 50), _row(a, 1)) for a in NOISES[:-1]}
    claim = "is undecided"
    if all(decided for _, decided, _ in pays.values()):
        gains = [gain for gain, _, _ in pays.values()]
        claim = "holds" if min(gains) > 0 else "does not hold" if max(gains) < 0 else claim
    told = ", ".join(f"{words} at a = {a:g}" for a, (_, _, words) in pays.items())
    _, _, noisy = by(_row(NOISES[0], 1), _row(0.0, 1))
    return (
        f"{claim}: K = 50 is worth {told}. Training with a = {NOISES[0]:g} instead of none is, at"
        f" K = 1, worth {noisy}."
    )


def noise(bench: Bench) -> Table:
    """Noise in training, and how many samples Algorithm 3 averages."""
    names = {_row(a, k): (a, k) for a in NOISES for k in (COUNTS if a else (1,))}

    def measure(name: str) -> Row:
        size, count = names[name]

        def once(asked: recipe.Recipe) -> Row:
            row = bench.train(asked)
            if count > 1:
                scores = bench.scores(bench.manifold(asked), samples=count)
                mean = sum(scores[column] for column in GAMMAS) / len(GAMMAS)
                row = {**row, **scores, "mean": round(mean, 2)}
                row.pop("training", None)  # the row of that training is the one without averaging
            return row

        return bench.repeated(bench.asked.changed(representation={"noise": size}), once)

    return Table(
        "noise",
        "coordinate noise a in training, K samples averaged",
        SCOPE
        + budget(bench, "noise")
        + " One sample is the noise-free one. The paper has a = 0.5 and K of 50 to 100.",
        COLUMNS,
        tuple(names),
        measure,
        judged,
        repeated=True,
    )


HALVES = {"even images": slice(None, None, 2), "odd images": slice(1, None, 2)}
"""The test images, counted from 0."""


def samples(bench: Bench) -> Table:
    """How many samples the manifold that ships averages, chosen on images that are not scored."""
    names = {f"K = {count}": count for count in COUNTS}

    def measure(name: str) -> Row:
        row: Row = {}
        for half, images in HALVES.items():
            scores = bench.scores(bench.shipped, samples=names[name], images=images)
            row |= {f"{column}, {half}": scores[column] for column in GAMMAS}
            row[half] = round(float(np.mean([scores[column] for column in GAMMAS])), 2)
        return row

    def verdict(rows: Rows) -> str:
        told, one, gains = [], rows["K = 1"], []
        for half, other in (("even images", "odd images"), ("odd images", "even images")):
            chosen = max(names, key=lambda name: rows[name][half])
            best = max(row[other] for row in rows.values())
            gains.append(rows[chosen][other] - one[other])
            told.append(
                f"of the {other} {chosen}, chosen on the {half}, has {rows[chosen][other]:.2f} %"
                f" right, one sample {one[other]:.2f}, its own best K {best:.2f}"
            )
        ships = SHIPS.representation.samples
        gain = float(np.mean([rows[f"K = {ships}"][half] - one[half] for half in HALVES]))
        return (
            f"On average over the four sizes, {'; '.join(told)}. Chosen on other images, averaging is"
            f" worth {np.mean(gains):+.2f} points (less than {LEAD} is nothing that these images can"
            f" tell). The K = {ships} that ships was fixed before, after scores of smaller runs on the"
            f" same test images; it is worth {gain:+.2f}."
        )

    return Table(
        "samples",
        "K of the manifold that ships, chosen on one half of the test images and scored on the other",
        "`resnet20-last-block-mlp` at γ = 0, 25, 50 and 75 % (unseen), the mean of the four, on every"
        " second raw test image and on the others (2,500 each; the four scores are in the JSON file)."
        " No image that K is chosen on is scored.",
        tuple(HALVES),
        tuple(names),
        measure,
        verdict,
    )
