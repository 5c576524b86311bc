"""The documents say what the code does; a device's install needs only what it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from neumeta import checkpoint
from service import settings
from service.cli import welcome
from service.engine import Engine

ROOT = Path(__file__).parent.parent


def test_the_configuration_table_is_the_generated_one() -> None:
    assert settings.table() in (ROOT / "README.md").read_text()


def test_every_document_links_to_files_that_exist() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("models/*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_every_shipped_manifold_has_a_card_with_its_own_figures() -> None:
    shipped = sorted((ROOT / "models").glob("*.safetensors"))
    known = {"lenet-digits", "resnet20-cifar10", "resnet20-last-block-mlp", "vgg-cifar10"}
    assert {path.stem for path in shipped} >= known
    for path in shipped:
        assert path.stat().st_size <= 16 << 20
        card = path.with_suffix(".md").read_text()
        rows = checkpoint.read(path).about["evaluation"]
        for row in rows if len(rows) < 20 else rows[:1]:
            figure = f"{row['score']:.2f}".rstrip("0").rstrip(".")
            assert figure in card, f"{path.stem}: {row['width']} has {figure} %"
        table = json.loads(path.with_suffix(".latency.json").read_text())
        timed = {(*row["depth"], *row["channels"]) for row in table["rows"]}
        assert timed >= {(*row["depth"], *row["channels"]) for row in rows}


def test_a_device_needs_neither_the_service_nor_the_training_libraries(tmp_path: Path) -> None:
    barred = [
        "fastapi",
        "starlette",
        "uvicorn",
        "pydantic",
        "redis",
        "prometheus_client",
        "sklearn",
        "PIL",
        "tqdm",
        "tensorboard",
        "matplotlib",
        "scipy",
    ]
    code = (
        "import sys\n"
        f"for name in {barred!r}: sys.modules[name] = None\n"
        "import neumeta.network, neumeta.wire, neumeta.command\n"
        f"arguments = ['--arch', 'x', '--out', {str(tmp_path / 'x')!r}, '--url', 'http://127.0.0.1:9']\n"
        "assert neumeta.command.main(arguments) == 3\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_first_command_of_the_service_is_for_what_has_the_most_sizes() -> None:
    engine = Engine(sorted((ROOT / "models").glob("*.safetensors")), device="cpu")
    assert '"arch":"resnet20","width":0.5' in welcome(engine, "", "127.0.0.1:8000")
