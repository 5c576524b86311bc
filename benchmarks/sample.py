"""Sampling: the published way beside ours, error against K, cold requests, scaling, a training step.

    python -m benchmarks.sample mlp        # the paper's INR, K = 50: time, rate, memory, both ways
    python -m benchmarks.sample error      # distance to the mean of 10,000 samples, random and even
    python -m benchmarks.sample cold       # POST /weights of sizes that are in no cache
    python -m benchmarks.sample scale      # a ResNet-18 of ImageNet shape, 0.3 to 11.7 M parameters
    python -m benchmarks.sample train      # a training step, by parts

"The published way" is written here as the paper's code works: every sample builds the coordinates
and Fourier features of every pair, runs the MLP over all pairs of a tensor at once, keeps a full copy
of the network, and K copies are averaged at the end. Rates count the multiplications that are really
done, in GFLOP/s, beside that of a large matrix product in the same run. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import http.client
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.local import hardware, replicas
from neumeta import checkpoint, family
from neumeta.architecture import Architecture, Space
from neumeta.coordinates import Site, coordinates, sites
from neumeta.family import Family, Layer
from neumeta.inr import ResidualMLP, _Mlp, fourier_features, module_key
from neumeta.manifold import Manifold, representation
from neumeta.sample import sample, sample_site, seed_of
from training import cli, data, fit, recipe, source

NORMALISATION = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(work: Callable[[], object]) -> float:
    """Of one run, the device's work included."""
    began = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def median(work: Callable[[], object], times: int) -> float:
    return statistics.median(seconds(work) for _ in range(times))


def matrix_rate(size: int = 2048) -> float:
    """GFLOP/s of a large float32 matrix product."""
    a, b = (torch.randn(size, size, device=DEVICE) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / median(lambda: torch.mm(a, b), 7) / 1e9


def random_manifold(space: Space, options: dict[str, Any]) -> Manifold:
    """A manifold of random parameters with the paper's INR."""
    torch.manual_seed(0)
    model = representation("mlp", space, options, norm=False).eval().requires_grad_(False)
    labels = [str(i) for i in range(space.classes)]
    held = Manifold(
        space, model.to(DEVICE), "mlp", options, False, 0.5, 1, 64, NORMALISATION, labels
    )
    return held


def all_sites(space: Space, architecture: Architecture) -> Iterator[Site]:
    for layer in space.table.layers(architecture.depth):
        yield from sites(space, architecture, layer, norm=False)


def flops(manifold: Manifold, architecture: Architecture, *, split: bool) -> float:
    """Floating-point operations of one sample: two per multiplication of a matrix product."""
    total = 0.0
    for site in all_sites(manifold.space, architecture):
        mlp = network_of(manifold, site)
        pairs, width = site.outputs * site.inputs, mlp.last.in_features
        features = 3 * mlp.layer.in_features
        first = (1 + site.inputs + site.outputs) / 3 if split else pairs
        total += 2 * (first * features * width + pairs * len(mlp.hidden) * width**2)
        total += 2 * pairs * width * mlp.last.out_features
    return total


def network_of(manifold: Manifold, site: Site) -> _Mlp:
    model = manifold.representation
    assert isinstance(model, ResidualMLP)
    found = model.networks[module_key(site.role)]
    assert isinstance(found, _Mlp)
    return found


def per_pair(mlp: _Mlp, v: Float[Tensor, "B 6"]) -> Float[Tensor, "B kk"]:
    """Figure 3 as it is drawn: all Fourier features of every pair, one first layer over them."""
    order = ([0, 3], [1, 4], [2, 5])
    features = torch.cat([fourier_features(v[:, pair], mlp.num_freq) for pair in order], 1)
    weight = torch.cat([part.weight for part in (mlp.layer, mlp.inputs, mlp.outputs)], 1)
    h = torch.relu(features @ weight.t() + mlp.layer.bias)
    for hidden, step in zip(mlp.hidden, mlp.scale, strict=False):
        h = h + step * torch.relu(hidden(h))
    made: Tensor = mlp.last(h)
    return made


@torch.no_grad()
def published(manifold: Manifold, architecture: Architecture, samples: int) -> dict[str, Tensor]:
    """Algorithm 3 as published: K full copies, each from every pair's own coordinates."""
    model, noise, scale = manifold.representation, manifold.noise, manifold.scale
    copies: dict[str, list[Tensor]] = {}
    for k in range(samples):
        for site in all_sites(manifold.space, architecture):
            mlp = network_of(manifold, site)
            rows, columns = torch.meshgrid(
                torch.arange(site.outputs), torch.arange(site.inputs), indexing="ij"
            )
            place = torch.full(rows.shape, sum(site.cell) / 2 * site.length)
            raw = torch.stack(
                [
                    place,
                    columns,
                    rows,
                    torch.full_like(rows, site.length),
                    torch.full_like(rows, site.inputs),
                    torch.full_like(rows, site.outputs),
                ],
                -1,
            ).reshape(-1, 6)
            raw = raw.float().to(DEVICE)
            if k:  # an axis of one has nothing to be moved to
                deep, across, down = site.length > 1, site.inputs > 1, site.outputs > 1
                moves = torch.tensor([deep, True, True, deep, across, down], device=DEVICE)
                raw = raw + (torch.rand_like(raw) * 2 - 1) * noise * moves
            v = torch.cat((raw[:, :3] / raw[:, 3:], raw[:, 3:] / scale), 1)
            made = per_pair(mlp, v) * (model.get_buffer("scales")[0] * site.gain)
            copies.setdefault(site.name, []).append(made)
    return {name: torch.stack(each).mean(0) for name, each in copies.items()}


def drawn(manifold: Manifold, architecture: Architecture, samples: int) -> dict[str, Tensor]:
    return dict(sample(manifold, architecture, samples=samples))


def peak() -> float:
    """This process's largest resident memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def mlp(asked: argparse.Namespace) -> dict[str, Any]:
    """The paper's INR over the whole ResNet-20, both ways."""
    space = Space("resnet-cifar", "resnet20", 10, ("*",), (0.25, 1.0))
    manifold = random_manifold(space, {"layers": 8, "hidden": 512, "num_freq": 32})
    loaded, rows = peak(), []
    for width in asked.widths:
        architecture = space.architecture(width)
        each = []
        for _ in range(asked.rounds):
            rate = matrix_rate()
            theirs = seconds(partial(published, manifold, architecture, asked.baseline))
            ours = seconds(partial(drawn, manifold, architecture, asked.samples))
            each.append((rate, theirs / asked.baseline, ours / asked.samples))
        rate, theirs, ours = (statistics.median(column) for column in zip(*each, strict=True))
        done = flops(manifold, architecture, split=True) / ours / 1e9
        before = flops(manifold, architecture, split=False) / theirs / 1e9
        first = first_tensor(manifold, architecture, asked.samples)
        row = {
            "width": width,
            "samples": asked.samples,
            "matrix_gflops": round(rate, 1),
            "published": {
                "seconds_per_sample": round(theirs, 3),
                "of_matrix_rate": round(before / rate, 3),
            },
            "ours": {
                "seconds_per_sample": round(ours, 3),
                "of_matrix_rate": round(done / rate, 3),
                "seconds_to_the_first_tensor": round(first, 3),
            },
            "ratio_per_sample": round(theirs / ours, 2),
        }
        rows.append(row)
        print(row, flush=True)
    return {"rows": rows, "loaded_mb": round(loaded), "peak_mb": round(peak())}


def first_tensor(manifold: Manifold, architecture: Architecture, samples: int) -> float:
    began = time.perf_counter()
    next(iter(sample(manifold, architecture, samples=samples)))
    return time.perf_counter() - began


def small_mlp(run: Path, root: Path | None) -> Manifold:
    """The residual MLP trained on the digits: regression, then Algorithm 2."""
    asked = replace(
        recipe.load("tiny"),
        name="tiny-mlp",
        representation="mlp",
        options={"layers": 5, "hidden": 64, "num_freq": 6},
        noise=0.5,
        regression_steps=1500,
        optimiser="adamw",
        lr=5e-4,
        reconstruction=1.0,
    )
    loaded = data.load(asked.data, root)
    net = cli.trained_source(asked, loaded, Path(), run)
    manifold, targets, smoothed = cli.prepare(asked, loaded, net)
    fit.fit(manifold, targets, smoothed, loaded, asked, run, resume=True)
    return manifold


def distance(made: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Root mean square over all weights, as a part of that of the weights themselves."""
    error = torch.cat([(made[name] - exact[name]).flatten() for name in exact])
    return float(error.norm() / torch.cat([each.flatten() for each in exact.values()]).norm())


@torch.no_grad()
def random_means(
    manifold: Manifold, architecture: Architecture, samples: int, seed: int
) -> dict[str, Tensor]:
    """The mean of K independent samples (the first exact), tensor by tensor."""
    found = {}
    for layer in manifold.space.table.layers(architecture.depth):
        if not manifold.space.morphing(layer):
            continue
        for site in sites(manifold.space, architecture, layer, norm=manifold.norm):
            generator = torch.Generator().manual_seed(seed_of(seed, site.name))
            total, chunk = torch.zeros(()), 250
            for done in range(0, samples, chunk):
                at = coordinates(
                    site,
                    manifold.scale,
                    noise=manifold.noise,
                    samples=min(chunk, samples - done),
                    generator=generator,
                    noise_free_first=done == 0 and samples <= 1000,
                )
                total = total + manifold.representation(site, at.to(manifold.device)).sum(0).cpu()
            found[site.name] = total.flatten() / samples
    return found


@torch.no_grad()
def even_means(
    manifold: Manifold, architecture: Architecture, samples: int, seed: int
) -> dict[str, Tensor]:
    """The same by `sample_site`."""
    return {
        site.name: sample_site(manifold, site, samples, seed).flatten()
        for layer in manifold.space.table.layers(architecture.depth)
        if manifold.space.morphing(layer)
        for site in sites(manifold.space, architecture, layer, norm=manifold.norm)
    }


def error(asked: argparse.Namespace) -> dict[str, Any]:
    """How far the mean of K samples is from that of 10,000, and what K does to accuracy."""
    report: dict[str, Any] = {}
    held = {path.parent.name: checkpoint.read(path) for path in asked.manifolds}
    held["tiny-mlp"] = small_mlp(asked.run, asked.data)
    for name, manifold in held.items():
        if not manifold.noise:
            continue
        space = manifold.space
        architecture = space.architecture(space.width[0])
        exact = random_means(manifold, architecture, asked.exact, 99)
        rows = []
        for samples in (1, 2, 4, 5, 8, 16, 32, 50, 64, 128):
            row: dict[str, Any] = {"samples": samples}
            for kind, means in (("random", random_means), ("even", even_means)):
                errors = [
                    distance(means(manifold, architecture, samples, seed), exact)
                    for seed in range(8)
                ]
                row[kind] = round(statistics.median(errors), 5)
            work = partial(drawn, manifold, architecture, samples)
            row["seconds"] = round(median(work, 3), 4)
            rows.append(row)
            print(name, row, flush=True)
        report[name] = {"error": rows, "accuracy": accuracies(manifold, asked)}
        print(name, report[name]["accuracy"], flush=True)
    draw(report, asked.figure)
    return report


def accuracies(manifold: Manifold, asked: argparse.Namespace) -> list[dict[str, Any]]:
    loaded = data.load("digits" if manifold.space.arch == "lenet" else "cifar10", asked.data)
    rows = []
    for width in (1.0, 0.5, manifold.space.width[0]):
        architecture = manifold.space.architecture(width)
        row: dict[str, Any] = {"width": width}
        for samples in (1, 4, 8, 16, 50):
            weights = dict(sample(manifold, architecture, samples=samples))
            net = source.network_from(weights, architecture.family, architecture.depth)
            row[str(samples)] = round(
                source.accuracy(net, loaded.test_images, loaded.test_labels, loaded), 2
            )
        rows.append(row)
    return rows


def draw(report: dict[str, Any], path: Path) -> None:
    """Error against K, on logarithmic axes."""
    from training import plots

    curves = {
        f"{name}, {kind}": [(row["samples"], row[kind]) for row in found["error"]]
        for name, found in report.items()
        for kind in ("random", "even")
    }
    plots.convergence(curves, path)


def cold(asked: argparse.Namespace) -> dict[str, Any]:
    """POST /weights for sizes nobody asked for before, one after the other."""
    found: dict[str, Any] = {}
    with replicas(1, asked.models, "--cache-bytes", "0") as (service,):
        connection = http.client.HTTPConnection("127.0.0.1", service.port)

        def post(body: dict[str, Any]) -> tuple[float, float, int]:
            began = time.perf_counter()
            connection.request(
                "POST", "/weights", json.dumps(body), {"content-type": "application/json"}
            )
            answer = connection.getresponse()
            size = len(answer.read(1))
            first = time.perf_counter() - began
            size += len(answer.read())
            if answer.status != 200:
                raise SystemExit(f"{answer.status} for {body}")
            return first, time.perf_counter() - began, size

        for _ in range(5):
            post({"arch": "resnet20", "width": 0.3})
        for width in (0.5, 1.0):
            rows = []
            for _ in range(asked.rounds):
                rows.append(post({"arch": "resnet20", "width": width}))
                post({"arch": "resnet20", "width": 0.3})
            first, whole, size = (statistics.median(column) for column in zip(*rows, strict=True))
            found[str(width)] = {
                "bytes": size,
                "first_byte_ms": round(1000 * first, 1),
                "last_byte_ms": round(1000 * whole, 1),
                "worst_ms": round(1000 * max(row[1] for row in rows), 1),
            }
            print(width, found[str(width)], flush=True)
    return found


def _resnet18(depth: tuple[int, ...]) -> tuple[Layer, ...]:
    layers = [Layer("conv1", "layer1", "image", 7, "bn1", 0, 0, 1, 2, "conv1")]
    before = "layer1"
    for stage in range(4):
        axis = f"layer{stage + 1}"
        for block in range(2):
            at, inner, place = f"{axis}.{block}", f"{axis}.{block}.inner", (stage, 0, 1, 4 << stage)
            layers.append(Layer(f"{at}.conv1", inner, before, 3, None, *place, f"{at}.conv1"))
            layers.append(Layer(f"{at}.conv2", axis, inner, 3, None, *place, f"{at}.conv2"))
            if before != axis:
                name = f"{at}.shortcut"
                layers.append(Layer(name, axis, before, 1, None, *place, name))
            before = axis
    layers.append(Layer("linear", "classes", before, 0, None, 3, 0, 1, 0, "linear"))
    return tuple(layers)


RESNET18 = Family(
    "resnet-imagenet",
    (64, 128, 256, 512),
    {"resnet18": (2, 2, 2, 2)},
    2,
    3,
    224,
    _resnet18,
    lambda axis: int(axis[5]) - 1 if axis.startswith("layer") else None,
)


def scale(asked: argparse.Namespace) -> dict[str, Any]:
    """Time and memory against the number of parameters, each size in a process of its own."""
    rows = []
    for width in (0.125, 0.25, 0.5, 0.75, 1.0):
        command = [sys.executable, "-m", "benchmarks.sample", "one", "--widths", str(width)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows.append(json.loads(told.splitlines()[-1])["result"])
        print(rows[-1], flush=True)
    per = [row["seconds_per_million_pairs"] for row in rows]
    return {"rows": rows, "spread": round(max(per) / min(per) - 1, 3)}


def one(asked: argparse.Namespace) -> dict[str, Any]:
    """One size of `scale`."""
    family.FAMILIES[RESNET18.name] = RESNET18
    space = Space(RESNET18.name, "resnet18", 1000, ("*",), (0.1, 1.0))
    manifold = random_manifold(space, {"layers": 4, "hidden": 128, "num_freq": 8})
    small = space.architecture(0.1)
    for _ in sample(manifold, small, samples=1):
        pass  # what is loaded once is loaded
    architecture = space.architecture(asked.widths[0])
    before = peak()

    def work() -> None:
        for _ in sample(manifold, architecture, samples=1):
            pass

    spent = median(work, 3)
    pairs = sum(site.outputs * site.inputs for site in all_sites(space, architecture))
    return {
        "parameters": space.cost(architecture)["parameters"],
        "pairs": pairs,
        "seconds": round(spent, 3),
        "seconds_per_million_pairs": round(1e6 * spent / pairs, 3),
        "peak_above_loaded_mb": round(peak() - before, 1),
    }


def train(asked: argparse.Namespace) -> dict[str, Any]:
    """A step's parts, with the residual MLP the plain way and ours, and with the learned grid."""
    space = Space("resnet-cifar", "resnet20", 10, ("*",), (0.25, 1.0))
    x, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    found: dict[str, Any] = {}
    ways: tuple[tuple[str, str, dict[str, Any], Any], ...] = (
        ("mlp, plain", "mlp", {"layers": 5, "hidden": 128, "num_freq": 16}, plain_generated),
        ("mlp, ours", "mlp", {"layers": 5, "hidden": 128, "num_freq": 16}, fit.generated),
        ("grid", "grid", {}, fit.generated),
    )
    for name, kind, options, make in ways:
        torch.manual_seed(0)
        model = representation(kind, space, options, norm=True)
        names = [str(i) for i in range(10)]
        manifold = Manifold(space, model, kind, options, True, 0.5, 1, 64, NORMALISATION, names)
        optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
        parts, losses = [], []
        for number in range(asked.rounds):
            seconds_of, loss = training_step(manifold, optimiser, make, x, labels, number)
            parts.append(seconds_of)
            losses.append(round(loss, 5))
        medians = {key: round(statistics.median(p[key] for p in parts), 4) for key in parts[0]}
        found[name] = {**medians, "losses": losses}
        print(name, found[name], flush=True)
    return found


def training_step(
    manifold: Manifold,
    optimiser: torch.optim.Optimizer,
    make: Callable[..., dict[str, Tensor]],
    x: Tensor,
    labels: Tensor,
    number: int,
) -> tuple[dict[str, float], float]:
    """The seconds of a step's parts, and its loss."""
    full = manifold.space.full
    net = fit.skeleton(manifold, full)
    ticks = [time.perf_counter()]
    made = make(manifold, full, 0.5, torch.Generator().manual_seed(number))
    leaves = {key: value.detach().requires_grad_() for key, value in made.items()}
    ticks.append(time.perf_counter())
    weights = fit.parameters_of(manifold, full, leaves)
    loss = source.task_loss(torch.func.functional_call(net, weights, (x, 0)), labels, None, 0.0)
    loss.backward()  # type: ignore[no-untyped-call]
    ticks.append(time.perf_counter())
    optimiser.zero_grad()
    torch.autograd.backward(list(made.values()), [leaf.grad for leaf in leaves.values()])
    ticks.append(time.perf_counter())
    optimiser.step()
    ticks.append(time.perf_counter())
    names = ("inr_forward", "network", "inr_backward", "optimiser")
    spans = [after - before for before, after in pairwise(ticks)]
    return dict(zip(names, spans, strict=True)), loss.item()


def plain_generated(
    manifold: Manifold, architecture: Architecture, noise: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """What `fit.generated` makes, from every pair's own Fourier features."""
    found, layers = {}, manifold.space.table.layers(architecture.depth)
    for blocks in {layer.stage: layer.blocks for layer in layers if layer.blocks > 1}.values():
        fit.partition(blocks, 0.0, generator)  # the same draws afterwards
    for layer in layers:
        for site in sites(manifold.space, architecture, layer, norm=manifold.norm):
            at = coordinates(site, manifold.scale, noise=noise, generator=generator)
            mlp = network_of(manifold, site)
            v = at.vectors().reshape(-1, 6)
            made = per_pair(mlp, v) * site.gain
            shape = (site.outputs, site.inputs, *site.spatial)
            found[site.name] = made.reshape(shape if site.kind == "weight" else (site.outputs,))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    works = {each.__name__: each for each in (mlp, error, cold, scale, one, train)}
    parser.add_argument("what", choices=list(works))
    parser.add_argument("--widths", type=float, nargs="+", default=[1.0, 0.5])
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--baseline", type=int, default=3, help="samples of the published way")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--exact", type=int, default=10_000)
    parser.add_argument("--manifolds", type=Path, nargs="*", default=[])
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--run", type=Path, default=Path(tempfile.gettempdir()) / "tiny-mlp")
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/samples.svg"))
    asked = parser.parse_args()
    asked.run.mkdir(parents=True, exist_ok=True)
    told = {"hardware": hardware(), "threads": torch.get_num_threads(), "device": DEVICE.type}
    print(
        json.dumps(
            {"benchmark": f"sample {asked.what}", **told, "result": works[asked.what](asked)}
        )
    )


if __name__ == "__main__":
    main()
