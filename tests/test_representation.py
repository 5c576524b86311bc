"""Representations: fast paths against plain loops, wrappers around any of them, no hidden state."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neumeta.coordinates import Along, Coordinates, Site, Span, coordinates, whole
from neumeta.manifold import roles
from neumeta.representation import Anchored, Corrected, Expanded, Grid, IntegralGrid, build
from neumeta.representation.features import fourier_features, remaining
from neumeta.representation.grid import interpolate
from neumeta.representation.mlp import _Mlp
from neumeta.sample import sample_site
from neumeta.sites import sites
from neumeta.space import Space
from tests.conftest import lenet
from tests.support.modules import traced

KINDS = ["mlp", "grid", "integral"]
WRAPPED: dict[str, dict[str, Any]] = {
    "alone": {},
    "anchored": {"anchored": {"reach": 0.25}},
    "corrected": {"corrected": {"orders": 2, "depths": True}},
    "both": {"anchored": {"reach": 0.5}, "corrected": {}},
    "centred": {"centred": {}},
    "expanded": {"expanded": {"orders": 2}},
}
PLAIN = Space("plain", traced("plain")[1], (0.25, 1.0), (1, 4))
DENSE = Space("concatenated", traced("concatenated")[1], (0.25, 1.0))


def randomised(model: torch.nn.Module, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model


def made(kind: str, wrapped: str, space: Space) -> Any:
    options = {"layers": 3, "hidden": 8, "num_freq": 3} if kind == "mlp" else {}
    return randomised(build(kind, {**options, **WRAPPED[wrapped]}, roles(space)))


@pytest.mark.parametrize("wrapped", list(WRAPPED))
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_nothing_sampled_depends_on_train_or_eval(kind: str, wrapped: str) -> None:
    model = made(kind, wrapped, PLAIN)
    # One stage is deeper than the source's, and one shallower.
    for site in sites(PLAIN, PLAIN.architecture(0.8, [4, 1])).values():
        generator = torch.Generator().manual_seed(0)
        noisy = coordinates(site, 64, noise=0.5, samples=2, generator=generator)
        for at in (coordinates(site, 64), noisy):
            training, evaluating = model.train()(site, at), model.eval()(site, at)
            assert torch.equal(training, evaluating)
            shape = (site.rows.count, site.columns.count, math.prod(site.spatial))
            assert training.shape == (len(at.layer), *shape)


@pytest.mark.parametrize("wrapped", list(WRAPPED))
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_noisy_copy_is_the_same_alone_and_among_others(kind: str, wrapped: str) -> None:
    model = made(kind, wrapped, DENSE)
    for site in sites(DENSE, DENSE.architecture([0.5, 0.9, 0.3])).values():
        generator = torch.Generator().manual_seed(0)
        at = coordinates(site, 64, noise=0.5, samples=3, generator=generator)
        together = model(site, at)
        for k in range(3):
            inputs, outputs = (
                Along(
                    each.span, each.pairs[k : k + 1], each.index[k : k + 1], each.place[k : k + 1]
                )
                for each in (at.inputs, at.outputs)
            )
            one = Coordinates(at.layer[k : k + 1], inputs, outputs, 64, exact=False)
            # float32 sums in another order
            torch.testing.assert_close(model(site, one)[0], together[k], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("wrapped", ["alone", "corrected", "both", "expanded"])
@given(st.lists(st.floats(0.05, 1.6), min_size=3, max_size=3))
@settings(max_examples=10, deadline=None)
@torch.no_grad()
def test_whole_indices_need_no_interpolation_and_give_the_same(
    wrapped: str, widths: list[float]
) -> None:
    """Concatenations too, whose parts begin in the middle of the source's dimension."""
    model = made("grid", wrapped, DENSE)
    for site in sites(DENSE, DENSE.architecture(widths, extrapolate=True)).values():
        at = coordinates(site, 64)
        assert at.exact
        assert torch.equal(model(site, at), model(site, replace(at, exact=False)))


@torch.no_grad()
def test_a_concatenated_dimension_has_the_first_channels_of_every_part() -> None:
    model = made("grid", "alone", DENSE)
    narrow = sites(DENSE, DENSE.architecture(0.5))["head.weight"]
    # 8, 6 and 5 channels become 4, 3 and 2.
    assert [units for units, _, _ in narrow.columns.parts] == [4, 3, 2]
    kept = [0, 1, 2, 3, 8, 9, 10, 14, 15]
    source = model.grid["head/weight"][0, :, :, 0]
    assert torch.equal(model(narrow, coordinates(narrow, 64))[0, :, :, 0], source[:, kept])


# --- centred, anchored, corrected and expanded -----------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(0, 2**32), st.floats(0.1, 1.0), st.booleans())
@settings(max_examples=10, deadline=None)
@torch.no_grad()
def test_a_centred_filter_behind_a_relu_sums_to_zero_at_every_size(
    kind: str, seed: int, width: float, noisy: bool
) -> None:
    model = randomised(made(kind, "centred", PLAIN), seed)
    seen = set()
    for site in sites(PLAIN, PLAIN.architecture(width, [2, 3], extrapolate=True)).values():
        generator = torch.Generator().manual_seed(seed)
        noise = {"noise": 0.5, "samples": 2, "generator": generator} if noisy else {}
        at = coordinates(site, 64, **noise)
        weights, inner = model(site, at), model.inner(site, at)
        seen.add(site.positive)
        if site.positive:
            # float32 sums of at most a few hundred numbers of order one
            sums = weights.sum((2, 3))
            torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-4, rtol=0)
            # and nothing else is changed: differences within a filter are what they were
            left = weights - inner
            torch.testing.assert_close(left, left[..., :1, :1].expand_as(left), atol=1e-5, rtol=0)
        else:
            assert torch.equal(weights, inner)
    assert seen == {True, False}


@pytest.mark.parametrize("kind", ["mlp", "grid"])
def test_the_source_keeps_its_own_size_and_fades_with_distance(kind: str) -> None:
    model = made(kind, "anchored", PLAIN)
    assert isinstance(model, Anchored)
    site = sites(PLAIN, PLAIN.full)["down.weight"]
    source = torch.randn(site.shape)
    model.fill(site, source)
    randomised(model.inner)  # training moves what is inside
    at = coordinates(site, 64)
    kept = model(site, at)
    # float16 has 11 bits
    torch.testing.assert_close(kept.view_as(source), source, atol=1e-6, rtol=2**-11)
    assert not kept.requires_grad  # nothing at this size moves it again
    free = model(replace(site, distance=1.0), at)
    assert torch.equal(free, model.inner(site, at))
    for distance in (0.05, 0.125, 0.2):
        share = 1 - distance / 0.25
        blended = model(replace(site, distance=distance), at)
        torch.testing.assert_close(blended, (1 - share) * free + share * kept)
    for distance in (0.25, 0.3, 0.45):  # beyond its reach the source has no say
        assert torch.equal(model(replace(site, distance=distance), at), free)
    # More blocks are as far as `growth` says: as far as channels, unless it is given.
    apart = [model(replace(site, **{kind: 0.125}), at) for kind in ("growth", "distance")]
    assert torch.equal(*apart)
    deeper = replace(site, growth=0.5)
    assert torch.equal(model(deeper, at), free)
    model.growth = 0.125
    assert torch.equal(model(deeper, at), model(replace(site, distance=0.0625), at))


def test_a_correction_is_nothing_at_full_size_and_a_polynomial_elsewhere() -> None:
    model = made("grid", "corrected", PLAIN)
    assert isinstance(model, Corrected)
    full = sites(PLAIN, PLAIN.full)
    for site in full.values():
        at = coordinates(site, 64)
        assert torch.equal(model(site, at), model.inner(site, at))
    for architecture in (PLAIN.architecture(0.6), PLAIN.architecture(0.6, [1, 4])):
        for site in sites(PLAIN, architecture).values():
            at = coordinates(site, 64)
            inner, found = model.inner(site, at)[0], model(site, at)[0]
            key = site.role.replace(".", "/")

            def phi(count: int, all_of: int, site: Site = site) -> Tensor:
                less = 1 - count / all_of
                shallower = max(0.0, -site.deeper)
                return torch.tensor([less, less**2, shallower, shallower**2, max(0.0, site.deeper)])

            for o in range(site.rows.count):
                row = model.rows[key][o] @ phi(site.rows.count, site.rows.full)
                for i in range(site.columns.count):
                    if site.vector:
                        expected = inner[o, i] + row
                    else:
                        column = model.columns[key][i] @ phi(site.columns.count, site.columns.full)
                        expected = inner[o, i] * (1 + row) * (1 + column)
                    torch.testing.assert_close(found[o, i], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_depth_corrects_nothing_unless_it_is_asked_for() -> None:
    site = sites(PLAIN, PLAIN.architecture(0.6))["stage1.0.conv1.weight"]
    at = coordinates(site, 64)
    for options, alike in (({}, True), ({"depths": True}, False)):
        model = randomised(build("grid", {"corrected": options}, roles(PLAIN)))
        for deeper in (0.5, -0.5):
            assert torch.equal(model(site, at), model(replace(site, deeper=deeper), at)) == alike


@torch.no_grad()
def test_an_expansion_is_nothing_at_full_size_and_a_polynomial_elsewhere() -> None:
    fresh, model = build("grid", WRAPPED["expanded"], roles(PLAIN)), made("grid", "expanded", PLAIN)
    assert isinstance(model, Expanded) and len(model.terms) == 2
    randomised(fresh.inner)
    for architecture in (PLAIN.full, PLAIN.architecture(1.0, [1, 4])):  # whatever the depth
        for site in sites(PLAIN, architecture).values():
            at = coordinates(site, 64)
            assert torch.equal(model(site, at), model.inner(site, at))
    for architecture in (PLAIN.architecture(0.6), PLAIN.architecture([0.3, 0.8])):
        shares = set()
        for site in sites(PLAIN, architecture).values():
            at = coordinates(site, 64)
            inner, found = model.inner(site, at)[0], model(site, at)[0]
            rows, columns = site.rows.count, site.columns.count
            less = 1 - (rows / site.rows.full + columns / site.columns.full) / 2
            shares.add(less)
            # At the source's depth a block has its own node.
            linear, square = (each.grid[site.role.replace(".", "/")] for each in model.terms)
            node = round(site.cell[0] * len(linear))
            for o in range(rows):
                for i in range(columns):
                    expected = inner[o, i] + less * linear[node, o, i]
                    expected = expected + less**2 * square[node, o, i]
                    torch.testing.assert_close(found[o, i], expected, atol=1e-6, rtol=1e-5)
            assert torch.equal(fresh(site, at), fresh.inner(site, at))  # terms begin as nothing
        assert len(shares) > 3


@torch.no_grad()
def test_one_linear_term_in_a_node_for_each_block_is_what_expands_unless_told_otherwise() -> None:
    """Files hold the options that were given alone."""
    model = randomised(build("grid", {"nodes": 0, "expanded": {}}, roles(PLAIN)))
    (term,) = model.terms
    assert len(term.grid["stage1/n/conv1/weight"]) == 2
    found = sites(PLAIN, PLAIN.architecture(0.6, [4, 3]))
    first, second, third, last = (found[f"stage1.{n}.conv1.weight"] for n in range(4))

    def made_by(site: Site) -> Tensor:
        weights: Tensor = term(site, coordinates(site, 64))
        return weights

    assert torch.equal(made_by(first), made_by(second))
    assert torch.equal(made_by(third), made_by(last))
    assert not torch.equal(made_by(second), made_by(third))


def test_wrappers_stand_around_each_other_and_unknown_options_are_refused() -> None:
    model = made("integral", "both", PLAIN)
    assert isinstance(model, Corrected) and isinstance(model.inner, Anchored)
    assert isinstance(model.inner.inner, IntegralGrid)
    outer = build("grid", {"expanded": {}, "corrected": {}}, roles(PLAIN))
    assert isinstance(outer, Expanded) and isinstance(outer.inner, Corrected)
    for kind, options, match in (
        ("spline", {}, "'spline' is not one of"),
        ("grid", {"density": 1.0}, "grid: .*density"),
        ("grid", {"corrected": {"order": 3}}, "grid: .*order"),
        ("grid", {"expanded": {"depths": True}}, "grid: .*depths"),
        ("mlp", {"layers": 1, "hidden": 8, "anchored": {}}, "mlp: .*reach"),
    ):
        with pytest.raises(ValueError, match=match):
            build(kind, options, roles(PLAIN))


# --- grids -----------------------------------------------------------------------------------------


@given(st.lists(st.floats(-2, 9), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_interpolation_equals_the_loop(index: list[float]) -> None:
    values = torch.arange(24.0).reshape(3, 8).square()
    found = interpolate(values, torch.tensor(index), 1)
    for column, at in enumerate(index):
        clamped = min(max(float(torch.tensor(at)), 0.0), 7.0)
        low = math.floor(clamped)
        high = min(low + 1, 7)
        part = clamped - low
        expected = values[:, low] * (1 - part) + values[:, high] * part
        torch.testing.assert_close(found[:, column], expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_a_stepped_grid_repeats_blocks_and_another_one_blends_them() -> None:
    for stepped in (True, False):
        model = randomised(build("grid", {"nodes": 0, "stepped": stepped}, roles(PLAIN)))
        found = sites(PLAIN, PLAIN.architecture(1.0, [4, 3]))
        nodes = model.grid["stage1/n/conv1/weight"]
        assert len(nodes) == 2  # one for each block of the source
        blocks = [
            model(
                found[f"stage1.{n}.conv1.weight"],
                coordinates(found[f"stage1.{n}.conv1.weight"], 64),
            )
            for n in range(4)
        ]
        if stepped:
            for block, node in zip(blocks, (0, 0, 1, 1), strict=True):
                assert torch.equal(block[0], nodes[node])
        else:
            torch.testing.assert_close(blocks[1][0], torch.lerp(nodes[0], nodes[1], 0.25))


@torch.no_grad()
def test_an_integral_grid_equals_the_loop() -> None:
    manifold = lenet("integral", seed=1)
    assert isinstance(manifold.representation, IntegralGrid)
    site = sites(manifold.space, manifold.space.architecture(0.4))["conv2.weight"]
    found = sample_site(manifold, site, 1, seed=0)
    grid = manifold.representation.grid["conv2/weight"][0]
    for o in range(site.rows.count):
        for i in range(site.columns.count):
            row = (o + 0.5) / site.rows.count * grid.shape[0] - 0.5
            column = (i + 0.5) / site.columns.count * grid.shape[1] - 0.5
            rows = interpolate(grid, torch.tensor([row]), 0)
            expected = interpolate(rows, torch.tensor([column]), 1)[0, 0] * site.gain
            torch.testing.assert_close(found[o, i].flatten(), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_noise_moves_only_the_axes_that_morph() -> None:
    """Of the classes, which keep their number, none may be mixed with another."""
    space = lenet().space
    model = IntegralGrid(roles(space), density=1.0)
    site = sites(space, space.full)["linear.weight"]
    assert (site.rows.morphs, site.columns.morphs) == (False, True)
    by_class = torch.randn(10)
    model.fill(site, by_class[:, None].expand(10, 64))
    generator = torch.Generator().manual_seed(0)
    noisy = model(site, coordinates(site, 64, noise=0.5, samples=3, generator=generator))
    torch.testing.assert_close(noisy, by_class[None, :, None, None].expand_as(noisy))
    # and along the axis that morphs it does move: c + U(-1/2, 1/2), whatever the noise on the size
    by_input = torch.arange(64.0)
    model.fill(site, by_input[None].expand(10, 64))
    noisy = model(site, coordinates(site, 64, noise=0.5, samples=50, generator=generator))
    moved = (noisy[:, 0, 1:-1, 0] - by_input[1:-1]).abs()
    assert 0.2 < moved.mean() < 0.3 and moved.max() <= 0.5


def test_a_grid_starts_as_the_source_averaged_between_its_points() -> None:
    space = lenet().space
    model = IntegralGrid(roles(space))
    site = sites(space, space.full)["conv1.weight"]
    source = torch.randn(32, 1, 3, 3)
    assert model.fill(site, source)
    # 32 channels in 12 points: the first one is the mean of the first three.
    start = source[:3].mean(0).reshape(1, 9)
    torch.testing.assert_close(model.grid["conv1/weight"][0, 0], start)


def test_a_grid_takes_each_block_of_the_source_where_it_lies() -> None:
    model = build("grid", {"nodes": 0, "stepped": True}, roles(PLAIN))
    assert isinstance(model, Grid)
    values = {name: torch.randn(site.shape) for name, site in sites(PLAIN, PLAIN.full).items()}
    for name, site in sites(PLAIN, PLAIN.full).items():
        model.fill(site, values[name])
    for name, site in sites(PLAIN, PLAIN.full).items():
        assert torch.equal(model(site, coordinates(site, 64)).view(site.shape), values[name])


# --- the MLP ---------------------------------------------------------------------------------------


def along(pairs: Tensor) -> Along:
    span = Span(((pairs.shape[1], pairs.shape[1], 1),), True)
    return Along(span, pairs, pairs[..., 0], pairs[..., 0])


def test_the_blocked_mlp_is_the_plain_one() -> None:
    """Inference in place and in blocks against autograd's forward, with blocks that do not divide."""
    torch.manual_seed(0)
    for residual in (True, False):
        mlp = randomised(_Mlp(9, 4, 16, 4, residual, 0.5).double())
        for samples, outputs, inputs in ((3, 70, 33), (2, 5, 1), (1, 2, 1500)):
            at = Coordinates(
                torch.rand(samples, 2).double(),
                along(torch.rand(samples, inputs, 2).double()),
                along(torch.rand(samples, outputs, 2).double()),
                64,
                exact=False,
            )
            plain = mlp(at).detach()
            with torch.no_grad():
                fast = mlp(at)
            # float64, the same products and sums
            torch.testing.assert_close(fast, plain, atol=1e-12, rtol=1e-10)


@given(st.floats(0.001, 0.5), st.floats(0, 1), st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_a_blurred_wave_is_its_mean_over_the_noise(blur: float, at: float, num_freq: int) -> None:
    """Against the mean of many evenly spread places; the coordinate itself is its own mean."""
    places = at + blur * (2 * (torch.arange(20000).double() + 0.5) / 20000 - 1)
    mean = fourier_features(places[:, None], num_freq).mean(0)
    found = fourier_features(torch.tensor([at]).double(), num_freq, (blur,))
    torch.testing.assert_close(found, mean, atol=1e-5, rtol=0)


def test_noise_of_half_a_channel_of_64_leaves_seven_of_sixteen_octaves() -> None:
    left = remaining((0.5 / 64,), 16, torch.float32, torch.device("cpu"))
    assert (left[0, :7] > 0).all() and (left[0, 7:] == 0).all()
    # and so no weight of the others says anything, on the axes that morph alone
    space = lenet().space
    options = {"layers": 2, "hidden": 8, "num_freq": 16, "blur": 0.5}
    model = randomised(build("mlp", options, roles(space)))
    site = sites(space, space.full)["linear.weight"]
    at = coordinates(site, 64)
    before = model(site, at)
    mlp = model.networks["linear/weight"]
    for part, moves in ((mlp.inputs, False), (mlp.outputs, True)):
        with torch.no_grad():
            part.weight[:, 2 + 7 : 2 + 16] += 1.0  # sines of the octaves from 7 on
        assert torch.equal(model(site, at), before) != moves


@torch.no_grad()
def test_a_new_mlp_is_the_same_at_every_size_and_nothing() -> None:
    """The coordinates of size have no effect at first, and what it makes is zero."""
    options = {"layers": 3, "hidden": 8, "num_freq": 4}
    model = build("mlp", options, roles(DENSE))
    site = sites(DENSE, DENSE.full)["head.weight"]
    at = coordinates(site, 64)
    assert not model(site, at).any()
    for mlp in model.networks.values():
        mlp.last.weight.normal_()

    def resized(along: Along) -> Along:
        return replace(along, pairs=along.pairs * torch.tensor([1.0, 0.3]))

    moved = replace(
        at,
        layer=at.layer * torch.tensor([1.0, 3.0]),
        inputs=resized(at.inputs),
        outputs=resized(at.outputs),
        exact=False,
    )
    made = model(site, at)
    assert made.any() and torch.equal(made, model(site, moved))


def test_layers_are_counted_as_the_supplement_does() -> None:
    """5 layers are the first, over 198 features, and four residual ones; the last is not counted."""
    model = build("mlp", {"layers": 5, "hidden": 256, "num_freq": 16}, roles(lenet().space))
    held = sum(each.numel() for each in model.networks["conv2/weight"].parameters())
    assert held == 198 * 256 + 256 + 4 * (256 * 256 + 256 + 1) + 256 * 9 + 9


def test_options_that_a_file_does_not_name_are_those_it_was_written_with() -> None:
    """Files hold the options that were given alone: another default would refuse them."""
    model = build("mlp", {}, roles(lenet().space))
    held = sum(each.numel() for each in model.networks["conv2/weight"].parameters())
    assert held == 198 * 512 + 512 + 7 * (512 * 512 + 512 + 1) + 512 * 9 + 9


def test_so_are_those_of_grids_and_of_what_stands_around_them() -> None:
    key = "stage1/n/conv1/weight"  # 2 blocks of 5 channels, 3x3
    grid, integral = (build(kind, {}, roles(PLAIN)) for kind in ("grid", "integral"))
    assert grid.grid[key].shape == (1, 5, 5, 9) and not grid.stepped
    assert integral.grid[key].shape == (1, 2, 2, 9) and not integral.stepped  # 0.375 of 5
    anchored = build("grid", {"anchored": {"reach": 0.1}}, roles(PLAIN))
    assert anchored.source.grid[key].shape == (2, 5, 5, 9) and anchored.source.stepped
    assert anchored.growth == 1.0
    corrected = build("grid", {"corrected": {}}, roles(PLAIN))
    assert corrected.rows[key].shape == corrected.columns[key].shape == (5, 3)


def test_features_kept_for_an_axis_are_those_of_its_coordinates() -> None:
    span = Span(((5, 9, 1), (3, 4, 2)), True)
    at = whole(span, 64, torch.float32)
    assert at is whole(span, 64, torch.float32)
    assert fourier_features(torch.zeros(5, 6), 16).shape == (5, (2 * 16 + 1) * 6)
    model = made("mlp", "alone", DENSE)
    site = sites(DENSE, DENSE.architecture(0.5))["head.weight"]
    exact = coordinates(site, 64, samples=2)
    with torch.no_grad():
        kept, plain = model(site, exact), model(site, replace(exact, exact=False))
    assert torch.equal(kept, plain)
    torch.testing.assert_close(kept[0], kept[1])


@torch.no_grad()
def test_one_network_for_all_tells_roles_apart_by_their_place() -> None:
    options = {"layers": 3, "hidden": 8, "num_freq": 3, "block_based": False}
    model = randomised(build("mlp", options, roles(PLAIN)))
    assert len(model.networks) == 1
    found = sites(PLAIN, PLAIN.full)
    one, other = found["stage1.0.conv1.weight"], found["stage1.0.conv2.weight"]
    assert not torch.equal(model(one, coordinates(one, 64)), model(other, coordinates(other, 64)))
    exact = coordinates(one, 64)
    assert torch.equal(model(one, exact), model(one, replace(exact, exact=False)))
    # A vector takes the centre of 3x3.
    bias = found["stem.bias"]
    assert model(bias, coordinates(bias, 64)).shape == (1, 5, 1, 1)


@torch.no_grad()
def test_a_nested_mlp_makes_the_sources_first_channels_and_another_one_spreads_them() -> None:
    """While the coordinates of size have no effect, as after a regression on one size."""
    at_full, at_half = sites(DENSE, DENSE.full), sites(DENSE, DENSE.architecture(0.5))
    for nested in (True, False):
        options = {"layers": 3, "hidden": 8, "num_freq": 3, "nested": nested}
        model = randomised(build("mlp", options, roles(DENSE)))
        for mlp in model.networks.values():
            for columns in mlp.of_size(value=True):
                columns.zero_()
        compared = 0
        for name, site in at_half.items():
            if not (site.morphs and site.rows.leading and site.columns.leading):
                continue
            whole_, half = (model(each, coordinates(each, 64))[0] for each in (at_full[name], site))
            compared += 1
            first = whole_[: site.rows.count, : site.columns.count]
            # The same sums over blocks of another size.
            assert torch.allclose(half, first, atol=1e-5) == nested, (name, nested)
        assert compared > 2


@torch.no_grad()
def test_noise_moves_a_channel_of_a_nested_mlp_by_as_much_of_the_sources_axis() -> None:
    mlp = randomised(_Mlp(9, 2, 8, 3, True, 0.0, nested=True))
    span = Span(((4, 8, 1),), True)
    still = whole(span, 64, torch.get_default_dtype())
    moved = Along(span, still.pairs, still.index + 0.25, still.place)
    at = Coordinates(torch.zeros(1, 2), moved, moved, 64, exact=False)
    found = mlp._along(moved, at)
    place = (torch.arange(4) + 0.25 + 0.5) / 8
    wanted = fourier_features(torch.stack((place, still.pairs[0, :, 1]), -1)[None], 3)
    assert torch.equal(found, wanted)


def test_an_mlp_in_sixteen_bits_trains_near_the_one_in_float32() -> None:
    """Products of hidden layers alone are rounded, to eight bits each."""
    mlp = _Mlp(9, 4, 32, 4, True, 0.0)
    torch.nn.init.normal_(mlp.last.weight)
    span = whole(Span(((16, 16, 1),), True), 64, torch.get_default_dtype())
    at = Coordinates(torch.zeros(1, 2), span, span, 64, exact=True)
    found, gradients = {}, {}
    for sixteen in (False, True):
        mlp.autocast = sixteen
        mlp.zero_grad()
        found[sixteen] = mlp(at)
        found[sixteen].square().sum().backward()
        gradients[sixteen] = mlp.hidden[0].weight.grad.clone()  # type: ignore[union-attr, operator]
    assert found[True].dtype == torch.float32 and not torch.equal(found[True], found[False])
    for near in (found, gradients):
        error = (near[True] - near[False]).norm() / near[False].norm()
        assert error < 2**-6
    rounded = found[True].bfloat16().float()
    assert not torch.equal(rounded, found[True])  # the last layer is not
