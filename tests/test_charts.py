"""Manifolds that were trained apart, put together: each size is drawn from one of them, whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from torch import Tensor

from neumeta import checkpoint
from neumeta.coordinates import coordinates
from neumeta.graph import extent
from neumeta.manifold import Contract, Manifold, roles
from neumeta.representation import Anchored, Corrected, Sizes, build
from neumeta.sample import sample
from neumeta.sites import sites
from neumeta.space import Architecture, Space
from neumeta.statistics import Statistics
from tests.conftest import lenet
from tests.support.modules import traced
from tests.support.sealed import opened, seal
from training import charts


def manifold(seed: int, reach: float = 0.1) -> Manifold:
    """A manifold of random numbers that eight bits and a unit for each row hold exactly."""
    made = lenet("grid", seed, anchored={"reach": reach}, corrected={})
    for parameter in made.representation.parameters():
        numbers = (parameter.data.float() * 64).round().clamp(-127, 127)
        numbers[..., -1, -1] = 127
        parameter.data.copy_(numbers / 128)
    return replace(made, noise=0.0, samples=1)


def drawn(part: Manifold, both: Manifold, size: Architecture) -> list[tuple[str, Tensor, Tensor]]:
    """Every tensor of one size, by name: the part's and the joined manifold's."""
    expected, found = dict(sample(part, size)), dict(sample(both, size))
    assert expected.keys() == found.keys()
    return [(name, value, found[name]) for name, value in expected.items()]


LARGE, SMALL = manifold(1), manifold(2)
SPACE = LARGE.space
HALVES = [Sizes(0.5), Sizes(0.25)]
WIDTHS = st.lists(st.floats(0.25, 1.0), min_size=len(SPACE.groups), max_size=len(SPACE.groups))


@given(WIDTHS)
@settings(max_examples=25, deadline=None)
def test_a_size_is_drawn_whole_from_the_first_chart_that_its_narrowest_group_reaches(
    width: list[float],
) -> None:
    size = SPACE.architecture(width)
    channels = zip(size.channels, SPACE.full.channels, strict=True)
    part = LARGE if all(2 * mine + 1 >= full for mine, full in channels) else SMALL
    both = charts.joined([LARGE, SMALL], HALVES, SPACE)
    assert all(torch.equal(found, value) for _, value, found in drawn(part, both, size))


def test_the_mean_of_cycles_is_that_of_every_number_and_leaves_them_as_they_were() -> None:
    cycles = [manifold(seed) for seed in (3, 4, 5)]
    before = [deepcopy(each.representation.state_dict()) for each in cycles]
    made = charts.mean(cycles)
    for name, value in made.representation.state_dict().items():
        expected = sum(state[name].double() for state in before) / 3
        torch.testing.assert_close(value, expected.to(value.dtype), atol=0, rtol=2**-10)
        assert value.dtype == before[0][name].dtype
    other = replace(cycles[0], samples=2)
    with pytest.raises(ValueError, match="its samples is 2, that of the first 1"):
        charts.mean([*cycles, other])
    strange = {name: value + 1 for name, value in cycles[0].frozen.items()} or {"x": torch.ones(1)}
    with pytest.raises(ValueError, match="do not morph"):
        charts.mean([cycles[0], replace(cycles[1], frozen=strange)])
    for each, state in zip(cycles, before, strict=True):
        now = each.representation.state_dict()
        assert all(torch.equal(now[name], value) for name, value in state.items())
    assert charts.mean(cycles[:1]) is cycles[0]


def test_there_is_no_mean_of_unlike_manifolds_nor_of_charts() -> None:
    other = manifold(1)
    for module in other.representation.modules():
        if isinstance(module, Anchored):
            for value in module.source.state_dict().values():
                value.add_(1)
    with pytest.raises(ValueError, match="different sources"):
        charts.mean([LARGE, other])
    with pytest.raises(ValueError, match=r"no mean.*0\.1.*0\.2"):
        charts.mean([LARGE, manifold(1, reach=0.2)])
    both = charts.joined([LARGE, SMALL], HALVES, SPACE)
    with pytest.raises(ValueError, match="eight bits"):
        charts.mean([both, both])


def test_a_chart_and_what_went_on_from_it_have_a_mean() -> None:
    torch.manual_seed(0)
    large = manifold(0)
    for module in large.representation.modules():
        if isinstance(module, Anchored):
            for value in module.source.state_dict().values():
                value.uniform_(-1, 1)  # sixteen bits do not hold what eight and a unit do
    chart = charts.taken(charts.joined([large, SMALL], HALVES, SPACE), 0)
    further = replace(chart, representation=deepcopy(chart.representation))
    with torch.no_grad():
        for parameter in further.representation.parameters():
            if parameter.requires_grad:
                parameter += 1
    for module in further.representation.modules():
        if isinstance(module, Anchored):  # as training and files hold it
            module.source.half()
    found = charts.mean([chart, further]).representation.state_dict()
    now = further.representation.state_dict()
    for name, value in chart.representation.state_dict().items():
        expected = torch.lerp(value.double(), now[name].double(), 0.5)
        # The source is rounded to sixteen bits: by 2^-11 of each number.
        torch.testing.assert_close(found[name].double(), expected, atol=1e-6, rtol=2**-10)


def test_what_is_narrower_than_every_chart_is_drawn_from_the_last() -> None:
    both = charts.joined([LARGE, SMALL], HALVES, SPACE)
    size = SPACE.architecture(0.1, extrapolate=True)
    assert all(torch.equal(found, value) for _, value, found in drawn(SMALL, both, size))


def test_a_size_with_a_shallow_stage_is_drawn_from_the_chart_that_is_for_it() -> None:
    space = Space("deep", traced("resnet")[1], (0.25, 1.0), (1, 4))
    parts = [
        replace(lenet("grid"), space=space, representation=build("grid", {}, roles(space)))
        for _ in range(3)
    ]
    for value, part in enumerate(parts):
        for parameter in part.representation.parameters():
            parameter.data.fill_(value)
    both = charts.joined(parts, [Sizes(0.5, 3), Sizes(0.25, 2), Sizes(0.25)], space)
    expected = {0: [(0.7, 3), (0.7, 4)], 1: [(0.7, 2), (0.3, 3), (0.3, 2)], 2: [(0.7, 1), (0.3, 1)]}
    for width, depth, value in (
        (*size, chart) for chart, sizes in expected.items() for size in sizes
    ):
        depths = [3] * (len(space.depth) - 1) + [depth]
        for site in sites(space, space.architecture(width, depths)).values():
            made = both.representation(site, coordinates(site, 64))
            assert bool((made == value).all())


@given(WIDTHS)
@example([0.5] * len(SPACE.groups))
@example([0.25] * len(SPACE.groups))
@settings(max_examples=15, deadline=None)
def test_a_chart_of_narrow_sizes_has_all_that_their_widest_needs_and_no_more(
    width: list[float],
) -> None:
    size = SPACE.architecture(width)
    channels = zip(size.channels, SPACE.full.channels, strict=True)
    part = SMALL if all(2 * mine - 1 <= full for mine, full in channels) else LARGE
    both = charts.joined([SMALL, LARGE], [Sizes(0.25, most=(0.5,)), Sizes(0.25)], SPACE)
    gains = {name: site.gain for name, site in sites(SPACE, size).items()}
    for name, value, found in drawn(part, both, size):
        # What is cut off may have held a row's largest number: then it has another unit.
        off = gains.get(name, 0.0) / 127 / 2
        assert torch.allclose(found, value, atol=off, rtol=1e-6)
    for module in both.representation.parts[0].modules():
        for site in roles(SPACE).values():
            held = getattr(module, "grid", {}).get(site.role.replace(".", "/"))
            if held is not None:
                for span, count in zip((site.rows, site.columns), held.shape[1:3], strict=True):
                    assert count == (math.floor(span.full / 2 + 0.5) if span.morphs else span.full)


@pytest.mark.parametrize("width", [0.66, 0.3, 0.4])
def test_a_size_asked_for_at_a_border_is_one_of_the_charts(width: float) -> None:
    size, full = SPACE.architecture(width), SPACE.full
    asked = [mine / own for mine, own in zip(size.channels, full.channels, strict=True)]
    assert min(asked) < width or max(asked) > width  # rounded
    narrowest, widest = SPACE.ends(size)
    assert max(widest) <= width <= narrowest
    for site in sites(SPACE, size).values():
        assert Sizes(width).holds(site) and Sizes(0.1, most=(width,)).holds(site)
    wider = replace(size, channels=tuple(n + 2 for n in size.channels))
    narrower = replace(size, channels=tuple(n - 2 for n in size.channels))
    assert not any(Sizes(0.1, most=(width,)).holds(site) for site in sites(SPACE, wider).values())
    assert not any(Sizes(width).holds(site) for site in sites(SPACE, narrower).values())


@pytest.mark.parametrize("steps", [127, 55])
def test_numbers_of_a_chart_are_at_most_half_a_unit_of_their_row_off(steps: int) -> None:
    torch.manual_seed(0)
    made = build("grid", {"nodes": 3, "stepped": True}, roles(SPACE))
    for parameter in made.parameters():
        parameter.data.normal_()
    whole = {key: value.clone() for key, value in made.grid.items()}
    made.compact(steps)
    for key, value in whole.items():
        held, matrix = made.grid[key], value.shape[2:].numel() > 1
        assert held.dtype == (torch.int8 if matrix else torch.float16)
        largest = value.abs().amax((2, 3), keepdim=True)
        most = largest / steps / 2 if matrix else value.abs() / 2048
        back = held * made.unit[key] if matrix else held.float()
        assert bool(((back - value).abs() <= most * 1.001).all())
    size = SPACE.architecture(0.5)
    for site in sites(SPACE, size).values():
        key = site.role.replace(".", "/")
        expected = (made.grid[key] * made.unit[key]) if key in made.unit else made.grid[key].float()
        found = made(site, coordinates(site, 64))
        rows, columns = site.rows.count, site.columns.count
        if site.rows.leading and site.columns.leading:
            assert torch.equal(found[0], expected[0, :rows, :columns])


def test_a_chart_of_few_steps_keeps_the_source_in_all_of_them() -> None:
    parts = [manifold(1), manifold(2)]
    for part in parts:
        for parameter in part.representation.parameters():
            parameter.data.normal_()
    both = charts.joined(parts, HALVES, SPACE, [55, 127])
    first, second = both.representation.parts
    for grid, most in ((first.inner.inner, 55), (first.inner.source, 127), (second.inner, 127)):
        held = [value for value in grid.grid.values() if value.dtype == torch.int8]
        assert held and {int(value.abs().max()) for value in held} == {most}
    # What is taken out and put back has the same numbers.
    taken = [charts.taken(both, index) for index in (0, 1)]
    again = charts.joined(taken, HALVES, SPACE, [55, 127]).representation.state_dict()
    for name, value in both.representation.state_dict().items():
        assert torch.equal(again[name], value), name


def test_corrections_of_a_chart_are_those_rounded_to_sixteen_bits() -> None:
    torch.manual_seed(0)
    rounded, made = (build("grid", {"corrected": {"depths": True}}, roles(SPACE)) for _ in range(2))
    for parameter in made.parameters():
        parameter.data.normal_(std=0.05)
    rounded.load_state_dict(made.state_dict())
    assert isinstance(rounded, Corrected) and isinstance(made, Corrected)
    for held in (rounded.rows, rounded.columns):
        for value in held.values():
            value.data.copy_(value.data.half())
    both = charts.joined([LARGE, SMALL], HALVES, SPACE)
    corrections = [each for each in both.representation.modules() if isinstance(each, Corrected)]
    assert len(corrections) == 2
    for each in corrections:
        numbers = [*each.rows.values(), *each.columns.values()]
        assert numbers and all(value.dtype == torch.float16 for value in numbers)
    made.compact()
    for held in (made.rows, made.columns):
        assert all(value.dtype == torch.float16 for value in held.values())
    for site in sites(SPACE, SPACE.architecture(0.5)).values():
        at = coordinates(site, 64)
        assert torch.equal(made(site, at), rounded(site, at))


def deep(value: float, blocks: tuple[int, int] = (1, 4)) -> Manifold:
    """A manifold of a network whose depth morphs, all of whose numbers are one."""
    space = Space("deep", traced("resnet")[1], (0.25, 1.0), blocks)
    model = build("grid", {"corrected": {}}, roles(space))
    for name, parameter in model.named_parameters():
        parameter.data.fill_(value if "grid" in name else 0.0)
    made = replace(lenet("grid"), space=space, representation=model, noise=0.0)
    return replace(made, kind="grid", options={"corrected": {}})


def test_a_chart_of_shallow_sizes_has_the_blocks_that_their_deepest_has_and_no_more() -> None:
    parts, sizes = [deep(1.0), deep(2.0)], [Sizes(0.25, 1, most_blocks=(1,)), Sizes(0.25)]
    space = parts[0].space
    both = charts.joined(parts, sizes, space)
    for width, depth in ((1.0, 1), (0.4, 1), (1.0, 2), (0.4, 3)):
        for last in (1, depth):
            depths = [depth] * (len(space.depth) - 1) + [last]
            for site in sites(space, space.architecture(width, depths)).values():
                made = both.representation(site, coordinates(site, 64))
                value = 1.0 if depth == 1 else 2.0
                torch.testing.assert_close(made, torch.full_like(made, value), atol=0, rtol=1e-6)
    wanted = {
        site.role for site in sites(space, space.architecture(1.0, [1] * len(space.depth))).values()
    }
    grid = both.representation.parts[0].inner.grid
    assert {role.replace("/", ".") for role in grid} == wanted
    assert wanted < roles(space).keys()


def test_a_chart_may_be_bounded_in_each_stage_by_itself() -> None:
    parts = [deep(1.0), deep(2.0)]
    space = parts[0].space
    others = len(space.depth) - 1
    both = charts.joined(
        parts, [Sizes(0.25, 1, most_blocks=(*[3] * others, 1)), Sizes(0.25)], space
    )
    for first, last in ((1, 1), (3, 1), (4, 1), (1, 2), (3, 2)):
        for site in sites(space, space.architecture(0.5, [first] * others + [last])).values():
            made = both.representation(site, coordinates(site, 64))
            value = 1.0 if first <= 3 and last == 1 else 2.0
            torch.testing.assert_close(made, torch.full_like(made, value), atol=0, rtol=1e-6)
    # It has the blocks of the source's other stages, and one of the last.
    shape = space.architecture(1.0, [*space.depth[:others], 1])
    grid = both.representation.parts[0].inner.grid
    wanted = {site.role for site in sites(space, shape).values()}
    assert {role.replace("/", ".") for role in grid} == wanted < roles(space).keys()


def test_a_chart_may_be_bounded_in_each_group_by_itself() -> None:
    parts = [deep(1.0), deep(2.0)]
    space = parts[0].space
    others = len(space.groups) - 1
    bounds = Sizes(0.25, 1, most=(*[1.0] * others, 0.5))
    both = charts.joined(parts, [bounds, Sizes(0.25)], space)
    for first, last, value in ((1.0, 0.5, 1.0), (0.3, 0.3, 1.0), (0.5, 0.6, 2.0), (1.0, 1.0, 2.0)):
        for site in sites(space, space.architecture([first] * others + [last])).values():
            made = both.representation(site, coordinates(site, 64))
            torch.testing.assert_close(made, torch.full_like(made, value), atol=0, rtol=1e-6)
    # It has all channels of the other groups, and half of the last one's.
    size = space.architecture([1.0] * others + [0.5])
    grid = both.representation.parts[0].inner.grid
    for site in sites(space, size).values():
        held = grid[site.role.replace(".", "/")]
        assert held.shape[1:3] == (site.rows.count, site.columns.count), site.name


def test_a_chart_of_a_group_that_is_narrow_comes_back_from_a_file_and_can_be_taken_out(
    tmp_path: Path,
) -> None:
    others = len(deep(1.0).space.groups) - 1
    most = (*[1.0] * others, 0.5)
    both, path = bounded(most=most), tmp_path / "both.safetensors"
    checkpoint.write(both, path)
    again = checkpoint.read(path)
    assert again.options == both.options
    assert again.representation.sizes[0] == Sizes(0.25, 1, most=most, most_blocks=(1,))
    taken = charts.taken(again, 0)
    size = both.space.architecture([1.0] * others + [0.5], [1] * len(both.space.depth))
    for name, value in sample(both, size):
        assert torch.equal(dict(sample(taken, size))[name], value)


def test_bounds_of_another_number_of_groups_are_refused() -> None:
    part = deep(1.0)
    many = (0.5,) * (len(part.space.groups) + 1)
    with pytest.raises(ValueError, match=r"charts\[0\].most: . numbers; .* each of . groups"):
        charts.joined([part, part], [Sizes(0.25, 1, most=many), Sizes(0.25)], part.space)


def test_a_chart_of_one_narrow_group_does_not_take_the_sizes_of_another() -> None:
    first, last = Sizes(0.25, most=(0.5, 1.0)), Sizes(0.25, most=(1.0, 0.5))
    both = Sizes(0.25, most=(0.5,))
    assert first.covers(both) and last.covers(both) and Sizes(0.25).covers(first)
    assert not any([first.covers(last), last.covers(first), both.covers(first)])


def test_bounds_of_another_number_of_stages_are_refused() -> None:
    part = deep(1.0)
    many = (1,) * (len(part.space.depth) + 1)
    with pytest.raises(
        ValueError, match=r"charts\[0\].most_blocks: . numbers; .* each of . stages"
    ):
        charts.joined([part, part], [Sizes(0.25, 1, most_blocks=many), Sizes(0.25)], part.space)


@pytest.mark.parametrize(
    ("earlier", "later", "covered"),
    [
        ((2, 3), (2, 3), True),
        ((2, 3), (2, 2), True),
        ((2, 3), (3, 2), False),
        ((2, 3), (2,), True),
        ((2, 3), (3,), False),
        ((2,), (2, 1), True),
        ((2,), (2, 3), False),
        ((math.inf,), (9, 9), True),
        ((9, 9), (math.inf,), False),
    ],
)
def test_a_chart_takes_all_sizes_of_another_if_no_stage_of_that_is_deeper(
    earlier: tuple[float, ...], later: tuple[float, ...], covered: bool
) -> None:
    mine, theirs = (Sizes(0.25, 1, most_blocks=each) for each in (earlier, later))
    assert mine.covers(theirs) == covered


@pytest.mark.parametrize("index", [0, 1])
def test_a_chart_that_is_taken_out_makes_the_weights_it_made_within(index: int) -> None:
    bounds = [Sizes(0.25, most=(0.5,)), Sizes(0.25)]
    both = charts.joined([SMALL, LARGE], bounds, SPACE)
    before = {name: value.clone() for name, value in both.representation.state_dict().items()}
    taken = charts.taken(both, index)
    assert taken.kind == "grid" and taken.options == both.options["charts"][index]["options"]
    size = SPACE.architecture(0.4 if index == 0 else 0.8)
    assert all(torch.equal(found, value) for _, value, found in drawn(taken, both, size))
    parameters = dict(taken.representation.named_parameters())
    trained = {name: value for name, value in parameters.items() if ".source." not in name}
    assert all(value.requires_grad and value.dtype == torch.float32 for value in trained.values())
    # It can be put back: no number is rounded twice.
    parts = [taken, LARGE] if index == 0 else [SMALL, taken]
    again = charts.joined(parts, bounds, SPACE).representation.state_dict()
    cut = "parts.0.inner.source"  # and now it has all of the other's
    assert all(torch.equal(again[name], value) for name, value in before.items() if cut not in name)


@pytest.mark.parametrize(
    ("bounds", "index"), [(HALVES, 1), ([Sizes(0.25, most=(0.5,)), Sizes(0.25)], 0)]
)
@pytest.mark.parametrize("options", [{}, {"corrected": {}}, {"corrected": {}, "expanded": {}}])
def test_a_chart_that_is_taken_out_keeps_the_source_that_others_keep(
    bounds: list[Sizes], index: int, options: dict[str, Any]
) -> None:
    parts = [
        LARGE,
        replace(lenet("grid", 2, anchored={"reach": 0.1}, **options), noise=0.0, samples=1),
    ]
    both = charts.joined(parts[:: 1 if index else -1], bounds, SPACE)
    taken = charts.taken(both, index)
    assert "anchored" in taken.options
    expected, kept = dict(sample(both, SPACE.full)), dict(sample(taken, SPACE.full))
    assert all(torch.equal(kept[name], value) for name, value in expected.items())
    # And is one that a file holds.
    assert build("grid", taken.options, roles(SPACE)).load_state_dict(
        taken.representation.state_dict()
    )


def test_only_a_chart_that_is_there_is_taken_out() -> None:
    with pytest.raises(ValueError, match="of kind grid, which has no charts"):
        charts.taken(SMALL, 0)
    with pytest.raises(ValueError, match="its charts are 0 to 1"):
        charts.taken(charts.joined([LARGE, SMALL], HALVES, SPACE), 2)


def test_a_file_of_charts_names_a_tensor_for_every_chart_and_dtype_alone() -> None:
    both = charts.joined([LARGE, SMALL], HALVES, SPACE)
    tensors = load(checkpoint.encode(both))
    held = {name.removeprefix("inr.") for name in tensors if name.startswith("inr.")}
    kinds = ("float16", "float32", "int8")
    assert held == {f"parts.{part}.{kind}" for part in (0, 1) for kind in kinds}


def bounded(most_blocks: tuple[float, ...] = (1,), most: tuple[float, ...] = (0.5,)) -> Manifold:
    """Two charts, one of them for one block and narrow sizes alone."""
    parts = [deep(1.0), deep(2.0)]
    sizes = [Sizes(0.25, 1, most, most_blocks), Sizes(0.25)]
    channels, *side = (extent(dim, {}) for dim in parts[0].space.graph.input[1:])
    images = torch.zeros(2, channels, *side, dtype=torch.uint8)
    contract = Contract((0.5,) * channels, (0.5,) * channels)
    made = charts.joined(parts, sizes, parts[0].space)
    return replace(made, statistics=Statistics(images), contract=contract)


@pytest.mark.parametrize("most_blocks", [(1,), (1,) * len(deep(1.0).space.depth)])
def test_a_bounded_chart_comes_back_from_a_file_and_can_be_taken_out(
    tmp_path: Path, most_blocks: tuple[float, ...]
) -> None:
    both, path = bounded(most_blocks), tmp_path / "both.safetensors"
    checkpoint.write(both, path)
    again = checkpoint.read(path)
    assert again.options == both.options
    assert again.representation.sizes[0] == Sizes(0.25, 1, most=(0.5,), most_blocks=most_blocks)
    ones = [1] * len(both.space.depth)
    taken = charts.taken(again, 0)
    for depth, width, value in ((ones, 0.5, 1.0), (ones, 0.6, 2.0), (None, 0.5, 2.0)):
        for site in sites(both.space, both.space.architecture(width, depth)).values():
            at = coordinates(site, 64)
            wanted = torch.full((1, site.rows.count, site.columns.count, 1), value)
            assert torch.allclose(again.representation(site, at), wanted, rtol=1e-6)
            if value == 1.0:
                assert torch.equal(taken.representation(site, at), again.representation(site, at))
    # What was cut off is there again, with nothing in it.
    state = taken.representation.state_dict()
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in deep(1.0).representation.state_dict().items()
    }
    left = {site.role.replace(".", "/") for site in roles(both.space).values() if site.occurs > 1}
    assert left and not any(state[f"inner.grid.{key}"].any() for key in left)


def test_charts_that_were_written_before_they_were_bundled_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, path = bounded(), tmp_path / "both.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "bundled", dict)
        checkpoint.write(both, path)
    assert len(load(path.read_bytes())) > 20
    state = checkpoint.read(path).representation.state_dict()
    assert all(torch.equal(state[n], v) for n, v in both.representation.state_dict().items())


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda held: held.pop("inr.parts.1.int8"), "parts.1.int8 is missing"),
        (
            lambda held: held.update({"inr.parts.2.int8": held["inr.parts.1.int8"] + 0}),
            "is not wanted",
        ),
        (lambda held: held.update({"inr.x": held["inr.parts.1.int8"] + 0}), "x is not wanted"),
        (
            lambda held: held.update({"inr.parts.0.int8": held["inr.parts.0.int8"][1:]}),
            "not torch.int8",
        ),
        (
            lambda held: held.update({"inr.parts.0.int8": held["inr.parts.0.int8"].float()}),
            "float32",
        ),
        (lambda held: held.update({"inr.parts.0.int8": held["inr.parts.0.int8"][None]}), "(1, "),
    ],
)
def test_numbers_that_are_not_those_of_the_charts_are_refused(
    tmp_path: Path, damage: Callable[[dict[str, Tensor]], Any], told: str
) -> None:
    path = tmp_path / "both.safetensors"
    checkpoint.write(bounded(), path)
    header, tensors = opened(path)
    damage(tensors)
    seal(path, header, tensors)
    with pytest.raises(checkpoint.BadCheckpoint, match="does not fit deep") as refused:
        checkpoint.read(path)
    assert told in str(refused.value)


def test_charts_come_back_from_a_file_with_the_same_bytes(tmp_path: Path) -> None:
    both = charts.joined([LARGE, SMALL], HALVES, SPACE)
    path = tmp_path / "both.safetensors"
    digest = checkpoint.write(both, path)
    again = checkpoint.read(path)
    assert checkpoint.write(again, tmp_path / "again.safetensors") == digest
    for width in (1.0, 0.5, 0.3):
        size = SPACE.architecture(width)
        assert all(torch.equal(new, old) for _, old, new in drawn(both, again, size))


def test_matrices_of_the_source_are_held_in_eight_bits_too() -> None:
    part = manifold(1)
    assert isinstance(part.representation.inner, Anchored)
    for parameter in part.representation.inner.source.parameters():
        parameter.data.normal_()
    both = charts.joined([part, SMALL], HALVES, SPACE)
    source = both.representation.parts[0].inner.source
    assert {value.dtype for value in source.grid.values()} == {torch.int8, torch.float16}
    for name, exact, found in drawn(part, both, SPACE.full):
        if exact.ndim == 1:
            assert torch.equal(found, exact), name
            continue
        # Half a unit, of which a row's largest number is 127.
        most = exact.flatten(1).abs().amax(1) / 127 / 2
        assert bool(((found - exact).flatten(1).abs().amax(1) <= most * 1.001).all()), name


def test_the_source_is_kept_by_the_charts_that_come_near_it() -> None:
    held = charts.joined([LARGE, SMALL], HALVES, SPACE).representation.parts
    assert isinstance(held[0].inner, Anchored) and isinstance(held[1], Corrected)
    assert not isinstance(held[1].inner, Anchored)
    # Sizes of the second chart are half of the source's away or more.
    held = charts.joined([LARGE, manifold(2, reach=0.6)], HALVES, SPACE).representation.parts
    assert isinstance(held[1].inner, Anchored)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (replace(SMALL, space=lenet("grid").space, noise=0.25), "its noise is 0.25"),
        (replace(SMALL, frozen={"bias": torch.ones(2)}), "do not morph"),
    ],
)
def test_manifolds_that_do_not_share_what_they_must_are_refused(other: Manifold, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        charts.joined([LARGE, other], HALVES, SPACE)


@pytest.mark.parametrize("own", [Sizes(0.25, most=(0.5,)), Sizes(0.25, most_blocks=(1,))])
def test_a_grid_with_noise_is_not_cut_to_narrow_or_shallow_sizes(own: Sizes) -> None:
    noisy = [replace(each, noise=0.25) for each in (SMALL, LARGE)]
    with pytest.raises(ValueError, match="without noise"):
        charts.joined(noisy, [own, Sizes(0.25)], SPACE)


PART: dict[str, Any] = {"kind": "grid", "options": {}, "blocks": 0}


@pytest.mark.parametrize(
    "held",
    [
        [],
        [PART | {"least": 0.25}, PART | {"least": 0.5}],
        [PART | {"least": 0.5}, PART | {"least": 0.5}],
        [PART | {"least": 0.5}, PART | {"least": 0.5, "blocks": 1}],
        [PART | {"least": 0.25}, PART | {"least": 0.25, "most": 0.5}],
        [PART | {"least": 0.25, "most": 0.5}],
        [PART | {"least": 0.25, "most_blocks": 2}],
        [PART | {"least": 0.25, "most_blocks": 1, "blocks": 2}, PART | {"least": 0.25}],
        [PART | {"least": 0.25, "most_blocks": float("nan")}, PART | {"least": 0.25}],
        [PART | {"least": 0.25}, PART | {"least": 0.25, "most_blocks": 2}],
        [PART | {"least": 0.25, "most_blocks": []}, PART | {"least": 0.25}],
        [PART | {"least": 0.25, "most_blocks": [float("nan")]}, PART | {"least": 0.25}],
        [PART | {"least": 0.25, "most_blocks": ["1"]}, PART | {"least": 0.25}],
        [PART | {"least": 0.25, "most_blocks": "1"}, PART | {"least": 0.25}],
        [PART | {"least": 0.25, "most_blocks": [True]}, PART | {"least": 0.25}],
        [PART | {"least": 0.25, "most_blocks": [1, 1]}, PART | {"least": 0.25}],
        [PART | {"least": 0.6, "most": 0.5}, PART | {"least": 0.5}],
        [PART | {"least": -1.0}],
        [PART | {"least": 0.25, "most": float("nan")}, PART | {"least": 0.25}],
        [PART | {"least": 0.25, "most": 0.5, "kind": "integral"}, PART | {"least": 0.25}],
        [{"kind": "charts", "options": {"charts": [PART | {"least": 0.5}]}, "least": 0.5}],
        [PART | {"least": 0.9 - k / 100} for k in range(17)],
    ],
)
def test_charts_that_are_none_are_refused_before_anything_is_made(held: list[Any]) -> None:
    with pytest.raises(ValueError, match="charts"):
        build("charts", {"charts": held}, roles(SPACE))
