"""How large the product is at two revisions: lines of code and public names.

    python -m benchmarks.size OLD [NEW]

Of neumeta, service and training: lines that are neither blank nor a comment, and of these the ones that
are no docstring. Public names are modules' functions, classes and constants, and public classes' own
methods and fields, unless they begin with an underscore. A revision is anything that git knows; NEW is
the working tree unless it is given. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGES = ("neumeta", "service", "training")
REPOSITORY = Path(__file__).parent.parent
NOTHING = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


def lines(text: str) -> tuple[int, int]:
    """Lines of a module that are neither blank nor a comment, and those of them that hold code."""
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*NOTHING, tokenize.ENDMARKER):
            held.update(range(token.start[0], token.end[0] + 1))
    whole = len(held)
    for node in ast.walk(ast.parse(text)):
        # A string alone on its lines says something and does nothing: a docstring.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            value = node.value
            if isinstance(value.value, str):
                held.difference_update(range(value.lineno, (value.end_lineno or value.lineno) + 1))
    return whole, len(held)


def names(body: list[ast.stmt], within: str = "") -> Iterator[str]:
    """Public names that these statements define, classes' own among them."""
    for node in body:
        found: list[str] = []
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found = [node.name]
        elif isinstance(node, ast.Assign):
            found = [each.id for each in node.targets if isinstance(each, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found = [node.target.id]
        for name in found:
            if not name.startswith("_"):
                yield within + name
                if isinstance(node, ast.ClassDef):
                    yield from names(node.body, f"{within}{name}.")


def files(revision: str, repository: Path = REPOSITORY) -> dict[str, str]:
    """The packages' modules at a revision ('': the working tree), by path."""
    if not revision:
        paths = [path for package in PACKAGES for path in (repository / package).rglob("*.py")]
        return {str(path.relative_to(repository)): path.read_text() for path in sorted(paths)}

    def git(*words: str) -> str:
        command = ["git", "-C", str(repository), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    listed = git("ls-tree", "-r", "--name-only", revision, *PACKAGES).split()
    return {path: git("show", f"{revision}:{path}") for path in listed if path.endswith(".py")}


def counted(modules: dict[str, str]) -> dict[str, Any]:
    """Lines and public names by package and in all."""
    found: dict[str, Any] = {}
    for package in PACKAGES:
        texts = [text for path, text in modules.items() if path.startswith(f"{package}/")]
        public = {
            f"{path}:{name}"
            for path, text in modules.items()
            if path.startswith(f"{package}/")
            for name in names(ast.parse(text).body)
        }
        found[package] = {
            "files": len(texts),
            "lines": sum(lines(text)[0] for text in texts),
            "code": sum(lines(text)[1] for text in texts),
            "public_names": len(public),
        }
    found["all"] = {
        key: sum(found[package][key] for package in PACKAGES)
        for key in ("files", "lines", "code", "public_names")
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old")
    parser.add_argument("new", nargs="?", default="", help="default: the working tree")
    asked = parser.parse_args()
    both = {
        name or "working tree": counted(files(name))
        for name in dict.fromkeys((asked.old, asked.new))
    }
    print("| revision | package | files | lines | of code | public names |")
    print("|---|---|---:|---:|---:|---:|")
    for name, found in both.items():
        for package, row in found.items():
            print(f"| {name} | {package} | " + " | ".join(map(str, row.values())) + " |")
    print(json.dumps({"benchmark": "size", "result": both}))


if __name__ == "__main__":
    main()
