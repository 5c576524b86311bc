"""The scope of the paper's code, the last block of ResNet-20, in the words of its tables' heads."""

from __future__ import annotations

from benchmarks.paper.bench import GAMMAS, Bench
from benchmarks.paper.table import by_seed
from training import recipe_file

COLUMNS = (*GAMMAS, "mean")
SCOPE = (
    "Scope of the paper's code: the hidden width of the last block of ResNet-20 on CIFAR-10,"
    " trained on 32 to 64 channels. Training images are those of `benchmarks.pixels`: JPEGs of"
    " quality about 75, two thirds of them restored by a small network, 4,000 raw ones among them;"
    " scores are on the 5,000 raw test images that are at hand (those on JPEG ones are in the JSON"
    " file)."
    " The paper's figure stands in brackets; where it gives one number, beside our mean."
)
SHIPS = recipe_file.load("cifar10-resnet20-last-block-mlp")
UNORDERED = "no permutation (a random order)"


def budget(bench: Bench, table: str) -> str:
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
