"""Algorithm 3 written with loops, one weight at a time, which every fast path must equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations_with_replacement

import pytest
import torch
from torch import Tensor

from neumeta import sample as sampling
from neumeta.coordinates import Site, coordinates
from neumeta.fold import fold
from neumeta.manifold import Contract, Manifold, roles
from neumeta.representation import (
    Anchored,
    Centred,
    Corrected,
    IntegralGrid,
    ResidualMLP,
    build,
)
from neumeta.representation.base import Representation, module_key
from neumeta.representation.mlp import _Mlp
from neumeta.sample import evenly, normalised, sample, sample_site, seed_of
from neumeta.sites import kept, sites
from neumeta.space import Architecture, Space
from neumeta.statistics import Statistics, flatten, measure, unflatten
from tests.conftest import lenet
from tests.support.modules import DEEP, MODULES, traced

Vector = tuple[float, float, float, float, float, float]
"""[l/L, c_in/C_in, c_out/C_out, L/N, C_in/N, C_out/N], l and c the middles of their cells"""


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def vectors(manifold: Manifold, site: Site, samples: int, seed: int) -> Iterator[list[Vector]]:
    """The coordinates of every weight, row by row, of one noisy copy after another."""
    noise = manifold.noise if samples > 1 else 0.0
    points = evenly(samples, 6 if site.length > 1 else 4)
    generator = torch.Generator().manual_seed(seed_of(seed, site.name))

    def mirrors(count: int) -> list[int]:
        return [1 if draw else -1 for draw in torch.randint(0, 2, (count,), generator=generator)]

    deep, wide, tall = site.length > 1, site.columns.morphs, site.rows.morphs
    turns: dict[int, list[int]] = {}
    for column, count, moves in (
        (0, 1, deep), (1, 1, deep), (2, site.columns.count, wide),
        (3, 1, wide and site.columns.count > 1), (4, site.rows.count, tall),
        (5, 1, tall and site.rows.count > 1),
    ):  # fmt: skip
        turns[column] = mirrors(count) if noise and moves else [0] * count
    low, high = site.cell
    scale = manifold.scale
    for k in range(samples):

        def moved(column: int, index: int = 0, k: int = k) -> float:
            return float(points[k, column]) * turns[column][index] * noise if noise else 0.0

        copy = []
        length = site.length + moved(0)
        place = low + (high - low) * (0.5 + moved(1)) if deep else (low + high) / 2
        across = site.columns.count + moved(3)
        down = site.rows.count + moved(5)
        for o in range(site.rows.count):
            for i in range(site.columns.count):
                column, row = (i + 0.5 + moved(2, i)) / across, (o + 0.5 + moved(4, o)) / down
                copy.append((place, column, row, length / scale, across / scale, down / scale))
        yield copy


def mlp_at(model: ResidualMLP, site: Site, v: Vector, scale: int) -> Tensor:
    """Figure 3: gamma of the six coordinates, the layers one after the other."""
    mlp = model.networks[module_key(site.role)]
    assert isinstance(mlp, _Mlp)
    h = mlp.layer.bias
    for part, (position, size) in (
        (mlp.layer, (0, 3)),
        (mlp.inputs, (1, 4)),
        (mlp.outputs, (2, 5)),
    ):
        features = [v[position], v[size]]
        span = {1: site.columns, 2: site.rows}.get(position)
        blurred = mlp.blur if span is not None and span.morphs else 0.0
        for x, of in ((v[position], span.full if span else 1), (v[size], scale)):
            for wave in (math.sin, math.cos):
                for i in range(mlp.num_freq):
                    z = 2**i * math.pi * blurred / of
                    features.append(wave(x * 2**i * math.pi) * (math.sin(z) / z if z else 1.0))
        h = h + part.weight @ torch.tensor(features)
    h = h.relu()
    for hidden, step in zip(mlp.hidden, mlp.scale, strict=True):
        h = h + step * (hidden.weight @ h + hidden.bias).relu()  # type: ignore[operator]
    out: Tensor = mlp.last.weight @ h + mlp.last.bias
    return out * model.get_buffer("scales")[model.order[site.role]] * site.gain


def between(values: Tensor, at: float) -> Tensor:
    """Linear interpolation along the first axis, held at both ends."""
    at = min(max(at, 0.0), len(values) - 1.0)
    low = math.floor(at)
    high = min(low + 1, len(values) - 1)
    return values[low] * (1 - (at - low)) + values[high] * (at - low)


def grid_at(model: Representation, site: Site, v: Vector, scale: int) -> Tensor:
    """The nested grid: values at absolute channels, corrected per channel by polynomials of size."""
    key = module_key(site.role)
    column, row = v[1] * v[4] * scale - 0.5, v[2] * v[5] * scale - 0.5
    assert isinstance(model, Corrected)
    inner = model.inner
    near = 0.0
    if isinstance(inner, Anchored):
        # A scalar width: every axis is as far from the source as the network.
        near = max(0.0, 1 - abs(1 - site.rows.count / site.rows.full) / inner.reach)
        source = between(between(inner.source.grid[key][0].double(), row), column)
        inner = inner.inner
    value = between(between(inner.grid[key][0], row), column)  # type: ignore[index, union-attr]
    if near > 0:
        value = (1 - near) * value + near * source

    def correction(modulation: Tensor, at: float, count: int, full: int) -> Tensor:
        phi = [(1 - count / full) ** (k + 1) for k in range(model.orders)]
        return between(modulation, at) @ torch.tensor(phi)

    by_row = correction(model.rows[key], row, site.rows.count, site.rows.full)
    if site.vector:
        return (value + by_row) * site.gain
    by_column = correction(model.columns[key], column, site.columns.count, site.columns.full)
    return value * (1 + by_row) * (1 + by_column) * site.gain


def integral_at(model: IntegralGrid, site: Site, v: Vector, scale: int) -> Tensor:
    """The integral grid: a piecewise linear function of the relative position of each channel."""
    grid = model.grid[module_key(site.role)][0]
    places = []
    axes = ((v[2] * v[5] * scale, site.rows, 0), (v[1] * v[4] * scale, site.columns, 1))
    for index, span, axis in axes:
        points = grid.shape[axis]
        place = index / span.count * points - 0.5
        places.append(place if span.morphs else round(index - 0.5))
    return between(between(grid, places[0]), places[1]) * site.gain


PLAIN: dict[str, Callable[..., Tensor]] = {"mlp": mlp_at, "grid": grid_at, "integral": integral_at}
KINDS = {
    "mlp": ("mlp", {}),
    "centred mlp": ("mlp", {"blur": 0.5, "centred": {}}),
    "grid": ("grid", {"corrected": {}}),
    "integral": ("integral", {}),
}


@torch.no_grad()
def algorithm_3(manifold: Manifold, site: Site, samples: int, seed: int) -> Tensor:
    """The mean over K noisy copies of the tensor, every weight by itself."""
    plain, model = PLAIN[manifold.kind], manifold.representation
    centred = isinstance(model, Centred) and site.positive
    copies = []
    for copy in vectors(manifold, site, samples, seed):
        inner = model.inner if isinstance(model, Centred) else model
        made = torch.stack([plain(inner, site, v, manifold.scale) for v in copy])
        if centred:
            filters = made.view(site.rows.count, -1)
            made = filters - filters.mean(1, keepdim=True)
        copies.append(made.flatten())
    return torch.stack(copies).mean(0).reshape(site.shape)


def small(kind: str) -> tuple[Manifold, Architecture]:
    of, options = KINDS[kind]
    manifold = lenet(of, **options)
    return manifold, manifold.space.architecture(0.25)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("samples", [1, 3, 8])
def test_a_whole_network_equals_algorithm_3(kind: str, samples: int, float64: None) -> None:
    """K = 8 is the cubature, K = 3 Sobol's points, K = 1 without noise."""
    manifold, architecture = small(kind)
    manifold.representation.double()
    made = dict(sample(manifold, architecture, samples=samples, seed=5))
    expected = {
        site.name: algorithm_3(manifold, site, samples, 5)
        for site in sites(manifold.space, architecture).values()
        if site.rows.count * site.columns.count < 200
        or samples < 8  # the loops take milliseconds a weight
    }
    assert set(expected) <= set(made) and len(expected) > 4
    for name, value in expected.items():
        # float64, the same arithmetic with sums in another order
        torch.testing.assert_close(made[name], value, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("samples", [1, 8])
def test_near_the_source_its_weights_have_their_share(samples: int, float64: None) -> None:
    """The reference reads the distance off conv2's own width; 0.875 is 0.5 of the reach away."""
    manifold = lenet("grid", anchored={"reach": 0.25}, corrected={})
    model = manifold.representation
    assert isinstance(model, Corrected) and isinstance(model.inner, Anchored)
    manifold.representation.double()
    model.inner.source.half()
    for parameter in model.inner.source.parameters():
        torch.nn.init.normal_(parameter)
    architecture = manifold.space.architecture(0.875)
    assert architecture.channels == (28, 56, 56)
    site = sites(manifold.space, architecture)["conv2.bias"]
    made = sample_site(manifold, site, samples, 3)
    expected = algorithm_3(manifold, site, samples, 3)
    torch.testing.assert_close(made, expected, atol=1e-10, rtol=1e-10)


def test_a_site_of_a_deep_stage_equals_algorithm_3(float64: None) -> None:
    """Six coordinates have noise where depth morphs: K = 12 is their cubature."""
    space = Space("plain", traced("plain")[1], (0.1, 1.0), (1, 4))
    options = {"layers": 4, "hidden": 12, "num_freq": 3}
    torch.manual_seed(1)
    model = build("mlp", options, roles(space)).double()
    manifold = Manifold(space, model, "mlp", options, 0.5, 12, 64, Contract((0.3,), (0.4,)))
    architecture = space.architecture(0.1, [3, 2])
    deep = [site for site in sites(space, architecture).values() if site.length > 1]
    assert deep
    with torch.no_grad():
        for site in deep[:3]:
            made = sample_site(manifold, site, 12, 2)
            torch.testing.assert_close(
                made, algorithm_3(manifold, site, 12, 2), atol=1e-10, rtol=1e-10
            )


@pytest.mark.parametrize("kind", list(KINDS))
def test_float32_is_near_algorithm_3(kind: str) -> None:
    """What rounding to 24 bits may do: angles of up to 8 pi are off by 2e-6, coordinates and the
    sums after them by less; values are of order one."""
    manifold, architecture = small(kind)
    single = dict(sample(manifold, architecture, samples=8, seed=5))
    manifold.representation.double()
    torch.set_default_dtype(torch.float64)
    try:
        double = dict(sample(manifold, architecture, samples=8, seed=5))
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in double.items():
        torch.testing.assert_close(single[name].double(), value, atol=1e-4, rtol=1e-4)


def test_bfloat16_products_are_within_their_rounding() -> None:
    """8 bits of mantissa: each product's operands are off by at most 2^-9 of themselves, and what
    they add to is float32. Three layers of it are held to 3 * 2^-8 of the tensor's own size."""
    manifold, architecture = small("mlp")
    model = manifold.representation
    assert isinstance(model, ResidualMLP)
    exact = dict(sample(manifold, architecture, samples=8))
    model.lower(torch.bfloat16)
    assert next(model.networks["conv1/weight"].inputs.parameters()).dtype == torch.float32  # type: ignore[union-attr]
    for name, value in sample(manifold, architecture, samples=8):
        assert value.dtype == torch.float32
        error = (value - exact[name]).square().mean().sqrt()
        assert 0 < error <= 3 * 2**-8 * exact[name].square().mean().sqrt()


@pytest.mark.parametrize("dimensions", [4, 6])
def test_the_cubature_integrates_every_cubic(dimensions: int) -> None:
    points = evenly(2 * dimensions, dimensions).double()
    assert points.abs().max() <= 1
    assert (points[:, : 6 - dimensions] == 0).all()
    used = range(6 - dimensions, 6)
    for degree in (1, 2, 3):
        for term in combinations_with_replacement(used, degree):
            made = points[:, list(term)].prod(1).mean()
            # Over [-1, 1]: 0 for an odd power, 1 / (power + 1) for an even one.
            powers = [term.count(d) for d in set(term)]
            exact = math.prod(0.0 if k % 2 else 1 / (k + 1) for k in powers)
            torch.testing.assert_close(float(made), exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize("samples", [2, 5, 16, 64])
def test_even_points_fill_each_axis_one_to_a_cell(samples: int) -> None:
    points = evenly(samples, 4)
    assert points.shape == (samples, 6) and points.abs().max() <= 1
    if samples & (samples - 1) == 0:  # Sobol's first 2^m points are one to each 2^m-th
        cells = ((points + 1) / 2 * samples).floor().long().sort(0).values
        assert (cells == torch.arange(samples)[:, None]).all()


def test_one_sample_is_noise_free_and_seeds_matter_only_with_noise() -> None:
    manifold = lenet()
    a, b = (dict(sample(manifold, manifold.space.full, samples=1, seed=s)) for s in (0, 1))
    c, d = (dict(sample(manifold, manifold.space.full, samples=2, seed=s)) for s in (0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(c[name], d[name]) for name in c)


def test_copies_made_a_few_at_a_time_are_those_made_together(
    monkeypatch: pytest.MonkeyPatch, float64: None
) -> None:
    """Eight, by three, three and two."""
    manifold, architecture = small("mlp")
    manifold.representation.double()
    site = sites(manifold.space, architecture)["conv2.weight"]
    pairs = site.rows.count * site.columns.count
    made = []
    for at_once in (8, 3):
        monkeypatch.setattr(sampling, "PAIRS_AT_ONCE", at_once * pairs)
        made.append(sample_site(manifold, site, 8, 5))
    torch.testing.assert_close(*made, atol=1e-12, rtol=1e-12)


def test_a_grid_is_nested_in_the_absolute_channel_index() -> None:
    """Without correction a narrow network is the first channels of a wide one (fan-in apart)."""
    manifold = lenet("grid")
    wide, narrow = (
        dict(sample(manifold, manifold.space.architecture(w), samples=1)) for w in (1.0, 0.5)
    )
    gain = 64 / 32
    torch.testing.assert_close(narrow["conv3.weight"], wide["conv3.weight"][:32, :32] * gain)
    torch.testing.assert_close(narrow["conv3.bias"], wide["conv3.bias"][:32])


# --- batch statistics and frozen parts -------------------------------------------------------------


def any_manifold(name: str) -> Manifold:
    """A grid of random values over a module of the tests, with calibration images."""
    module, graph = traced(name)
    space = Space(name, graph, (0.25, 1.0), (1, 5) if graph.stages else None)
    torch.manual_seed(0)
    model = build("grid", {}, roles(space))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    shape = (MODULES | DEEP)[name][1]
    images = torch.randint(0, 256, (16, *shape), dtype=torch.uint8)
    contract = Contract((0.4,) * shape[0], (0.3,) * shape[0])
    frozen = {name: module.state_dict()[name] for name in kept(graph)}
    return Manifold(space, model, "grid", {}, 0.0, 1, 64, contract, frozen, Statistics(images))


@pytest.mark.parametrize("name", [*MODULES, *DEEP])
@torch.no_grad()
def test_any_graph_is_sampled_in_the_order_and_shapes_of_the_wire(name: str) -> None:
    """Folded by the statistics of its own calibration images, whatever the size."""
    manifold = any_manifold(name)
    space = manifold.space
    for width in (0.5, 1.0):
        architecture = space.architecture(width) if space.groups else space.full
        graph, sizes = space.graph_of(architecture), space.sizes(architecture)
        made = list(sample(manifold, architecture))
        assert [n for n, _ in made] == sorted(graph.folded.tensors)
        for tensor, value in made:
            assert tuple(value.shape) == graph.folded.shape(tensor, sizes)
        found = sites(space, architecture)
        raw = {
            n: sample_site(manifold, found[n], 1, 0) if n in found else manifold.frozen[n]
            for n in graph.tensors
            if n in found or n in manifold.frozen
        }
        images = manifold.statistics.images
        assert images is not None
        moments = measure(graph, sizes, raw, normalised(manifold, images))
        expected = fold(graph, raw, moments)
        for tensor, value in made:
            torch.testing.assert_close(value, expected[tensor], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_statistics_that_were_kept_are_taken_for_their_size_alone() -> None:
    manifold = any_manifold("resnet")
    space = manifold.space
    half, other = space.architecture(0.5), space.architecture(0.75)
    before = {a: dict(sample(manifold, a)) for a in (half, other)}
    graph, sizes = space.graph_of(half), space.sizes(half)
    norms = [node for node in graph.nodes if node.op == "batch_norm"]
    count = sum(graph.shape(node.tensors["mean"], sizes)[0] for node in norms)
    moments = torch.stack((torch.zeros(count), torch.ones(count)))
    manifold.statistics = Statistics(manifold.statistics.images, {half.key: moments})
    after = {a: dict(sample(manifold, a)) for a in (half, other)}
    assert all(torch.equal(before[other][n], after[other][n]) for n in before[other])
    assert any(not torch.equal(before[half][n], after[half][n]) for n in before[half])
    raw = {n: sample_site(manifold, s, 1, 0) for n, s in sites(space, half).items()}
    expected = fold(graph, raw, unflatten(graph, sizes, moments))
    for name, value in after[half].items():
        torch.testing.assert_close(value, expected[name])


def test_noise_free_coordinates_are_made_once() -> None:
    manifold = lenet()
    site = sites(manifold.space, manifold.space.full)["conv1.weight"]
    one, other = (coordinates(site, 64) for _ in range(2))
    assert one.inputs.pairs.data_ptr() == other.inputs.pairs.data_ptr()
    assert flatten({"a": (torch.zeros(2), torch.ones(2))}).shape == (2, 2)
