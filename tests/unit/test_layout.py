"""Where things lie: what tests and the package's folders may not do. Files are parsed, none is imported."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, TESTS = ROOT / "edge_speq", ROOT / "tests"
MODELS = {"bundled", "tiny", "twin"}  # fixtures of models


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def is_test(name: str) -> bool:
    """Whether a dotted name is that of a test module or of the fixtures' file."""
    return any(part.startswith("test_") or part == "conftest" for part in name.split("."))


def test_no_test_imports_a_test() -> None:
    pairs = ((path, name) for path in files(TESTS) for name in imported(parsed(path)))
    found = {f"{path.relative_to(ROOT)}: {name}" for path, name in pairs if is_test(name)}
    assert not found, "what tests share belongs in tests/support"


def test_unit_tests_load_no_model() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in files(TESTS / "unit")
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef) and MODELS & {argument.arg for argument in node.args.args}
    }
    assert not found, "a test that loads a model belongs in tests/engine or in the folder of what it tests"


def test_a_class_name_means_one_class() -> None:
    places = defaultdict(list)
    for path in files(PACKAGE):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not {name: found for name, found in places.items() if len(found) > 1}


# --- private attributes of a model ---------------------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def defined(tree: ast.AST) -> set[str]:
    """Private names of the methods and attributes of a file's classes."""
    found = set[str]()
    for node in (n for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for n in ast.walk(c)):
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            found.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return {name for name in found if is_private(name)}


def private_of_the_engine() -> set[str]:
    return set[str]().union(*(defined(parsed(path)) for path in files(PACKAGE / "engine")))


def models_outside() -> set[ast.ClassDef]:
    """Classes outside the engine that derive from EdgeLlama, or from one that does."""
    trees = [parsed(path) for path in files(PACKAGE) if "engine" not in path.parts]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    names, found = {"EdgeLlama"}, set[ast.ClassDef]()
    while more := {c for c in classes if c not in found and names & {ast.unparse(b).split(".")[-1] for b in c.bases}}:
        found |= more
        names |= {node.name for node in more}
    return found


def reads() -> Iterator[tuple[str, str]]:
    """Each private attribute of a model that is read or overridden outside the engine: its file, and where."""
    engine, models = private_of_the_engine(), models_outside()
    for path in files(PACKAGE):
        name, tree = path.relative_to(ROOT).as_posix(), parsed(path)
        if name.startswith("edge_speq/engine/"):
            continue
        foreign = engine - defined(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in foreign and not is_self(node.value):
                yield name, f"{node.lineno}: {ast.unparse(node)}"
            if isinstance(node, ast.ClassDef) and node in models:
                yield from ((name, found) for found in _of_the_base(node, engine))


def _of_the_base(model: ast.ClassDef, engine: set[str]) -> Iterator[str]:
    for node in ast.walk(model):
        if isinstance(node, ast.Attribute) and node.attr in engine:
            yield f"{node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.FunctionDef) and node.name in engine:
            yield f"{node.lineno}: def {node.name}"


def test_nobody_outside_the_engine_reads_private_attributes_of_a_model() -> None:
    found = sorted(f"{name}:{where}" for name, where in reads())
    assert not found, "only edge_speq/engine may: give EdgeLlama a public name for it"
