"""What the source of the trainer must hold: who imports whom, names, and sizes."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

import prefkern
from prefkern.losses import LOSSES

PACKAGE = Path(prefkern.__file__).resolve().parent
ROOMS = ("train", "prep", "cli")
FILES = sorted(path for room in ROOMS for path in (PACKAGE / room).rglob("*.py"))
TRAIN = PACKAGE / "train"
# What may name a loss: recipes, of one method each, and the demonstration.
RECIPES = TRAIN / "recipes"
DEMO = {TRAIN / f"{name}.py" for name in ("demo", "demo_report", "demo_task")}
GENERIC = [p for p in FILES if TRAIN in p.parents and RECIPES not in p.parents and p not in DEMO]
# Names that are English or a Python word as well.
WORDS = {"more", "sft"}


def module_of(path: Path) -> str:
    parts = ["prefkern", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Modules of the rooms that a file imports anywhere, in functions and for types as well."""
    found, package = set(), module_of(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names = [f"{target}.{alias.name}" for alias in node.names]
            # a name that is no module is read off the package itself
            found |= {name if name in MODULES else target for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def strings(path: Path) -> list[str]:
    """String constants of a file but for its documentation."""
    tree = ast.parse(path.read_text())
    texts = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts
    ]


@pytest.mark.parametrize("path", GENERIC, ids=module_of)
def test_generic_code_names_no_loss(path):
    """A loss or a recipe declares what it needs; generic code reads the declaration."""
    allowed = {"dpo"} if path == TRAIN / "config.py" else set()  # the default of --loss
    for text in strings(path):
        named = set(re.findall(r"\w+", text)) & (LOSSES.keys() - WORDS - allowed)
        assert not named, f"{path.name} names {sorted(named)} in {text!r}"


def test_the_loop_knows_no_recipe():
    """Only a prepared run asks which providers there are; recipes build on the loop."""
    into = {
        module_of(path): {m for m in imports(path) if m.startswith("prefkern.train.recipes")}
        for path in GENERIC
        if TRAIN / "stored" not in path.parents  # commands made of recipes, as rounds are
    }
    assert {name: found for name, found in into.items() if found} == {
        # which of the two ways to train, which of the two to prepare
        "prefkern.train": {"prefkern.train.recipes.rounds", "prefkern.train.recipes.prepared"},
        "prefkern.train.config": {"prefkern.train.recipes.options"},
        "prefkern.train.run": {"prefkern.train.recipes.table"},
    }


def test_arrows_point_one_way():
    order = {"prep": 0, "train": 1, "cli": 2}
    graph = {name: imports(path) for name, path in MODULES.items()}
    for name, found in graph.items():
        for other in found:
            assert order[other.split(".")[1]] <= order[name.split(".")[1]], f"{name} -> {other}"
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle: {' -> '.join((*above, name))}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_name_stands_for_two_things():
    """Classes and functions of train, prep and cli that others may import."""
    where = defaultdict(list)
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_":
                where[node.name].append(module_of(path))
    assert {name: modules for name, modules in where.items() if len(modules) > 1} == {}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_sizes(path):
    text = path.read_text()
    assert text.count("\n") <= 400 and path.stem not in ("utils", "common", "checks")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and "prep" not in path.parts:
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 60, f"{path.name}: {node.name} has {lines} lines"
            options = node.args.args + node.args.kwonlyargs
            assert len(options) <= 12, f"{path.name}: {node.name} has {len(options)} parameters"
