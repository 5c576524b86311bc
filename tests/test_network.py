"""The module a device runs: what it takes, what it refuses, how it is kept and sent on."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
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
from neumeta.fold import fold
from neumeta.graph import Graph
from neumeta.manifold import Contract, Manifold, roles
from neumeta.network import Network
from neumeta.notation import pack
from neumeta.representation import build
from neumeta.sample import sample
from neumeta.space import Space
from neumeta.statistics import Statistics
from tests.conftest import lenet
from tests.support.modules import DEEP, MODULES, drawn, error, images_of, seeded, traced
from training import networks
from training.trace import trace


def resnet(kind: torch.dtype = torch.float32) -> Network:
    """A small network of random weights that takes raw pixels."""
    _, graph = traced("resnet")
    net = Network(graph.folded, graph.full)
    # Small enough for float16.
    net.load_state_dict({n: 0.4 * t for n, t in drawn(graph.folded, graph.full).items()})
    net.to(kind).eval().normalise([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    return net


def pulled(path: Path, dtype: str = "float32") -> Path:
    """A file as the service sends it."""
    manifold = lenet()
    architecture = manifold.space.architecture(0.4)
    plan = wire.plan(manifold, architecture, dtype)
    path.write_bytes(b"".join(wire.stream(plan, sample(manifold, architecture))))
    return path


def rewritten(
    path: Path,
    change: Callable[[dict[str, Any], dict[str, Tensor]], object],
    dtype: str = "float32",
) -> None:
    """A pulled file whose metadata and tensors `change` has changed."""
    with safe_open(pulled(path, dtype), framework="pt") as file:
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
    _, graph = traced("resnet")
    other = Network(graph.folded, graph.full).eval()
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


@pytest.mark.parametrize("dtype", list(wire.KINDS))
def test_a_pulled_file_takes_raw_pixels(dtype: str, tmp_path: Path) -> None:
    net = network.load(pulled(tmp_path / "net.safetensors", dtype))
    kind = torch.float32 if dtype == "int8" else wire.KINDS[dtype][0]
    assert not net.training and net.mean.dtype == kind
    plain = copy.deepcopy(net)
    plain.normalise([0.0], [1.0])
    x = torch.rand(2, 1, 28, 28)  # float32, whatever the file's precision
    normalised = (x.to(net.mean.dtype) - net.mean) / net.std
    assert torch.equal(net(x), plain(normalised))
    assert torch.allclose(net.mean, torch.tensor(0.3, dtype=net.mean.dtype))


def set_(*path: Any, to: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], object]:
    def change(about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for key in path[:-1]:
            about = about[key]
        about[path[-1]] = to

    return change


CHANGED: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], object], str]] = {
    "no graph": (lambda about, _: about.pop("graph"), "the graph is a NoneType"),
    "a graph that is damaged": (
        lambda about, _: about.update(graph=about["graph"][:-9]),
        "the graph",
    ),
    "another graph": (
        lambda about, _: about.update(graph=pack(traced("squeezed")[1].folded)),
        "channels|tensor",
    ),
    "no depth": (lambda about, _: about.pop("depth"), "depth"),
    "a number for a depth": (set_("depth", to=3), "depth"),
    "a depth too many": (set_("depth", to=[1]), "depth"),
    "no channels": (lambda about, _: about.pop("channels"), "channels"),
    "channels of one axis less": (lambda about, _: about["channels"].pop(), "channels"),
    "text for a size": (set_("channels", 1, to="9"), "channels"),
    "true for a size": (set_("channels", 1, to=True), "channels"),
    "a size of zero": (set_("channels", 1, to=0), "channels"),
    "a huge size": (set_("channels", 1, to=10**12), "channels"),
    "no mean": (lambda about, _: about.pop("mean"), "mean"),
    "text for a mean": (set_("mean", to=["0"]), "mean"),
    "three means": (set_("mean", to=[0.1, 0.1, 0.1]), "mean"),
    "std of zero": (set_("std", to=[0]), "std"),
    "a tensor missing": (lambda _, t: t.pop("conv2.bias"), "conv2.bias is missing"),
    "a tensor too many": (lambda _, t: t.update(x=torch.zeros(1)), "tensor x is no part"),
    "another shape": (set_("channels", 1, to=5), "tensor conv.* expected"),
    "two precisions": (lambda _, t: t.update(x=torch.zeros(1).half()), "one float type"),
    "integers": (
        lambda _, t: t.update({k: v.to(torch.int8) for k, v in t.items()}),
        "one float type",
    ),
    "other integers": (
        lambda _, t: t.update({"conv1.weight": t["conv1.weight"].to(torch.uint8)}),
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


INT8: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], object], str]] = {
    "no scales": (lambda _, t: t.pop("conv2.weight_scale"), "conv2.weight_scale is missing"),
    "scales of one channel": (
        lambda _, t: t.update({"conv2.weight_scale": t["conv2.weight_scale"][:1]}),
        r"conv2.weight_scale is \(1, 1, 1, 1\) where \(26, 1, 1, 1\) is expected",
    ),
    "a weight less": (
        lambda _, t: t.update({"conv2.weight": t["conv2.weight"][1:]}),
        r"conv2.weight_scale is \(26, 1, 1, 1\) where \(25, 1, 1, 1\)",
    ),
    "an int8 bias": (
        lambda _, t: t.update({"conv1.bias": torch.ones(13, dtype=torch.int8)}),
        "bias",
    ),
    "scales of nothing": (lambda _, t: t.update(x_scale=torch.ones(1)), "x_scale is no part"),
    "other floats": (lambda _, t: t.update({"conv1.bias": torch.ones(13).half()}), "one float"),
    "a weight in float32": (
        lambda _, t: t.update({"conv2.weight": t["conv2.weight"].float()}),
        "tensor conv2.weight_scale is no part",
    ),
}


@pytest.mark.parametrize("kind", list(INT8))
def test_an_int8_file_that_is_not_whole_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    change, match = INT8[kind]
    rewritten(path, change, "int8")
    with pytest.raises(ValueError, match=match) as refused:
        network.load(path)
    assert str(refused.value).startswith(f"{path}: ")


def written(path: Path, graph: Graph, **changes: Any) -> dict[str, Tensor]:
    """A pulled file of random folded tensors of this graph's size, and its tensors."""
    extents = dict.fromkeys((axis.group, axis.size) for axis in graph.axes.values())
    order = sorted(extents, key=lambda extent: graph.groups.index(extent[0]))
    channels = graph.input[1][0][1]
    about = {
        "graph": pack(graph.folded),
        "depth": list(graph.depth),
        "channels": [size for _, size in order],
        "mean": [0.1] * channels,
        "std": [0.4] * channels,
    }
    tensors = drawn(graph.folded, graph.full)
    save_file(tensors, path, {"neumeta": json.dumps(about | changes)})
    return tensors


@pytest.mark.parametrize("name", [*MODULES, *DEEP])
@torch.no_grad()
def test_any_network_is_loaded_without_its_code(name: str, tmp_path: Path) -> None:
    _, graph = traced(name)
    written(tmp_path / "n", graph)
    net = network.load(tmp_path / "n")
    x = images_of(name)
    plain = Network(graph.folded, graph.full)
    plain.load_state_dict(drawn(graph.folded, graph.full))
    channels = len(net.mean)
    plain.normalise([0.1] * channels, [0.4] * channels)
    # Memory may lie at other addresses, for which kernels add up in another order.
    assert error(net(x), plain(x)) <= 1e-6
    made = pickle.loads(pickle.dumps(net))
    assert error(made(x), net(x)) <= 1e-6


@pytest.mark.parametrize("name", [*MODULES, *DEEP])
@torch.no_grad()
def test_the_users_own_class_is_filled(name: str, tmp_path: Path) -> None:
    """Folded weights in a module with its batch norms computes what the module did."""
    make, images = (MODULES | DEEP)[name]
    source, graph = traced(name)
    state = {k: v for k, v in source.state_dict().items() if v.is_floating_point()}
    about = dict.fromkeys(("mean", "std"), [0.5] * images[0])
    written(tmp_path / "n", graph, **about)
    with safe_open(tmp_path / "n", framework="pt") as file:
        metadata = file.metadata()
    save_file(fold(graph, state), tmp_path / "n", metadata)
    other = seeded(make, seed=9).train()
    x = images_of(name)
    assert error(other.eval()(x), source(x)) > 1e-2
    filled = network.load(tmp_path / "n", into=other.train())
    assert filled is other and not filled.training
    # float32: batch norms multiplied into weights
    assert error(filled(x), source(x)) <= 1e-4


def test_a_class_that_is_another_is_refused_by_the_tensor(tmp_path: Path) -> None:
    written(tmp_path / "n", traced("resnet")[1])
    other = networks.resnet_cifar((2, 3, 3), 10, (4, 6, 9))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"tensor .* is \(9"):
        network.load(tmp_path / "n", into=other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(ValueError, match=r"tensor .* is \(5.*\) in ResNetCifar, \(4"):
        network.load(tmp_path / "n", into=networks.resnet_cifar((2, 3, 3), 10, (5, 6, 8)))
    with pytest.raises(ValueError, match="bn1 is no batch norm of Squeezed"):
        network.load(tmp_path / "n", into=MODULES["squeezed"][0]())


def test_a_file_tells_what_it_takes(tmp_path: Path) -> None:
    about = network.contract(pulled(tmp_path / "n"))
    assert about["classes"] == list("0123456789") and about["arch"] == "lenet"
    assert (about["mean"], about["std"], about["task"]) == ([0.3], [0.4], "classification")
    assert (about["depth"], about["channels"]) == ([], [13, 26, 26]) and "graph" not in about


class Named(torch.nn.Module):
    """Parts called like what the device's module has itself."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.std = torch.nn.Conv2d(2, 4, 1), torch.nn.Conv2d(4, 5, 1)
        self.program, self.channels = torch.nn.Conv2d(5, 4, 1), torch.nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.program(torch.relu(self.std(torch.relu(self.mean(x)))))
        return self.channels(x.mean((2, 3)))  # type: ignore[no-any-return]


@torch.no_grad()
def test_a_network_may_call_its_parts_what_it_likes(tmp_path: Path) -> None:
    graph, _ = trace(Named(), torch.zeros(1, 2, 4, 4))
    tensors = written(tmp_path / "n", graph)
    net, own = network.load(tmp_path / "n"), Named().eval()
    own.load_state_dict(tensors)
    x = torch.rand(2, 2, 4, 4)
    torch.testing.assert_close(net(x), own((x - 0.1) / 0.4))
    assert set(net.state_dict()) == {*tensors, "mean", "std"}
    net.normalise([0, 0], [1, 1])
    torch.testing.assert_close(copy.deepcopy(net)(x), own(x))


def deep_file(path: Path, depth: list[int]) -> torch.nn.Module:
    """A ResNet pulled at another depth, and the user's class of that size."""
    _, graph = traced("resnet")
    space = Space("resnet", graph, (0.25, 1.0), (1, 4))
    torch.manual_seed(0)
    model = build("grid", {}, roles(space))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    contract = Contract((0.5,) * 3, (0.5,) * 3)
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    manifold = Manifold(space, model, "grid", {}, 0.0, 1, 64, contract, {}, Statistics(images))
    architecture = space.architecture(0.5, depth, extrapolate=True)
    plan = wire.plan(manifold, architecture, "float32")
    path.write_bytes(b"".join(wire.stream(plan, sample(manifold, architecture))))
    return networks.resnet_cifar(depth, 10, (2, 3, 4))


@pytest.mark.parametrize("depth", [[2, 3, 3], [1, 1, 4], [4, 2, 3]])
@torch.no_grad()
def test_other_depths_run_alone_and_in_the_users_class(depth: list[int], tmp_path: Path) -> None:
    own = deep_file(tmp_path / "n", depth)
    net = network.load(tmp_path / "n")
    network.load(tmp_path / "n", into=own)
    x = torch.rand(2, 3, 8, 8)
    assert error(own((x - 0.5) / 0.5), net(x)) <= 1e-4


@pytest.mark.parametrize("depth", [[2], [0, 3], [2, 257], [2, 3, 1], [2, True], "23"])
def test_a_depth_that_cannot_be_is_refused(depth: Any, tmp_path: Path) -> None:
    written(tmp_path / "n", traced("plain")[1], depth=depth)
    with pytest.raises(ValueError, match="depth: .* whole numbers of at most 256"):
        network.load(tmp_path / "n")


def test_a_file_loads_within_a_blink(tmp_path: Path) -> None:
    """Processor time in a process of its own, as other tests in one slowed it sixfold: 10 ms for a
    ResNet-20 where this was written, of a bound of 60."""
    graph, _ = trace(networks.resnet_cifar(), torch.zeros(1, 3, 32, 32))
    written(tmp_path / "n", graph)
    code = """
import sys, time
from pathlib import Path
from neumeta import network
taken = []
for _ in range(5):
    start = time.thread_time()
    network.load(Path(sys.argv[1]))
    taken.append(time.thread_time() - start)
print(min(taken))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "n")]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(told.stdout) < 0.06


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
    for wanted in (0x2080, 0x4B50):  # the first bytes of a pickle, of a zip archive
        header = raw[8 : 8 + length].ljust(wanted)
        path.write_bytes(wanted.to_bytes(8, "little") + header + raw[8 + length :])
        assert network.load(path)(torch.rand(1, 1, 28, 28)).shape == (1, 10)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        network.load(tmp_path / "none.safetensors")
