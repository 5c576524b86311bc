"""Coordinates, representations and Algorithm 3 against plain references written with loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations_with_replacement, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neumeta.architecture import Space
from neumeta.coordinates import Coordinates, coordinates, sites
from neumeta.family import FAMILIES, macs, parameters
from neumeta.inr import IntegralGrid, LearnedGrid, _Mlp, fourier_features, interpolate
from neumeta.manifold import representation, roles
from neumeta.network import Network
from neumeta.sample import evenly, sample, sample_site, seed_of
from tests.conftest import lenet


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("image", [(32, 32), (28, 28), (8, 8), (30, 17), (5, 7)], ids=str)
def test_the_table_gives_the_module_shapes_parameters_and_macs(
    family: str, image: tuple[int, int]
) -> None:
    table = FAMILIES[family]
    for depth in table.architectures.values():
        sizes = {axis: size - 3 for axis, size in table.full_sizes(depth, 13).items()}
        sizes["image"] = table.input_channels
        net = Network(family, depth, sizes)
        shapes = {name: tuple(value.shape) for name, value in net.named_parameters()}
        assert {
            tensor.name: tuple(a if isinstance(a, int) else sizes[a] for a in tensor.axes)
            for tensor in table.tensors(depth)
        } == shapes
        counted = sum(value.numel() for value in net.parameters())
        assert parameters(table.tensors(depth), sizes) == counted
        done = 0

        def count(module: torch.nn.Module, given: object, made: torch.Tensor) -> None:
            nonlocal done
            assert isinstance(module, torch.nn.Linear)
            done += module.weight.numel()

        for module in net.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(count)
        real = torch.nn.functional.conv2d

        def conv2d(
            x: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor,
            convolve: Callable[..., torch.Tensor] = real,
            **rest: int,
        ) -> torch.Tensor:
            nonlocal done
            made = convolve(x, weight, bias, **rest)
            done += made[0, 0].numel() * weight.numel()
            return made

        torch.nn.functional.conv2d = conv2d
        try:
            net(torch.zeros(1, table.input_channels, *image))
        finally:
            torch.nn.functional.conv2d = real
        assert macs(table, depth, sizes, image) == done


@given(st.integers(0, 2**32), st.floats(0, 0.5), st.floats(0.25, 1.0))
@settings(max_examples=50, deadline=None)
def test_noise_stays_in_its_cell_and_follows_algorithm_3(
    seed: int, noise: float, width: float
) -> None:
    space = Space("resnet-mnist", "resnet-mnist", 10, ("*",), (0.25, 1.0), (1, 3))
    architecture = space.architecture(width, [3, 2])
    for layer in space.table.layers(architecture.depth):
        for site in sites(space, architecture, layer, norm=False):
            generator = torch.Generator().manual_seed(seed)
            at = coordinates(
                site, 64, noise=noise, samples=3, generator=generator, noise_free_first=True
            )
            v = at.vectors()
            assert v.shape == (3, site.outputs, site.inputs, 6)
            # Each coordinate is within its noise of the integer one, and the first sample exact.
            for axis, count in ((1, site.inputs), (2, site.outputs)):
                index = v[..., axis] * v[..., axis + 3] * 64
                exact = torch.arange(count, dtype=torch.float32)
                exact = exact[None, None] if axis == 1 else exact[None, :, None]
                assert (index - exact).abs().max() <= noise + 1e-3
                assert (index - exact)[0].abs().max() <= 1e-3
            if site.length > 1:
                low, high = layer.block / layer.blocks, (layer.block + 1) / layer.blocks
                assert (v[..., 0] >= low - 1e-6).all() and (v[..., 0] <= high + 1e-6).all()


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


def test_each_channel_mirrors_the_points_by_its_own_seed() -> None:
    manifold = lenet()
    space, points = manifold.space, evenly(8, 4)
    site = sites(space, space.full, space.table.layers(())[1], norm=False)[0]

    def noise(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        at = coordinates(site, 64, noise=0.5, samples=8, generator=generator, points=points)
        index = at.outputs[..., 0] * at.outputs[..., 1] * 64
        return index - torch.arange(site.outputs)

    made, column = noise(0), 0.5 * points[:, 4, None]
    # float32 products of indices up to 64
    kept = (made - column).abs().amax(0) < 1e-4
    mirrored = (made + column).abs().amax(0) < 1e-4
    assert (kept ^ mirrored).all() and kept.any() and mirrored.any()
    assert not torch.equal(made, noise(1))


def test_the_blocked_mlp_is_the_plain_one() -> None:
    """Inference in place and in blocks against autograd's forward, with blocks that do not divide."""
    torch.manual_seed(0)
    for residual in (True, False):
        mlp = _Mlp(9, layers=5, hidden=16, num_freq=4, residual=residual).double()
        for samples, outputs, inputs in ((3, 70, 33), (2, 5, 1), (1, 2, 1500)):
            at = Coordinates(
                torch.rand(samples, 2).double(),
                torch.rand(samples, inputs, 2).double(),
                torch.rand(samples, outputs, 2).double(),
                64,
            )
            plain = mlp(at).detach()
            with torch.no_grad():
                fast = mlp(at)
            # float64, the same products and sums
            torch.testing.assert_close(fast, plain, atol=1e-12, rtol=1e-10)


def test_noise_beyond_half_a_step_is_refused() -> None:
    manifold = lenet()
    space = manifold.space
    site = sites(space, space.full, space.table.layers(())[0], norm=False)[0]
    with pytest.raises(ValueError, match="noise"):
        coordinates(site, 64, noise=0.6)


def test_the_split_first_layer_is_the_supplements_mlp() -> None:
    """Figure 3 written plainly: one matrix over (2*num_freq+1)*6 features per coordinate vector."""
    torch.manual_seed(0)
    mlp = _Mlp(9, layers=4, hidden=8, num_freq=3, residual=True).double()
    space = lenet().space
    site = sites(space, space.architecture(0.3), space.table.layers(())[1], norm=False)[0]
    at = coordinates(site, 64, noise=0.4, samples=2, generator=torch.Generator().manual_seed(1))
    at = Coordinates(at.layer.double(), at.inputs.double(), at.outputs.double(), at.scale)
    made = mlp(at)
    v = at.vectors()
    columns = {
        0: (mlp.layer, 0), 3: (mlp.layer, 1), 1: (mlp.inputs, 0),
        4: (mlp.inputs, 1), 2: (mlp.outputs, 0), 5: (mlp.outputs, 1),
    }  # fmt: skip
    for index in [(0, 0, 0), (1, 3, 2), (0, site.outputs - 1, site.inputs - 1)]:
        h = mlp.layer.bias.clone()
        inputs = 0
        for d, (block, within) in columns.items():
            value = v[(*index, d)]
            features = [(value, within)]
            for i in range(3):
                angle = value * 2**i * math.pi
                features += [
                    (angle.sin(), 2 + 6 * within + i),
                    (angle.cos(), 2 + 6 * within + 3 + i),
                ]
            for feature, column in features:
                h = h + block.weight[:, column] * feature
                inputs += 1
        assert inputs == (2 * 3 + 1) * 6
        h = h.relu()
        for linear, scale in zip(mlp.hidden, mlp.scale, strict=True):
            h = h + scale * (linear.weight @ h + linear.bias).relu()
        expected = mlp.last.weight @ h + mlp.last.bias
        # float64, the same sums in another order
        torch.testing.assert_close(made[index], expected, atol=1e-12, rtol=1e-10)


def test_fourier_features_count() -> None:
    assert fourier_features(torch.zeros(5, 6), 16).shape == (5, (2 * 16 + 1) * 6)


@given(st.lists(st.floats(-2, 9), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_interpolation_equals_the_loop(index: list[float]) -> None:
    values = torch.arange(24.0).reshape(3, 8).square()
    made = interpolate(values, torch.tensor(index), 1)
    for column, at in enumerate(index):
        clamped = min(max(float(torch.tensor(at)), 0.0), 7.0)
        low = math.floor(clamped)
        high = min(low + 1, 7)
        part = clamped - low
        expected = values[:, low] * (1 - part) + values[:, high] * part
        torch.testing.assert_close(made[:, column], expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "grid", "integral"])
@pytest.mark.parametrize("block_based", [True, False])
def test_sampling_is_the_mean_of_single_evaluations(kind: str, block_based: bool) -> None:
    manifold = lenet(kind)
    if kind == "mlp" and not block_based:
        options = {**manifold.options, "block_based": False}
        manifold.representation = representation("mlp", manifold.space, options, norm=False)
    architecture = manifold.space.architecture(0.5)
    layer = manifold.space.table.layers(())[1]
    site = sites(manifold.space, architecture, layer, norm=False)[0]
    made = sample_site(manifold, site, 5, seed=3)
    generator = torch.Generator().manual_seed(seed_of(3, site.name))
    total = torch.zeros_like(made)
    at = coordinates(
        site,
        64,
        noise=0.5,
        samples=5,
        generator=generator,
        points=evenly(5, 4),
    )
    for k in range(5):
        one = Coordinates(at.layer[k : k + 1], at.inputs[k : k + 1], at.outputs[k : k + 1], 64)
        total += manifold.representation(site, one).reshape(made.shape) / 5
    # float32 sums in another order, values of order one
    torch.testing.assert_close(made, total, atol=1e-5, rtol=1e-4)


def test_one_sample_is_noise_free_and_seeds_matter_only_with_noise() -> None:
    manifold = lenet()
    a, b = (dict(sample(manifold, manifold.space.full, samples=1, seed=s)) for s in (0, 1))
    c, d = (dict(sample(manifold, manifold.space.full, samples=4, seed=s)) for s in (0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(c[name], d[name]) for name in c)


@given(st.floats(0.02, 1.4), st.booleans())
@settings(max_examples=30, deadline=None)
def test_whole_indices_need_no_interpolation_and_give_the_same(width: float, morph: bool) -> None:
    manifold = lenet("grid")
    model, space = manifold.representation, manifold.space
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    architecture = space.architecture(width, extrapolate=True)
    layer = space.table.layers(())[int(morph)]
    for site in sites(space, architecture, layer, norm=False):
        at = coordinates(site, 64)
        assert at.exact
        plain = replace(at, exact=False)
        assert torch.equal(model(site, at), model(site, plain))


def test_the_source_keeps_its_own_size_and_fades_with_distance() -> None:
    manifold = lenet("grid", reach=0.25)
    model, space = manifold.representation, manifold.space
    assert isinstance(model, LearnedGrid)
    site = next(
        site
        for site in sites(space, space.full, space.table.layers(())[1], norm=False)
        if site.kind == "weight"
    )
    source = torch.randn(site.outputs, site.inputs, *site.spatial)
    model.fill(site, source)
    grid = model.grid["conv2/weight"]
    with torch.no_grad():
        grid.add_(torch.randn(grid.shape))  # training moves the grid
    at = coordinates(site, 64)
    kept = model(site, at)
    # float16 has 11 bits
    torch.testing.assert_close(kept.view_as(source), source, atol=1e-6, rtol=2**-11)
    kept.sum().backward()
    assert grid.grad is None or not grid.grad.any()  # nothing at this size moves it again
    free = model(replace(site, distance=1.0), at)
    for distance in (0.05, 0.125, 0.2):
        share = 1 - distance / 0.25
        made = model(replace(site, distance=distance), at)
        torch.testing.assert_close(made, (1 - share) * free + share * kept)
    assert torch.equal(model(replace(site, distance=0.25), at), free)
    # More blocks are as far as they are many in training, and a share of it afterwards.
    deeper = replace(site, growth=0.5)
    model.growth = 0.125
    assert torch.equal(model(deeper, at), free)
    model.eval()
    assert torch.equal(model(deeper, at), model(replace(site, distance=0.0625), at))


def test_distance_is_the_largest_relative_change() -> None:
    space = Space("resnet-cifar", "resnet20", 10, ("*",), (0.25, 1.0), (1, 5))
    assert space.distance(space.full) == (0, 0)
    assert space.distance(space.architecture([1.0, 0.75, 0.5])) == (0.5, 0)
    assert space.distance(space.architecture(0.75, [3, 3, 5])) == (0.25, pytest.approx(2 / 3))
    assert space.distance(space.architecture(0.75, [1, 3, 4])) == pytest.approx((2 / 3, 1 / 3))
    assert space.distance(space.architecture(1.25, extrapolate=True)) == (0.25, 0)


def test_a_grid_is_nested_in_the_absolute_channel_index() -> None:
    """Without correction a narrow network is the first channels of a wide one (fan-in apart)."""
    manifold = lenet("grid")
    model = manifold.representation
    assert isinstance(model, LearnedGrid)
    with torch.no_grad():
        for group in (model.outputs, model.inputs):
            for parameter in group.parameters():
                parameter.zero_()
    wide, narrow = (
        dict(sample(manifold, manifold.space.architecture(w), samples=1)) for w in (1.0, 0.5)
    )
    gain = 64 / 32
    torch.testing.assert_close(narrow["conv3.weight"], wide["conv3.weight"][:32, :32] * gain)
    torch.testing.assert_close(narrow["conv3.bias"], wide["conv3.bias"][:32])


def test_an_integral_grid_is_a_quadrature_of_one_function() -> None:
    """With a constant or linear integrand every size computes the same integral over u, exactly."""
    manifold = lenet("integral")
    model = manifold.representation
    assert isinstance(model, IntegralGrid)
    grid = model.grid["conv2/weight"]
    assert grid.shape == (1, 24, 12, 9)  # 0.375 points per channel, of (64, 32)
    with torch.no_grad():
        grid.copy_((torch.arange(12.0) + 0.5)[None, None, :, None].expand_as(grid))
    for width in (1.0, 0.75, 0.5):
        made = dict(sample(manifold, manifold.space.architecture(width), samples=1))
        # The sum over inputs, fan-in gain included: the integral of 12 u du * 32 = 192. Points
        # beyond the outermost knots are held constant, symmetrically at both ends.
        sums = made["conv2.weight"].sum(1)
        torch.testing.assert_close(sums, torch.full_like(sums, 192.0), atol=1e-3, rtol=1e-5)


def test_an_integral_grid_equals_the_loop() -> None:
    manifold = lenet("integral", seed=1)
    assert isinstance(manifold.representation, IntegralGrid)
    architecture = manifold.space.architecture(0.4)
    layer = manifold.space.table.layers(())[1]
    site = sites(manifold.space, architecture, layer, norm=False)[0]
    made = sample_site(manifold, site, 1, seed=0)
    grid = manifold.representation.grid["conv2/weight"][0]
    for o in range(site.outputs):
        for i in range(site.inputs):
            row = (o + 0.5) / site.outputs * grid.shape[0] - 0.5
            column = (i + 0.5) / site.inputs * grid.shape[1] - 0.5
            rows = interpolate(grid, torch.tensor([row]), 0)
            expected = interpolate(rows, torch.tensor([column]), 1)[0, 0] * site.gain
            torch.testing.assert_close(made[o, i].flatten(), expected, atol=1e-4, rtol=1e-4)


def test_noise_moves_only_the_axes_that_morph() -> None:
    """In the last block's scope conv1 reads 64 frozen channels: noise must not mix them."""
    space = Space("resnet-cifar", "resnet20", 10, ("layer3.2.inner",), (0.5, 1.0))
    model = IntegralGrid(roles(space, norm=False), density=1.0)
    layers = {layer.name: layer for layer in space.table.layers(space.depth)}
    site = sites(space, space.full, layers["layer3.2.conv1"], norm=False)[0]
    assert site.morphs == (True, False)
    by_input = torch.randn(64)
    model.fill(site, by_input[None, :, None, None].expand(64, 64, 3, 3))
    generator = torch.Generator().manual_seed(0)
    noisy = model(site, coordinates(site, 64, noise=0.5, samples=3, generator=generator))
    torch.testing.assert_close(noisy, by_input[None, None, :, None].expand_as(noisy))
    # and along the axis that morphs it does move: c + U(-1/2, 1/2), whatever the noise on the size
    by_output = torch.arange(64.0)
    model.fill(site, by_output[:, None, None, None].expand(64, 64, 3, 3))
    noisy = model(site, coordinates(site, 64, noise=0.5, samples=50, generator=generator))
    moved = (noisy[:, 1:-1, 0, 0] - by_output[1:-1]).abs()
    assert 0.2 < moved.mean() < 0.3 and moved.max() <= 0.5


def test_a_grid_starts_as_the_source_averaged_between_its_points() -> None:
    manifold = lenet("integral")
    model = manifold.representation
    assert isinstance(model, IntegralGrid)
    space = manifold.space
    layer = space.table.layers(())[0]
    site = sites(space, space.full, layer, norm=False)[0]
    source = torch.randn(32, 1, 3, 3)
    model.fill(site, source)
    # 32 channels in 12 points: the first one is the mean of the first three.
    start = source[:3].mean(0).reshape(1, 9)
    torch.testing.assert_close(model.grid["conv1/weight"][0, 0], start)


def test_deeper_branches_are_finer_steps() -> None:
    space = Space("resnet-mnist", "resnet-mnist", 10, ("*",), (1.0, 1.0), (1, 3))
    for blocks in range(1, 10):
        architecture = space.architecture(1.0, [blocks, 1], extrapolate=True)
        ends = [
            site.gain
            for layer in space.table.layers(architecture.depth)
            if layer.branch_end and layer.stage == 0
            for site in sites(space, architecture, layer, norm=False)
        ]
        assert sum(ends) == pytest.approx(2 * 2)  # weight and bias, the source's two blocks


def test_roles_are_shared_over_depth_and_scoped_by_morph() -> None:
    deep = Space("resnet-mnist", "resnet-mnist", 10, ("*",), (1.0, 1.0), (1, 3))
    assert len(roles(deep, norm=False)) == 2 * 7
    last = Space("resnet-cifar", "resnet20", 10, ("layer3.2.inner",), (0.5, 1.0))
    assert sorted(roles(last, norm=False)) == [
        f"layer3.2.{conv}.{kind}" for conv in ("conv1", "conv2") for kind in ("bias", "weight")
    ]
    assert last.architecture(0.5).channels == (32,)
    assert last.sizes(last.architecture(0.5))["layer3.1.inner"] == 64


def test_every_width_between_is_one_channel_apart() -> None:
    space = lenet().space
    counts = [space.architecture(0.25 + 0.75 * i / 300).channels[2] for i in range(301)]
    assert all(0 <= b - a <= 1 for a, b in pairwise(counts))
    assert counts[0] == 16 and counts[-1] == 64
