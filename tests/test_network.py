"""The module a device runs: what it takes, what it refuses, how it is kept and sent on."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from neumeta import checkpoint, network, wire
from neumeta.family import FAMILIES
from neumeta.network import Network
from neumeta.sample import sample
from tests.conftest import lenet

RESNET = FAMILIES["resnet-cifar"]


def resnet(kind: torch.dtype = torch.float32, depth: tuple[int, ...] = (1, 1, 1)) -> Network:
    """A small network of random weights that takes raw pixels."""
    torch.manual_seed(0)
    net = Network(RESNET.name, depth, RESNET.full_sizes(depth, 10)).to(kind).eval()
    net.normalise([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    return net


def pulled(path: Path, dtype: str = "float32") -> Path:
    """A file as the service sends it."""
    manifold = lenet()
    architecture = manifold.space.architecture(0.4)
    plan = wire.plan(manifold.space, architecture, dtype, manifold.normalisation)
    path.write_bytes(b"".join(wire.stream(plan, sample(manifold, architecture))))
    return path


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """A pulled file whose metadata and tensors `change` has changed."""
    with safe_open(pulled(path), framework="pt") as file:
        about = json.loads(file.metadata()["neumeta"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(about, tensors)
    save_file(tensors, path, {"neumeta": json.dumps(about)})


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_uint8_images_give_the_logits_of_floats(kind: torch.dtype) -> None:
    net = resnet(kind)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        expected = net(images.to(kind) / 255)
        assert torch.equal(net(images), expected)
        assert not torch.equal(net(images // 2), expected)
    assert expected.dtype == kind


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (torch.zeros(3, 16, 16), "batch dimension is missing"),
        (torch.zeros(2, 1, 16, 16), r"\(N, 3, height, width\).*\(2, 1, 16, 16\)"),
        (torch.zeros(2, 16, 16, 3), r"\(2, 16, 16, 3\)"),
        (torch.zeros(16, 16), r"\(16, 16\)"),
        (torch.zeros(1, 2, 3, 16, 16), r"\(1, 2, 3, 16, 16\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int64), "int64"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int8), "int8"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.bool), "bool"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.complex64), "complex64"),
        (np.zeros((2, 3, 16, 16), np.float32), "ndarray"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images: Any, match: str) -> None:
    # Under the tests annotations are checked first: this is what a user meets.
    pixels = getattr(Network.pixels, "__wrapped__", Network.pixels)
    with pytest.raises(ValueError, match=match):
        pixels(resnet(), images)


def test_forward_asks_for_images() -> None:
    with pytest.raises(ValueError, match="batch dimension is missing"):
        resnet()(torch.zeros(3, 16, 16))


def test_normalisation_is_kept_with_the_weights() -> None:
    net = resnet()
    other = Network(RESNET.name, (1, 1, 1), RESNET.full_sizes((1, 1, 1), 10)).eval()
    other.load_state_dict(net.state_dict())
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(other(x), net(x))
        other.normalise([0, 0, 0], [1, 1, 1])
        assert not torch.equal(other(x), net(x))


def test_weights_without_normalisation_leave_it_as_it_is() -> None:
    net = resnet()
    state = {name: value for name, value in net.state_dict().items() if name not in ("mean", "std")}
    net.load_state_dict(state)
    assert net.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("mean", "std", "field"),
    [
        ([0.0], [1.0], "mean"),
        ([0.0] * 3, [1.0], "std"),
        ([0.0] * 3, [1.0, 1.0, 0.0], "std"),
        ([0.0] * 3, [1.0, 1.0, -1.0], "std"),
        ([float("nan")] * 3, [1.0] * 3, "mean"),
        ([0.0] * 3, [float("inf")] * 3, "std"),
    ],
)
def test_a_normalisation_that_cannot_be_is_refused(
    mean: list[float], std: list[float], field: str
) -> None:
    net = resnet()
    with pytest.raises(ValueError, match=field):
        net.normalise(mean, std)
    assert net.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_computes_the_same(copied: Callable[[Network], Network], tmp_path: Path) -> None:
    for net, shape in (
        (resnet(), (2, 3, 16, 16)),
        (network.load(pulled(tmp_path / "n")), (2, 1, 28, 28)),
    ):
        x = torch.rand(shape)
        assert torch.equal(copied(net)(x), net(x))


@pytest.mark.parametrize("kind", [torch.float32, torch.uint8])
def test_it_exports_and_traces(kind: torch.dtype) -> None:
    net = resnet().requires_grad_(False)
    x = (255 * torch.rand(2, 3, 16, 16)).to(kind)
    exported = torch.export.export(net, (x,)).module()
    torch.testing.assert_close(exported(x), net(x))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_trace_serves_other_batches() -> None:
    net = resnet().requires_grad_(False)
    traced = torch.jit.trace(net, torch.rand(2, 3, 16, 16))
    x = torch.rand(5, 3, 16, 16)
    torch.testing.assert_close(traced(x), net(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_computes_the_same(tmp_path: Path) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    net, x = resnet().requires_grad_(False), torch.rand(2, 3, 16, 16)
    program = torch.onnx.export(net, (x,), dynamo=True, verbose=False)
    assert program is not None
    program.save(tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    (logits,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(np.array(logits)), net(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", list(wire.DTYPES))
def test_a_pulled_file_takes_raw_pixels(dtype: str, tmp_path: Path) -> None:
    net = network.load(pulled(tmp_path / "net.safetensors", dtype))
    assert not net.training and net.mean.dtype == wire.DTYPES[dtype][0]
    plain = copy.deepcopy(net)
    plain.normalise([0.0], [1.0])
    x = torch.rand(2, 1, 28, 28)  # float32, whatever the file's precision
    normalised = (x.to(net.mean.dtype) - net.mean) / net.std
    assert torch.equal(net(x), plain(normalised))
    assert torch.allclose(net.mean, torch.tensor(0.3, dtype=net.mean.dtype))


def set_(*path: str, to: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], object]:
    def change(about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for key in path[:-1]:
            about = about[key]
        about[path[-1]] = to

    return change


CHANGED: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], object], str]] = {
    "no family": (lambda about, _: about.pop("family"), "family: None"),
    "another family": (set_("family", to="vgg"), "family: 'vgg'"),
    "a list for a family": (set_("family", to=["lenet-mnist"]), "family"),
    "no depth": (lambda about, _: about.pop("depth"), "depth"),
    "a number for a depth": (set_("depth", to=3), "depth"),
    "a depth too many": (set_("depth", to=[1]), "depth"),
    "no sizes": (lambda about, _: about.pop("sizes"), "sizes"),
    "sizes without an axis": (lambda about, _: about["sizes"].pop("conv2"), "sizes: conv2"),
    "text for a size": (set_("sizes", "conv2", to="9"), "sizes: conv2"),
    "true for a size": (set_("sizes", "conv2", to=True), "sizes: conv2"),
    "a size of zero": (set_("sizes", "conv2", to=0), "sizes: conv2"),
    "a huge size": (set_("sizes", "conv2", to=10**12), "sizes: conv2"),
    "no normalisation": (lambda about, _: about.pop("normalisation"), "normalisation"),
    "no mean": (lambda about, _: about["normalisation"].pop("mean"), "mean"),
    "text for a mean": (set_("normalisation", "mean", to=["0"]), "mean"),
    "three means": (set_("normalisation", "mean", to=[0.1, 0.1, 0.1]), "mean"),
    "std of zero": (set_("normalisation", "std", to=[0]), "std"),
    "a tensor missing": (lambda _, t: t.pop("conv2.bias"), "conv2.bias is missing"),
    "a tensor too many": (lambda _, t: t.update(x=torch.zeros(1)), "tensor x is no part"),
    "another shape": (set_("sizes", "conv2", to=5), "tensor conv2.weight .* expected"),
    "two precisions": (lambda _, t: t.update(x=torch.zeros(1).half()), "one float type"),
    "integers": (
        lambda _, t: t.update({k: v.to(torch.int8) for k, v in t.items()}),
        "one float type",
    ),
    "no tensors": (lambda _, t: t.clear(), "is missing"),
}


@pytest.mark.parametrize("kind", list(CHANGED))
def test_a_file_that_is_not_whole_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    change, match = CHANGED[kind]
    rewritten(path, change)
    with pytest.raises(ValueError, match=match) as refused:
        network.load(path)
    assert str(refused.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("depth", "allowed"), [([1, 1], False), ([0, 1, 1], False), ([10, 1, 1], False), ([2, 1, 1], 1)]
)
def test_a_depth_outside_the_family_is_refused(
    depth: list[int], allowed: bool, tmp_path: Path
) -> None:
    net = resnet(depth=tuple(depth) if allowed else (1, 1, 1))
    about = {
        "family": RESNET.name,
        "depth": depth,
        "sizes": RESNET.full_sizes(net.depth, 10),
        "normalisation": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    tensors = {k: v for k, v in net.state_dict().items() if k not in ("mean", "std")}
    save_file(tensors, tmp_path / "n", {"neumeta": json.dumps(about)})
    if allowed:
        x = torch.rand(1, 3, 16, 16)
        assert torch.equal(network.load(tmp_path / "n")(x), net(x))
    else:
        with pytest.raises(ValueError, match="depth: .* is not 3 whole numbers from 1 to 9"):
            network.load(tmp_path / "n")


OTHER: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "text": (lambda path: path.write_text("hello, no network here"), "damaged"),
    "cut": (lambda path: path.write_bytes(pulled(path).read_bytes()[:-50]), "cut short"),
    "cut in the header": (lambda path: path.write_bytes(pulled(path).read_bytes()[:60]), "cut"),
    "a torch file": (lambda path: torch.save({"a": torch.zeros(2)}, path), "a torch"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "pickle"),
    "a folder": (lambda path: path.mkdir(), "folder"),
    "a manifold": (lambda path: checkpoint.write(lenet(), path), "a manifold, not a network"),
    "no metadata": (lambda path: save_file({"a": torch.zeros(2)}, path), "'neumeta'"),
    "no JSON": (lambda path: save_file({"a": torch.zeros(2)}, path, {"neumeta": "{"}), "not JSON"),
    "a list": (lambda path: save_file({"a": torch.zeros(2)}, path, {"neumeta": "[]"}), "object"),
    "deep JSON": (
        lambda path: save_file({"a": torch.zeros(2)}, path, {"neumeta": "[" * 100_000}),
        "not JSON",
    ),
}


@pytest.mark.parametrize("kind", list(OTHER))
def test_a_file_that_is_no_network_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    make, match = OTHER[kind]
    make(path)
    with pytest.raises(ValueError, match=match) as refused:
        network.load(path)
    assert str(refused.value).startswith(f"{path}: ")


def test_a_header_whose_length_looks_like_another_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    raw = pulled(path).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    for wanted in (0x480, 0x4B50):  # the first bytes of a pickle, of a zip archive
        header = raw[8 : 8 + length].ljust(wanted)
        path.write_bytes(wanted.to_bytes(8, "little") + header + raw[8 + length :])
        assert network.load(path)(torch.rand(1, 1, 28, 28)).shape == (1, 10)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        network.load(tmp_path / "none.safetensors")
