"""Finds one-line faults that the tests miss: changes one operator, number or statement at a time and runs the tests.

Works on a copy of the checkout, one mutant at a time, each in a fork that has already loaded torch. A mutant is killed
if a test fails, and survives if all pass. Survivors are printed with their line: each is a missing test, or a line that
makes no difference.

    python tools/mutate.py --count 100 --seed 1 megatron_txssm/ops megatron_txssm/recipe
    python tools/mutate.py --count 20 megatron_txssm/recipe/validation/fp8_checks.py --tests tests/recipe/validation
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
# Tests of a package besides those that mirror it.
_MORE_TESTS = {
    "ops": ["tests/model/test_state_space_mixer.py", "tests/model/test_context_parallel.py"],
    "model": ["tests/parity/test_layouts.py"],
    "recipe": ["tests/architecture", "tests/cli/test_cli.py"],
}
_SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass(frozen=True)
class Mutant:
    """`text` replaces one node's source; the path is relative to the checkout."""

    path: Path
    line: int
    begin: int
    end: int
    text: str

    def apply(self, source: bytes) -> bytes:
        return source[: self.begin] + self.text.encode() + source[self.end :]

    def describe(self, source: bytes) -> str:
        before = source[self.begin : self.end].decode()
        return f"{self.path}:{self.line}: {' '.join(before.split())}  →  {self.text}"


def mutants(path: Path) -> Iterator[Mutant]:
    """Every mutant of a file, except in annotations, error messages and docstrings."""
    source = (_ROOT / path).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in _code(ast.parse(source)):
        for text in _replacements(node):
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
            yield Mutant(path, node.lineno, begin, end, text)


def _code(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.Raise | ast.JoinedStr) or not isinstance(child, ast.AST):
                continue
            if isinstance(child, ast.expr | ast.stmt):
                yield child
            yield from _code(child)


def _replacements(node: ast.expr | ast.stmt) -> Iterator[str]:
    match node:
        case ast.Compare(ops=[op]) if type(op) in _SWAPPED:
            yield f"({ast.unparse(ast.Compare(node.left, [_other(op)], node.comparators))})"
        case ast.BinOp(op=op) if type(op) in _SWAPPED:
            yield f"({ast.unparse(ast.BinOp(node.left, _other(op), node.right))})"
        case ast.BoolOp(op=op):
            yield f"({ast.unparse(ast.BoolOp(_other(op), node.values))})"
        case ast.UnaryOp(op=ast.Not()):
            yield f"({ast.unparse(node.operand)})"
        case ast.Constant(value=bool(value)):
            yield str(not value)
        case ast.Constant(value=int() | float() as value):
            yield str(value + 1 if isinstance(value, int) else value * 2)
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            yield "pass"


def _other(op: ast.AST) -> Any:
    return _SWAPPED[type(op)]()


def tests_of(path: Path) -> list[str]:
    """The tests that mirror a file's package, and those named in `_MORE_TESTS`."""
    package = path.parts[1] if len(path.parts) > 2 else ""
    mirror = f"tests/{package}" if package else f"tests/test_{path.stem}.py"
    return [test for test in (mirror, *_MORE_TESTS.get(package, [])) if (_ROOT / test).exists()]


def run_tests(copy: Path, tests: list[str], log: Path) -> int:
    """pytest's exit code in a fork; stops at the first failure."""
    if (child := os.fork()) == 0:
        import pytest

        with open(log, "w", encoding="utf-8") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        os.chdir(copy)
        # Before the checkout's own path, for this process and those that tests start.
        sys.path[0] = os.environ["PYTHONPATH"] = str(copy)
        # A mutant may have its predecessor's size and time, so Python would use outdated compiled code.
        sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests])
        os._exit(int(code))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="files or folders of the package")
    parser.add_argument("--count", type=int, default=100, help="mutants to draw (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--tests", nargs="+", help="the tests to run (default: those that mirror the file)")
    args = parser.parse_args()
    files = [
        file.resolve().relative_to(_ROOT)
        for path in args.paths
        for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])
    ]
    drawn = [mutant for file in files for mutant in mutants(file)]
    random.Random(args.seed).shuffle(drawn)
    drawn = drawn[: args.count]

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch  # noqa: F401  (once, for all forks)
    import transformers  # noqa: F401

    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy, log = Path(folder) / "checkout", Path(folder) / "log"
        for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=_ROOT, text=True).split("\0")[:-1]:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(_ROOT / name, copy / name)
        for suite in {tuple(args.tests or tests_of(mutant.path)) for mutant in drawn}:
            if not suite or run_tests(copy, list(suite), log):
                print(f"{' '.join(suite) or 'no tests'}: cannot judge mutants, as they fail or there are none")
                print(log.read_text(encoding="utf-8")[-2000:] if suite else "")
                return 2
        for number, mutant in enumerate(drawn, 1):
            source = (_ROOT / mutant.path).read_bytes()
            (copy / mutant.path).write_bytes(mutant.apply(source))
            survived = run_tests(copy, args.tests or tests_of(mutant.path), log) == 0
            (copy / mutant.path).write_bytes(source)
            survivors += [mutant.describe(source)] if survived else []
            print(f"{number}/{len(drawn)} {'SURVIVED' if survived else 'killed'} {mutant.describe(source)}", flush=True)
    print(f"\n{len(drawn) - len(survivors)} of {len(drawn)} mutants killed; the survivors:")
    print("\n".join(survivors))
    return 0


if __name__ == "__main__":
    sys.exit(main())
