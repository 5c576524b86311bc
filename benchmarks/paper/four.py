"""The main paper's comparison: four ways to have four sizes of one network."""

from __future__ import annotations

from benchmarks.paper.bench import GAMMAS, UNSEEN, Bench, Changes, stored
from benchmarks.paper.lead import LEAD
from benchmarks.paper.scope import SCOPE, SHIPS
from benchmarks.paper.table import Row, Rows, Table, holds


def main_cifar10(bench: Bench) -> Table:
    """The main paper's Table: four ways to have four sizes."""
    last, shipped = "the source network", "NeuMeta, as it ships"
    epochs = 0.1 if bench.setting.quick else 4.0
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
        numbers = round(stored(found) / 1e6, 3)
        return {**bench.scores(found, samples=found.samples), "parameters, M": numbers}

    def verdict(rows: Rows) -> str:
        full = rows[last][next(iter(GAMMAS))]
        drops = [f"{full - rows[shipped][column]:.2f}" for column in GAMMAS]
        lead = min(rows[shipped][UNSEEN] - rows[name][UNSEEN] for name in changes)
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
