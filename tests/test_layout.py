"""No strided convolution by one pixel runs backwards: the fault of oneDNN is out of reach."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import runs
from training import data, fit, networks, recipe_file, source
from training.layout import SoundConvolutions, sound
from training.task import TASKS

ROOT = Path(__file__).parent.parent


class Backwards(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the (kernel, stride) of every convolution that runs backwards."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.seen.append((tuple(args[2].shape[2:]), tuple(args[4])))
        return func(*args, **(kwargs or {}))

    def strided_pixels(self) -> int:
        return sum(max(kernel) == 1 and max(stride) > 1 for kernel, stride in self.seen)


class Odd(nn.Module):
    """What someone's own network may do: permuted axes, groups, transposed, one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(6, 12, 1, 2, groups=3)
        self.depthwise = nn.Conv2d(12, 12, 1, (1, 2), padding=1, groups=12)
        self.again = nn.Conv2d(12, 5, 1, 3)
        self.transposed = nn.ConvTranspose2d(5, 4, 1, 2, output_padding=1)
        self.line = nn.Conv1d(4, 3, 1, 2)
        self.wide = nn.Conv2d(3, 6, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        x = self.depthwise(self.grouped(x))
        x = self.again(x)
        return self.line(self.transposed(x).flatten(2)).mean(2)  # type: ignore[no-any-return]


def test_any_network_of_ones_own_runs_no_strided_pixel_backwards() -> None:
    torch.manual_seed(0)
    net = Odd()
    x = torch.randn(2, 3, 64, 64)
    with Backwards() as seen, SoundConvolutions():
        net(x).sum().backward()
    assert len(seen.seen) == 7 - 1 and seen.strided_pixels() == 0


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export's own
def test_an_exported_graph_runs_no_strided_pixel_backwards() -> None:
    net, x = (
        nn.Sequential(nn.Conv2d(3, 6, 1, 2), nn.ConvTranspose2d(6, 4, 1, 2)),
        torch.ones(2, 3, 9, 9),
    )
    program = torch.export.export(net, (x,))
    for each in (program, program.run_decompositions()):
        with Backwards() as seen, SoundConvolutions():
            each.module()(x).sum().backward()
        assert len(seen.seen) == 2 and seen.strided_pixels() == 0


def test_fit_and_source_training_run_no_strided_pixel_backwards(tmp_path: Path) -> None:
    asked = recipe_file.load("cifar10-resnet")
    digits = data.load("digits")
    few = data.Dataset(
        "few", digits.train_images[:8].expand(-1, 3, -1, -1).contiguous(), digits.train_labels[:8],
        digits.test_images[:8].expand(-1, 3, -1, -1).contiguous(), digits.test_labels[:8],
        digits.classes, [0.3] * 3, [0.4] * 3, pad=0, flips=False,
    )  # fmt: skip
    task = TASKS["classification"]
    net = networks.resnet_cifar(widths=(5, 10, 19))  # 5 channels before a shortcut
    with Backwards() as seen:
        source.train(net, few, task, epochs=1, lr=0.01, batch=8)
    assert len(seen.seen) == 21 and seen.strided_pixels() == 0
    fitted = asked.changed(
        network={"weights": "", "train": {"epochs": 0}, "named": {}},
        representation={"options": {}, "anchored": None, "corrected": None},
        fit={"width": (0.25, 1.0), "blocks": None, "epochs": 1.0, "batch": 8, "full_weight": 1.0,
             "distill": "none", "widths": ()},
        evaluate={"blocks": None},
    )  # fmt: skip
    manifold, smoothed = runs.prepared(fitted, few, tmp_path)
    with Backwards() as seen:
        fit.fit(manifold, smoothed, few, task, fitted, tmp_path)
    assert len(seen.seen) == 3 * 21 and seen.strided_pixels() == 0


CALLS: list[tuple[str, Callable[..., Tensor], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ("plain", F.conv2d, (2, 6, 9, 8), (4, 6, 1, 1), {"stride": 2}),
    ("padded", F.conv2d, (2, 6, 9, 8), (4, 6, 1, 1), {"stride": (2, 3), "padding": (1, 2)}),
    ("valid", F.conv2d, (2, 6, 9, 8), (4, 6, 1, 1), {"stride": [2, 1], "padding": "valid"}),
    ("grouped", F.conv2d, (2, 6, 9, 8), (4, 3, 1, 1), {"stride": 2, "groups": 2}),
    ("one image", F.conv2d, (6, 9, 8), (4, 6, 1, 1), {"stride": 3}),
    ("line", F.conv1d, (2, 6, 9), (4, 6, 1), {"stride": 2, "padding": 1}),
    ("volume", F.conv3d, (2, 6, 5, 4, 3), (4, 6, 1, 1, 1), {"stride": (2, 1, 2)}),
    ("back", F.conv_transpose2d, (2, 6, 5, 4), (6, 4, 1, 1), {"stride": 2}),
    ("back, cut", F.conv_transpose2d, (2, 6, 5, 4), (6, 4, 1, 1),
     {"stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2)}),
    ("back, grouped", F.conv_transpose1d, (2, 6, 5), (6, 2, 1), {"stride": 3, "groups": 2}),
    ("back, dilated", F.conv_transpose1d, (2, 6, 5), (6, 4, 1),
     {"stride": 2, "output_padding": 3, "dilation": 4}),
    ("back, one image", F.conv_transpose3d, (6, 5, 4, 3), (6, 4, 1, 1, 1), {"stride": 2}),
]  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CALLS, ids=[case[0] for case in CALLS])
def test_the_sums_and_their_gradients_are_the_same(case: Any, bias: bool) -> None:
    """float64 in the plain layout, where torch's own way is sound."""
    _, call, image, weight, options = case
    torch.manual_seed(0)
    outputs = weight[0] if "back" not in case[0] else weight[1] * options.get("groups", 1)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in (image, weight, (outputs,))]
    inputs = [each.requires_grad_() for each in inputs[: 3 if bias else 2]]
    with Backwards() as plain:
        expected = call(*inputs, **options)
        mix = torch.randn_like(expected)
        gradients = torch.autograd.grad((expected * mix).sum(), inputs)
    with Backwards() as seen, SoundConvolutions():
        found = call(*inputs, **options)
        ours = torch.autograd.grad((found * mix).sum(), inputs)
    assert plain.strided_pixels() == 1 and seen.strided_pixels() == 0
    torch.testing.assert_close(found, expected)
    for a, b in zip(ours, gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_other_convolutions_are_left_as_they_are() -> None:
    x = torch.ones(1, 3, 8, 8, requires_grad=True)
    with Backwards() as seen, SoundConvolutions():
        for kernel, stride in ((1, 1), (3, 2), ((1, 3), (1, 2))):
            nn.Conv2d(3, 4, kernel, stride)(x).sum().backward()
    assert seen.seen == [((1, 1), (1, 1)), ((3, 3), (2, 2)), ((1, 3), (1, 2))]
    with SoundConvolutions(), pytest.raises(RuntimeError, match="same"):
        F.conv2d(x, torch.ones(4, 3, 1, 1), stride=2, padding="same")


def test_only_the_cpu_pays_for_sound_convolutions() -> None:
    """Every call of torch goes through the mode: on a GPU, training would take half as long again."""
    thinned = {}
    for device in ("cpu", "meta"):
        x = torch.ones(1, 3, 8, 8, requires_grad=True)
        with Backwards() as seen, sound(torch.device(device)):
            nn.Conv2d(3, 4, 1, 2)(x).sum().backward()
        thinned[device] = not seen.strided_pixels()
    assert thinned == {"cpu": True, "meta": False}


PROCESS = """
import sys, torch, torch.nn.functional as F
from contextlib import nullcontext
from training.layout import SoundConvolutions
torch.set_num_threads(1)
torch.manual_seed(0)
last, plain = torch.channels_last, torch.contiguous_format
with SoundConvolutions() if sys.argv[1] == "sound" else nullcontext():
    for channels in (1, 2, 3, 5, 6, 7, 8, 11, 12, 15, 16, 17):
        for back in (False, True):
            for turn in range(4):
                x = torch.randn(8, 16 if back else channels, 64 >> back, 64 >> back)
                w = torch.randn(16, channels, 1, 1)
                run = F.conv_transpose2d if back else F.conv2d
                grads = []
                for layout, kind in ((last, torch.float32), (plain, torch.float64)):
                    leaves = [t.to(kind).contiguous(memory_format=layout) for t in (x, w)]
                    leaves = [leaf.requires_grad_() for leaf in leaves]
                    grads.append(torch.autograd.grad(run(*leaves, stride=2).square().sum(), leaves))
                for a, b in zip(*grads):
                    assert float((a - b).abs().max()) <= 1e-4 * float(b.abs().max()), (channels, back)
print("sound")
"""


def test_a_process_of_its_own_survives_all_channel_counts() -> None:
    """Real backward passes around both vector sizes. Without the rule this process dies on AVX2."""
    command = [sys.executable, "-c", PROCESS, "sound"]
    environment = {"PYTHONPATH": str(ROOT), "MALLOC_PERTURB_": "1", "PATH": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=240
    )
    assert done.returncode == 0 and done.stdout == "sound\n", done.stderr
