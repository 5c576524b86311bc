"""The chain's promises that need no data: layering, wire bytes, checkpoint integrity, sampling."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from neumeta.architecture import BadArchitecture
from safetensors.torch import save

from neumeta import checkpoint, wire
from neumeta.sample import sample
from tests.conftest import lenet

ROOT = Path(__file__).parent.parent


def test_imports_go_one_way() -> None:
    allowed = {
        "neumeta": {"neumeta"},
        "service": {"neumeta", "service"},
        "training": {"neumeta", "training"},
    }
    for package, may in allowed.items():
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names = [node.module]
                ours = {name.split(".")[0] for name in names} & set(allowed)
                assert ours <= may, f"{path.name} imports {ours - may}"


@pytest.mark.parametrize("kind", ["mlp", "grid"])
@pytest.mark.parametrize("dtype", list(wire.DTYPES))
def test_stream_equals_safetensors(kind: str, dtype: str) -> None:
    manifold = lenet(kind)
    architecture = manifold.space.architecture(0.4)
    plan = wire.plan(manifold.space, architecture, dtype, manifold.normalisation)
    tensors = dict(sample(manifold, architecture))
    raw = b"".join(wire.stream(plan, tensors.items()))
    metadata = {"neumeta": __import__("json").loads(plan.header[8:])["__metadata__"]["neumeta"]}
    kept = {name: tensor.to(wire.DTYPES[dtype][0]) for name, tensor in tensors.items()}
    assert raw == save(kept, metadata)
    assert len(raw) == plan.length


def test_checkpoint_round_trip_and_damage(tmp_path: Path) -> None:
    manifold = lenet()
    path = tmp_path / "m.safetensors"
    digest = checkpoint.write(manifold, path)
    kept = checkpoint.read(path)
    assert kept.digest == digest
    architecture = manifold.space.architecture(0.5)
    for (a, x), (b, y) in zip(
        sample(manifold, architecture), sample(kept, architecture), strict=True
    ):
        assert a == b and torch.equal(x, y)
    raw = path.read_bytes()
    broken = bytearray(raw)
    broken[-5] ^= 1
    path.write_bytes(broken)
    with pytest.raises(checkpoint.BadCheckpoint, match="tensor inr"):
        checkpoint.read(path)
    path.write_bytes(raw[:-100])
    with pytest.raises(checkpoint.BadCheckpoint, match="cut short"):
        checkpoint.read(path)


@pytest.mark.parametrize("width", [0, -1, float("nan"), float("inf"), 10**9, 0.1, [0.5], [0.5] * 4])
def test_widths_outside_are_refused(width: float) -> None:
    with pytest.raises(BadArchitecture, match="width"):
        lenet().space.architecture(width)
