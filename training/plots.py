"""Pictures of what the pipeline made: scores over width, a heatmap over depth. Knows only rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

from neumeta import atomic
from training.recipe import Recipe

plt.rcParams["svg.hashsalt"] = "neumeta"  # equal results give equal files


def evaluation(rows: list[dict[str, Any]], recipe: Recipe, source: float, path: Path) -> None:
    """The score over width, or a heatmap over depth, whichever the recipe evaluates."""
    if recipe.evaluate.blocks and len(rows[0]["depth"]) == 2 and len(recipe.evaluate.widths) == 1:
        depth_heatmap(rows, recipe, path)
    else:
        # The source's depth comes first.
        depth = rows[0]["depth"]
        width_curve(
            {"manifold": [row for row in rows if row["depth"] == depth]}, recipe, source, path
        )


def width_curve(
    curves: dict[str, list[dict[str, Any]]], recipe: Recipe, source: float, path: Path
) -> None:
    """The score over width, one line per method; the trained range is shaded."""
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for label, rows in curves.items():
        points = sorted((row["width"], row["score"]) for row in rows)
        axes.plot(*zip(*points, strict=True), "o-", label=label)
    axes.axhline(source, color="grey", linestyle=":", label=f"source network, {source:.1f}")
    axes.axvspan(*recipe.fit.width, color="tab:green", alpha=0.08, label="trained widths")
    axes.set(xlabel="width", ylabel=_label(rows), title=recipe.title)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def depth_curve(curves: dict[str, list[dict[str, Any]]], recipe: Recipe, path: Path) -> None:
    """The score over the number of blocks of every stage; the trained range is shaded."""
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for label, rows in curves.items():
        points = sorted((row["depth"][0], row["score"]) for row in rows)
        axes.plot(*zip(*points, strict=True), "o-", label=label)
    if recipe.fit.blocks:
        axes.axvspan(*recipe.fit.blocks, color="tab:green", alpha=0.08, label="trained depths")
    axes.set(xlabel="blocks per stage", ylabel=_label(rows), title=recipe.title)
    axes.legend()
    _save(figure, path)


def depth_heatmap(rows: list[dict[str, Any]], recipe: Recipe, path: Path) -> None:
    """The score over (L1, L2); the trained square is framed."""
    most = max(max(row["depth"]) for row in rows)
    least = min(min(row["depth"]) for row in rows)
    table = np.full((most - least + 1, most - least + 1), np.nan)
    for row in rows:
        table[row["depth"][0] - least, row["depth"][1] - least] = row["score"]
    figure, axes = plt.subplots(figsize=(6.4, 5.6))
    shown = axes.imshow(table, origin="lower", cmap="viridis", vmin=np.nanmin(table) - 1)
    for (a, b), value in np.ndenumerate(table):
        axes.text(
            b,
            a,
            f"{value:.1f}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if value < 90 else "black",
        )
    if recipe.fit.blocks:
        low, high = recipe.fit.blocks
        side = high - low + 1
        axes.add_patch(
            Rectangle(
                (low - least - 0.5, low - least - 0.5),
                side,
                side,
                fill=False,
                edgecolor="red",
                linewidth=2,
            )
        )
    ticks = range(most - least + 1)
    axes.set_xticks(ticks, [str(t + least) for t in ticks])
    axes.set_yticks(ticks, [str(t + least) for t in ticks])
    axes.set(xlabel="L2", ylabel="L1")
    axes.set_title(recipe.title, fontsize=10)
    figure.colorbar(shown, label=_label(rows))
    _save(figure, path)


def bars(
    groups: dict[str, dict[str, tuple[float, float]]],
    title: str,
    path: Path,
    *,
    value: str = "test accuracy (%)",
    legend: str = "width",
) -> None:
    """One row per group, one bar per key: (mean, spread) of `value`."""
    figure, axes = plt.subplots(figsize=(7.2, 0.5 * len(groups) + 1))
    keys = list(next(iter(groups.values())))
    height = 0.8 / len(keys)
    for index, key in enumerate(keys):
        at = [row - index * height for row in range(len(groups), 0, -1)]
        means, spreads = zip(*(group[key] for group in groups.values()), strict=True)
        axes.barh(at, means, height, xerr=spreads, label=key)
    axes.set_yticks([row - 0.3 for row in range(len(groups), 0, -1)], list(groups))
    axes.set(xlabel=value)
    axes.set_title(title, fontsize=10)
    axes.legend(title=legend, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def convergence(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Relative error of the mean weights against the number of samples, logarithmic."""
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for label, points in curves.items():
        style = "o:" if label.endswith("random") else "o-"
        axes.loglog([k for k, _ in points], [error for _, error in points], style, label=label)
    axes.set(xlabel="samples K", ylabel="relative error of the mean")
    axes.set_title("Distance to the mean of 10,000 samples", fontsize=10)
    axes.legend()
    _save(figure, path)


def kernels(shown: dict[str, Any], name: str, path: Path) -> None:
    """Mean weight of each kernel over (output, input) channel, one panel per channel order."""
    figure, panels = plt.subplots(1, len(shown), figsize=(4 * len(shown), 4), squeeze=False)
    for axes, (label, weight) in zip(panels[0], shown.items(), strict=True):
        table = weight.flatten(2).mean(2).numpy()
        limit = np.quantile(np.abs(table), 0.98)
        axes.imshow(table, cmap="RdBu", vmin=-limit, vmax=limit)
        axes.set(title=f"{name}, {label}", xlabel="input channel", ylabel="output channel")
    _save(figure, path)


def sheet(rows: dict[str, list[np.ndarray]], path: Path, *, width: float = 7.0) -> None:
    """Images of one size, (H, W, 1 or 3) in 0..1, side by side in rows that are named; `width` in
    inches."""
    tiles = list(rows.values())
    high, wide, _ = tiles[0][0].shape
    gap = max(1, high // 24)
    most = max(len(row) for row in tiles)
    shape = (len(tiles) * (high + gap) - gap, most * (wide + gap) - gap, 3)
    canvas = np.ones(shape)
    for index, line in enumerate(tiles):
        for place, image in enumerate(line):
            down, across = index * (high + gap), place * (wide + gap)
            canvas[down : down + high, across : across + wide] = image
    figure, axes = plt.subplots(figsize=(width, width * shape[0] / shape[1]))
    axes.imshow(canvas, interpolation="nearest")
    axes.set_yticks([index * (high + gap) + high / 2 for index in range(len(tiles))], list(rows))
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _save(figure, path)


def _label(rows: list[dict[str, Any]]) -> str:
    return f"test {rows[0]['metric']}"


def _save(figure: Any, path: Path) -> None:
    metadata = {"Date": None} if path.suffix == ".svg" else None
    try:
        with atomic.writing(path) as file:
            figure.savefig(file, format=path.suffix[1:], bbox_inches="tight", metadata=metadata)
    finally:
        plt.close(figure)
