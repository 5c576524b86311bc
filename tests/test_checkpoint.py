"""What a manifold's file refuses, and what travels in it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from neumeta import checkpoint, sites
from neumeta.fold import fold
from neumeta.manifold import Contract, Manifold, roles
from neumeta.notation import dump, pack, parse
from neumeta.representation import build
from neumeta.sample import sample
from neumeta.space import Space
from neumeta.statistics import Statistics
from tests.conftest import lenet
from tests.support.modules import traced
from tests.support.sealed import opened, seal, stored

MODELS = Path(__file__).parent.parent / "models"


def resnet() -> Manifold:
    """A manifold with stages, batch norm, calibration images and statistics kept for one size."""
    graph = traced("resnet")[1]
    space = Space("resnet", graph, (0.25, 1.0), (2, 4), named={"deep": (4, 4, 4)})
    torch.manual_seed(0)
    options: dict[str, Any] = {"nodes": 0, "anchored": {"reach": 0.5}, "corrected": {}}
    model = build("grid", options, roles(space))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    norms = [node for node in graph.nodes if node.op == "batch_norm"]
    half = space.architecture(0.5)
    sizes = space.sizes(half)
    count = sum(graph.shape(node.tensors["mean"], sizes)[0] for node in norms)
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    kept = {half.key: torch.rand(2, count) + 0.5}
    contract = Contract((0.4,) * 3, (0.3,) * 3, ("a", "b"), "classification", "accuracy")
    statistics = Statistics(images, kept)
    return Manifold(
        space, model, "grid", options, 0.25, 2, 64, contract, {}, statistics, {"licence": "none"}
    )


@pytest.mark.parametrize("make", [lenet, resnet])
def test_a_manifold_comes_back_and_samples_the_same(make: Any, tmp_path: Path) -> None:
    manifold, path = make(), tmp_path / "m.safetensors"
    digest = checkpoint.write(manifold, path)
    kept = checkpoint.read(path)
    assert kept.digest == digest
    for field in ("kind", "options", "noise", "samples", "scale", "contract", "about"):
        assert getattr(kept, field) == getattr(manifold, field)
    for field in ("name", "width", "blocks", "most", "named", "groups", "extents", "depth"):
        assert getattr(kept.space, field) == getattr(manifold.space, field)
    depths = [None] if not manifold.space.blocks else [None, [4, 2, 3]]
    for depth in depths:
        architecture = manifold.space.architecture(0.5, depth)
        for (a, x), (b, y) in zip(
            sample(manifold, architecture), sample(kept, architecture), strict=True
        ):
            assert a == b and torch.equal(x, y)
    assert checkpoint.encode(kept) == path.read_bytes()


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    checkpoint.write(lenet(), path)
    raw = path.read_bytes()
    broken = bytearray(raw)
    broken[-5] ^= 1
    path.write_bytes(broken)
    with pytest.raises(checkpoint.BadCheckpoint, match="tensor inr"):
        checkpoint.read(path)
    path.write_bytes(raw[:-100])
    with pytest.raises(checkpoint.BadCheckpoint, match="cut short"):
        checkpoint.read(path)


def graph_of(change: Any) -> Any:
    """A header whose graph is changed."""

    def edit(header: dict[str, Any], _: Any) -> None:
        held = json.loads(json.dumps(dump(traced("resnet")[1])))
        change(held)
        header["graph"] = pack(parse(held))

    return edit


def to_two(held: dict[str, Any]) -> None:
    held["nodes"][0][4]["stride"] = [2, 2]


TAMPERED: dict[str, tuple[Any, str]] = {
    "a stride that does not fit": (graph_of(to_two), "conv1: conv gives"),
    "no graph": (lambda h, _: h.update(graph=3), "the graph is a int"),
    "another graph": (
        lambda h, _: h.update(graph=pack(traced("squeezed")[1])),
        "does not fit|malformed|stages",
    ),
    "another format": (lambda h, _: h.update(format=1), "format 1; this version reads 2 and 3"),
    "a width of three": (lambda h, _: h.update(width=[0.5, 3]), "width"),
    "a width of nothing": (lambda h, _: h.update(width=[0, 1]), "width"),
    "a million blocks": (lambda h, _: h.update(blocks=[1, 10**6], most=10**6), "blocks"),
    "a name for two stages of three": (lambda h, _: h.update(named={"x": [1, 2]}), "named: 'x'"),
    "an unknown representation": (
        lambda h, _: h["representation"].update(kind="spline"),
        "'spline'",
    ),
    "options of another": (
        lambda h, _: h["representation"].update(options={"nodes": 0}),
        "does not fit resnet",
    ),
    "a chart for no width": (
        lambda h, _: h["representation"].update(
            kind="charts",
            options={"charts": [{"kind": "grid", "options": {}, "least": -1e308, "blocks": 0}]},
        ),
        "no width is from",
    ),
    "a chart for an endless width": (
        lambda h, _: h["representation"].update(
            kind="charts",
            options={"charts": [{"kind": "grid", "options": {}, "least": 10**400, "blocks": 0}]},
        ),
        "malformed",
    ),
    "means of one channel": (lambda h, _: h["contract"].update(mean=[0.1]), "contract"),
    "std of zero": (lambda h, _: h["contract"].update(std=[0.0] * 3), "contract"),
    "noise of one": (lambda h, _: h.update(noise=1.0), "noise"),
    "no samples": (lambda h, _: h.update(samples=0), "samples"),
    "no images": (lambda _, t: t.pop("calibration.images"), "calibration.images is missing"),
    "images of another size": (
        lambda _, t: t.update({"calibration.images": torch.zeros(4, 3, 9, 8, dtype=torch.uint8)}),
        "calibration.images is .4, 3, 9, 8., not two or more of .3, 8, 8.",
    ),
    "statistics of another size": (
        lambda _, t: t.update({k: torch.ones(2, 5) for k in t if k.startswith("kept.")}),
        "tensor kept.* is .2, 5., not",
    ),
    "statistics of no size": (lambda _, t: t.update({"kept.x": torch.ones(2, 5)}), "malformed"),
    "statistics of a huge size": (
        lambda _, t: t.update({"kept.2000000.3.3/1": torch.ones(2, 5)}),
        "malformed",
    ),
}


@pytest.mark.parametrize("kind", list(TAMPERED))
def test_a_file_that_was_sealed_again_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    checkpoint.write(resnet(), path)
    header, tensors = opened(path)
    change, match = TAMPERED[kind]
    change(header, tensors)
    seal(path, header, tensors)
    with pytest.raises(checkpoint.BadCheckpoint, match=match) as refused:
        checkpoint.read(path)
    assert str(refused.value).startswith(f"{path}: ")


def test_a_frozen_tensor_of_any_dtype_comes_back(tmp_path: Path) -> None:
    manifold, path = resnet(), tmp_path / "m.safetensors"
    for dtype in (torch.bool, torch.int32, torch.float64):
        manifold.frozen[f"x.{dtype}"] = torch.zeros(1000, dtype=dtype)
    checkpoint.write(manifold, path)
    frozen = checkpoint.read(path).frozen
    assert all(torch.equal(frozen[name], value) for name, value in manifold.frozen.items())


def test_a_file_of_the_format_before_is_read(tmp_path: Path) -> None:
    manifold, path = resnet(), tmp_path / "m.safetensors"
    checkpoint.write(manifold, path)
    header, tensors = opened(path)
    header["format"] = 2
    del header["deflated"]
    seal(path, header, tensors)
    assert checkpoint.encode(checkpoint.read(path)) == checkpoint.encode(manifold)


def test_batch_norms_in_front_of_what_morphs_keep_their_statistics_in_the_file(
    tmp_path: Path,
) -> None:
    """Files written before, which hold none, are read: these are measured then."""
    whole, path = resnet(), tmp_path / "m.safetensors"
    module, graph = traced("resnet")
    own, graph = module.state_dict(), graph.morphing(["layer3.2.conv1"], depth=False)
    space = Space("resnet", graph, (0.5, 1.0))
    manifold = replace(
        whole,
        space=space,
        representation=build("grid", {}, roles(space)),
        options={},
        frozen={name: own[name] for name in sites.kept(graph)},
        statistics=Statistics(whole.statistics.images),
    )
    checkpoint.write(manifold, path)
    size = space.architecture(0.5)
    now = dict(sample(checkpoint.read(path), size))
    source = fold(traced("resnet")[1], own)
    assert torch.equal(now["conv1.weight"], source["conv1.weight"])
    assert torch.equal(now["conv1.bias"], source["conv1.bias"])
    header, tensors = opened(path)
    statistics = {"frozen.bn1.running_mean", "frozen.bn1.running_var"}
    assert statistics <= tensors.keys()
    seal(path, header, {name: value for name, value in tensors.items() if "running" not in name})
    then = dict(sample(checkpoint.read(path), size))
    assert not torch.equal(then["conv1.bias"], source["conv1.bias"])
    variance = "frozen.bn1.running_var"
    strange: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "half of them": ({variance: torch.empty(0)}, "bn1.running_var is missing"),
        "whole numbers": (
            {variance: tensors[variance].long()},
            "bn1.running_var is not of float32",
        ),
        "negative": ({variance: -tensors[variance]}, "a variance .* is negative"),
        "those of a norm behind": (
            {"frozen.layer3.2.bn2.running_mean": own["layer3.2.bn2.running_mean"]},
            "layer3.2.bn2.running_mean differs by size",
        ),
    }
    for changed, match in strange.values():
        held = {name: value for name, value in (tensors | changed).items() if value.numel()}
        seal(path, header, held)
        with pytest.raises(checkpoint.BadCheckpoint, match=match):
            checkpoint.read(path)


IMAGES = "calibration.images"


def bit(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors[IMAGES][len(tensors[IMAGES]) // 2] ^= 16


DEFLATED: dict[str, tuple[Any, str]] = {
    "a bit": (bit, "tensor calibration.images: deflated bytes are|does not match its digest"),
    "its end": (
        lambda _, t: t.update({IMAGES: t[IMAGES][:-3]}),
        "tensor calibration.images: deflated bytes are not those of uint8",
    ),
    "more than its shape": (
        lambda h, _: h["deflated"].update({IMAGES: ["uint8", [4, 3, 8, 7]]}),
        "tensor calibration.images: deflated bytes are not those of uint8 .4, 3, 8, 7.",
    ),
    "something behind it": (
        lambda _, t: t.update({IMAGES: torch.cat([t[IMAGES], t[IMAGES]])}),
        "deflated bytes are not those of",
    ),
    "another dtype": (
        lambda h, _: h["deflated"].update({IMAGES: ["complex64", [4, 3, 8, 8]]}),
        "tensor calibration.images: deflated bytes of 'complex64'; known are uint8",
    ),
    "an endless shape": (
        lambda h, _: h["deflated"].update({IMAGES: ["uint8", [1 << 62, 1 << 62]]}),
        "tensor calibration.images: [0-9]+ deflated bytes cannot be those of uint8",
    ),
    "less than nothing": (
        lambda h, _: h["deflated"].update({IMAGES: ["uint8", [-4, 192]]}),
        "tensor calibration.images: deflated bytes of shape .-4, 192., which is none",
    ),
    "no bytes": (
        lambda _, t: t.update({IMAGES: t[IMAGES].float()}),
        "tensor calibration.images: deflated bytes are torch.float32",
    ),
    "no tensor": (
        lambda _, t: t.pop(IMAGES),
        "tensor calibration.images is missing",
    ),
}


@pytest.mark.parametrize("kind", list(DEFLATED))
def test_a_deflated_tensor_that_was_tampered_with_is_refused_by_name(
    kind: str, tmp_path: Path
) -> None:
    manifold, path = resnet(), tmp_path / "m.safetensors"
    manifold.statistics = Statistics(manifold.statistics.images // 128, manifold.statistics.kept)
    checkpoint.write(manifold, path)
    header, tensors = stored(path)
    assert IMAGES in header["deflated"]
    change, match = DEFLATED[kind]
    change(header, tensors)
    seal(path, header, tensors)
    with pytest.raises(checkpoint.BadCheckpoint, match=match) as refused:
        checkpoint.read(path)
    assert str(refused.value).startswith(f"{path}: ")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["inr", "frozen", "kept"])
def test_a_tensor_that_is_not_finite_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, value: float
) -> None:
    manifold, path = lenet(), tmp_path / "m.safetensors"
    checkpoint.write(manifold, path)
    good = path.read_bytes()
    if part == "inr":
        name, tensor = next(iter(manifold.representation.state_dict().items()))
        tensor.flatten()[0] = value
    else:
        name, tensor = "x", torch.tensor([[1.0], [value]])
        if part == "frozen":
            manifold.frozen[name] = tensor
        else:
            manifold.statistics = Statistics(kept={name: tensor})
    with pytest.raises(checkpoint.BadCheckpoint, match=f"tensor {part}.{name} .*not finite"):
        checkpoint.write(manifold, path)
    assert path.read_bytes() == good and len(list(tmp_path.iterdir())) == 1
    # The same in a file that another program wrote, its digests right.
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_finite", lambda *_: None)
        checkpoint.write(manifold, path)
    with pytest.raises(checkpoint.BadCheckpoint, match=f"{path}: tensor {part}.{name} .*finite"):
        checkpoint.read(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"noise": math.nan}, "noise"),
        ({"contract": Contract((0.1,), (math.inf,))}, "contract.std.0"),
        ({"about": {"evaluation": [{"score": math.nan}]}}, "about.evaluation.0.score"),
    ],
)
def test_a_number_of_the_header_that_is_not_finite_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], named: str
) -> None:
    manifold, path = replace(lenet(), **change), tmp_path / "m.safetensors"
    with pytest.raises(checkpoint.BadCheckpoint, match=f"{named} is"):
        checkpoint.write(manifold, path)
    assert not path.exists()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_finite_numbers", lambda *_: None)
        checkpoint.write(manifold, path)
    with pytest.raises(checkpoint.BadCheckpoint, match=f"{named} is"):
        checkpoint.read(path)


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_shipped_tables_have_the_costs_of_their_own_images(path: Path) -> None:
    manifold = checkpoint.read(path)
    for row in manifold.about["evaluation"]:
        space = manifold.space
        architecture = space.architecture(row["width"], row["depth"] or None, extrapolate=True)
        cost = space.cost(architecture)
        assert (row["parameters"], row["macs"]) == (cost["parameters"], cost["macs"])


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_what_shipped_files_say_of_themselves_names_no_folder_of_a_machine(path: Path) -> None:
    told = json.dumps(checkpoint.read(path).about)
    assert not re.search(r'["\s,](/|~/|[A-Z]:\\)\w', told)
