"""The user's own network: `module:function` or `file.py:function` -> a torch module.

The function takes the arguments that a recipe gives, or none. Its code is run: a name comes from the
user's own command or recipe.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn


def resolve(name: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """The network that the function (or class) of this name makes.

    A file may import its neighbours, a module may lie in the working folder.

    Raises ValueError, naming the function and in one line, if it is not there, fails, or gives
    something else than a torch module.
    """
    path, colon, function = name.rpartition(":")
    if not colon or not path or not function.isidentifier():
        raise ValueError(
            f"{name}: not the name of a function; 'mynet.py:build' or 'torchvision.models:resnet18'"
        )
    try:
        held = _file(Path(path)) if path.endswith(".py") else _module(path)
    except (Exception, SystemExit) as error:  # the user's code, which may raise anything
        raise ValueError(f"{name}: cannot be imported: {_line(error)}") from None
    build = getattr(held, function, None)
    if not callable(build):
        made = [key for key, each in vars(held).items() if callable(each) and key[0] != "_"]
        known = f"; it has {', '.join(sorted(made)[:8])}" if made else ""
        raise ValueError(f"{name}: {path} has no function {function!r}{known}")
    try:
        found = build(**(arguments or {}))
    except (Exception, SystemExit) as error:  # as above
        raise ValueError(f"{name}: failed: {_line(error)}") from None
    if not isinstance(found, nn.Module):
        raise ValueError(f"{name}: gives a {type(found).__name__}, not a torch.nn.Module")
    return found


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    path = path.resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError("it is no Python file")
    held = importlib.util.module_from_spec(spec)
    with _importable(str(path.parent)):
        spec.loader.exec_module(held)
    # Its classes could not be pickled otherwise; but another module of the name stays what it is.
    sys.modules.setdefault(path.stem, held)
    return held


def _module(name: str) -> ModuleType:
    with _importable(os.getcwd()):
        return importlib.import_module(name)


@contextmanager
def _importable(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
