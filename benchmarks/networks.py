"""Networks that nobody here wrote, from the module to a device: what tracing finds, and if it holds.

    python -m benchmarks.networks [NAME ...] [--run runs/networks] [--checkpoints FOLDER]

torchvision's models with random weights, and the VAE of --checkpoints. Each network's row is kept in
the folder RUN: a network that has one is not measured again. Nothing is trained: a manifold is a grid
that holds the network's own weights, and its batch statistics are measured on 16 images of noise.
`--channels` bounds the cliques that are ordered. Seconds are of processor time. Writes the table in
docs/networks.md. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.local import hardware
from neumeta import network, wire
from neumeta.fold import fold
from neumeta.graph import Graph
from neumeta.manifold import Contract, Manifold, roles
from neumeta.network import Network
from neumeta.program import Program, output
from neumeta.representation import build
from neumeta.sample import sample
from neumeta.sites import kept, sites
from neumeta.space import Space
from neumeta.statistics import Statistics
from tests.support.torchvision import models
from training import networks, order, weights
from training.trace import trace

WIDTHS = (0.25, 0.5, 0.75)
IMAGES = 16
PATIENCE = 180
"""Seconds of processor time that torch-pruning may take."""
DOCUMENT = Path(__file__).parent.parent / "docs" / "networks.md"
BEGIN, END = "<!-- table -->", "<!-- end of the table -->"

Width = float | dict[str, float]


@dataclass(frozen=True)
class Subject:
    """A network and, where its own constructor knows widths, how it makes itself at one of them.

    `narrow` gives a module and the width to request of the manifold: a constructor may leave some
    groups as they are. `groups` are patterns that put those into groups of their own.
    """

    make: Callable[[], nn.Module]
    narrow: Callable[[float], tuple[nn.Module, Width]] | None = None
    groups: tuple[str, ...] = ()
    shape: tuple[int, int, int] = (3, 64, 64)
    weights: str = ""


def _torchvision(name: str, **options: Any) -> nn.Module:
    made: nn.Module = getattr(models(), name)(weights=None, **options)
    return made


def _googlenet() -> nn.Module:
    return _torchvision("googlenet", aux_logits=False, init_weights=True)


def _deeplab() -> nn.Module:
    made: nn.Module = models().segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None
    )
    return made


def _vgg(width: float) -> tuple[nn.Module, Width]:
    vgg = models().vgg
    layers = [each if each == "M" else round(each * width) for each in vgg.cfgs["A"]]
    made = vgg.VGG(vgg.make_layers(layers, batch_norm=True))
    # Its classifier expects 512 channels in.
    made.classifier[0] = nn.Linear(layers[-2] * 49, 4096)
    return made, {"features*": width, "classifier*": 1.0}


def _mobilenet_v2(width: float) -> tuple[nn.Module, Width]:
    made = models().MobileNetV2(width_mult=width, round_nearest=1)
    return made, {"features.18*": 1.0, "*": width}


def _densenet(width: float) -> tuple[nn.Module, Width]:
    sizes = {"growth_rate": round(32 * width), "num_init_features": round(64 * width)}
    return models().DenseNet(block_config=(6, 12, 24, 16), **sizes), width


def _convnext(width: float) -> tuple[nn.Module, Width]:
    config = models().convnext.CNBlockConfig
    sizes = [round(96 * 2**stage * width) for stage in range(4)]
    blocks = zip(sizes, [*sizes[1:], None], (3, 3, 9, 3), strict=True)
    return models().ConvNeXt([config(*block) for block in blocks]), width


def _vae(width: float) -> tuple[nn.Module, Width]:
    return networks.vae(width=round(32 * width), hidden=round(256 * width)), width


SUBJECTS: dict[str, Subject] = {
    "resnet18": Subject(partial(_torchvision, "resnet18")),
    "resnet50": Subject(partial(_torchvision, "resnet50")),
    "vgg11_bn": Subject(partial(_torchvision, "vgg11_bn"), _vgg, ("features*", "classifier*")),
    "mobilenet_v2": Subject(
        partial(_torchvision, "mobilenet_v2"), _mobilenet_v2, ("features.18*", "*")
    ),
    "mobilenet_v3_small": Subject(partial(_torchvision, "mobilenet_v3_small")),
    "efficientnet_b0": Subject(partial(_torchvision, "efficientnet_b0")),
    "densenet121": Subject(partial(_torchvision, "densenet121"), _densenet),
    "squeezenet1_1": Subject(partial(_torchvision, "squeezenet1_1")),
    "regnet_y_400mf": Subject(partial(_torchvision, "regnet_y_400mf")),
    "mnasnet0_5": Subject(partial(_torchvision, "mnasnet0_5")),
    "googlenet": Subject(_googlenet),
    "shufflenet_v2_x0_5": Subject(partial(_torchvision, "shufflenet_v2_x0_5")),
    "convnext_tiny": Subject(partial(_torchvision, "convnext_tiny"), _convnext),
    "deeplabv3_mobilenet_v3_large": Subject(_deeplab),
    "vae": Subject(networks.vae, _vae, (), (1, 32, 32), "vae/VAE_mnist.pt"),
}


def roughen(module: nn.Module, images: Tensor) -> None:
    """Give vectors values of their own, and batch norms the statistics of these images."""
    for name, tensor in module.named_parameters():
        if name.endswith("layer_scale") or (tensor.ndim == 1 and name.endswith("weight")):
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif tensor.ndim == 1:
            nn.init.uniform_(tensor, -0.2, 0.2)
    norms = [each for each in module.modules() if isinstance(each, nn.BatchNorm2d)]
    for each in norms:
        each.momentum = None
        each.train()
    with torch.no_grad():
        module(images)
    module.eval()


def error(made: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    return float((made - expected).abs().max() / expected.abs().max())


def value(module: nn.Module, images: Tensor) -> Tensor:
    """The output that would be scored."""
    with torch.no_grad():
        return output(module(images))


def permutations(graph: Graph, tensors: Mapping[str, Tensor], images: Tensor) -> dict[str, float]:
    """How far outputs move when every axis is permuted, and when one side alone is."""
    cliques = order.cliques(graph)
    generator = torch.Generator().manual_seed(0)
    orders = {axis: torch.randperm(size, generator=generator) for axis, size in graph.full.items()}
    together = order.apply(tensors, cliques, orders)
    # The axis of the most sides, in one of them.
    axis = max(cliques, key=lambda each: len(cliques[each]))
    lone = {axis: cliques[axis][-1:]}
    alone = order.apply(tensors, lone, {axis: orders[axis]})
    program = Program(graph, graph.full)

    def run(held: Mapping[str, Tensor], kind: torch.dtype) -> Tensor:
        cast = {name: tensor.to(kind) for name, tensor in held.items()}
        with torch.no_grad():
            return output(program.run(cast, images.to(kind)))

    exact = run(tensors, torch.float64)
    return {
        "permuted": error(run(together, torch.float32), run(tensors, torch.float32)),
        "permuted_float64": error(run(together, torch.float64), exact),
        "one_side": error(run(alone, torch.float64), exact),
    }


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in the block after so many seconds of processor time."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def compared(graph: Graph, module: nn.Module, images: Tensor) -> dict[str, Any]:
    """Our cliques beside torch-pruning's groups, as sets of (layer, 'in' or 'out')."""
    layers = {
        name: each
        for name, each in module.named_modules()
        if isinstance(each, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d))
    }
    ours: dict[str, frozenset[tuple[str, str]]] = {}
    for axis, sides in graph.cliques().items():
        found = set()
        for tensor, dimension, _, _ in sides:
            name, _, kind = tensor.rpartition(".")
            if kind == "weight" and name in layers:
                swapped = isinstance(layers[name], nn.ConvTranspose2d)
                found.add((name, "out" if (dimension == 0) != swapped else "in"))
        ours[axis] = frozenset(found)
    import torch_pruning as pruning

    outputs = (
        pruning.prune_conv_out_channels,
        pruning.prune_linear_out_channels,
        pruning.prune_depthwise_conv_out_channels,
    )
    inputs = (pruning.prune_conv_in_channels, pruning.prune_linear_in_channels)
    names = {each: name for name, each in layers.items()}
    theirs = set()
    try:
        with limit(PATIENCE):
            dependencies = pruning.DependencyGraph().build_dependency(module, images[:1])
            for group in dependencies.get_all_groups():
                found = set()
                for item in group:
                    name = names.get(item.dep.layer)
                    if name is not None and item.dep.pruning_fn in outputs:
                        found.add((name, "out"))
                    elif name is not None and item.dep.pruning_fn in inputs:
                        found.add((name, "in"))
                theirs.add(frozenset(found))
    except Exception as failure:  # whatever that library raises where it cannot follow a network
        why = " ".join(str(failure).split())[:160]
        return {"equal": None, "of": len(ours), "why": f"{type(failure).__name__}: {why}"}
    differ = [axis for axis, sides in ours.items() if sides not in theirs]
    extra = [sorted(sides) for sides in theirs if sides not in set(ours.values())]
    return {
        "equal": len(ours) - len(differ),
        "of": len(ours),
        "differ": differ[:5],
        "only_theirs": len(extra),
        "extra": [[f"{name} {side}" for name, side in sides[:4]] for sides in extra[:3]],
    }


def ordered(graph: Graph, tensors: Mapping[str, Tensor], most: int) -> dict[str, Any]:
    """Total variation of the folded weights before and after `mshp` of cliques up to `most`."""
    folded, held = graph.folded, fold(graph, tensors)
    cliques = order.cliques(folded)
    axes = [axis for axis, size in graph.full.items() if size <= most]
    began = time.process_time()
    orders = order.order(held, cliques, "mshp", axes=axes)
    seconds = time.process_time() - began
    before = order.total_variation(held)
    after = order.total_variation(order.apply(held, cliques, orders))
    sizes = [graph.full[axis] for axis in axes]
    return {
        "tv_before": before,
        "tv_after": after,
        "tv_change_percent": 100 * (after / before - 1) if before else 0.0,
        "ordered": len(axes),
        "largest": max(sizes, default=0),
        "seconds": seconds,
    }


def manifold_of(name: str, graph: Graph, tensors: Mapping[str, Tensor], images: Tensor) -> Manifold:
    """A manifold whose grid holds these weights: what a smaller size has are their first channels."""
    space = Space(name, graph, (min(WIDTHS), 1.0))
    made = build("grid", {}, roles(space))
    for site in sites(space, space.full).values():
        made.fill(site, tensors[site.name])
    channels = images.shape[1]
    return Manifold(
        space,
        made.eval().requires_grad_(False),
        "grid",
        {},
        0.0,
        1,
        64,
        Contract((0.0,) * channels, (1.0,) * channels),
        {tensor: tensors[tensor] for tensor in kept(graph)},
        Statistics(images),
    )


def flops(module: nn.Module, image: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(image)
    return int(counter.get_total_flops())


def served(subject: Subject, manifold: Manifold, width: float, images: Tensor) -> dict[str, Any]:
    """One width through the wire into a file, and that file loaded in both ways."""
    space = manifold.space
    module: nn.Module | None = None
    request: Width = width
    if width == 1.0:
        module = subject.make()
    elif subject.narrow is not None:
        module, request = subject.narrow(width)
    architecture = space.architecture(request)
    plan = wire.plan(manifold, architecture, "float32")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        began = time.process_time()
        with path.open("wb") as file:
            for part in wire.stream(plan, sample(manifold, architecture)):
                file.write(part)
        seconds = time.process_time() - began
        net = network.load(path)
        # In float64: how each way computes, not how it rounds.
        made = value(net.double(), images.double())
        row: dict[str, Any] = {
            "width": width,
            "bytes": path.stat().st_size,
            "finite": bool(made.isfinite().all()),
            "macs": space.cost(architecture)["macs"],
            "macs_equal": 2 * space.cost(architecture)["macs"] == flops(net.float(), images[:1]),
            "seconds": seconds,
        }
        if module is not None:
            filled = network.load(path, into=module)
            row["into"] = error(value(filled.double(), images.double()), made)
            row["macs_equal"] &= flops(filled.float(), images[:1]) == 2 * row["macs"]
    return row


def measure(name: str, most: int, checkpoints: Path | None) -> dict[str, Any]:
    """A network's row."""
    subject, began = SUBJECTS[name], time.process_time()
    torch.manual_seed(0)
    images = torch.randn(IMAGES, *subject.shape)
    module = subject.make()
    if subject.weights:
        if checkpoints is None:
            raise SystemExit(f"{name}: --checkpoints names the folder that holds {subject.weights}")
        weights.fit_into(module, weights.read(checkpoints / subject.weights), subject.weights)
        module.eval()
    else:
        roughen(module, images)
    started = time.process_time()
    graph, notes = trace(module, images, groups=subject.groups)
    traced = time.process_time() - started
    state = module.state_dict()
    tensors = {tensor: state[tensor].detach() for tensor in graph.tensors}
    two = images[:2]
    row: dict[str, Any] = {
        "network": name,
        "hardware": hardware(),
        "parameters": graph.parameters(graph.full),
        "nodes": len(graph.nodes),
        "axes": len(graph.axes),
        "groups": list(trace(module, images)[0].groups) if subject.groups else list(graph.groups),
        "stages": [
            {"name": s.name, "children": s.children, "first": s.first, "blocks": s.blocks}
            for s in graph.stages
        ],
        "notes": notes,
        "traced": error(value(_interpreted(graph, tensors), two), value(module, two)),
        **permutations(graph, tensors, two),
        "pruning": compared(graph, module, images),
        "order": ordered(graph, tensors, most),
    }
    manifold = manifold_of(name, graph, tensors, images)
    row["widths"] = [served(subject, manifold, width, two) for width in (*WIDTHS, 1.0)]
    row["trace_seconds"] = traced
    row["seconds"] = time.process_time() - began
    return row


def _interpreted(graph: Graph, tensors: Mapping[str, Tensor]) -> nn.Module:
    net = Network(graph, graph.full)
    net.load_state_dict(dict(tensors))
    return net.eval()


def line(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    pruning, tv = row["pruning"], row["order"]
    cliques = (
        f"{pruning['equal']} of {pruning['of']}" if pruning["equal"] is not None else "not traced"
    )
    into = [width for width in row["widths"] if "into" in width]
    widths = ", ".join(f"{width['width']:g}" for width in into)
    stages = ", ".join(f"{s['name']} ({s['blocks']} of {s['children']})" for s in row["stages"])
    cells = [
        row["network"],
        f"{row['parameters'] / 1e6:.1f}",
        str(row["axes"]),
        str(len(row["groups"])),
        stages or "none",
        cliques,
        f"{row['permuted']:.0e}",
        f"{row['one_side']:.2g}",
        f"{tv['tv_change_percent']:.1f} % ({tv['ordered']} of {row['axes']})",
        f"{max(width['into'] for width in into):.0e} ({widths})",
        "yes" if all(width["macs_equal"] for width in row["widths"]) else "NO",
        f"{row['trace_seconds']:.0f} / {tv['seconds']:.0f} / "
        f"{max(width['seconds'] for width in row['widths']):.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "network",
    "M parameters",
    "axes",
    "groups",
    "stages (alike of all blocks)",
    "cliques as torch-pruning's",
    "all axes permuted",
    "one side alone",
    "TV after `mshp` (cliques ordered)",
    "`into=` beside the graph (widths)",
    "MACs exact",
    "seconds: trace / order / sample",
)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD), *map(line, rows)]
    return "\n".join(lines)


def write(rows: list[dict[str, Any]]) -> None:
    """Put the table into the document, between its marks."""
    text = DOCUMENT.read_text() if DOCUMENT.exists() else f"{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    _whole(DOCUMENT, f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")


def _whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SUBJECTS))
    parser.add_argument("--run", type=Path, default=Path("runs/networks"))
    parser.add_argument("--checkpoints", type=Path, help="the folder that holds vae/VAE_mnist.pt")
    parser.add_argument("--channels", type=int, default=2048, help="largest clique that is ordered")
    parser.add_argument("--report", action="store_true", help="measure nothing: write the table")
    asked = parser.parse_args()
    if unknown := sorted(set(asked.names) - set(SUBJECTS)):
        parser.error(f"{unknown[0]}: not one of {', '.join(SUBJECTS)}")
    rows = []
    for name in SUBJECTS:
        path = asked.run / f"{name}.json"
        if not path.exists() and not asked.report and name in (asked.names or SUBJECTS):
            row = measure(name, asked.channels, asked.checkpoints)
            _whole(path, json.dumps(row, indent=1) + "\n")
        if path.exists():
            rows.append(json.loads(path.read_text()))
            if name in (asked.names or SUBJECTS):
                print(line(rows[-1]), flush=True)
    write(rows)
    bad = [
        row["network"]
        for row in rows
        if row["permuted_float64"] > 1e-9
        or not all(width["macs_equal"] and width["finite"] for width in row["widths"])
        or any(width.get("into", 0.0) > 1e-5 for width in row["widths"])
        or math.isnan(row["one_side"])
    ]
    print(json.dumps({"benchmark": "networks", "hardware": hardware(), "bad": bad, "rows": rows}))


if __name__ == "__main__":
    main()
