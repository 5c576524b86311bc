"""Algorithm 3 written with loops, one weight at a time, which every fast path must equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from neumeta.architecture import Architecture, Space
from neumeta.inr import IntegralGrid, LearnedGrid, ResidualMLP, _Mlp, module_key
from torch import Tensor

from benchmarks.published import all_sites
from neumeta.coordinates import Site
from neumeta.manifold import Manifold, representation
from neumeta.sample import evenly, sample, sample_site, seed_of
from tests.conftest import lenet

Vector = tuple[float, float, float, float, float, float]
"""[l/L, c_in/C_in, c_out/C_out, L/N, C_in/N, C_out/N]"""


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

    deep, wide, tall = site.length > 1, site.inputs > 1, site.outputs > 1
    turns: dict[int, list[int]] = {0: [0], 1: [0], 3: [0], 5: [0]}
    for column, count, moves in (
        (0, 1, deep), (1, 1, deep), (2, site.inputs, True), (3, 1, wide), (4, site.outputs, True),
        (5, 1, tall),
    ):  # fmt: skip
        if noise and moves:
            turns[column] = mirrors(count)
    low, high = site.cell
    scale = manifold.scale
    for k in range(samples):

        def moved(column: int, index: int = 0, k: int = k) -> float:
            return float(points[k, column]) * turns[column][index] * noise if noise else 0.0

        copy = []
        length = site.length + moved(0)
        place = low + (high - low) * (0.5 + moved(1)) if deep else (low + high) / 2
        across = site.inputs + moved(3)
        down = site.outputs + moved(5)
        for o in range(site.outputs):
            for i in range(site.inputs):
                column, row = (i + moved(2, i)) / across, (o + moved(4, o)) / down
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
        for x in (v[position], v[size]):
            features += [math.sin(x * 2**i * math.pi) for i in range(mlp.num_freq)]
            features += [math.cos(x * 2**i * math.pi) for i in range(mlp.num_freq)]
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


def grid_at(model: LearnedGrid, site: Site, v: Vector, scale: int) -> Tensor:
    """The nested grid: values at absolute channels, corrected per channel by polynomials of size."""
    key = module_key(site.role)
    column, row = v[1] * v[4] * scale, v[2] * v[5] * scale
    value = between(between(model.grid[key][0], row), column)
    near = 1 - abs(1 - site.outputs / site.full_outputs) / model.reach if model.reach else 0.0
    if near > 0:  # a scalar width: every axis is as far from the source as the network
        source = between(between(model.source.get_buffer(key)[0], row), column)
        value = (1 - near) * value + near * source

    def correction(modulation: Tensor, at: float, count: int, full: int) -> Tensor:
        phi = [(1 - count / full) ** (k + 1) for k in range(model.orders)]
        return between(modulation, at) @ torch.tensor(phi)

    by_row = correction(model.outputs[key], row, site.outputs, site.full_outputs)
    if site.kind != "weight":
        return (value + by_row) * site.gain
    by_column = correction(model.inputs[key], column, site.inputs, site.full_inputs)
    return value * (1 + by_row) * (1 + by_column) * site.gain


def integral_at(model: IntegralGrid, site: Site, v: Vector, scale: int) -> Tensor:
    """The integral grid: a piecewise linear function of the relative position of each channel."""
    grid = model.grid[module_key(site.role)][0]
    places = []
    axes = ((v[2] * v[5] * scale, site.outputs, 0), (v[1] * v[4] * scale, site.inputs, 1))
    for index, count, axis in axes:
        points = grid.shape[axis]
        places.append((index + 0.5) / count * points - 0.5 if site.morphs[axis] else round(index))
    return between(between(grid, places[0]), places[1]) * site.gain


PLAIN: dict[str, Callable[..., Tensor]] = {"mlp": mlp_at, "grid": grid_at, "integral": integral_at}


@torch.no_grad()
def algorithm_3(manifold: Manifold, site: Site, samples: int, seed: int) -> Tensor:
    """The mean over K noisy copies of the tensor, every weight by itself."""
    plain, model = PLAIN[manifold.kind], manifold.representation
    copies = [
        torch.stack([plain(model, site, v, manifold.scale) for v in copy])
        for copy in vectors(manifold, site, samples, seed)
    ]
    mean = torch.stack(copies).mean(0)
    shape = (site.outputs, site.inputs, *site.spatial) if site.kind == "weight" else (site.outputs,)
    return mean.reshape(shape)


def small(kind: str) -> tuple[Manifold, Architecture]:
    manifold = lenet(kind)
    return manifold, manifold.space.architecture(0.25)


@pytest.mark.parametrize("kind", list(PLAIN))
@pytest.mark.parametrize("samples", [1, 3, 8])
def test_a_whole_network_equals_algorithm_3(kind: str, samples: int, float64: None) -> None:
    """K = 8 is the cubature, K = 3 Sobol's points, K = 1 without noise."""
    manifold, architecture = small(kind)
    manifold.representation.double()
    made = dict(sample(manifold, architecture, samples=samples, seed=5))
    expected = {
        site.name: algorithm_3(manifold, site, samples, 5)
        for site in all_sites(manifold.space, architecture)
        if site.outputs * site.inputs < 200 or samples < 8  # the loops take milliseconds a weight
    }
    assert set(expected) <= set(made) and len(expected) > 4
    for name, value in expected.items():
        # float64, the same arithmetic with sums in another order
        torch.testing.assert_close(made[name], value, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("samples", [1, 8])
def test_near_the_source_its_weights_have_their_share(samples: int, float64: None) -> None:
    """The reference reads the distance off conv2's own width; 0.875 is 0.5 of the reach away."""
    manifold = lenet("grid", reach=0.25)
    model = manifold.representation
    assert isinstance(model, LearnedGrid)
    manifold.representation.double()
    for buffer in model.source.buffers():
        buffer.normal_()
    architecture = manifold.space.architecture(0.875)
    assert architecture.channels == (28, 56, 56)
    layer = manifold.space.table.layers(())[1]
    for site in all_sites(manifold.space, architecture):
        if site.kind == "bias" and site.name.startswith(layer.name):
            made = sample_site(manifold, site, samples, 3)
            expected = algorithm_3(manifold, site, samples, 3)
            torch.testing.assert_close(made, expected, atol=1e-10, rtol=1e-10)
            break
    else:
        raise AssertionError("no site was compared")


def test_a_site_of_a_deep_stage_equals_algorithm_3(float64: None) -> None:
    """Six coordinates have noise where depth morphs: K = 12 is their cubature."""
    space = Space("resnet-mnist", "resnet-mnist", 10, ("*",), (0.1, 1.0), (1, 3))
    options = {"layers": 4, "hidden": 12, "num_freq": 3}
    torch.manual_seed(1)
    model = representation("mlp", space, options, norm=False).double()
    normalisation = {"mean": [0.3], "std": [0.4]}
    labels = list("0123456789")
    manifold = Manifold(space, model, "mlp", options, False, 0.5, 12, 64, normalisation, labels)
    architecture = space.architecture(0.1, [3, 2])
    deep = [site for site in all_sites(manifold.space, architecture) if site.length > 1]
    assert deep
    with torch.no_grad():
        for site in deep[:3]:
            made = sample_site(manifold, site, 12, 2)
            torch.testing.assert_close(
                made, algorithm_3(manifold, site, 12, 2), atol=1e-10, rtol=1e-10
            )


@pytest.mark.parametrize("kind", list(PLAIN))
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
