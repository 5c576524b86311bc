"""How alike networks of different widths are inside: linear CKA (Kornblith et al. 2019)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.paper.bench import Bench
from benchmarks.paper.table import Row, Rows, Table
from benchmarks.paper.variation import PUBLIC
from neumeta import checkpoint
from neumeta.fold import fold
from neumeta.graph import Graph
from neumeta.manifold import Manifold
from neumeta.program import Program
from neumeta.sample import sample
from training import networks, source
from training.data import to_float
from training.trace import trace

WIDTHS = (1.0, 0.75, 0.5, 0.25)
IMAGES = 500
SHIPPED = "resnet20-cifar10.safetensors"
APART = "resnet32"
"""A public network that shares nothing with the manifold but its data."""
PLACES = ("stem", "stage 1", "stage 2", "stage 3", "logits")


def cka(one: Tensor, other: Tensor) -> float:
    """Linear CKA of the features (N, A) and (N, B): 1 where one is the other, rotated and scaled."""
    one, other = (each.double() - each.double().mean(0) for each in (one, other))
    # Through the N x N Gram matrices: there are more features than images.
    a, b = one @ one.T, other @ other.T
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-300))


@torch.no_grad()
def features(program: Program, weights: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """What the stem, every stage and the whole network of a CIFAR ResNet give, (N, features) each."""
    read = {step.name: step.inputs[0] for step in program.steps if step.inputs}
    last = {}
    for step in program.steps:
        stage = step.name.split(".")[0]
        if step.op == "relu":  # the last one of each part is what the next part reads
            place = f"stage {stage[-1]}" if stage.startswith("layer") else "stem"
            last[place] = step.name
    wanted = {value: place for place, value in last.items()}
    found: dict[str, Tensor] = {}

    def watch(name: str, value: Tensor) -> None:
        if read[name] in wanted:
            found[wanted[read[name]]] = value.flatten(1)

    outputs: Any = program.run(weights, x, watch=watch)
    return found | {"logits": outputs}


def similarity(bench: Bench) -> Table:
    """Networks sampled at different widths, and one that was trained apart."""
    pairs = {f"{a:g} and {b:g}": (a, b) for a, b in itertools.pairwise(WIDTHS)}
    pairs |= {f"1 and {b:g}": (1.0, b) for b in WIDTHS[2:]}
    apart = f"1 and the public {APART}"
    names = (*pairs, apart)
    held: dict[float, dict[str, Tensor]] = {}

    def images() -> Tensor:
        tests = bench.loaded.test_images
        return to_float(tests[:: max(1, len(tests) // IMAGES)][:IMAGES], bench.loaded)

    def sampled(width: float) -> dict[str, Tensor]:
        if width not in held:
            manifold: Manifold = checkpoint.read(bench.setting.models / SHIPPED)
            architecture = manifold.space.architecture(width)
            graph = manifold.space.graph_of(architecture).folded
            weights = dict(sample(manifold, architecture))
            program = Program(graph, manifold.space.sizes(architecture))
            held[width] = features(program, weights, images())
        return held[width]

    def public() -> dict[str, Tensor]:
        net = networks.resnet_cifar((5, 5, 5)).eval()
        source.fill(net, bench.setting.checkpoints / PUBLIC[APART])
        graph: Graph = trace(net, torch.zeros(1, 3, 32, 32))[0]
        weights = fold(graph, source.tensors(net, graph.tensors))
        return features(Program(graph.folded, graph.full), weights, images())

    def measure(name: str) -> Row:
        if bench.setting.quick:
            x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
            one = other = dict.fromkeys(PLACES, x)
        else:
            one = sampled(pairs[name][0] if name in pairs else 1.0)
            other = sampled(pairs[name][1]) if name in pairs else public()
        row: Row = {place: cka(one[place], other[place]) for place in PLACES}
        others = [cka(one[a], other[b]) for a in PLACES for b in PLACES if a != b]
        return {**row, "another layer, mean": sum(others) / len(others)}

    def verdict(rows: Rows) -> str:
        def mean(name: str) -> float:
            return float(sum(rows[name][place] for place in PLACES)) / len(PLACES)

        within = {name: mean(name) for name in pairs}
        least = min(within, key=lambda name: within[name])
        closer = all(value > mean(apart) for value in within.values())
        return (
            "Claimed: the same layer is more alike in two sizes of the manifold than in networks that"
            f" were trained apart. Here it {'is' if closer else 'is not'}: {within[least]:.2f} or more"
            f" (mean over layers; least for {least}) against {mean(apart):.2f}."
        )

    return Table(
        "similarity",
        "linear CKA between networks of different widths",
        f"The shipped ResNet-20 manifold (whole network), {IMAGES} raw test images: how alike what"
        " the same layer gives is in two networks, 1 being the same but for rotation and scale; the"
        f" last column is of different layers. The public {APART} shares nothing with the manifold but"
        " the data: it stands for networks that are trained one by one. It is of full width, which"
        " makes it a hard comparison: no narrow network of its own training is at hand.",
        (*PLACES, "another layer, mean"),
        names,
        measure,
        verdict,
    )
