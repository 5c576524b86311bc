"""Coordinates: noise within its cell, as Algorithm 3 has it; parts of a dimension in their places."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neumeta.coordinates import ONE, Span, coordinates, whole
from neumeta.sample import evenly
from neumeta.sites import sites
from neumeta.space import Space
from tests.conftest import lenet
from tests.support.modules import traced

PLAIN = Space("plain", traced("plain")[1], (0.25, 1.0), (1, 4))


@given(st.integers(0, 2**32), st.floats(0, 0.5), st.floats(0.25, 1.0))
@settings(max_examples=20, deadline=None)
def test_noise_stays_in_its_cell_and_follows_algorithm_3(
    seed: int, noise: float, width: float
) -> None:
    architecture = PLAIN.architecture(width, [3, 2])
    for site in sites(PLAIN, architecture).values():
        generator = torch.Generator().manual_seed(seed)
        at = coordinates(
            site, 64, noise=noise, samples=3, generator=generator, noise_free_first=True
        )
        v = at.vectors()
        assert v.shape == (3, site.rows.count, site.columns.count, 6)
        # Each coordinate is within its noise of its channel's middle, and the first sample exact.
        for axis, count in ((1, site.columns.count), (2, site.rows.count)):
            index = v[..., axis] * v[..., axis + 3] * 64
            exact = torch.arange(count, dtype=torch.float32) + 0.5
            exact = exact[None, None] if axis == 1 else exact[None, :, None]
            assert (index - exact).abs().max() <= noise + 1e-3
            assert (index - exact)[0].abs().max() <= 1e-3
        low, high = site.cell
        assert (v[..., 0] >= low - 1e-6).all() and (v[..., 0] <= high + 1e-6).all()
        if site.length == 1:
            assert (v[..., 0] == 0.5).all()


def test_each_channel_mirrors_the_points_by_its_own_seed() -> None:
    space, points = lenet().space, evenly(8, 4)
    site = sites(space, space.full)["conv2.weight"]

    def noise(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        at = coordinates(site, 64, noise=0.5, samples=8, generator=generator, points=points)
        index = at.outputs.pairs[..., 0] * at.outputs.pairs[..., 1] * 64 - 0.5
        # float32 products of indices up to 64
        torch.testing.assert_close(index, at.outputs.index, atol=1e-4, rtol=0)
        return at.outputs.index - torch.arange(site.rows.count)

    made, column = noise(0), 0.5 * points[:, 4, None].float()
    kept = (made - column).abs().amax(0) < 1e-4
    mirrored = (made + column).abs().amax(0) < 1e-4
    assert (kept ^ mirrored).all() and kept.any() and mirrored.any()
    assert not torch.equal(made, noise(1))


def test_a_single_noisy_copy_is_noisy_and_exact_ones_are_as_many_as_asked_for() -> None:
    space = lenet().space
    site = sites(space, space.architecture(0.5))["conv2.weight"]
    generator = torch.Generator().manual_seed(0)
    noisy = coordinates(site, 64, noise=0.5, samples=1, generator=generator)
    exact = coordinates(site, 64, samples=3)
    assert not noisy.exact and exact.exact
    assert len(noisy.vectors()) == 1 and len(exact.vectors()) == 3
    one = coordinates(site, 64).vectors()
    assert torch.equal(exact.vectors(), one.expand(3, -1, -1, -1))
    moved = (noisy.vectors() - one)[0].abs().amax((0, 1))
    # The one block of the layer has no place to move to, and a network no other length.
    assert moved[0] == moved[3] == 0 and all(moved[at] > 1e-4 for at in (1, 2, 4, 5))


@pytest.mark.parametrize("blocks", [2, 3])
def test_in_a_stage_of_several_blocks_place_and_length_move_too(blocks: int) -> None:
    site = sites(PLAIN, PLAIN.architecture(1.0, [blocks, 2]))["stage1.1.conv1.weight"]
    generator = torch.Generator().manual_seed(0)
    at = coordinates(site, 64, noise=0.5, samples=200, generator=generator)
    place, length = at.layer[:, 0] * blocks, at.layer[:, 1] * 64
    for values, middle in ((place, 1.5), (length, float(blocks))):
        assert middle - 0.5 - 1e-4 <= values.min() < middle - 0.4
        assert middle + 0.4 < values.max() <= middle + 0.5 + 1e-4
    assert (at.layer[:, 0] - at.layer[0, 0]).abs().max() > 0  # each copy its own


def test_a_vector_has_one_column_in_the_middle_of_everything() -> None:
    along = whole(ONE, 64, torch.float32)
    assert along.pairs.tolist() == [[[0.5, 1 / 64]]]
    assert along.index.tolist() == [[0.0]] and along.place.tolist() == [[0.5]]
    assert not ONE.morphs and ONE.leading


def test_indices_are_the_sources_first_ones_in_a_dimension_of_one_part_that_is_no_larger() -> None:
    for parts, leading in (
        (((4, 6, 3),), True),
        (((6, 6, 1),), True),
        (((7, 6, 1),), False),
        (((4, 6, 1), (3, 5, 1)), False),
    ):
        span = Span(parts, True)
        index = whole(span, 64, torch.float32).index[0]
        assert span.leading == leading == torch.equal(index, torch.arange(span.count).float())


def test_each_coordinate_moves_by_its_own_column_of_the_points() -> None:
    site, points = sites(PLAIN, PLAIN.full)["stage1.1.conv1.weight"], evenly(12, 6)
    generator = torch.Generator().manual_seed(0)
    at = coordinates(site, 64, noise=0.5, samples=12, generator=generator, points=points)
    low, high = site.cell
    moved = [at.layer[:, 1] * 64 - site.length, (at.layer[:, 0] - low) / (high - low) - 0.5]
    for along in (at.inputs, at.outputs):
        moved += [along.index[:, 0], along.pairs[:, 0, 1] * 64 - along.span.count]
    for column, found in enumerate(moved):
        expected = 0.5 * points[:, column].float()
        turned = expected if (found - expected).abs().max() < 0.1 else -expected
        torch.testing.assert_close(found, turned, atol=1e-4, rtol=0)


def test_noise_moves_neither_an_axis_that_keeps_its_size_nor_the_one_input_of_a_vector() -> None:
    space = lenet().space
    for name, rows, columns in (
        ("conv1.weight", True, False),
        ("conv2.weight", True, True),
        ("conv2.bias", True, False),
        ("linear.weight", False, True),
    ):
        site = sites(space, space.architecture(0.5))[name]
        generator = torch.Generator().manual_seed(0)
        noisy = coordinates(site, 64, noise=0.5, samples=4, generator=generator)
        exact = coordinates(site, 64)
        for along, still, moves in (
            (noisy.outputs, exact.outputs, rows),
            (noisy.inputs, exact.inputs, columns),
        ):
            for mine, theirs in (
                (along.pairs, still.pairs),
                (along.index, still.index),
                (along.place, still.place),
            ):
                assert torch.equal(mine, theirs.expand_as(mine)) != moves


@pytest.mark.parametrize("noise", [-0.1, 0.6])
def test_noise_beyond_half_a_step_is_refused(noise: float) -> None:
    space = lenet().space
    with pytest.raises(ValueError, match="noise"):
        coordinates(sites(space, space.full)["conv1.weight"], 64, noise=noise)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3)), min_size=1,
                max_size=4))  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_every_part_lies_in_its_own_stretch_of_the_source(
    parts: list[tuple[int, int, int]],
) -> None:
    span = Span(tuple(parts), True)
    along = whole(span, 64, torch.float32)
    at, row = 0, 0
    for units, full, repeat in parts:
        count = units * repeat
        for channel in range(count):
            assert float(along.pairs[0, row, 1]) == pytest.approx(span.count / 64)
            # The source's index that it is nested at lies within the part.
            index = float(along.index[0, row])
            assert index == at + min(channel, full * repeat - 1)
            middle = (at + (channel + 0.5) * full / units) / span.full
            assert float(along.place[0, row]) == pytest.approx(middle, abs=1e-5)
            assert float(along.pairs[0, row, 0]) == pytest.approx(middle, abs=1e-5)
            row += 1
        at += full * repeat
    assert row == span.count and at == span.full


def test_vectors_are_in_the_order_of_the_supplement() -> None:
    space = lenet().space
    site = sites(space, space.architecture(0.5))["conv2.weight"]
    v = coordinates(site, 64).vectors()
    # [l/L, c_in/C_in, c_out/C_out, L/N, C_in/N, C_out/N]
    assert v[0, 5, 3].tolist() == pytest.approx([0.5, 3.5 / 16, 5.5 / 32, 1 / 64, 16 / 64, 32 / 64])


def test_noise_free_axes_are_copied_to_a_device_once_and_noisy_ones_each_time() -> None:
    """A step of training asks for a hundred of them, and each copy waits for the device."""
    space = lenet("grid").space
    site = sites(space, space.architecture(0.5))["conv2.weight"]
    device = torch.device("meta")
    for noise, once in ((0.0, True), (0.5, False)):
        drawn = torch.Generator().manual_seed(0)
        at = coordinates(site, 64, noise=noise, generator=drawn)
        first, second = at.to(device), at.to(device)
        assert first.layer.device == first.outputs.index.device == device
        assert (first.outputs is second.outputs) == (first.inputs is second.inputs) == once
    assert at.to(torch.device("cpu")) is at
