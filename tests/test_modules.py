"""How the modules of the package hang together, and whether the files that pages name exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from source_files import PACKAGE, ROOT, sources, tree

# Modules that no other imports, and the page where a reader learns their names.
OUTSIDE = {
    "integrations.axolotl": "docs/integrations.md",
    "integrations.context_parallel": "prefkern/integrations/trl/preference.py",  # an error says it
    "integrations.llama_factory_v1": "docs/integrations.md",
    "integrations.ms_swift": "docs/integrations.md",
    "integrations.nemo_rl": "docs/integrations.md",
    "integrations.openrlhf": "docs/integrations.md",
    "integrations.preference_model": "docs/api.md",
    "integrations.sentence_transformers": "docs/integrations.md",
    "integrations.torchtitan": "docs/integrations.md",
    "integrations.verl": "docs/integrations.md",
    "losses.listwise.dpa_rag": "docs/methods.md",
    "train.recipes.demonstrations": "docs/methods.md",
}
PYTHONS_OWN = {"", "__main__"}
# Imports for the type checker alone that would close a circle. A record explains its arguments in
# its errors by docstrings.py, which is handed records and makes none.
TYPES_ALONE = {("losses.docstrings", "losses.record")}


@cache
def modules() -> dict[str, Path]:
    """Modules of the package by their dotted name in it; the package itself is ""."""
    found = {}
    for path in sources("prefkern"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def for_types(module: ast.Module) -> set[int]:
    """ids of the imports below `if TYPE_CHECKING:`."""
    blocks = (n for n in ast.walk(module) if isinstance(n, ast.If))
    return {
        id(node)
        for block in blocks
        if ast.unparse(block.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for inner in block.body
        for node in ast.walk(inner)
    }


def imports_of(name: str, path: Path, *, types: bool) -> Iterator[str]:
    """Modules of the package that one imports, in functions too; `types`: those for the type
    checker alone."""
    parts = name.split(".") if name else []
    package = parts if path.name == "__init__.py" else parts[:-1]
    aside = for_types(tree(path))
    for node in ast.walk(tree(path)):
        if (id(node) in aside) != types:
            continue
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ["prefkern", *above] if node.level else []
            base += node.module.split(".") if node.module else []
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for first, *rest in targets:
            if first != "prefkern":
                continue
            full = ".".join(rest)
            yield full if full in modules() else ".".join(rest[:-1])


@cache
def graph() -> dict[str, set[str]]:
    return {n: {*imports_of(n, p, types=False)} - {n} for n, p in modules().items()}


def circle(edges: dict[str, set[str]]) -> list[str]:
    """One circle of imports, or [] where there is none."""
    done: set[str] = set()
    trail: list[str] = []

    def visit(name: str) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        trail.append(name)
        for other in sorted(edges.get(name, ())):
            if found := visit(other):
                return found
        done.add(trail.pop())
        return []

    return next((found for name in edges if (found := visit(name))), [])


def test_no_circle_of_imports():
    """A package that imports its own modules and a module that imports from its package by name
    (`from . import checks`) are one edge each, to the module."""
    assert circle(graph()) == []
    typed = {
        (name, other)
        for name, path in modules().items()
        for other in imports_of(name, path, types=True)
        if other != name and circle({**graph(), name: graph()[name] | {other}})
    }
    assert typed == TYPES_ALONE


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_every_module_is_used():
    """By another module, by its name as a table of modules has it, or it is an entry that a page
    names."""
    used = set().union(*graph().values())
    for path in sources("prefkern"):
        texts = (n.value for n in ast.walk(tree(path)) if isinstance(n, ast.Constant))
        used |= {t[9:] for t in texts if isinstance(t, str) and t.startswith("prefkern.")}
    # to import a module is to import the packages around it
    used |= {name.rpartition(".")[0] for name in used}
    used |= {".".join(name.split(".")[:i]) for name in used for i in range(len(name.split(".")))}
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    around = {name for name in packages if any(m.startswith(f"{name}.") for m in OUTSIDE)}
    assert set(modules()) - used - around - PYTHONS_OWN == set(OUTSIDE)


def test_what_no_module_imports_is_named_to_readers():
    silent = [
        name
        for name, page in OUTSIDE.items()
        if f"prefkern.{name}" not in (ROOT / page).read_text(encoding="utf-8")
    ]
    assert not silent


TOP = ("prefkern", "kernels", "csrc", "tests", "benchmarks", "docs", "examples", "requirements")
_FILE = re.compile(r"[\w./<>*-]*\w\.(?:py|h|cu|cuh|cpp|md|json|ya?ml|toml|txt)")
_FOLDER = re.compile(rf"(?:{'|'.join(TOP)})/[\w./<>*-]*")


def named(text: str) -> set[str]:
    """Files and folders that a page names in code marks or links."""
    marked = re.findall(r"`([^`]+)`|\]\(([^)#]+)\)", text)
    words = (word for pair in marked for word in " ".join(pair).split())
    return {w for w in words if _FILE.fullmatch(w) or _FOLDER.fullmatch(w)}


@cache
def files() -> list[str]:
    below = (p for top in TOP for p in (ROOT / top).rglob("*") if "__pycache__" not in p.parts)
    every = [*below, *ROOT.glob("*")]
    return [p.relative_to(ROOT).as_posix() + "/" * p.is_dir() for p in every]


def there(name: str) -> bool:
    """A path from the root; or, of a page that names the folder before, the end of one. Letters in
    angle brackets stand for any."""
    start = "" if name.split("/")[0] in TOP else r"(?:.*/)?"
    body = re.sub(r"<\w+>|\*", "\0", name.rstrip("/"))
    pattern = re.compile(
        start + re.escape(body).replace("\0", "[^/]*").replace("\\\0", "[^/]*") + "/?"
    )
    return any(map(pattern.fullmatch, files()))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_files_that_a_page_names_exist(page):
    found = named((ROOT / page).read_text(encoding="utf-8"))
    assert len(found) > 2
    assert not [name for name in sorted(found) if not there(name)]


def test_a_file_that_does_not_exist_is_seen():
    text = (
        "in `kernels/head_fold.py`, `tests/oracles.py`, [one](docs/no.md) and `csrc/cpu/<op>.cpp`"
    )
    missing = {name for name in named(text) if not there(name)}
    assert missing == {"kernels/head_fold.py", "docs/no.md"}
