"""Section 9.1: what public checkpoints score after import, folding and permutation: the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.paper.bench import Bench
from benchmarks.paper.table import Row, Rows, Table, holds
from benchmarks.paper.variation import PUBLIC
from neumeta.fold import fold
from neumeta.graph import Graph
from neumeta.program import Program
from training import data, networks, recipe_file, source
from training.order import apply, cliques, order
from training.task import TASKS, Task
from training.trace import trace

STEPS = ("imported", "folded", "permuted")
EVERY = {"cifar10": 5, "mnist": 2}
"""Of the test images every so-manyth one is scored: the whole would take more than two minutes."""
THEIRS = {"resnet20": 91.73, "resnet32": 92.63, "resnet44": 93.10, "resnet56": 93.39}
"""What the files' own project states for all 10,000 raw test images."""


def section9(bench: Bench) -> Table:
    """Every public checkpoint at hand: three networks that must be one."""
    vae = "VAE (MNIST), nats"
    columns = (*STEPS, *(f"{step}, JPEG" for step in STEPS), "largest change")

    def cifar() -> dict[str, data.Dataset]:
        tests = bench.tests
        return {"": tests[""], ", JPEG": tests["jpeg"]}

    def measure(name: str) -> Row:
        if bench.setting.quick:
            return compared(bench.traced.module, bench.traced.graph, {"": bench.loaded}, 3)
        if name == vae:
            asked = recipe_file.load("mnist-vae")
            loaded, found = bench.source("vae", asked)
            assert isinstance(loaded, data.Dataset)
            task = TASKS[asked.task]
            return compared(found.module, found.graph, {"": loaded}, EVERY["mnist"], task)
        blocks = (int(name.removeprefix("resnet")) - 2) // 6
        net: nn.Module = networks.resnet_cifar((blocks,) * 3).eval()
        source.fill(net, bench.setting.checkpoints / PUBLIC[name])
        graph, _ = trace(net, torch.zeros(1, 3, 32, 32))
        return compared(net, graph, cifar(), EVERY["cifar10"])

    def verdict(rows: Rows) -> str:
        agree = all(row[STEPS[0]] == row[step] for row in rows.values() for step in STEPS)
        most = max(row["_change"] for row in rows.values())
        unchanged = agree and most < 1e-3
        return (
            f"The claim {holds(unchanged)}: import, folding and permutation"
            f" leave every network what it was (no output moves by more than {most:.1e} of the"
            " largest)."
        )

    return Table(
        "section9",
        "public checkpoints after import, folding and permutation",
        "The paper takes public CIFAR ResNets too (of another project, trained on CIFAR-10 and"
        " CIFAR-100). Here: akamaster/pytorch_resnet_cifar10 and YannDubs/disentangling-vae, as"
        " published. Scored on every fifth of the 5,000 test images at hand, raw and as JPEG"
        " (1,000: a standard error is 0.8 points), the VAE's ELBO on every second of MNIST's. In"
        " brackets: what the project itself states for all 10,000 raw ones. The last column: how"
        " far any output moves, as a share of the largest.",
        columns,
        ("the source network",) if bench.setting.quick else (*PUBLIC, vae),
        measure,
        verdict,
        {name: {STEPS[0]: figure} for name, figure in THEIRS.items()},
    )


def compared(
    net: nn.Module,
    graph: Graph,
    tests: dict[str, data.Dataset],
    every: int,
    task: Task = TASKS["classification"],
) -> Row:
    """The scores of the network as it came, of its folded graph, and of that in the order of mSHP."""
    own = source.tensors(net, graph.tensors)
    folded = fold(graph, {name: value.double() for name, value in own.items()})
    groups = cliques(graph.folded)
    moved = apply(folded, groups, order(folded, groups, "mshp", sizes=graph.full))
    program = Program(graph.folded, graph.full)

    def run(tensors: dict[str, Tensor]) -> Callable[[Tensor], Any]:
        held = {name: value.float() for name, value in tensors.items()}
        return lambda x: program.run(held, x)

    networks_: dict[str, Callable[[Tensor], Any]] = {
        "imported": net.eval(),
        "folded": run(folded),
        "permuted": run(moved),
    }
    found: Row = {}
    most = 0.0
    for suffix, images in tests.items():
        few = replace(
            images,
            test_images=images.test_images[::every],
            test_labels=images.test_labels[::every],
        )
        tallies: dict[str, list[Tensor]] = {name: [] for name in networks_}
        with torch.no_grad():
            for x, y in few.test_batches(250):
                outputs = {name: task.read(each(x)) for name, each in networks_.items()}
                targets = task.targets(x, y, few)
                for name, given in outputs.items():
                    tallies[name].append(task.tally(given, targets))
                    most = max(most, _change(outputs["imported"], given))
        for name, parts in tallies.items():
            found[f"{name}{suffix}"] = round(task.score(torch.stack(parts).sum(0)), 2)
    return {**found, "largest change": f"{most:.0e}", "_change": most}


def _change(one: Any, other: Any) -> float:
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
