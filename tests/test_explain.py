"""What `--explain` prints, and whose network it is about."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from training.explain import explain
from training.modules import resolve
from training.trace import TraceError

MINE = """
import torch
from torch import nn
from neighbour import WIDTH

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(WIDTH)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x):
        return x + self.conv(torch.relu(self.norm(x)))

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, stride=2, padding=1)
        self.body = nn.Sequential(Block(), Block(), Block())
        self.wide = nn.Conv2d(WIDTH, 3 * WIDTH, 1)
        self.fc = nn.Linear(3 * WIDTH, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.wide(self.body(self.stem(x)))).mean((2, 3)))

def build():
    return Mine()

def broken():
    raise RuntimeError("no weights\\nhere")

def number():
    return 7
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 8\n")
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


@pytest.fixture(autouse=True)
def _own_modules() -> object:
    path = list(sys.path)
    yield
    assert sys.path == path
    for name in ("mine", "neighbour", "leaves"):
        sys.modules.pop(name, None)


def rows(text: str, title: str) -> list[list[str]]:
    """The cells of the table under the line that begins with `title`."""
    lines = text.split("\n")
    start = next(place for place, line in enumerate(lines) if line.startswith(title))
    table = []
    for line in lines[start + 1 :]:
        if not line:
            break
        table.append(re.split(r"\s{2,}", line.strip()))
    return table


def test_groups_stages_fixed_sizes_and_costs_are_those_of_the_network(file: Path) -> None:
    net = resolve(f"{file}:build")
    text = explain(net, (3, 16, 20))
    assert rows(text, "Width: 2 axes in 2 groups") == [
        ["group", "size", "axes of that size, each called after the module that makes it"],
        ["stem", "8", "stem"],
        ["wide", "24", "wide"],
    ]
    assert rows(text, "Depth: 1 stage") == [
        ["stage", "blocks", "alike", "which"],
        ["body", "3", "3", "body.0 to body.2"],
    ]
    assert rows(text, "Keeps its size") == [
        ["input", "is the image"],
        ["fc", "is an output of the network"],
    ]
    costs = rows(text, "Size and cost")
    assert [row[0] for row in costs] == ["width", "0.25", "0.5", "0.75", "1"]
    # A batch norm before its convolution is served as a factor and a summand for each channel.
    parameters = sum(p.numel() for p in net.parameters())
    macs = 80 * (3 * 9 * 8 + 3 * 9 * 8 + 8 * 24) + 24 * 5
    assert costs[-1] == [
        "1",
        str(parameters) if parameters < 1000 else f"{parameters / 1000:.2f} k",
        f"{parameters * 4 / 1e6:.2f} MB",
        f"{macs / 1000:.2f} k",
    ]
    assert text.startswith("Mine on images of 3 x 16 x 20: ")
    assert max(map(len, text.split("\n"))) <= 100


def test_a_network_that_cannot_morph_says_so() -> None:
    text = explain(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (3, 2, 2))
    assert "Width: no axis can be resized." in text
    assert "Depth: no container has consecutive children that are alike" in text
    assert [row[0] for row in rows(text, "Size and cost")] == ["width", "1"]


def test_many_axes_of_one_size_are_counted_not_listed() -> None:
    layers = [nn.Linear(12, 12)]
    for _ in range(9):
        layers += [nn.ReLU(), nn.Linear(12, 12)]
    text = explain(nn.Sequential(nn.Flatten(), *layers, nn.ReLU(), nn.Linear(12, 2)), (3, 2, 2))
    # The last one is counted too: ten layers, of which six are named.
    assert "and 4 more" in text


def test_what_cannot_be_served_is_named(file: Path) -> None:
    class Sorted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sort(-1).values

    with pytest.raises(TraceError, match=r"^0: sort \(sort\) is not among the operations"):
        explain(nn.Sequential(Sorted()), (3, 4, 4))


def test_a_module_is_found_in_the_working_folder(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    assert type(resolve("mine:build")).__name__ == "Mine"
    assert type(resolve("mine.py:Mine")).__name__ == "Mine"


def test_arguments_are_given_to_the_function(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from torch import nn\ndef build(classes=3):\n    return nn.Linear(2, classes)\n"
    )
    net = resolve(f"{path}:build", {"classes": 5})
    assert isinstance(net, nn.Linear) and net.out_features == 5
    with pytest.raises(
        ValueError, match="failed: TypeError: .*unexpected keyword argument 'width'"
    ):
        resolve(f"{path}:build", {"width": 2})


def test_a_file_does_not_replace_a_module_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "json.py"
    path.write_text("from torch import nn\ndef build():\n    return nn.Identity()\n")
    before = sys.modules["json"]
    resolve(f"{path}:build")
    assert sys.modules["json"] is before


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("{}", "not the name of a function"),
        ("{}:", "not the name of a function"),
        (":build", "not the name of a function"),
        ("{}:not a name", "not the name of a function"),
        ("{}x.py:build", "cannot be imported: FileNotFoundError: there is no such file"),
        ("no_such_module:build", "cannot be imported: ModuleNotFoundError"),
        ("{}:nothing", "has no function 'nothing'; it has Block, Mine, broken, build, number"),
        ("{}:broken", "failed: RuntimeError: no weights here"),
        ("{}:number", "gives a int, not a torch.nn.Module"),
        ("{}:Block.forward", "not the name of a function"),
    ],
)
def test_names_that_make_no_network_are_refused_in_one_line(
    file: Path, name: str, why: str
) -> None:
    given = name.format(file)
    with pytest.raises(ValueError, match=re.escape(why)) as caught:
        resolve(given)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(given)


def test_a_file_that_ends_the_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "leaves.py"
    path.write_text("import sys\nsys.exit('usage: ...')\n")
    with pytest.raises(ValueError, match=r"cannot be imported: SystemExit: usage"):
        resolve(f"{path}:build")
