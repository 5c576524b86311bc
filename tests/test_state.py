"""What a stage keeps is read back as it was written, or its file is named with what to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from training import state
from training.divergence import Diverged


class Code:
    """What a pickle may hold: a call that is made when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_what_is_kept_comes_back_and_what_is_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    state.save({"step": 3, "model": {"a": torch.arange(3.0)}}, path)
    with state.loaded(path) as kept:
        assert kept["step"] == 3 and torch.equal(kept["model"]["a"], torch.arange(3.0))
    said = f"{path}: damaged, cut short or of another network (KeyError: 'optimiser'); delete it"
    with pytest.raises(state.BadState) as told, state.loaded(path) as kept:
        kept["optimiser"]  # fails as the block that takes the content does
    assert str(told.value).startswith(said)
    whole = path.read_bytes()
    for damage in (whole[:-1000], whole[:10], b"", b"\x80\x02" + whole[200:]):
        path.write_bytes(damage)
        with pytest.raises(state.BadState) as told, state.loaded(path):
            raise AssertionError("it was read")
        assert str(path) in str(told.value) and "\n" not in str(told.value)


def test_why_a_file_is_refused_is_one_short_line(tmp_path: Path) -> None:
    for error, shown in (
        (RuntimeError("first\nsecond"), "(RuntimeError: first)"),
        (KeyError(), "(KeyError:)"),
        (ValueError("x" * 500), "x)"),
    ):
        with pytest.raises(state.BadState) as told, state.reading(tmp_path / "a.pt"):
            raise error
        assert shown in str(told.value) and len(str(told.value)) < 300 + len(str(tmp_path))


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    torch.save(Code(tmp_path / "made"), path)
    with pytest.raises(state.BadState, match=r"fit\.pt: damaged"), state.loaded(path):
        pass
    assert not (tmp_path / "made").exists()


def test_a_file_that_cannot_be_read_and_divergence_are_not_damage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"), state.loaded(tmp_path / "gone.pt"):
        pass
    for error in (PermissionError("no"), Diverged("it diverged")):
        with pytest.raises(type(error)) as told, state.reading(tmp_path / "a.pt"):
            raise error
        assert told.value is error
