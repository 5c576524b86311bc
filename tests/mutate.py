"""Mutation testing: does any test fail when a line is broken on purpose? docs/mutation.md

    python -m tests.mutate neumeta/fold.py training/task.py --sample 30

makes mutants of each file with cosmic-ray's operators and runs the tests that mirror the file on each,
until one fails. No file is touched. A mutant lives in a process that is forked when everything is
imported, and changes the code of its functions there; if it changes what is made at import, it is
imported in the file's place. Shapes are not checked.
"""

from __future__ import annotations

import argparse
import ast
import gc
import json
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
OPERATORS = (
    *("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_FloorDiv", "Pow_Mul"),
    *("BitOr_BitAnd", "BitAnd_BitOr", "LShift_RShift", "RShift_LShift"),
    *("Eq_NotEq", "NotEq_Eq", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Is_IsNot", "IsNot_Is"),
    *("Delete_USub", "Delete_Not", "AddNot", "TrueWithFalse", "FalseWithTrue", "AndWithOr"),
    *("OrWithAnd", "BreakWithContinue", "ContinueWithBreak", "ExceptionReplacer"),
    *("NumberReplacer", "ZeroIterationForLoop"),
)
"""The ends of cosmic-ray's names: one change for each kind of operator, not all that it has."""


@dataclass
class Mutant:
    """One change of a file, by the operator's name and the how-manieth place it is applied at: the
    same as long as the file is."""

    name: str
    line: int
    before: str
    after: str
    code: str = field(repr=False, default="")
    outcome: str = ""


@dataclass
class Baseline:
    """What the unchanged file's tests do: seconds and lines by test, and those that are left out."""

    seconds: dict[str, float]
    lines: dict[str, set[int]]
    left_out: dict[str, str]


def mutants(path: Path, wanted: Callable[[list[str]], list[str]], most: int) -> list[Mutant]:
    """The first `most` mutants of a file, among those that `wanted` takes of all their names, in its
    order, whose program differs in more than annotations, docstrings, what decorators are told (how
    much is cached, whether a class is frozen), a `*` between parameters and whether `zip` is strict."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    source, found = path.read_text(), list[Mutant]()
    operators = {
        name.rpartition("/")[2]: get_operator(name)()
        for name in operator_names()
        if name.endswith(OPERATORS)
    }
    nodes, names = list(ast_nodes(get_ast(source))), []
    for name, operator in operators.items():
        places = sum(len(list(operator.mutation_positions(node))) for node in nodes)
        names += [f"{name}:{occurrence}" for occurrence in range(places)]
    seen = {_program(source)}
    for each in wanted(names):
        name, _, occurrence = each.partition(":")
        code = mutate_code(source, operators[name], int(occurrence))
        try:
            program = _program(code)
        except SyntaxError:  # `not` before an assignment within an expression
            continue
        if program in seen:
            continue
        seen.add(program)
        pairs = enumerate(zip(source.split("\n"), code.split("\n"), strict=False), 1)
        line, (before, after) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
        found.append(Mutant(each, line, before.strip(), after.strip(), code))
        if len(found) == most:
            break
    return sorted(found, key=lambda mutant: mutant.line)


def _program(source: str) -> str:
    """A source's tree without what is never run."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            node.annotation = ast.Constant(None)  # type: ignore[assignment]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            calls = [
                each.func if isinstance(each, ast.Call) else each for each in node.decorator_list
            ]
            node.decorator_list = calls
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        if isinstance(node, ast.arguments):  # `*` and `/` between them: no operators
            node.args = node.posonlyargs + node.args + node.kwonlyargs
            node.defaults += [each for each in node.kw_defaults if each]
            node.posonlyargs, node.kwonlyargs, node.kw_defaults = [], [], []
        if isinstance(node, ast.keyword) and node.arg == "strict":
            node.value = ast.Constant(None)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None
    return ast.dump(tree)


def tests_of(path: Path) -> list[Path]:
    """The tests that mirror a file: those of its name, and what pyproject.toml adds."""
    parts = [part for part in path.relative_to(ROOT).with_suffix("").parts if part != "__init__"]
    found = []
    for end in range(len(parts), 1, -1):
        for start in (0, 1):
            test = ROOT / "tests" / f"test_{'_'.join(parts[start:end])}.py"
            if not found and test.exists():
                found.append(test)
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutation"]["more"]
    for name, more in table.items():
        if path.is_relative_to(ROOT / name):
            found += [ROOT / "tests" / each for each in more]
    return list(dict.fromkeys(found))


class Changed(MetaPathFinder, Loader):
    """Finds one module's changed source in place of its file's."""

    def __init__(self, path: Path, code: str) -> None:
        parts = path.relative_to(ROOT).with_suffix("").parts
        self.module = ".".join(parts).removesuffix(".__init__")
        self.path, self.code = path, code

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.module:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None:
            spec.loader = self
        return spec

    def exec_module(self, module: Any) -> None:
        exec(compile(self.code, str(self.path), "exec"), module.__dict__)


class Watch:
    """A pytest plugin that keeps what each test did."""

    def __init__(self, path: Path) -> None:
        self.path, self.known = str(path), Baseline({}, {}, {})

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        lines = self.known.lines.setdefault(item.nodeid, set())

        def inside(frame: Any, event: str, argument: Any) -> Any:
            lines.add(frame.f_lineno)
            return inside

        def entered(frame: Any, event: str, argument: Any) -> Any:
            return inside if frame.f_code.co_filename == self.path else None

        began = time.process_time()
        sys.settrace(entered)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.known.seconds[item.nodeid] = time.process_time() - began

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            why = str(report.longrepr).strip().splitlines()
            self.known.left_out[report.nodeid] = why[-1] if why else report.outcome


class Limit:
    """A pytest plugin that ends a test after so many seconds of the processor's, not of the clock's."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        def over(*_: Any) -> None:
            pytest.fail(f"more than {self.seconds:g} s")

        signal.signal(signal.SIGPROF, over)
        signal.setitimer(signal.ITIMER_PROF, self.seconds)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


class Rounds:
    """A pytest plugin that runs the tests as they are, and some of them on each mutant, each time in a
    process of its own, forked when all is imported."""

    def __init__(self, path: Path, mutants: list[Mutant], budget: float, log: Path) -> None:
        self.path, self.mutants, self.budget, self.log = path, mutants, budget, log
        self.known: Baseline | None = None

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.known = known = forked(lambda: self.unchanged(session), 1200, self.log)
        if not isinstance(known, Baseline):
            self.known = None
            return True
        functions = [each for each in gc.get_objects() if type(each) is FunctionType]
        own = {
            (each.__code__.co_qualname, each.__code__.co_firstlineno): each
            for each in functions
            if each.__code__.co_filename == str(self.path)
        }
        for mutant in self.mutants:
            codes = dict(_codes(compile(mutant.code, str(self.path), "exec")))
            changed = {f: codes[k] for k, f in own.items() if k in codes and f.__code__ != codes[k]}
            # Else what is made at import changes: a constant, a default, a class.
            if changed:
                limit = 60 + 30 * self.budget
                code = forked(
                    lambda m=mutant, c=changed: self.tried(session, m, c), limit, self.log
                )
                mutant.outcome = {None: "timeout", 0: "survived"}.get(code, "killed")
        return True

    def unchanged(self, session: pytest.Session) -> Baseline:
        watch = Watch(self.path)
        session.config.pluginmanager.register(watch)
        for item, after in zip(session.items, [*session.items[1:], None], strict=False):
            try:
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            except (
                Exception,
                pytest.fail.Exception,
            ) as error:  # a limit that was reached between a test and its fixtures
                watch.known.left_out[item.nodeid] = str(error)
                session._setupstate.teardown_exact(None)
        return watch.known

    def tried(self, session: pytest.Session, mutant: Mutant, changed: dict[Any, Any]) -> int:
        for function, code in changed.items():
            function.__code__ = code
        assert self.known is not None
        return _first_failure(session, session.items, self.known, mutant, self.budget)


def _codes(code: CodeType) -> Iterator[tuple[tuple[str, int], CodeType]]:
    """Every function's code in a module's, by its name and line."""
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield (each.co_qualname, each.co_firstlineno), each
            yield from _codes(each)


def _run(items: list[pytest.Item]) -> None:
    for item, after in zip(items, [*items[1:], None], strict=False):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)


def _first_failure(
    session: pytest.Session,
    items: list[pytest.Item],
    known: Baseline,
    mutant: Mutant,
    budget: float,
) -> int:
    """Ends the process where a test fails, else gives 0. Tests that run the mutant's line come first,
    and cheap ones before others; what would be more than `budget` seconds is left out."""

    def order(item: pytest.Item) -> tuple[bool, float]:
        return mutant.line not in known.lines[item.nodeid], known.seconds[item.nodeid]

    fit = [item for item in items if item.nodeid in known.seconds.keys() - known.left_out.keys()]
    total, chosen = 0.0, list[pytest.Item]()
    for item in sorted(fit, key=order):
        total += known.seconds[item.nodeid]
        if total <= budget or not chosen:
            chosen.append(item)

    class Stop:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                os._exit(ANSWERS["failed"])

    session.config.pluginmanager.register(Stop())
    _run(chosen)
    return 0


class Whole:
    """A pytest plugin that runs a mutant's tests where the whole file is imported changed."""

    def __init__(self, mutant: Mutant, known: Baseline, budget: float) -> None:
        self.mutant, self.known, self.budget = mutant, known, budget

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:  # they cannot even be imported
            os._exit(ANSWERS["failed"])
        _first_failure(session, session.items, self.known, self.mutant, self.budget)
        os._exit(ANSWERS["passed"])


ANSWERS = {"passed": 40, "failed": 41}
"""A process's end that says what its tests did."""


def run(path: Path, code: str, plugin: object, limit: Limit) -> int:
    """pytest in this process, on the tests of a file whose source is this."""
    import hypothesis

    hypothesis.settings.register_profile("mutants", database=None, derandomize=True)
    hypothesis.settings.load_profile("mutants")
    sys.meta_path.insert(0, Changed(path, code))
    asked = ["-o", "addopts=", "-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist"]
    asked += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    with tempfile.TemporaryDirectory() as temporary:
        asked += ["--basetemp", temporary, *map(str, tests_of(path))]
        return int(pytest.main(asked, plugins=[plugin, limit]))


def forked(work: Callable[[], Any], seconds: float, log: Path) -> Any:
    """What `work` gives in a process of its own; 0 or 1 where its tests passed or failed, None where it
    takes too long."""
    with tempfile.NamedTemporaryFile() as answer:
        child = os.fork()
        if not child:
            os.setpgid(0, 0)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(out, 1)
            os.dup2(out, 2)
            code = ANSWERS["failed"]
            try:
                Path(answer.name).write_bytes(pickle.dumps(work()))
                code = 0
            finally:
                os._exit(code)
        end, done, status = time.monotonic() + seconds, 0, 0
        while not done and time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.005)
        if not done:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        if status:
            return 0 if os.waitstatus_to_exitcode(status) == ANSWERS["passed"] else 1
        return pickle.loads(Path(answer.name).read_bytes())


def examine(path: Path, chosen: list[Mutant], asked: argparse.Namespace, log: Path) -> Baseline:
    """Run the tests of a file on its mutants, and write down in each what came of it.

    Raises SystemExit if they cannot be run.
    """

    def work() -> tuple[Baseline | None, list[str]]:
        rounds = Rounds(path, chosen, asked.budget, log)
        run(path, path.read_text(), rounds, Limit(asked.slowest))
        return rounds.known, [mutant.outcome for mutant in chosen]

    found = forked(work, 7200, log.with_suffix(".all"))
    if not isinstance(found, tuple) or found[0] is None:
        raise SystemExit(f"{path}: its tests do not run; see {log.with_suffix('.all')}")
    known, outcomes = found
    for mutant, outcome in zip(chosen, outcomes, strict=True):
        mutant.outcome = outcome
        if not outcome:
            whole = Whole(mutant, known, asked.budget)
            limit, most = Limit(2 * asked.slowest), 60 + 30 * asked.budget
            code = forked(lambda m=mutant, w=whole, n=limit: run(path, m.code, w, n), most, log)
            mutant.outcome = {None: "timeout", 0: "survived"}.get(code, "killed")
    return known


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--sample", type=int, default=30, help="mutants per file, 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--slowest", type=float, default=2.0, help="seconds; slower tests rest")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds of tests per mutant")
    parser.add_argument("--reports", type=Path, default=ROOT / "runs" / "mutants")
    parser.add_argument("--again", action="store_true", help="only those that survived last time")
    asked = parser.parse_args()
    asked.reports.mkdir(parents=True, exist_ok=True)
    # What torch imports when a module is traced for the first time, once for all.
    torch.set_num_threads(1)
    torch.export.export(torch.nn.Linear(1, 1), (torch.zeros(1, 1),))
    for file in asked.files:
        path = file.resolve()
        name = str(path.relative_to(ROOT))
        report = asked.reports / (name.replace("/", ".") + ".json")
        kept = json.loads(report.read_text()) if asked.again else []
        left = [each["name"] for each in kept if each["outcome"] == "survived"]
        drawn = random.Random(asked.seed)

        def wanted(
            names: list[str], left: list[str] = left, drawn: random.Random = drawn
        ) -> list[str]:
            return left if asked.again else drawn.sample(names, len(names))

        chosen = mutants(path, wanted, asked.sample or 1 << 30)
        started = time.monotonic()
        known = examine(path, chosen, asked, asked.reports / "log.txt")
        for test, why in known.left_out.items():
            print(f"  left out: {test}: {why}")
        for mutant in chosen:
            if mutant.outcome == "survived":
                print(f"  {name}:{mutant.line} {mutant.name} survived")
                print(f"    - {mutant.before}\n    + {mutant.after}")
        rows = [asdict(m) | {"code": ""} for m in chosen]
        if asked.again:
            now = {row["name"]: row for row in rows}
            rows = [now.get(each["name"], each) for each in kept]
        report.write_text(json.dumps(rows, indent=1))
        count = {o: sum(m.outcome == o for m in chosen) for o in ("killed", "timeout", "survived")}
        took, tests = time.monotonic() - started, len(known.seconds)
        told = f"{len(chosen)} mutants, {tests} tests: {count}"
        print(f"{name}: {told}, {took:.0f} s", flush=True)


if __name__ == "__main__":
    main()
