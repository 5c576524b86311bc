"""What the engine decides before any weight is: canonical URLs, keys, budgets, expected score."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from starlette.datastructures import QueryParams

from neumeta import checkpoint
from neumeta.graph import extent
from neumeta.manifold import Contract, Manifold, roles
from neumeta.representation import build
from neumeta.sites import kept
from neumeta.space import Architecture, Space
from neumeta.statistics import Statistics
from service import device
from service.engine import Engine, Job, growing
from service.problem import Problem
from service.request import WeightsRequest, from_query
from tests.conftest import lenet
from training import networks
from training.trace import trace


@cache
def space(name: str) -> Space:
    """A small space of every kind: whole network, last block, depth, both. Batch norm is folded."""
    traced = {
        "resnet20": (networks.resnet_cifar((3, 3, 3), shortcut="conv"), (3, 32, 32)),
        "resnet32": (networks.resnet_cifar((5, 5, 5), shortcut="conv"), (3, 32, 32)),
        "resnet-mnist": (networks.resnet_mnist((2, 2)), (1, 28, 28)),
        "resnet44": (networks.resnet_cifar((7, 7, 7), shortcut="conv"), (3, 32, 32)),
    }[name]
    module, image = traced
    graph = trace(module, torch.zeros(1, *image))[0].folded
    if name == "resnet20":  # widths no group divides by: the channels of 0.28 are 0.25 of layer1
        return Space(name, graph.morphing(["*"], depth=False), (0.28, 0.97))
    if name == "resnet32":
        return Space(name, graph.morphing(["layer3.4.conv1"], depth=False), (0.5, 1.0))
    if name == "resnet-mnist":
        return Space(name, graph.morphing([]), (1.0, 1.0), (1, 3))
    named = {f"resnet{6 * n + 2}": (n, n, n) for n in (5, 7, 9)}
    return Space(name, graph, (0.5, 1.0), (5, 9), named=named)


def row(
    space: Space, channels: list[int], depth: list[int], score: float, beyond: bool = False
) -> dict[str, Any]:
    """A row of an evaluation table."""
    cost = space.cost(Architecture(tuple(depth), tuple(channels)))
    told = {"channels": channels, "depth": depth, "score": score, "extrapolated": beyond}
    return {**told, **cost}


def grid(space: Space, about: dict[str, Any] | None = None, **contract: Any) -> Manifold:
    """A manifold of random weights over a space; its frozen tensors are random too."""
    torch.manual_seed(0)
    channels = extent(space.graph.input[1], {})
    held = {
        name: torch.randn(space.graph.shape(name, space.graph.full)) for name in kept(space.graph)
    }
    return Manifold(
        space,
        build("grid", {}, roles(space)),
        "grid",
        {},
        0.0,
        1,
        64,
        Contract((0.5,) * channels, (0.25,) * channels, tuple("0123456789"), **contract),
        held,
        about=about or {},
    )


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("models")
    rows = [
        row(space("resnet20"), [16, 32, 64], [], 92.0),
        row(space("resnet20"), [8, 16, 32], [], 88.0),
        {"score": "of another kind"},
        {"channels": [1, 2], "depth": [], "score": 99.0, "parameters": 9},
        {"channels": [8, 16, 32], "depth": [10**9] * 3, "score": 99.0, "parameters": 9},
    ]
    files = []
    for number, manifold in enumerate(
        [
            lenet(),
            grid(space("resnet20"), {"evaluation": rows}),
            *(grid(space(name)) for name in ("resnet32", "resnet-mnist", "resnet44")),
        ]
    ):
        files.append(folder / f"{number}.safetensors")
        checkpoint.write(manifold, files[-1])
    return Engine(files, device="cpu")


def job(engine: Engine, **asked: Any) -> Job:
    return engine.job(WeightsRequest(**asked))


def again(engine: Engine, location: str) -> Job:
    """The job of a Content-Location."""
    split = urlsplit(location)
    return engine.job(from_query(split.path.rpartition("/")[2], QueryParams(split.query)))


ARCHS = {"lenet": 3, "resnet20": 3, "resnet32": 1, "resnet44": 3}


@hypothesis_settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_canonical_url_is_the_same_file(engine: Engine, data: st.DataObject) -> None:
    arch = data.draw(st.sampled_from(list(ARCHS)))
    low, high = engine.manifolds[arch].space.width
    extrapolate = data.draw(st.booleans())
    factor = st.floats(1e-3, 2.0) if extrapolate else st.floats(low, high)
    width = data.draw(factor | st.lists(factor, min_size=ARCHS[arch], max_size=ARCHS[arch]))
    first = job(engine, arch=arch, width=width, extrapolate=extrapolate)
    second = again(engine, first.location)
    assert second.key == first.key
    assert second.location == first.location
    assert second.architecture == first.architecture


def test_a_depth_has_a_canonical_url_without_a_width(engine: Engine) -> None:
    first = job(engine, arch="resnet-mnist", depth=[1, 3])
    assert "width" not in first.location and "depth=1,3" in first.location
    assert again(engine, first.location).key == first.key
    deeper = job(engine, arch="resnet-mnist", depth=[9, 3], extrapolate=True)
    assert deeper.architecture.extrapolated and again(engine, deeper.location).key == deeper.key


def test_a_named_depth_is_a_network_of_the_manifold_that_covers_it(engine: Engine) -> None:
    deep = job(engine, arch="resnet56", width=0.75)
    assert deep.key == job(engine, arch="resnet44", width=0.75, depth=[9, 9, 9]).key
    assert deep.architecture.depth == (9, 9, 9) and not deep.architecture.extrapolated
    assert again(engine, deep.location).key == deep.key
    # A file of that name comes first, whatever else could make it.
    assert job(engine, arch="resnet32").manifold.space.name == "resnet32"
    with pytest.raises(Problem, match="depth"):
        job(engine, arch="resnet56", depth=[9, 9, 9])
    with pytest.raises(Problem, match="resnet57"):
        job(engine, arch="resnet57")


def test_extrapolated_is_a_property_of_the_architecture(engine: Engine) -> None:
    """0.24 of 16, 32 and 64 channels is 4, 8 and 15: no trained width gives it."""
    assert job(engine, arch="resnet20", width=0.24, extrapolate=True).architecture.extrapolated
    # 31.6 of 64 channels round to 32, which is trained.
    assert not job(
        engine, arch="resnet32", width=0.4949, extrapolate=True
    ).architecture.extrapolated


@pytest.mark.parametrize(
    "changed",
    [{"dtype": "float16"}, {"seed": 1}, {"samples": 2}, {"width": 0.75}],
    ids=lambda changed: next(iter(changed)),
)
def test_the_etag_follows_what_the_bytes_follow(engine: Engine, changed: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"arch": "lenet", "width": 0.5}
    assert job(engine, **asked).key == job(engine, **asked).key
    assert job(engine, **asked).key != job(engine, **{**asked, **changed}).key


def test_the_etag_follows_the_checkpoint_and_the_engine(tmp_path: Path) -> None:
    keys = set()
    for seed, threads in ((0, 1), (1, 1), (0, 2)):
        path = tmp_path / f"{seed}.safetensors"
        checkpoint.write(lenet(seed=seed), path)
        keys.add(job(Engine([path], device="cpu", threads=threads), arch="lenet").key)
    assert len(keys) == 3


def test_seed_and_samples_mean_nothing_without_noise(engine: Engine) -> None:
    assert job(engine, arch="resnet20", seed=5, samples=9).key == job(engine, arch="resnet20").key


@pytest.mark.parametrize("arch", ["lenet", "resnet20", "resnet32", "resnet44", "resnet-mnist"])
@pytest.mark.parametrize("bound", ["max_params", "max_bytes", "max_macs"])
def test_a_budget_gets_the_largest_that_fits(engine: Engine, arch: str, bound: str) -> None:
    here = engine.manifolds[arch].space
    column = {"max_params": "parameters", "max_bytes": "bytes", "max_macs": "macs"}[bound]
    sizes = growing(here, None, False)
    needs = []
    for index in range(0, sizes.count, max(1, sizes.count // 9)):
        architecture = sizes(index)
        width = here.factors(architecture) or None
        depth = list(architecture.depth) if here.blocks else None
        needs.append(engine.describe(job(engine, arch=arch, width=width, depth=depth))[column])
    assert needs == sorted(needs) and len(set(needs)) > 3
    for need, following in zip(needs, needs[1:], strict=False):
        exact = engine.describe(job(engine, arch=arch, budget={bound: need}))
        assert exact[column] == need
        between = engine.describe(job(engine, arch=arch, budget={bound: following - 1}))
        assert need <= between[column] < following
    with pytest.raises(Problem) as refused:
        job(engine, arch=arch, budget={bound: needs[0] - 1})
    assert refused.value.status == 422
    assert f"at least {needs[0]}" in refused.value.errors[0]["allowed"]


@pytest.mark.parametrize("higher", [True, False], ids=["higher is better", "lower is better"])
def test_a_budget_prefers_fewer_blocks_where_they_were_measured_to_be_better(
    tmp_path: Path, higher: bool
) -> None:
    source = networks.resnet_cifar((3, 3, 3), shortcut="conv")
    graph = trace(source, torch.zeros(1, 3, 32, 32))[0].folded
    both = Space("resnet20", graph, (0.25, 1.0), (1, 5))
    sign = 1 if higher else -1
    rows = [
        row(both, [16, 32, 64], [3, 3, 3], sign * 88.0),
        row(both, [4, 8, 16], [3, 3, 3], sign * 69.0),
        row(both, [16, 32, 64], [1, 1, 1], sign * 80.0),
        row(both, [16, 32, 64], [6, 6, 6], sign * 90.0, beyond=True),
    ]
    path = tmp_path / "both.safetensors"
    checkpoint.write(grid(both, {"evaluation": rows}, metric="loss", higher=higher), path)
    engine = Engine([path], device="cpu")
    shallow = both.cost(both.architecture(1.0, [1, 1, 1]))["parameters"]
    full = both.cost(both.full)["parameters"]

    def chosen(count: int, **more: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        asked = job(engine, arch="resnet20", budget={"max_params": count}, **more)
        return asked.architecture.depth, asked.architecture.channels

    assert chosen(shallow) == ((1, 1, 1), (16, 32, 64))
    assert chosen(shallow - 1)[0] == (3, 3, 3)
    assert chosen(shallow, depth=[3, 3, 3])[0] == (3, 3, 3)
    # Wide enough, three blocks are expected to be better again.
    assert chosen(full - 1)[0] == (3, 3, 3)
    assert chosen(10 * full) == ((3, 3, 3), (16, 32, 64))
    assert chosen(10 * full, extrapolate=True)[0] == (6, 6, 6)


def test_every_scalar_width_is_a_budget_candidate() -> None:
    steps = 20_000
    for each in (space("resnet20"), space("resnet32")):
        low, high = each.width
        found = {each.architecture(low + (high - low) * step / steps) for step in range(steps + 1)}
        sizes = growing(each, None, False)
        candidates = [sizes(index) for index in range(sizes.count)]
        assert found <= set(candidates)
        costs = [each.cost(candidate)["parameters"] for candidate in candidates]
        assert costs == sorted(costs)


def test_a_score_is_measured_or_between_measured_ones(engine: Engine) -> None:
    told = [
        engine.describe(job(engine, arch="resnet20", width=width))
        for width in (0.5, 0.6, 0.7, 0.97)
    ]
    assert (told[0]["score"], told[0]["score_measured"]) == (88.0, True)
    assert 88.0 < told[1]["score"] < told[2]["score"] < told[3]["score"] < 92.0
    assert not any(each["score_measured"] for each in told[1:])
    below = engine.describe(job(engine, arch="resnet20", width=0.3))
    assert below["score"] is None
    assert engine.describe(job(engine, arch="lenet"))["score"] is None


def test_one_name_is_served_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        checkpoint.write(lenet(), tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="'lenet' is served by an earlier file"):
        Engine(sorted(tmp_path.iterdir()), device="cpu")
    with pytest.raises(ValueError, match="device: 'tpu'"):
        Engine([], device="tpu")


@pytest.mark.parametrize(
    ("precision", "message"),
    [("float8", "'float8' is not"), ("tf32", "needs device 'cuda'"), ("bfloat16", "has none")],
)
def test_a_precision_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, precision: str, message: str
) -> None:
    monkeypatch.setattr(device, "cpu_has_bfloat16", lambda: False)
    with pytest.raises(ValueError, match=f"precision: .*{message}"):
        Engine([], device="cpu", precision=precision)


def test_bfloat16_has_bytes_and_etags_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        device, "cpu_has_bfloat16", lambda: True
    )  # torch emulates it where it is not
    path = tmp_path / "lenet.safetensors"
    checkpoint.write(lenet(), path)
    bodies, keys = set(), set()
    for precision in ("float32", "bfloat16", "bfloat16"):
        engine = Engine([path], device="cpu", precision=precision)
        made = job(engine, arch="lenet", width=0.5)
        keys.add(made.key)
        bodies.add(b"".join(engine.weights(made)))
    assert len(keys) == len(bodies) == 2


def test_a_score_is_never_interpolated_across_depths(tmp_path: Path) -> None:
    both = space("resnet44")
    rows = [
        row(both, [16, 32, 64], [7, 7, 7], 90.0),
        row(both, [8, 16, 32], [7, 7, 7], 80.0),
        row(both, [16, 32, 64], [5, 5, 5], 20.0),
    ]
    path = tmp_path / "both.safetensors"
    checkpoint.write(grid(both, {"evaluation": rows}), path)
    engine = Engine([path], device="cpu")

    def score(**asked: Any) -> float | None:
        found: float | None = engine.describe(job(engine, arch="resnet44", **asked))["score"]
        return found

    between = score(width=0.75)
    assert between is not None and 80 < between < 90
    assert score(depth=[5, 5, 5]) == 20
    assert score(width=0.75, depth=[5, 5, 5]) is None
    assert score(depth=[5, 6, 7]) is None


def normed() -> Manifold:
    """A small manifold whose batch norms' statistics are measured when it is sampled."""
    torch.manual_seed(0)
    graph, _ = trace(networks.resnet_mnist((2, 2)), torch.zeros(1, 1, 28, 28))
    both = Space("normed", graph, (0.5, 1.0), (1, 3))
    found = grid(both)
    for parameter in found.representation.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pixels = torch.randint(0, 256, (16, 1, 28, 28), dtype=torch.uint8)
    return replace(found, statistics=Statistics(pixels))


def test_statistics_that_are_measured_for_a_request_are_the_same_on_every_engine(
    tmp_path: Path,
) -> None:
    path = tmp_path / "normed.safetensors"
    checkpoint.write(normed(), path)
    engines = [Engine([path], device="cpu") for _ in range(2)]
    asked: dict[str, Any] = {"arch": "normed", "width": 0.6, "depth": [1, 3]}
    bodies = set()
    for each in (*engines, engines[0]):
        each.prepare_thread()
        bodies.add(b"".join(each.weights(job(each, **asked))))
    (body,) = bodies
    assert any(body)
    assert job(engines[0], **asked).key == job(engines[1], **asked).key


def test_an_mlp_is_lowered_inside_its_wrappers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device, "cpu_has_bfloat16", lambda: True)
    path = tmp_path / "lenet.safetensors"
    checkpoint.write(lenet(corrected={"orders": 2}, anchored={"reach": 0.2}), path)
    (made,) = Engine([path], device="cpu", precision="bfloat16").manifolds.values()
    kinds = {p.dtype for name, p in made.representation.named_parameters() if ".hidden." in name}
    assert kinds == {torch.bfloat16}


def test_a_width_is_a_number_a_list_or_an_object_by_group(engine: Engine) -> None:
    listed = job(engine, arch="resnet20", width=[0.5, 0.97, 0.75])
    by_group = job(engine, arch="resnet20", width={"layer3": 0.75, "layer1": 0.5})
    asked = from_query("resnet20", QueryParams("width=layer1:0.5,layer3:0.75"))
    assert listed.key == by_group.key == engine.job(asked).key
    assert "width=0.5,0.9" in by_group.location
    assert job(engine, arch="resnet20", width=0.5).location.count(",") == 0
    with pytest.raises(Problem, match="layer1, layer2, layer3") as refused:
        job(engine, arch="resnet20", width={"layer9": 0.5})
    assert refused.value.status == 422 and refused.value.errors[0]["given"] == "layer9"
    for query in ("layer1:0.5,layer1:0.6", "layer1:", ":0.5", "layer1:0.5,0.6", "layer1:0"):
        with pytest.raises(Problem, match="width"):
            from_query("resnet20", QueryParams({"width": query}))


def rows_of_convolutions(count: int) -> Space:
    """A network of so many groups: one for each of its layers."""
    layers = [torch.nn.Conv2d(3 if not n else 2, 2, 1) for n in range(count + 1)]
    groups = [str(n) for n in range(count)]
    graph, _ = trace(torch.nn.Sequential(*layers), torch.zeros(1, 3, 4, 4), groups=groups)
    return Space("long", graph, (0.25, 1.0))


def test_a_width_may_list_64_groups_and_more_are_not_served(tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    checkpoint.write(grid(rows_of_convolutions(64)), path)
    engine = Engine([path], device="cpu")
    assert len(engine.model("long")["groups"]) == 64
    width = [0.5 if n % 2 else 1.0 for n in range(64)]
    asked = job(engine, arch="long", width=width)
    assert asked.architecture.channels == (2, 1) * 32
    assert again(engine, asked.location).key == asked.key
    with pytest.raises(ValueError, match="width"):
        job(engine, arch="long", width=[1.0] * 65)
    checkpoint.write(grid(rows_of_convolutions(65)), path)
    with pytest.raises(checkpoint.BadCheckpoint, match="65 groups"):
        Engine([path], device="cpu")


def test_a_model_tells_its_groups_its_input_and_its_score(engine: Engine) -> None:
    told = engine.model("resnet20")
    assert told["groups"] == [
        {"name": name, "sizes": [size]}
        for name, size in (("layer1", 16), ("layer2", 32), ("layer3", 64))
    ]
    assert told["input"] == [3, 32, 32] and told["classes"] == list("0123456789")
    assert told["normalisation"] == {"mean": [0.5] * 3, "std": [0.25] * 3}
    assert (told["task"], told["metric"], told["higher"]) == ("classification", "accuracy", True)
    assert told["stages"] == [] and told["blocks"] is None
    assert engine.model("resnet-mnist")["stages"] == ["stage1", "stage2"]
    assert engine.model("resnet44")["named"]["resnet56"] == [9, 9, 9]
