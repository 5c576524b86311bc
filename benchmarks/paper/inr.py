"""Tables 1 to 5, what noise is worth, and the main paper's comparison: the residual MLP, one thing
changed at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.paper.bench import GAMMAS, Bench
from benchmarks.paper.table import Row, Rows, Table, by_seed, holds
from training import recipe

COLUMNS = (*GAMMAS, "mean")
SCOPE = (
    "Scope of the paper's code: the hidden width of the last block of ResNet-20 on CIFAR-10,"
    " trained on 32 to 64 channels. Training images are those of `benchmarks.pixels`: JPEGs of"
    " quality about 75, two thirds of them restored by a small network, 4,000 raw ones among them;"
    " scores are on the 5,000 raw test images that are at hand (those on JPEG ones are in the JSON"
    " file)."
    " The paper's figure stands in brackets; where it gives one number, beside our mean."
)
SHIPS = recipe.load("cifar10-resnet20-last-block-mlp")
UNORDERED = "no permutation (a random order)"
NATIVE = (
    " The source comes out of the manifold that ships, in the order of mSHP; its own order is gone, and"
    " a random one stands for it (figure2: the two have the same total variation)."
)
LEAD = 0.5
"""Points of the mean: a lead of less decides nothing between rows of one seed."""
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""By the number of seeds: how many standard errors around a mean hold 95 % (Student 1908)."""
NOISES = (0.5, 0.25, 0.0)
COUNTS = (1, 4, 8, 16, 50, 100)

Changes = Mapping[str, Any]


def _budget(bench: Bench, table: str) -> str:
    """What every row of this table was given."""
    rows = bench.setting.results.read(table).values()
    counts = [len(by_seed(row)) for row in rows] or [bench.setting.seeds]
    told = "one seed: differences of half a point mean little."
    if max(counts) > 1:
        count = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else counts[0]
        told = (
            f"{count} seeds: their mean and standard deviation; a lead decides if the 95 % interval of"
            " the differences seed by seed leaves out zero."
        )
    return (
        " Every row has the same small budget: 300 steps of regression, half an epoch, and 5 layers"
        f" unless said, where the recipe that ships has {SHIPS.fit.regression_steps:,} steps,"
        f" {SHIPS.fit.epochs:g} epochs and {SHIPS.representation.options['layers']} layers; {told}"
    )


def _trained(bench: Bench, changes: Mapping[str, Changes]) -> Callable[[str], Row]:
    return lambda name: bench.repeated(bench.asked.changed(**changes[name]))


def _options(bench: Bench, **more: Any) -> Changes:
    return {"representation": {"options": {**bench.asked.representation.options, **more}}}


def _lead(one: Row, other: Row, column: str = "mean") -> tuple[float, float]:
    """By how much the one is ahead, in points, and more than how much that must be to decide anything.

    The same seed begins both alike: differences are taken seed by seed, over those that both have.
    """
    pairs = list(zip(by_seed(one), by_seed(other), strict=False))
    leads = np.array([mine[column] - theirs[column] for mine, theirs in pairs])
    if len(leads) == 1:
        return round(float(leads[0]), 2), LEAD
    error = float(leads.std(ddof=1)) / len(leads) ** 0.5
    return round(float(leads.mean()), 2), STUDENT[len(leads)] * error


def _best(rows: Rows, claimed: str, column: str = "mean") -> str:
    """Whether the row that the paper calls best is, and by how much."""
    seeds = min(len(by_seed(row)) for row in rows.values())

    def mean(name: str) -> float:
        return float(np.mean([row[column] for row in by_seed(rows[name])[:seeds]]))

    best = max((name for name in rows if name != claimed), key=mean)
    lead, least = _lead(rows[claimed], rows[best], column)
    if abs(lead) <= least:
        told = f"{abs(lead):.2f} points {'ahead of' if lead > 0 else 'behind'}"
        told = told if lead else "level with"
        can = "one seed" if seeds == 1 else f"{seeds} seeds"
        return f"Undecided here: {claimed!r} is {told} {best!r}, less than {can} can tell."
    if lead > 0:
        return f"The claim holds here: {claimed!r} is best, {lead:.2f} points ahead of {best!r}."
    return f"The claim does not hold here: {best!r} is {-lead:.2f} points ahead of {claimed!r}."


def table1(bench: Bench) -> Table:
    """Permutation strategies."""
    names = {
        UNORDERED: "random",
        "layer-wise greedy": "layer-greedy",
        "layer-wise 2-opt": "layer-2opt",
        "mSHP": "mshp",
    }
    theirs = {
        UNORDERED: {"mean": 91.62, "total variation": 58141.80},
        "layer-wise greedy": {"mean": 91.67, "total variation": 50271.82},
        "layer-wise 2-opt": {"mean": 91.31, "total variation": 49132.78},
        "mSHP": {"mean": 91.87, "total variation": 45576.02},
    }
    changes = {name: {"order": {"strategy": strategy}} for name, strategy in names.items()}
    return Table(
        "table1",
        "permutation strategies",
        SCOPE
        + _budget(bench, "table1")
        + " Only the morphing axis is permuted here, so that the totals differ less."
        + NATIVE,
        (*COLUMNS, "total variation", "error"),
        tuple(names),
        _trained(bench, changes),
        lambda rows: _best(rows, "mSHP"),
        theirs,
        repeated=True,
    )


def table2(bench: Bench) -> Table:
    """The architecture of the MLP."""
    figures = {
        (5, 256, 16): 91.76, (5, 256, 32): 91.23, (8, 256, 16): 91.68, (8, 256, 32): 91.27,
        (8, 512, 16): 91.84, (8, 512, 32): 91.87, (12, 256, 16): 91.27, (12, 256, 32): 91.03,
    }  # fmt: skip
    changes, theirs = {}, {}
    for (layers, hidden, num_freq), figure in figures.items():
        name = f"{layers} layers, {hidden} units, {num_freq} frequencies"
        theirs[name] = {"mean": figure}
        if bench.setting.quick:
            layers, hidden, num_freq = 1 + layers // 4, hidden // 64, num_freq // 8
        changes[name] = _options(bench, layers=layers, hidden=hidden, num_freq=num_freq)
    return Table(
        "table2",
        "layers, units and frequencies",
        SCOPE + _budget(bench, "table2"),
        (*COLUMNS, "error", "parameters, M", "minutes"),
        tuple(changes),
        _trained(bench, changes),
        lambda rows: _best(rows, "8 layers, 512 units, 32 frequencies"),
        theirs,
        repeated=True,
    )


def table3(bench: Bench) -> Table:
    """Residual connections."""
    changes = {"without residual": _options(bench, residual=False), "with residual": {}}
    theirs = {"without residual": {"mean": 90.18}, "with residual": {"mean": 91.87}}
    return Table(
        "table3",
        "residual connections in the MLP",
        SCOPE + _budget(bench, "table3"),
        (*COLUMNS, "error"),
        tuple(changes),
        _trained(bench, changes),
        lambda rows: _best(rows, "with residual"),
        theirs,
        repeated=True,
    )


def table4(bench: Bench) -> Table:
    """One MLP for each tensor, or one for all."""
    changes = {"one for all tensors": _options(bench, block_based=False), "one for each tensor": {}}
    theirs = {"one for all tensors": {"mean": 91.74}, "one for each tensor": {"mean": 91.87}}
    return Table(
        "table4",
        "block-based INR",
        SCOPE + _budget(bench, "table4"),
        (*COLUMNS, "error", "parameters, M"),
        tuple(changes),
        _trained(bench, changes),
        lambda rows: _best(rows, "one for each tensor"),
        theirs,
        repeated=True,
    )


def table5(bench: Bench) -> Table:
    """The moving average."""
    figures = {"0": 91.32, "0.99": 91.42, "0.995": 91.87, "0.999": 91.42}
    changes = {name: {"fit": {"ema": float(name)}} for name in figures}
    return Table(
        "table5",
        "decay of the moving average (EMA)",
        SCOPE
        + _budget(bench, "table5")
        + " The learning rate falls to zero along a cosine, the paper's in two steps. The average's own"
        " warm-up, (1 + t) / (10 + t) at step t, ends at 0.956 after these 195 steps: the three decays"
        " are one here, and the table says only what averaging is worth.",
        COLUMNS,
        tuple(changes),
        _trained(bench, changes),
        lambda rows: _best(rows, "0.995"),
        {name: {"mean": figure} for name, figure in figures.items()},
        repeated=True,
    )


def noise(bench: Bench) -> Table:
    """Noise in training, and how many samples Algorithm 3 averages."""
    cells = [(a, k) for a in NOISES for k in (COUNTS if a else (1,))]
    names = {f"a = {a:g}, K = {k}": (a, k) for a, k in cells}

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

    def verdict(rows: Rows) -> str:
        worth = {
            size: _lead(rows[f"a = {size:g}, K = 50"], rows[f"a = {size:g}, K = 1"])
            for size in NOISES[:-1]
        }
        told = ", ".join(f"{gain:+.2f} points at a = {size:g}" for size, (gain, _) in worth.items())
        least, _ = _lead(rows[f"a = {NOISES[0]:g}, K = 1"], rows["a = 0, K = 1"])
        decided = all(abs(gain) > needed for gain, needed in worth.values())
        gains = [gain for gain, _ in worth.values()]
        claim = "is undecided"
        if decided and min(gains) > 0:
            claim = "holds"
        elif decided and max(gains) < 0:
            claim = "does not hold"
        return (
            f"The claim that averaging pays {claim} here: K = 50 is worth {told}; training with"
            f" a = {NOISES[0]:g} instead of none {least:+.2f} (K = 1)."
        )

    return Table(
        "noise",
        "coordinate noise a in training, K samples averaged",
        SCOPE
        + _budget(bench, "noise")
        + " One sample is the noise-free one. The paper has a = 0.5 and K of 50 to 100.",
        COLUMNS,
        tuple(names),
        measure,
        verdict,
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


def main_losses(bench: Bench) -> Table:
    """The main paper's ablation: smoothing, and the weights of the two losses beside the task's."""
    cells = {
        f"{UNORDERED}, λ1 = 0": ("random", 0.0, 1e-4, 73.56),
        f"{UNORDERED}, λ1 = 1": ("random", 1.0, 1e-4, 80.33),
        "λ2 = 0": ("mshp", 1.0, 0.0, 64.37),
        "λ1 = 1, λ2 = 1e-4": ("mshp", 1.0, 1e-4, 91.84),
        "λ1 = 10": ("mshp", 10.0, 1e-4, 91.73),
        "λ1 = 100": ("mshp", 100.0, 1e-4, 91.47),
        "λ1 = 0, λ2 = 0 (ours)": ("mshp", 0.0, 0.0, None),
    }
    changes = {
        name: {
            "order": {"strategy": strategy},
            "fit": {"reconstruction": recon, "regularisation": reg},
        }
        for name, (strategy, recon, reg, _) in cells.items()
    }

    def verdict(rows: Rows) -> str:
        smooth, _ = _lead(rows["λ1 = 1, λ2 = 1e-4"], rows[f"{UNORDERED}, λ1 = 1"])
        decay, _ = _lead(rows["λ1 = 1, λ2 = 1e-4"], rows["λ2 = 0"])
        return (
            _best(rows, "λ1 = 1, λ2 = 1e-4")
            + f" Permutation is worth {smooth:+.2f} points (the paper's: +11.51), λ2 {decay:+.2f}"
            " (+27.47)."
        )

    return Table(
        "main-losses",
        "permutation, reconstruction and regularisation",
        SCOPE + _budget(bench, "main-losses") + NATIVE,
        (*COLUMNS, "error"),
        tuple(cells),
        _trained(bench, changes),
        verdict,
        {name: {"mean": theirs} for name, (*_, theirs) in cells.items() if theirs is not None},
        repeated=True,
    )


def main_cifar10(bench: Bench) -> Table:
    """The main paper's Table: four ways to have four sizes."""
    last, epochs = ("the source network", 0.1 if bench.setting.quick else 4.0)
    shipped = "NeuMeta, as it ships"
    plain: Changes = {
        "options": {},
        "centred": None,
        "noise": 0.0,
        "corrected": None,
        "kind": "grid",
    }
    shared = {"folded": True, "regression_steps": 0, "epochs": epochs}
    integral = {**plain, "kind": "integral", "noise": 0.5, "options": {"density": 0.3125}}
    changes: dict[str, Changes] = {
        "slimmable": {
            "representation": plain,
            "fit": {**shared, "smallest": 0.0, "widths": [1.0, 0.75, 0.5]},
        },
        "INN (integral)": {"representation": integral, "fit": shared},
    }
    theirs = {
        "individual": (92.60, 90.65, 89.57, 87.04),
        "slimmable": (90.44, 90.44, 88.41, 18.56),
        "INN (integral)": (91.33, 90.50, 89.24, 71.70),
        shipped: (91.76, 91.32, 90.56, 89.56),
    }

    def individual() -> Row:
        row: Row = {"minutes": 0.0, "parameters, M": 0.0}
        for column, width in GAMMAS.items():
            one = {**shared, "smallest": 0.0, "widths": [width], "width": [min(width, 0.5), 1.0]}
            asked = bench.asked.changed(representation=plain, fit=one)
            trained = bench.train(asked)
            row |= {key: trained[key] for key in (column, f"{column} (JPEG)") if key in trained}
            row["minutes"] = round(row["minutes"] + trained["minutes"], 2)
            # Of the last block's two convolutions this width has so many of the numbers.
            row["parameters, M"] = round(row["parameters, M"] + width * trained["parameters, M"], 3)
        return row

    def measure(name: str) -> Row:
        if name == last:
            return bench.source_scores()
        if name == "individual":
            return individual()
        if name in changes:
            return bench.train(bench.asked.changed(**changes[name]))
        if bench.setting.quick:
            return bench.train(bench.asked)
        found = bench.shipped
        held = sum(value.numel() for value in found.representation.state_dict().values())
        return {**bench.scores(found, samples=found.samples), "parameters, M": round(held / 1e6, 3)}

    def verdict(rows: Rows) -> str:
        full = rows[last][next(iter(GAMMAS))]
        drops = [f"{full - rows[shipped][column]:.2f}" for column in GAMMAS]
        unseen = [name for name in theirs if name != shipped]
        lead = min(
            rows[shipped]["75 % (unseen)"] - rows[name]["75 % (unseen)"]
            for name in unseen
            if name != "individual"
        )
        claim = "is undecided" if abs(lead) < LEAD else holds(lead > 0)
        return (
            f"NeuMeta's drops from the source: {' / '.join(drops)} points (the paper's: 0.84 /"
            " 1.28 / 2.04 / 3.04). That it is ahead of the other shared networks at the unseen 75"
            f" % {claim} here ({lead:+.2f} points; its training was the longest)."
        )

    fitted = SHIPS.fit
    return Table(
        "main-cifar10",
        "four ways to have four sizes",
        SCOPE
        + " All start from the same source network, which teaches them, and train the last block alone"
        f" for {epochs:g} epochs (NeuMeta, after {fitted.regression_steps:,} steps of regression, for"
        f" {fitted.epochs:g}). Minutes are of a core,"
        " parameters those stored for what morphs; the paper trains the whole of its individual"
        " networks.",
        (*GAMMAS, "parameters, M", "minutes"),
        (last, "individual", "slimmable", "INN (integral)", shipped),
        measure,
        verdict,
        {name: dict(zip(GAMMAS, figures, strict=True)) for name, figures in theirs.items()},
    )
