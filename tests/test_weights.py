"""Reading weights in every layout that people publish, and refusing what does not fit."""

from __future__ import annotations

import json
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.test_networks import scrambled
from training import networks, source, weights

State = dict[str, Tensor]


def filled(path: Path, depth: tuple[int, ...], classes: int) -> networks.ResNetCifar:
    """The built-in network with what the file holds."""
    net = networks.resnet_cifar(depth, classes)
    source.fill(net, path)
    return net.eval()


def prefixed(*prefixes: str) -> Callable[[State], State]:
    return lambda state: {"".join(prefixes) + name: value for name, value in state.items()}


def renamed(*pairs: tuple[str, str]) -> Callable[[State], State]:
    def change(state: State) -> State:
        found = {}
        for name, value in state.items():
            for old, new in pairs:
                name = name.replace(old, new)
            found[name] = value
        return found

    return change


def optimised(state: State) -> dict[str, Any]:
    """A training run's file: weights, averaged weights that differ, an optimiser's state, numbers."""
    net = nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(net.parameters())
    net(torch.zeros(1, 2)).sum().backward()
    optimiser.step()
    return {
        "epoch": 3,
        "ema": {name: torch.zeros_like(value) for name, value in state.items()},
        "model": state,
        "optimizer": optimiser.state_dict(),
        "best": np.float64(91.5),
        "history": [np.float32(1.0), np.int64(2)],
        "curve": np.ones(3, np.float32),
        "args": Namespace(lr=0.1, arch="resnet20"),
        "loss": torch.tensor(0.3),
    }


LAYOUTS: dict[str, Callable[[State], Any]] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "best_prec1": 91.7},
    "net": lambda state: {"net": state, "acc": 90.0, "epoch": 7},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "ema": lambda state: {"ema": state},
    "nested twice": lambda state: {"model": {"state_dict": state}},
    "an unknown key": lambda state: {"weights_of_epoch_9": state, "epoch": 9},
    "module.": lambda state: {"state_dict": prefixed("module.")(state)},
    "model.": prefixed("model."),
    "_orig_mod.": prefixed("_orig_mod."),
    "module._orig_mod.model.": prefixed("module.", "_orig_mod.", "model."),
    "compiled inside": renamed(("layer1.", "layer1._orig_mod.")),
    "averaged": lambda state: {"n_averaged": torch.tensor(5), **prefixed("module.")(state)},
    "a training run": optimised,
    "no counts": lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
    "fc": renamed(("linear.", "fc.")),
    "classifier": renamed(("linear.", "classifier.")),
    "downsample": renamed((".shortcut.", ".downsample."), ("linear.", "fc.")),
}
FILES: dict[str, Callable[[Any, Path], None]] = {
    "zip": lambda held, path: torch.save(held, path),
    "legacy": lambda held, path: torch.save(held, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("file", list(FILES))
@pytest.mark.parametrize("shortcut", ["A", "B", "conv"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_gives_the_same_logits(
    layout: str, shortcut: str, file: str, tmp_path: Path
) -> None:
    theirs = networks.resnet_cifar((1, 2, 1), 7, shortcut=shortcut)
    scrambled(theirs)
    FILES[file](LAYOUTS[layout](theirs.state_dict()), tmp_path / "w.pth")
    x = torch.randn(2, 3, 16, 16)
    mine = filled(tmp_path / "w.pth", (1, 2, 1), 7)
    with torch.no_grad():
        torch.testing.assert_close(mine(x), theirs(x), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_any_precision_becomes_float32(
    kind: torch.dtype, shortcut: str, suffix: str, tmp_path: Path
) -> None:
    theirs = networks.resnet_cifar((1, 1, 1), 100, shortcut=shortcut)
    scrambled(theirs)
    # As people do it: counts are cast too, and what is more than 65504 is infinite in float16.
    state = {
        name: (value + 70_000 if "num_batches" in name else value).to(kind)
        for name, value in theirs.state_dict().items()
    }
    path = tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    theirs.load_state_dict({name: value.float() for name, value in state.items()})
    x = torch.randn(2, 3, 16, 16)
    read = weights.read(path)
    assert {tensor.dtype for tensor in read.values()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(filled(path, (1, 1, 1), 100)(x), theirs(x), atol=2e-5, rtol=1e-5)


def test_only_the_weights_are_read(tmp_path: Path) -> None:
    state = {"a.weight": torch.rand(2, 2)}
    torch.save(optimised(state), tmp_path / "run.pt")
    found = weights.read(tmp_path / "run.pt")
    assert list(found) == ["a.weight"] and torch.equal(found["a.weight"], state["a.weight"])


def test_parts_beside_each_other_are_one_network(tmp_path: Path) -> None:
    net = networks.vae()
    parts = {"encoder": net.encoder.state_dict(), "decoder": net.decoder.state_dict()}
    torch.save(parts, tmp_path / "vae.pt")
    other = networks.vae()
    weights.fit_into(other, weights.read(tmp_path / "vae.pt"))
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_module_whose_own_names_look_wrapped_is_filled(tmp_path: Path) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))

    one, two = Outer(), Outer()
    torch.save(prefixed("module.")(one.state_dict()), tmp_path / "w.pt")
    weights.fit_into(two, weights.read(tmp_path / "w.pt"))
    assert torch.equal(one.model[0].weight, two.model[0].weight)


class Bottleneck(nn.Module):
    """torchvision's names: here bn3 is the branch's, downsample.1 the shortcut's."""

    def __init__(self, shortcut: str) -> None:
        super().__init__()
        for i in (1, 2, 3):
            self.add_module(f"conv{i}", nn.Conv2d(4, 4, 1, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(4))
        self.add_module(shortcut, nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))


def test_bn3_of_a_bottleneck_stays_its_own(tmp_path: Path) -> None:
    one, two = scrambled(Bottleneck("downsample")), Bottleneck("shortcut")
    torch.save(one.state_dict(), tmp_path / "w.pt")
    weights.fit_into(two, weights.read(tmp_path / "w.pt"))
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_nothing_is_changed_where_one_tensor_does_not_fit() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    given = {name: torch.zeros_like(value) for name, value in before.items()} | {
        "1.weight": torch.zeros(4, 2)
    }
    with pytest.raises(ValueError, match=r"here.pt: .*1.weight \(4, 2\) where \(3, 2\)"):
        weights.fit_into(net, given, "here.pt")
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_integers_are_no_weights() -> None:
    with pytest.raises(ValueError, match=r"weight of torch.int8 where torch.float32"):
        weights.fit_into(
            nn.Linear(2, 2), {"weight": torch.ones(2, 2).char(), "bias": torch.ones(2)}
        )


def resnet(*depth: int, **more: Any) -> State:
    return networks.resnet_cifar(depth or (1, 1, 1), **more).state_dict()


MISFITS: dict[str, tuple[State, str]] = {
    "depth": (resnet(2, 1, 1), r"depth \(1, 1, 1\).* found .*depth \(2, 1, 1\).*layer1\.1\.conv1"),
    "classes": (resnet(classes=100), r"10 classes; found .*100 classes.*linear.weight \(100, 64\)"),
    "widths": (
        resnet(widths=(32, 64, 128)),
        r"widths \(16, 32, 64\).*found .*widths \(32, 64, 128\)",
    ),
    "four stages": (
        resnet(1, 1, 1, 1, widths=(16, 32, 64, 64)),
        r"depth \(1, 1, 1, 1\).*unexpected: layer4\.0",
    ),
    "one missing": (
        {k: v for k, v in resnet().items() if k != "layer1.0.bn2.bias"},
        r"missing: layer1\.0\.bn2\.bias",
    ),
    "one too many": (
        {**resnet(), "aux.weight": torch.zeros(2)},
        r"unexpected: aux\.weight",
    ),
    "another network": (
        networks.lenet().state_dict(),
        "missing: bn1.weight.*unexpected: conv1.bias",
    ),
    "a strange classifier": (
        {**resnet(), "linear.weight": torch.tensor(1.0)},
        "different: linear.weight",
    ),
}


@pytest.mark.parametrize("kind", list(MISFITS))
def test_a_misfit_is_told_by_what_was_expected_and_found(kind: str, tmp_path: Path) -> None:
    state, match = MISFITS[kind]
    path = tmp_path / "misfit.th"
    torch.save(state, path)
    with pytest.raises(ValueError, match=match) as refused:
        filled(path, (1, 1, 1), 10)
    assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value)


def scripted(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.ReLU()), path)


def cut(path: Path, **kind: bool) -> None:
    torch.save(resnet(), path, **kind)
    path.write_bytes(path.read_bytes()[:-2000])


def cut_safetensors(path: Path) -> None:
    save_file({"a": torch.rand(100)}, path)
    path.write_bytes(path.read_bytes()[:-9])


NO_WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "text": (lambda path: path.write_text("hello there, no weights"), "neither"),
    "json": (lambda path: path.write_text(json.dumps({"a": [1, 2, 3]})), "neither"),
    "a folder": (lambda path: path.mkdir(), "folder"),
    "a module": (lambda path: torch.save(nn.Linear(2, 2), path), "pickled .*Linear.*state_dict"),
    "TorchScript": (scripted, "TorchScript"),
    "cut zip": (cut, "cut short"),
    "cut legacy": (lambda path: cut(path, _use_new_zipfile_serialization=False), "cut short"),
    "cut safetensors": (cut_safetensors, "cut short"),
    "a list": (lambda path: torch.save([torch.zeros(2)], path), "no weights by name"),
    "a tensor": (lambda path: torch.save(torch.zeros(2), path), "no weights by name"),
    "numbers": (lambda path: torch.save({"epoch": 3}, path), "no weights by name"),
    "not finite": (
        lambda path: torch.save({"a.b": torch.tensor([1.0, float("nan")])}, path),
        "a.b has values that are not finite",
    ),
    "quantised": (
        lambda path: torch.save(
            {"a.b": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)}, path
        ),
        "quantised",
    ),
    "sparse": (lambda path: torch.save({"a.b": torch.eye(2).to_sparse()}, path), "sparse"),
}


@pytest.mark.parametrize("kind", list(NO_WEIGHTS))
def test_what_holds_no_weights_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    make, match = NO_WEIGHTS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # making old formats warns; reading them must not
        make(path)
    with pytest.raises(ValueError, match=match) as refused:
        weights.read(path)
    assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value)


def test_a_file_that_would_run_code_runs_none(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": resnet(), "x": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match="run code"):
        weights.read(tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()


def test_a_header_whose_length_looks_like_a_zip_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    save_file({"a": torch.ones(2)}, path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].ljust(0x4B50)
    path.write_bytes(0x4B50.to_bytes(8, "little") + header + raw[8 + length :])
    assert torch.equal(weights.read(path)["a"], torch.ones(2))


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        weights.read(tmp_path / "none.pt")
