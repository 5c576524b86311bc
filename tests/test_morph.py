"""The lines of Python that the README shows."""

from __future__ import annotations

from pathlib import Path

import torch

from neumeta import checkpoint
from training import networks
from training.morph import morph


def test_a_module_from_python_becomes_a_manifold_and_stays_as_it_is(tmp_path: Path) -> None:
    net = networks.lenet()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    result = morph(
        net,
        "digits",
        tmp_path / "mine.safetensors",
        width=(0.5, 1.0),
        epochs=0.2,
        fit={"batch": 64},
    )
    manifold = checkpoint.read(tmp_path / "mine.safetensors")
    assert manifold.space.name == "mine" and manifold.digest == result.digest
    assert [row["width"] for row in result.rows] == [1.0, 0.75, 0.5]
    assert manifold.about["source"]["score"] == round(result.source, 2)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
