"""Tables 1 to 5 and the ablation of the losses: the residual MLP, one thing changed at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.paper.bench import Bench, Changes
from benchmarks.paper.lead import ahead, best
from benchmarks.paper.scope import COLUMNS, SCOPE, UNORDERED, budget
from benchmarks.paper.table import Row, Rows, Table

NATIVE = (
    " The source comes out of the manifold that ships, in the order of mSHP; its own order is gone, and"
    " a random one stands for it (figure2: the two have the same total variation)."
)


def _trained(bench: Bench, changes: Mapping[str, Changes]) -> Callable[[str], Row]:
    return lambda name: bench.repeated(bench.asked.changed(**changes[name]))


def _options(bench: Bench, **more: Any) -> Changes:
    return {"representation": {"options": {**bench.asked.representation.options, **more}}}


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
        + budget(bench, "table1")
        + " Only the morphing axis is permuted here, so that the totals differ less."
        + NATIVE,
        (*COLUMNS, "total variation", "error"),
        tuple(names),
        _trained(bench, changes),
        lambda rows: best(rows, "mSHP"),
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
        SCOPE + budget(bench, "table2"),
        (*COLUMNS, "error", "parameters, M", "minutes"),
        tuple(changes),
        _trained(bench, changes),
        lambda rows: best(rows, "8 layers, 512 units, 32 frequencies"),
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
        SCOPE + budget(bench, "table3"),
        (*COLUMNS, "error"),
        tuple(changes),
        _trained(bench, changes),
        lambda rows: best(rows, "with residual"),
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
        SCOPE + budget(bench, "table4"),
        (*COLUMNS, "error", "parameters, M"),
        tuple(changes),
        _trained(bench, changes),
        lambda rows: best(rows, "one for each tensor"),
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
        + budget(bench, "table5")
        + " The learning rate falls to zero along a cosine, the paper's in two steps. The average's own"
        " warm-up, (1 + t) / (10 + t) at step t, ends at 0.956 after these 195 steps: the three decays"
        " are one here, and the table says only what averaging is worth.",
        COLUMNS,
        tuple(changes),
        _trained(bench, changes),
        lambda rows: best(rows, "0.995"),
        {name: {"mean": figure} for name, figure in figures.items()},
        repeated=True,
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
        smooth, _ = ahead(rows["λ1 = 1, λ2 = 1e-4"], rows[f"{UNORDERED}, λ1 = 1"])
        decay, _ = ahead(rows["λ1 = 1, λ2 = 1e-4"], rows["λ2 = 0"])
        return (
            best(rows, "λ1 = 1, λ2 = 1e-4")
            + f" Permutation is worth {smooth:+.2f} points (the paper's: +11.51), λ2 {decay:+.2f}"
            " (+27.47)."
        )

    return Table(
        "main-losses",
        "permutation, reconstruction and regularisation",
        SCOPE + budget(bench, "main-losses") + NATIVE,
        (*COLUMNS, "error"),
        tuple(cells),
        _trained(bench, changes),
        verdict,
        {name: {"mean": theirs} for name, (*_, theirs) in cells.items() if theirs is not None},
        repeated=True,
    )
