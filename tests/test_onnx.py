"""Networks as ONNX models: what ONNX Runtime computes is what torch does, whatever the operations."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from neumeta import __version__, checkpoint, network, protobuf, wire
from neumeta import onnx as written
from neumeta.failure import PullError
from neumeta.graph import BATCH, Graph, Node, constant
from neumeta.operations import OPERATIONS
from neumeta.program import Program
from neumeta.sample import sample
from neumeta.shapes import check
from neumeta.space import Architecture, Space
from neumeta.whole import check_file
from tests.conftest import lenet
from tests.support import modules
from training.trace import TraceError, trace

MODELS = sorted((Path(__file__).parent.parent / "models").glob("*.safetensors"))
CLOSE = 1e-5
"""Of the largest output: float32 sums in another order."""


def session(raw: bytes) -> onnxruntime.InferenceSession:
    """A runtime that holds this model, which the checker has passed with all its shapes."""
    onnx.checker.check_model(onnx.load_from_string(raw), full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])


def run(raw: bytes, images: Tensor) -> list[Tensor]:
    """The outputs of a model for these images."""
    here = session(raw)
    given = here.run(None, {here.get_inputs()[0].name: images.numpy()})
    return [torch.from_numpy(np.asarray(each)) for each in given]


def compare(graph: Graph, sizes: dict[str, int], images: Tensor, dtype: str = "float32") -> float:
    """The largest difference, relative, of a graph run by ONNX Runtime and by torch."""
    check(graph, sizes)
    tensors = modules.drawn(graph, sizes)
    channels = images.shape[1]
    about = {"mean": [0.4] * channels, "std": [0.3] * channels}
    plan = written.plan(graph, sizes, about, dtype)
    raw = b"".join(wire.stream(plan, sorted(tensors.items())))
    assert len(raw) == plan.length and raw.startswith(plan.header)
    for name, scales in plan.scales.items():
        numbers, factors = wire.quantized(name, tensors[name], scales.axis)
        tensors[name] = numbers.float() * factors
    wanted = Program(graph, sizes).run(tensors, (images - 0.4) / 0.3)
    found = run(raw, images)
    assert [each.shape for each in found] == [each.shape for each in modules.flat(wanted)]
    return modules.error(found, wanted)


def compared(module: nn.Module, *shape: int) -> float:
    """The same of a module, at its own size and with every axis halved."""
    torch.manual_seed(0)
    graph = trace(module.eval(), torch.zeros(1, *shape))[0].folded
    images = torch.rand(3, *shape)
    return max(compare(graph, sizes, images) for sizes in (graph.full, modules.halved(graph)))


class Function(nn.Module):
    """A convolution, a function of what it makes, and for a map of channels a head."""

    def __init__(self, function: Callable[[Tensor], Tensor], rank: int = 2) -> None:
        super().__init__()
        self.conv = {1: nn.Conv1d, 2: nn.Conv2d}[rank](3, 8, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


def test_every_operation_of_a_folded_graph_is_written() -> None:
    assert set(written.WRITERS) == set(OPERATIONS) - {"batch_norm"}


@pytest.mark.parametrize("name", [*modules.MODULES, *modules.DEEP])
def test_a_network_is_the_same_in_onnx_runtime(name: str) -> None:
    graph = modules.traced(name)[1].folded
    images = torch.rand(3, *(modules.MODULES | modules.DEEP)[name][1])
    for sizes in (graph.full, modules.halved(graph)):
        assert compare(graph, sizes, images) < CLOSE


@pytest.mark.parametrize(
    "name", ["depthwise", "transposed", "transposed groups", "shared", "layer scale"]
)
def test_an_int8_network_is_its_weights_times_their_scales(name: str) -> None:
    graph = modules.traced(name)[1].folded
    sizes = {axis: 4 * size for axis, size in graph.full.items()}
    images = torch.rand(3, *modules.MODULES[name][1])
    assert compare(graph, sizes, images, "int8") < CLOSE


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky": lambda x: F.leaky_relu(x, 0.3),
    "elu": lambda x: F.elu(x, 0.7),
    "hardtanh": lambda x: F.hardtanh(x, -0.3, 0.6),
    "softplus": F.softplus,
    "softplus that turns early": lambda x: F.softplus(3 * x, 2.0, 1.5),
    "mish of much": lambda x: F.mish(60 * x),
    "softmax": lambda x: F.softmax(x, 1),
    "log softmax": lambda x: F.log_softmax(x, -1),
    "negative": lambda x: -x,
    "exp": lambda x: torch.exp(0.3 * x),
    "number before": lambda x: 2.5 - x / 0.7 + (x * x - 0.3),
    "two values": lambda x: (x - x.mean((2, 3), keepdim=True)) / (x * x + 1.0),
    "mean of channels": lambda x: x.mean(1),
    "max pool": lambda x: F.max_pool2d(x, (3, 2), (2, 3), (1, 0)),
    "max pool, ceil": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "max pool, ceil and padded": lambda x: F.max_pool2d(x, 3, 3, 1, ceil_mode=True),
    "max pool, dilated": lambda x: F.max_pool2d(x, 2, 1, 1, dilation=2),
    "max pool, dilated, ceil": lambda x: F.max_pool2d(x, 2, 3, 1, dilation=4, ceil_mode=True),
    "avg pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg pool without padding's count": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "avg pool, ceil": lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True),
    "avg pool, ceil and padded": lambda x: F.avg_pool2d(x, (2, 4), (3, 3), (1, 2), ceil_mode=True),
    "avg pool, ceil and padded, without its count": lambda x: F.avg_pool2d(
        x, (2, 4), (3, 3), (1, 2), ceil_mode=True, count_include_pad=False
    ),
    "adaptive avg": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
    "adaptive avg that divides": lambda x: F.adaptive_avg_pool2d(x, (3, 5)),
    "adaptive avg of one": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive avg of more": lambda x: F.adaptive_avg_pool2d(x, (12, 7)),
    "adaptive max": lambda x: F.adaptive_max_pool2d(x, (4, 3)),
    "adaptive max of more": lambda x: F.adaptive_max_pool2d(x, (2, 13)),
    "adaptive max of one": lambda x: F.adaptive_max_pool2d(x, 1),
    "nearest doubled": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "nearest": lambda x: F.interpolate(x, size=(13, 7), mode="nearest"),
    "nearest by 41": lambda x: F.interpolate(x[:, :, :1, :2], size=(1, 82), mode="nearest"),
    "bilinear": lambda x: F.interpolate(x, size=(13, 7), mode="bilinear"),
    "bilinear between corners": lambda x: F.interpolate(
        x, size=(13, 7), mode="bilinear", align_corners=True
    ),
    "bilinear of one": lambda x: F.interpolate(x, size=(1, 7), mode="bilinear", align_corners=True),
    "pad": lambda x: F.pad(x, (1, 0, 2, 3), value=0.7),
    "cut": lambda x: F.pad(x, (-1, 2, 0, -2)),
    "reflect": lambda x: F.pad(x, (2, 1, 0, 3), mode="reflect"),
    "replicate": lambda x: F.pad(x, (2, 1, 0, 3), mode="replicate"),
    "circular": lambda x: F.pad(x, (2, 1, 0, 3), mode="circular"),
    "permuted": lambda x: x.permute(0, 2, 3, 1),
    "every second": lambda x: x[:, :, 1::2, ::3],
    "expanded": lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 4, 5),
    "flattened": lambda x: x.flatten(2).transpose(1, 2),
    "layer norm of two": lambda x: F.layer_norm(x, x.shape[2:]),
    "nothing": lambda x: x,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_the_same_in_onnx_runtime(name: str) -> None:
    assert compared(Function(FUNCTIONS[name]), 3, 9, 10) < CLOSE


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "max pool": lambda x: F.max_pool1d(x, 3, 2, 1, ceil_mode=True),
    "avg pool": lambda x: F.avg_pool1d(x, 4, 3, 2, ceil_mode=True),
    "adaptive avg": lambda x: F.adaptive_avg_pool1d(x, 4),
    "adaptive max": lambda x: F.adaptive_max_pool1d(x, 4),
    "reflect": lambda x: F.pad(x, (2, 1), mode="reflect"),
    "circular": lambda x: F.pad(x, (2, 1), mode="circular"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_function_of_rows_is_the_same_in_onnx_runtime(name: str) -> None:
    assert compared(Function(ROWS[name], 1), 3, 10) < CLOSE


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv, all of it": (lambda: nn.Conv2d(6, 9, (3, 2), (2, 1), (2, 0), (1, 2), 3), (6, 9, 8)),
    "conv 1d": (lambda: nn.Conv1d(3, 5, 4, 2, 1, bias=False), (3, 11)),
    "transposed, all of it": (
        lambda: nn.ConvTranspose2d(6, 9, (3, 2), (2, 3), (1, 0), (1, 2), 3, dilation=(2, 1)),
        (6, 5, 4),
    ),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 5, 4, 2, 1, bias=False), (3, 6)),
    "linear of maps": (lambda: nn.Linear(7, 4), (3, 5, 7)),
    "linear of maps, no bias": (lambda: nn.Linear(7, 4, bias=False), (3, 7)),
    "prelu of one": (lambda: nn.PReLU(init=0.3), (3, 5, 4)),
    "group norm alone": (lambda: nn.GroupNorm(2, 6, affine=False), (6, 5, 4)),
    "group norm of one value": (lambda: nn.GroupNorm(3, 6), (6, 1, 1)),
    "instance norm": (lambda: nn.InstanceNorm2d(6), (6, 5, 4)),
    "layer norm": (lambda: nn.LayerNorm((5, 4)), (6, 5, 4)),
    "batch norm": (lambda: nn.BatchNorm2d(6), (6, 5, 4)),
    "batch norm of vectors": (lambda: nn.BatchNorm1d(6), (6,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_the_same_in_onnx_runtime(name: str) -> None:
    make, shape = LAYERS[name]
    assert compared(modules.seeded(make), *shape) < CLOSE


def resized(mode: str, *size: int, corners: bool = False) -> dict[str, Any]:
    return {"size": size, "mode": mode, "align_corners": corners}


WINDOW = {"stride": (1, 2, 1), "padding": (1, 0, 1), "dilation": (1, 1, 2), "groups": constant(1)}
UNTRACED: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "bicubic": ("resize", (3, 9, 10), (3, 13, 7), resized("bicubic", 13, 7)),
    "bicubic between corners": (
        "resize",
        (3, 9, 10),
        (3, 13, 7),
        resized("bicubic", 13, 7, corners=True),
    ),
    "nearest of rows": ("resize", (3, 10), (3, 17), resized("nearest", 17)),
    "nearest of volumes": ("resize", (3, 3, 4, 5), (3, 6, 8, 5), resized("nearest", 6, 8, 5)),
    "nearest of volumes, odd": ("resize", (3, 3, 4, 5), (3, 5, 4, 3), resized("nearest", 5, 4, 3)),
    "conv of volumes": ("conv", (3, 4, 5, 6), (4, 5, 2, 6), WINDOW),
}


@pytest.mark.parametrize("name", UNTRACED)
def test_what_a_file_may_hold_though_no_trace_makes_it_is_the_same(name: str) -> None:
    op, given, made, attributes = UNTRACED[name]
    shapes = [tuple(map(constant, shape)) for shape in (given, made)]
    batch = ((BATCH, 1),)
    held = {"weight": "weight"} if op == "conv" else {}
    tensors = {name: tuple(map(constant, (4, 3, 2, 2, 2))) for name in held}
    node = Node("node", op, ("input",), held, attributes, (batch, *shapes[1]), "")
    graph = Graph((batch, *shapes[0]), {}, tensors, (node,), (("", "node"),))
    assert compare(graph, {}, torch.rand(2, *given)) < CLOSE


def test_only_the_largest_values_of_an_adaptive_pool_can_be_read() -> None:
    both = Function(lambda x: F.adaptive_max_pool2d(x, 2, return_indices=True)[1] * 1.0)
    with pytest.raises(TraceError, match="where the largest values were"):
        trace(both.eval(), torch.zeros(1, 3, 8, 8))


class Named(nn.Module):
    """Tensors and modules that are called as a model's input and outputs are."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Conv2d(3, 4, 1)
        self.input = nn.Parameter(torch.full((4, 1, 1), 0.7))
        self.output = nn.Parameter(torch.full((4, 1, 1), 0.3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.out(x) * self.input + self.output
        return {"input": x, "output": x.relu(), "out": x}


def test_names_that_a_network_uses_itself_are_no_trouble() -> None:
    assert compared(Named(), 3, 4, 4) < CLOSE


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("flattened", ["output"]),
        ("two outputs", ["out", "aux"]),
        ("heads", ["output0", "output1"]),
    ],
)
def test_outputs_are_called_as_the_users_module_calls_them(name: str, names: list[str]) -> None:
    graph = modules.traced(name)[1].folded
    tensors = modules.drawn(graph, graph.full)
    plan = written.plan(graph, graph.full, {"mean": [0.0] * 3, "std": [1.0] * 3}, "float32")
    here = session(b"".join(wire.stream(plan, sorted(tensors.items()))))
    assert [each.name for each in here.get_outputs()] == names
    (pixels,) = here.get_inputs()
    assert (pixels.name, pixels.type, pixels.shape[0]) == ("input", "tensor(float)", "batch")
    assert all(each.shape[0] == "batch" for each in here.get_outputs())


def sizes_of(space: Space, count: int) -> list[Architecture]:
    """Architectures of a space, drawn with a seed: other widths for each group, any trained depth."""
    drawn = random.Random(1)  # noqa: S311
    found = []
    for _ in range(count):
        width = [drawn.uniform(*space.width) for _ in space.groups]
        depth = [drawn.randint(*space.blocks) for _ in space.depth] if space.blocks else None
        found.append(space.architecture(width or space.width[1], depth))
    return found


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_shipped_manifolds_networks_are_the_same_in_both_formats(
    path: Path, tmp_path: Path
) -> None:
    manifold = checkpoint.read(path)
    torch.manual_seed(0)
    shape = [sum(repeat for _, repeat in dim) for dim in manifold.space.graph.input[1:]]
    for place, architecture in enumerate(sizes_of(manifold.space, 4)):
        dtype = ("float32", "float16", "bfloat16", "int8")[place]
        tensors = list(sample(manifold, architecture))
        file = tmp_path / f"{place}.safetensors"
        plain = wire.plan(manifold, architecture, dtype)
        file.write_bytes(b"".join(wire.stream(plain, tensors)))
        net = network.load(file).float()
        # In float32, as the model has it whatever its weights are.
        net.normalise(manifold.contract.mean, manifold.contract.std)  # type: ignore[operator]
        plan = wire.plan(manifold, architecture, dtype, "onnx")
        raw = b"".join(wire.stream(plan, tensors))
        assert len(raw) == plan.length and raw.startswith(plan.header)
        # int8 is the smaller one where anything is int8: scales cost less than they save.
        for form, each in (("safetensors", plain), ("onnx", plan)):
            exact = wire.plan(manifold, architecture, "float32", form)
            assert each.length < exact.length or dtype == "float32"
        assert raw == b"".join(
            wire.stream(wire.plan(manifold, architecture, dtype, "onnx"), tensors)
        )
        here = session(raw)
        for count in (1, 5):
            images = torch.rand(count, *shape)
            wanted = net(images)
            (found,) = here.run(None, {"input": images.numpy()})
            assert float((torch.from_numpy(found) - wanted).abs().max()) < CLOSE * max(
                1.0, float(wanted.abs().max())
            )


def model(dtype: str = "float32", width: float = 0.5) -> bytes:
    """LeNet as the service sends it."""
    manifold = lenet()
    architecture = manifold.space.architecture(width)
    plan = wire.plan(manifold, architecture, dtype, "onnx")
    return b"".join(wire.stream(plan, sample(manifold, architecture, samples=1)))


@pytest.mark.parametrize("dtype", list(wire.KINDS))
def test_a_models_tensors_are_the_sampled_ones_and_its_metadata_the_contract(dtype: str) -> None:
    manifold = lenet()
    architecture = manifold.space.architecture(0.5)
    found = onnx.load_from_string(model(dtype))
    assert (found.ir_version, found.opset_import[0].version) == (written.IR, written.OPSET)
    assert (found.producer_name, found.producer_version) == ("neumeta", __version__)
    (entry,) = found.metadata_props
    assert entry.key == "neumeta"
    assert json.loads(entry.value) == wire.about(manifold, architecture)
    assert json.loads(entry.value)["classes"] == list("0123456789")
    held = {each.name: each for each in found.graph.initializer}
    for name, tensor in sample(manifold, architecture, samples=1):
        given = torch.from_numpy(numpy_helper.to_array(held[name]).astype(np.float32))
        if dtype != "int8":
            assert torch.equal(given, tensor.to(wire.KINDS[dtype][0]).float())
        elif name.endswith("bias"):
            assert torch.equal(given, tensor)
        else:
            numbers, factors = wire.quantized(name, tensor, 0)
            scale = numpy_helper.to_array(held[f"{name}_scale"])
            assert held[name].data_type == onnx.TensorProto.INT8
            assert torch.equal(given, numbers.float()) and np.array_equal(scale, factors.numpy())


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_a_device_reads_of_a_model_is_what_onnx_reads(tmp_path: Path, dtype: str) -> None:
    raw = model(dtype)
    (tmp_path / "net.onnx").write_bytes(raw)
    with (tmp_path / "net.onnx").open("rb") as file:
        about, tensors = written.contents(file, len(raw))
    found = onnx.load_from_string(raw)
    assert about == json.loads(found.metadata_props[0].value)
    assert tensors == {
        each.name: (each.data_type, tuple(each.dims), len(each.raw_data))
        for each in found.graph.initializer
    }
    check_file(tmp_path / "net.onnx", "lenet", dtype, "onnx")
    check_file(tmp_path / "net.onnx")


def swapped(raw: bytes, old: bytes, new: bytes) -> bytes:
    assert old in raw and len(old) == len(new)
    return raw.replace(old, new)


BAD: dict[str, tuple[bytes, str]] = {
    "cut short": (model()[:-1], "no whole ONNX model"),
    "one byte more": (model() + b"\0", "no whole ONNX model"),
    "empty": (b"", "no whole ONNX model"),
    "noise": (bytes(range(200, 256)) * 9, "no whole ONNX model"),
    "no text at all": (protobuf.number(1, 8), "no whole ONNX model"),
    "a number without end": (b"\xff" * 12, "no whole ONNX model"),
    "broken metadata": (swapped(model(), b'{"arch"', b'["arch"'), "no whole ONNX model"),
    "another network": (swapped(model(), b'"lenet"', b'"venet"'), "it is 'venet'"),
    "another dtype": (model("float16"), "not float32"),
    "int8": (model("int8"), "conv1.weight is type 3 .*, not float32"),
    "another size": (swapped(model(), b'"channels":[16,', b'"channels":[15,'), "not float32"),
    "a tensor renamed": (swapped(model(), b"conv1.bias", b"conv7.bias"), "conv1.bias is missing"),
    "a network's safetensors": (b"\x20" + bytes(7) + b"{" + b" " * 31, "no whole ONNX model"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_model_that_is_not_the_one_asked_for_is_refused(name: str, tmp_path: Path) -> None:
    raw, told = BAD[name]
    path = tmp_path / "net.onnx"
    path.write_bytes(raw)
    with pytest.raises(PullError, match=told):
        check_file(path, "lenet", "float32", "onnx")
    path.write_bytes(model())
    check_file(path, "lenet", "float32", "onnx")
    check_file(path)
    with pytest.raises(PullError):
        check_file(path, "lenet", "float32", "safetensors")


def test_loading_a_model_into_torch_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(model())
    with pytest.raises(ValueError, match="an ONNX model"):
        network.load(path)


def test_a_constant_that_is_long_is_made_by_the_runtime_not_sent() -> None:
    short = written.plan(*normed(8), "float32")
    long = written.plan(*normed(80), "float32")
    assert len(long.header) < len(short.header) + 100


def normed(side: int) -> tuple[Graph, dict[str, int], dict[str, Any]]:
    """A layer norm over whole maps, without a weight of its own."""
    graph = trace(
        Function(lambda x: F.layer_norm(x, x.shape[1:])).eval(), torch.zeros(1, 3, side, side)
    )[0].folded
    assert compare(graph, graph.full, torch.rand(2, 3, side, side)) < CLOSE
    return graph, graph.full, {"mean": [0.0] * 3, "std": [1.0] * 3}


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, (1 << 62) + 5, -1, -(1 << 40)])
def test_whole_numbers_are_written_as_protobuf_has_them(value: int) -> None:
    shape = onnx.TensorProto.FromString(protobuf.number(1, value))
    assert list(shape.dims) == [value]


def test_numbers_beyond_float32_are_infinite() -> None:
    numbers = np.frombuffer(b"".join(map(protobuf.float32, (1e300, -1e300, 0.1))), "<f4")
    assert numbers.tolist() == [np.inf, -np.inf, np.float32(0.1)]
