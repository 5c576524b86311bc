"""What a manifold's file refuses, and what travels in it."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from neumeta import checkpoint
from neumeta.manifold import Manifold
from tests.conftest import lenet

MODELS = Path(__file__).parent.parent / "models"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["inr", "frozen", "statistics"])
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
        name, tensor = "x", torch.tensor([1.0, value])
        getattr(manifold, part)[name] = tensor
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
        ({"normalisation": {"mean": [0.1], "std": [math.inf]}}, "normalisation.std.0"),
        ({"about": {"evaluation": [{"accuracy": math.nan}]}}, "about.evaluation.0.accuracy"),
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


@pytest.mark.parametrize("image", [None, (8, 12)])
def test_the_image_size_travels_and_cost_is_counted_at_it(
    tmp_path: Path, image: tuple[int, int] | None
) -> None:
    manifold: Manifold = lenet()
    manifold.space = replace(manifold.space, image=image)
    checkpoint.write(manifold, tmp_path / "m.safetensors")
    space = checkpoint.read(tmp_path / "m.safetensors").space
    assert space == manifold.space
    # 3x3 convolutions at full, half and quarter sides (28x28 where the file does not say).
    sides = image or (28, 28)
    area = sides[0] * sides[1]
    expected = 9 * (32 * area + 32 * 64 * area // 4 + 64 * 64 * area // 16) + 640
    assert space.cost(space.full)["macs"] == expected


def test_a_file_without_an_image_size_is_read_with_the_familys_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As version 0.1 wrote them."""

    def older(space: object) -> dict[str, object]:
        return {key: value for key, value in asdict(space).items() if key != "image"}  # type: ignore[call-overload]

    manifold, path = lenet(), tmp_path / "m.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "asdict", older)
        checkpoint.write(manifold, path)
    space = checkpoint.read(path).space
    assert space.image is None and space.cost(space.full)["macs"] == 5_645_440


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_shipped_tables_have_the_costs_of_their_own_images(path: Path) -> None:
    manifold = checkpoint.read(path)
    for row in manifold.about["evaluation"]:
        space = manifold.space
        architecture = space.architecture(row["width"], row["depth"] or None, extrapolate=True)
        cost = space.cost(architecture)
        assert (row["parameters"], row["macs"]) == (cost["parameters"], cost["macs"])
    if path.stem == "lenet-digits":
        assert cost_of_full(manifold) == 461_440


def cost_of_full(manifold: Manifold) -> int:
    return manifold.space.cost(manifold.space.full)["macs"]
