"""The paper's claims in our terms: permutation, noise, K, EMA, block-based and residual, three seeds.

    python -m benchmarks.ablation --run runs/ablation

The scope of the paper's code in small: the digits (recipe `tiny`), the last hidden width alone morphs,
32 to 64 channels, and 16 are never seen. The representation over relative positions (`integral`), one
thing changed at a time: the score over widths. The residual MLP: the error of its regression on the
smoothed weights alone, since Algorithm 2 did not keep it (docs/LOG.md). Resumable: a seed that has a
result is not run again. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.local import hardware
from benchmarks.prepared import prepare
from neumeta.program import Program
from training import evaluate, fit, plots, recipe, recipe_file, source

WIDTHS = (1.0, 0.75, 0.5, 0.375, 0.25)
MLP = {"layers": 5, "hidden": 64, "num_freq": 6, "residual": True, "block_based": True}


def variants() -> dict[str, recipe.Recipe]:
    """Each variant's recipe, but for the seed."""
    tiny = recipe_file.load("tiny").changed(
        fit={"morph": ["conv3"], "width": [0.5, 1.0], "feature_views": 8, "epochs": 30},
        evaluate={"widths": WIDTHS},
    )
    plain = {"corrected": None, "noise": 0.5, "samples": 1}
    base = tiny.changed(representation={"kind": "integral", "options": {"density": 0.5}, **plain})
    mlp = tiny.changed(
        representation={"kind": "mlp", "options": MLP, **plain},
        fit={"regression_steps": 600, "epochs": 0},
    )
    unordered, random = {"strategy": "none"}, {"strategy": "random"}
    return {
        "integral": base,
        "no permutation": base.changed(order=unordered),
        "random order": base.changed(order=random),
        "no noise": base.changed(representation={"noise": 0.0}),
        "K = 8": base.changed(representation={"samples": 8}),
        "K = 50": base.changed(representation={"samples": 50}),
        "no EMA": base.changed(fit={"ema": 0.0}),
        "nested grid": tiny,
        "nested grid, random order": tiny.changed(order=random),
        "MLP": mlp,
        "MLP, no permutation": mlp.changed(order=unordered),
        "MLP, random order": mlp.changed(order=random),
        "MLP, no noise": mlp.changed(representation={"noise": 0.0}),
        "MLP, one for all": mlp.changed(representation={"options": {**MLP, "block_based": False}}),
        "MLP, not residual": mlp.changed(representation={"options": {**MLP, "residual": False}}),
    }


def measure(asked: recipe.Recipe, run: Path, root: Path | None) -> dict[str, Any]:
    """One seed of one variant. K alone changes nothing in training: those share a run."""
    ready = prepare(asked, root, run)
    graph = ready.graph.folded if asked.folded else ready.graph
    program = Program(graph, graph.full)
    smooth = source.score(lambda x: program.run(ready.smoothed, x), ready.data, ready.task)
    report: dict[str, Any] = {
        "source": source.score(ready.net, ready.data, ready.task),
        "source, smoothed": smooth,
        "total variation": ready.manifold.about["permutation"]["total_variation"],
    }
    if asked.fit.regression_steps:
        error = fit.initialise(
            ready.manifold, ready.smoothed, ready.targets, asked, lambda *logged: None
        )
        return {**report, "regression error": error}
    rows = evaluate.evaluate(ready.fit(run), ready.data, asked)
    return {**report, **{str(row["width"]): row["score"] for row in rows}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/ablation.svg"))
    asked = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in asked.seeds:
        for name, variant in variants().items():
            path = asked.run / "results" / f"{name}-{seed}.json"
            if not path.exists():
                shared = "integral" if name.startswith("K =") else name
                run = asked.run / f"{shared}-{seed}"
                row = measure(variant.changed(seed=seed), run, asked.data)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(row))
                print(f"seed {seed}: {name}: {row}", flush=True)
            results.setdefault(name, []).append(json.loads(path.read_text()))
    columns = ["source, smoothed", "total variation", "regression error", *map(str, WIDTHS)]
    print("| variant | " + " | ".join(columns) + " |")
    print("|---|" + "---:|" * len(columns))
    table: dict[str, dict[str, tuple[float, float]]] = {}
    for name, rows in results.items():
        for column in columns:
            values = [row[column] for row in rows if column in row]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                table.setdefault(name, {})[column] = (statistics.mean(values), spread)
        cells = [
            f"{table[name][c][0]:.4g} ± {table[name][c][1]:.2g}" if c in table[name] else ""
            for c in columns
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    trained = {name: row for name, row in table.items() if str(WIDTHS[0]) in row}
    bars = {n: {w: row[w] for w in map(str, WIDTHS)} for n, row in trained.items()}
    plots.bars(bars, "Digits, LeNet: score by variant, mean and spread of the seeds", asked.figure)
    threads = torch.get_num_threads()
    print(json.dumps({"hardware": hardware(), "threads": threads, "table": table}))


if __name__ == "__main__":
    main()
