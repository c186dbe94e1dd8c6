"""Plants errors in the package, one at a time, and counts those that the quick tests catch.

python -m benchmarks.mutants [--count 80] [--seed 0] [--jobs 2] [--root .] [--whole]
                             [--output benchmarks/results/mutants.json]

Places are drawn with a fixed seed from the rooms below, as many from each as it has lines. A mutant
changes one operator, comparison, constant or condition. It is caught if a test fails, or runs three
times as long as it should. The tests that are about its room are run, without the slow ones; with
`--whole`, what these let live is tried on all quick tests.
"""

import argparse
import ast
import concurrent.futures
import functools
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile

from benchmarks import timing

log = functools.partial(print, flush=True)

#: Places in the package -> the tests that are about them.
ROOMS = {
    "triangular": ["tests/test_triangular.py", "tests/bijectors"],
    "masked.py": ["tests/test_masked.py", "tests/test_triangular.py", "tests/bijectors"],
    "transformers.py": ["tests/test_splines.py", "tests/bijectors"],
    "splines.py": ["tests/test_splines.py", "tests/bijectors"],
    "bijectors": ["tests/bijectors", "tests/test_distributions.py", "tests/families"],
    "distributions": ["tests/test_distributions.py", "tests/families", "tests/objectives"],
    "objectives": ["tests/objectives", "tests/vae"],
    "training": ["tests/training", "tests/test_densities.py", "tests/test_files.py"],
}

SECONDS = 600

SWAPS = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.And: "or",
    ast.Or: "and",
    ast.BitAnd: "|",
    ast.BitOr: "&",
}


def places(path):
    """(line, column, end line, end column, new text) of every change that is possible in a file."""
    text = path.read_text()
    tree = ast.parse(text)
    found, skipped = [], set()
    for node in ast.walk(tree):
        # Words, types and messages are no behaviour.
        parts = []
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.AnnAssign):
            parts = [node.annotation] if isinstance(node, ast.AnnAssign) else [node]
        elif isinstance(node, ast.FunctionDef):
            arguments = [*node.args.args, *node.args.kwonlyargs]
            parts = [node.returns, *(argument.annotation for argument in arguments)]
            if node.name == "__repr__":
                parts = [node]
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.BinOp):
            names = [each.id for each in node.targets if isinstance(each, ast.Name)]
            parts = [node] if names and names[0][0].isupper() else []
        skipped.update(id(each) for part in parts if part for each in ast.walk(part))
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
            found.append((node.left, node.right, SWAPS[type(node.op)]))
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            found.append((node.left, node.comparators[0], SWAPS[type(node.ops[0])]))
        elif isinstance(node, ast.BoolOp):
            found.append((node.values[0], node.values[1], SWAPS[type(node.op)]))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
            found.append((node, None, ""))
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            new = not node.value if isinstance(node.value, bool) else node.value + 1
            found.append((node, None, repr(new)))
        elif isinstance(node, ast.If):
            found.append((node.test, None, "False"))
    return text, found


def changed(text, first, second, new):
    """The text with one change, and the line of it."""
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    raw = text.encode()
    if second is None:
        begin = starts[first.lineno - 1] + first.col_offset
        end = starts[first.end_lineno - 1] + first.end_col_offset
        if isinstance(first, ast.UnaryOp):
            end = starts[first.operand.lineno - 1] + first.operand.col_offset
        middle = new.encode()
    else:
        begin = starts[first.end_lineno - 1] + first.end_col_offset
        end = starts[second.lineno - 1] + second.col_offset
        between = raw[begin:end].decode()
        # Brackets between an operand and the operator stay.
        before = between[: len(between) - len(between.lstrip(") \n"))]
        after = between[len(between.rstrip("( \n")) :]
        middle = f"{before} {new} {after}".encode()
    result = (raw[:begin] + middle + raw[end:]).decode()
    return result, first.lineno


def choose(root, count, seed):
    """The mutants: path, line, old line, new text of the file."""
    rng = random.Random(seed)
    every = []
    for room, tests in ROOMS.items():
        where = root / "flowvi" / room
        files = sorted(where.rglob("*.py")) if where.is_dir() else [where]
        for path in files:
            text, found = places(path)
            every += [(path.relative_to(root), tests, text, *each) for each in found]
    chosen = []
    for path, tests, text, *change in rng.sample(every, len(every)):
        new, line = changed(text, *change)
        try:
            ast.parse(new)
        except SyntaxError:
            continue
        old_line, new_line = (each.splitlines()[line - 1].strip() for each in (text, new))
        if old_line != new_line:
            chosen.append((path, tests, new, line, old_line, new_line))
        if len(chosen) == count:
            break
    return chosen


def tested(folder, tests):
    """Whether the tests catch what is in a folder, and how."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    env = {**os.environ, "PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}
    known = [each for each in command if not each.startswith("tests") or (folder / each).exists()]
    process = subprocess.Popen(
        known, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "ran too long"
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if process.returncode:
        return (failed or ["failed"])[0].split(" - ")[0]
    return None


def attempt(root, whole, index, mutant):
    path, tests, new, line, old_line, new_line = mutant
    with tempfile.TemporaryDirectory(prefix="flowvi-mutant-") as name:
        folder = pathlib.Path(name)
        for part in ("flowvi", "tests", "benchmarks", "examples"):
            shutil.copytree(
                root / part, folder / part, ignore=shutil.ignore_patterns("__pycache__")
            )
        for part in ("pyproject.toml", "README.md"):
            shutil.copy(root / part, folder / part)
        (folder / path).write_text(new)
        caught = tested(folder, tests)
        if caught is None and whole:
            caught = tested(folder, ["tests"])
    result = {"place": f"{path}:{line}", "old": old_line, "new": new_line, "caught_by": caught}
    log(f"{index + 1}: {result}")
    return result


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=__doc__)
    parser.add_argument("--count", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path())
    parser.add_argument("--whole", action="store_true", help="try all quick tests on what lives")
    parser.add_argument("--list", action="store_true", help="print the mutants alone")
    parser.add_argument("--output", default="benchmarks/results/mutants.json")
    args = parser.parse_args()
    root = args.root.resolve()
    mutants = choose(root, args.count, args.seed)
    if args.list:
        for path, _, _, line, old_line, new_line in mutants:
            log(f"{path}:{line}: {old_line}  ->  {new_line}")
        return
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        tried = list(
            pool.map(functools.partial(attempt, root, args.whole), range(len(mutants)), mutants)
        )
    alive = [each for each in tried if each["caught_by"] is None]
    rows = [[each["place"], f"`{each['old']}`", f"`{each['new']}`"] for each in alive]
    results = {
        "environment": timing.environment("flowvi", "jax", "pytest"),
        "seed": args.seed,
        "caught": len(tried) - len(alive),
        "mutants": tried,
    }
    text = "\n".join(
        [
            "# Mutants\n",
            timing.environment_line(results["environment"]) + "\n",
            f"{results['caught']} of {len(tried)} are caught by quick tests. Those that live:\n",
            timing.table(["place", "before", "after"], rows) if rows else "none",
        ]
    )
    timing.write(args.output, results, text)
    log(text)


if __name__ == "__main__":
    main()
