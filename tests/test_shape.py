"""What the source must look like: who may import whom, how long an argument list may be, where a
formula may stand, which names may be said where."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from prefkern.backends.list_options import FAMILIES
from prefkern.losses.record import LOSSES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "prefkern"
MOST_ARGUMENTS = 12

# A room imports from rooms of a lower storey, and within itself. Rooms of one storey do not know
# each other. The single files stats, checks and env are the ground.
STOREYS = {
    "": 0,
    "backends": 1,
    "shard": 2,
    "head": 3,
    "ops": 4,
    "losses": 5,
    "objective": 6,
    "diffusion": 6,
    "integrations": 7,
    "prep": 7,
    "train": 8,
    "integrations.trl": 9,  # stands on the trainer's recipes
    "integrations.axolotl": 10,
    "cli": 9,
}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def sources(*roots: str) -> list[Path]:
    return sorted(p for root in roots for p in (ROOT / root).rglob("*.py"))


def room(parts: tuple[str, ...]) -> str:
    """The folder or file of prefkern that has a storey of its own; "" for the ground."""
    two = ".".join(parts[:2])
    return two if two in STOREYS else parts[0] if parts and parts[0] in STOREYS else ""


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import from prefkern in a file, those inside functions too."""
    here = path.relative_to(PACKAGE).with_suffix("").parts
    package = here[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - (node.level - 1)]
                full = (*base, *(node.module or "").split(".")) if node.module else base
            elif (node.module or "").split(".")[0] == "prefkern":
                full = tuple((node.module or "").split(".")[1:])
            else:
                continue
            for name in node.names:
                yield node.lineno, room((*full, name.name))
        elif isinstance(node, ast.Import):
            for name in node.names:
                head, *rest = name.name.split(".")
                if head == "prefkern":
                    yield node.lineno, room(tuple(rest))


def test_imports_point_one_way():
    wrong = []
    for path in sources("prefkern"):
        own = room(path.relative_to(PACKAGE).with_suffix("").parts)
        if path.parent == PACKAGE and path.name in ("__init__.py", "__main__.py"):
            continue
        wrong += [
            f"{path.relative_to(ROOT)}:{line} imports {other}"
            for line, other in imported(path)
            if other and other != own and STOREYS[other] >= STOREYS[own]
        ]
    assert not wrong, "\n".join(wrong)


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            yield node


def arguments(node: ast.FunctionDef) -> list[str]:
    a = node.args
    return [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls")]


def is_kernel(node: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(d) for d in node.decorator_list)


def test_no_long_argument_lists():
    """A call's data is one record; what a person calls names its arguments."""
    import prefkern

    public = {*prefkern.__all__, *LOSSES}
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {len(arguments(node))}"
        for path in sources("prefkern", "kernels")
        for node in functions(path)
        if len(arguments(node)) > MOST_ARGUMENTS and node.name not in public and not is_kernel(node)
    ]
    assert not long, "\n".join(long)


def names_of_losses(path: Path) -> list[str]:
    """String constants and attributes in code (docstrings aside) that are the name of a loss."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree(path))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        f"line {node.lineno}: {node.value}"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant)
        and id(node) not in docs
        and isinstance(node.value, str)
        and node.value in LOSSES
        and node.value not in FAMILIES  # of list_rank: plackett_luce, softmax
    ]


# Where a loss may be named beside losses/: what one method alone needs, tables of methods, and the
# default of the option.
MAY_NAME_LOSSES = ("train/recipes/", "train/demo", "integrations/", "cli/", "prep/")


def test_generic_code_names_no_loss():
    found = {}
    for path in sources("prefkern"):
        place = path.relative_to(PACKAGE).as_posix()
        below = place.startswith(("backends/", "ops/"))
        generic = place.startswith("train/") and not place.startswith(MAY_NAME_LOSSES)
        if (below or generic) and (names := names_of_losses(path)):
            found[place] = names
    # the default loss of a run
    assert found.pop("train/config.py", ["line 0: dpo"])[0].endswith(": dpo")
    assert not found, found


def test_no_device_above_the_backends():
    """Losses, objective and statistics do not ask which kind of device they run on, except where a
    value would have to be read, which waits for a GPU."""
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("prefkern/losses", "prefkern/objective")
        for path in sources(folder)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"""["'](cuda|mps|xpu)["']|is_cuda""", line)
    ]
    assert not wrong, wrong


# A statistic's value and its gradient coefficients have one eager and one native home.
HOMES = {"prefkern/backends/eager/finish.py", "csrc/numerics/finish.h"}
# What only a formula of a divergence contains: (1 - S) / (a (1 - a)) of alpha, log S / (a - 1) of
# renyi, the square's log-sum of col.
FORMULA = re.compile(
    r"/\s*\(\s*(?:\w+\.)?(?:a|alpha|param)\s*\*\s*\(1(?:\.0)?\s*-\s*(?:\w+\.)?(?:a|alpha|param)\s*\)"
)


def test_a_statistic_has_two_homes():
    found = {
        path.relative_to(ROOT).as_posix()
        for folder, pattern in (("prefkern", "*.py"), ("kernels", "*.py"), ("csrc", "*.[hc]*"))
        for path in (ROOT / folder).rglob(pattern)
        if "losses" not in path.parts
        and path.suffix != ".so"
        and FORMULA.search(path.read_text(encoding="utf-8"))
    }
    assert found == HOMES, found


def test_files_stay_short():
    long = {
        path.relative_to(ROOT).as_posix(): n
        for path in sources("prefkern", "kernels", "benchmarks")
        if (n := len(path.read_text(encoding="utf-8").splitlines())) > 420
    }
    assert not long, long
