"""The built-in networks: the same as the families, as published, and traceable whole."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import networks, weights

BUILT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet A": (lambda: networks.resnet_cifar(shortcut="A"), (2, 3, 32, 32)),
    "resnet B": (lambda: networks.resnet_cifar((1, 2, 1), 7, shortcut="B"), (2, 3, 24, 40)),
    "resnet conv": (lambda: networks.resnet_cifar((2, 1), 3, (6, 10)), (2, 3, 17, 16)),
    "resnet-mnist": (lambda: networks.resnet_mnist((1, 2)), (2, 1, 28, 28)),
    "lenet": (lambda: networks.lenet(), (2, 1, 28, 28)),
    "unet": (lambda: networks.unet(), (2, 3, 96, 128)),
    "unet group": (lambda: networks.unet(5, (8, 16, 24), 1, groups=4), (2, 1, 16, 20)),
    "vae": (lambda: networks.vae(), (2, 1, 32, 32)),
}


def scrambled(net: nn.Module, seed: int = 0) -> nn.Module:
    """`net` in eval mode, its batch norm as if it had been trained."""
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            for vector in (module.weight.data, module.running_var):
                vector.uniform_(0.5, 1.5)
            for vector in (module.bias.data, module.running_mean):
                vector.normal_(std=0.3)
    return net.eval()


@pytest.mark.parametrize("name", list(BUILT))
def test_the_exported_program_computes_the_same(name: str) -> None:
    build, shape = BUILT[name]
    net = scrambled(build())
    x = torch.rand(shape)
    exported = torch.export.export(net, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(x), net(x))


@pytest.mark.parametrize("widths", [(8, 16), (4, 7), (6, 6)])
def test_convolutions_replace_parameter_free_shortcuts(widths: tuple[int, int]) -> None:
    net = networks.resnet_cifar((2, 1), 5, widths, shortcut="A")
    scrambled(net)
    made = networks.convolved(net)
    kinds = [type(module).__name__ for name, module in made.named_modules() if "shortcut" in name]
    assert kinds == ["Conv2d"]
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(made(x), net(x), atol=1e-5, rtol=1e-5)


def test_shortcut_a_subsamples_and_pads_both_sides() -> None:
    block = networks.BasicBlock(2, 6, 2, "A").eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 2, 4, 4)
    with torch.no_grad():
        y = block(x)
    assert torch.equal(y[:, 2:4], x[:, :, ::2, ::2])
    assert not y[:, :2].any() and not y[:, 4:].any()


def test_unet_keeps_the_image_size_and_its_half_million_parameters() -> None:
    net = networks.unet()
    assert net.eval()(torch.rand(1, 3, 96, 128)).shape == (1, 11, 96, 128)
    assert 450_000 < sum(p.numel() for p in net.parameters()) < 550_000


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: networks.resnet_cifar(shortcut="C"), "shortcut"),
        (lambda: networks.resnet_cifar((3, 3)), "widths"),
        (lambda: networks.resnet_cifar(widths=(16, 8, 4), shortcut="A"), "widths"),
        (lambda: networks.resnet_mnist((2,)), "depth"),
        (lambda: networks.lenet(widths=(3, 4)), "widths"),
        (lambda: networks.unet(widths=(8,)), "widths"),
        (lambda: networks.unet(widths=(8, 12), groups=8), "groups"),
    ],
)
def test_a_size_that_cannot_be_is_refused(build: Callable[[], nn.Module], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        build()


def test_vae_draws_only_while_it_trains() -> None:
    net, x = networks.vae(), torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        assert not torch.equal(net(x)[0], net(x)[0])
        net.eval()
        pixels, mean, _ = net(x)
        assert torch.equal(pixels, net.decoder(mean))


def elbo(net: nn.Module, x: Tensor) -> tuple[float, float]:
    """Binary cross-entropy and KL divergence, nats an image, at the mean of the latents."""
    with torch.no_grad():
        pixels, mean, logvar = net(x)
    bce = F.binary_cross_entropy(pixels, x, reduction="sum") / len(x)
    kl = -0.5 * (1 + logvar - mean**2 - logvar.exp()).sum() / len(x)
    return bce.item(), kl.item()


def test_published_vae_has_its_published_loss(data_root: Path) -> None:
    path = data_root.parent / "checkpoints" / "vae" / "VAE_mnist.pt"
    net = networks.vae().eval()
    weights.fit_into(net, weights.read(path), path)
    raw = gzip.decompress((data_root / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())
    pixels = torch.from_numpy(np.frombuffer(raw, np.uint8, offset=16).copy())
    # Every fourth image: the first half of the test set is easier than the second.
    images = pixels.view(-1, 1, 28, 28)[::4].float() / 255
    bce, kl = elbo(net, F.interpolate(images, (32, 32), mode="bilinear"))
    # The whole test set has 118.2 and 19.3.
    assert bce == pytest.approx(118.2, abs=1)
    assert kl == pytest.approx(19.3, abs=0.2)
