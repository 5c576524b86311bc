"""Importing and training: the imported network computes what the published one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neumeta import checkpoint
from neumeta.program import Program
from neumeta.sample import sample
from training import data, networks, source, state
from training.task import TASKS
from training.teacher import Views

FILES = {
    "resnet20-12fca82f.th": 3,
    "resnet32-d509ac18.th": 5,
    "resnet44-014dd654.th": 7,
    "resnet56-4bfd9763.th": 9,
}


def published_forward(state: dict[str, Tensor], n: int, x: Tensor) -> Tensor:
    """The published ResNet, written straight from its definition: option A shortcuts, batch norm."""

    def norm(name: str, x: Tensor) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"])

    x = F.relu(norm("bn1", F.conv2d(x, state["conv1.weight"], padding=1)))
    for stage in range(3):
        for block in range(n):
            at = f"layer{stage + 1}.{block}"
            stride = 2 if stage and block == 0 else 1
            y = F.conv2d(x, state[f"{at}.conv1.weight"], stride=stride, padding=1)
            y = F.relu(norm(f"{at}.bn1", y))
            y = norm(f"{at}.bn2", F.conv2d(y, state[f"{at}.conv2.weight"], padding=1))
            if stride == 2:
                pad = x.shape[1] // 2
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad))
            x = F.relu(y + x)
    return F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


@pytest.mark.parametrize(("file", "n"), FILES.items())
def test_import_equals_the_published_network(file: str, n: int, data_root: Path) -> None:
    path = data_root.parent / "checkpoints" / file
    state = {
        key.removeprefix("module."): value
        for key, value in torch.load(path, map_location="cpu", weights_only=True)[
            "state_dict"
        ].items()
    }
    net = networks.resnet_cifar((n, n, n)).eval()
    source.fill(net, path)
    images = data.load("cifar10", data_root)
    x = data.to_float(images.test_images[:64], images)
    with torch.no_grad():
        expected = published_forward(state, n, x)
        # 1e-4 on logits of magnitude 10: float32 rounding through up to 56 layers.
        torch.testing.assert_close(net(x), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("taught", [False, True])
def test_training_resumes_to_the_same_network(tmp_path: Path, taught: bool) -> None:
    digits = data.load("digits")
    task = TASKS["classification"]
    more: dict[str, Any] = {}
    if taught:  # by a teacher's answers for fixed views, on growing images
        more["teacher"] = Views(digits, lambda x: x.flatten(1)[:, :10], 2, 0, tmp_path / "t.pt")
        more["resolutions"] = (0.5, 1.0)

    def fresh() -> torch.nn.Module:
        torch.manual_seed(0)
        first = networks.resnet_cifar((1, 1), 10, (4, 8), 1) if taught else networks.lenet()
        return torch.nn.Sequential(first, torch.nn.Dropout(0.2))

    def train(**where: Any) -> torch.nn.Module:
        return source.train(fresh(), digits, task, epochs=2, lr=0.05, **more, **where)

    whole = train()

    class Killed(Exception):
        pass

    def killed_after_one(value: object, path: Path) -> None:
        real(value, path)
        raise Killed

    real, state.save = state.save, killed_after_one
    try:
        with pytest.raises(Killed):
            train(state=tmp_path / "s.pt")
    finally:
        state.save = real
    resumed = train(state=tmp_path / "s.pt")
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_sixteen_bits_train_a_network_as_thirty_two_do() -> None:
    """bfloat16 has a significand of eight bits: steps are some percent off, and so is their sum."""
    digits, found = data.load("digits"), []
    for lr, bfloat16 in ((1e-12, False), (0.02, False), (0.02, True)):
        torch.manual_seed(0)
        net = source.train(
            networks.lenet(), digits, TASKS["classification"], epochs=1, lr=lr, bfloat16=bfloat16
        )
        assert all(value.dtype == torch.float32 for value in net.parameters())
        found.append(torch.cat([value.detach().flatten() for value in net.parameters()]))
    start, exact, rounded = found
    assert not torch.equal(exact, rounded)
    assert float((rounded - exact).norm()) < 0.1 * float((exact - start).norm())


def test_a_network_learns_from_small_images_and_its_teacher_sees_whole_ones() -> None:
    digits, seen = data.load("digits"), []

    class Watched(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(10))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                seen.append(x.shape[-1])
            return self.bias.expand(len(x), 10)

    taught: list[int] = []

    def teacher(x: Tensor) -> Tensor:
        taught.append(x.shape[-1])
        return torch.zeros(len(x), 10)

    source.train(
        Watched(), digits, TASKS["classification"], epochs=2, lr=0.1, teacher=teacher,
        resolutions=(0.5, 0.75, 1.0),
    )  # fmt: skip
    assert len(seen) == 2 * (len(digits) // 128) and sorted(seen) == seen
    assert set(seen) == {4, 6, 8} and set(taught) == {8}


@torch.no_grad()
def test_the_full_size_of_a_manifold_is_a_file_of_weights(tmp_path: Path) -> None:
    """With its batch statistics, so that the module computes what the service would send."""
    for name, build in (("resnet20-cifar10", "resnet20"), ("lenet-digits", "lenet")):
        path = Path(__file__).parent.parent / "models" / f"{name}.safetensors"
        assert checkpoint.is_manifold(path)
        manifold = checkpoint.read(path)
        channels = len(manifold.contract.mean)
        net = networks.BUILT_IN[build](10, channels)
        source.fill(net, path)
        space = manifold.space
        program = Program(space.graph.folded, space.graph.full)
        side = 32 if channels == 3 else 8
        x = torch.randn(8, channels, side, side)
        expected = program.run(dict(sample(manifold, space.full)), x)
        # float32, batch norm folded or not, twenty layers
        torch.testing.assert_close(net.eval()(x), expected, atol=1e-3, rtol=1e-3)
    other = networks.BUILT_IN["resnet20"](10, 3)
    with pytest.raises(ValueError, match=r"lenet-digits.safetensors: .*missing: "):
        source.fill(other, path)
    source.save(other, tmp_path / "plain.safetensors")
    for plain in (tmp_path / "plain.safetensors", Path(__file__), tmp_path / "not there"):
        assert not checkpoint.is_manifold(plain)
