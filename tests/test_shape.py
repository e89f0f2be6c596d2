"""What the source must look like: who may import whom, how long an argument list may be, where a
formula may stand, which names may be said where."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from source_files import PACKAGE, ROOT, sources, tree

from prefkern.backends.list_options import FAMILIES
from prefkern.losses.record import LOSSES

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


# Words of English too: they name a loss only as a whole string or after a dot.
PLAIN_WORDS = {"hinge", "more", "robust", "softmax"}


def default_losses(path: Path) -> set[int]:
    """ids of the constants that are the default of something called `loss`."""
    found: list[ast.AST] = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            a = node.args
            last = a.args[len(a.args) - len(a.defaults) :]
            pairs = [*zip(last, a.defaults, strict=True)]
            pairs += zip(a.kwonlyargs, a.kw_defaults, strict=True)
            found += [default for name, default in pairs if default and name.arg == "loss"]
        elif isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "loss" and node.value:
            found += ast.walk(node.value)
    return {id(node) for node in found}


def names_of_losses(path: Path) -> list[str]:
    """Losses named in code: as a string, a word of a text, an attribute or an import. What stands
    alone as a string is documentation, of a function or of a field."""
    aside = {id(node.value) for node in ast.walk(tree(path)) if isinstance(node, ast.Expr)}
    aside |= default_losses(path)
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in aside:
            whole = {node.value} - set(FAMILIES)  # of list_rank: plackett_luce, softmax
            said = set(re.findall(r"\w+", node.value)) - PLAIN_WORDS - set(FAMILIES)
            found += [(node.lineno, name) for name in whole | said]
        elif isinstance(node, ast.Attribute):
            found.append((node.lineno, node.attr))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            full = [getattr(node, "module", None) or "", *(name.name for name in node.names)]
            found += [(node.lineno, part) for name in full for part in name.split(".")]
    return [f"line {line}: {name}" for line, name in found if name in LOSSES]


# Where a loss may be named beside losses/: what one method alone needs and tables of methods.
MAY_NAME_LOSSES = ("train/recipes/", "train/demo", "integrations/", "cli/", "prep/")


def test_generic_code_names_no_loss():
    found = {}
    for path in sources("prefkern"):
        place = path.relative_to(PACKAGE).as_posix()
        below = place.startswith(("backends/", "ops/", "objective/"))
        generic = place.startswith("train/") and not place.startswith(MAY_NAME_LOSSES)
        if (below or generic) and (names := names_of_losses(path)):
            found[place] = names
    assert not found, found


def test_every_way_to_name_a_loss_is_seen(tmp_path):
    said = {
        'x = record.name == "dpo"': "dpo",
        "raise ValueError(\"has none; add 'sft'.\")": "sft",
        'f"for {x} or kto alone"': "kto",
        "y = losses.tdpo2(1)": "tdpo2",
        "from ..losses.pairwise.simpo import simpo": "simpo",
        "import prefkern.losses.pairwise.ipo": "ipo",
    }
    quiet = (
        '"""As dpo does."""', 'def f(*, loss="dpo"): ...', 'loss: tuple = ("dpo",)',
        'say("two more")',
    )  # fmt: skip
    for i, text in enumerate((*said, *quiet)):
        path = tmp_path / f"{i}.py"
        path.write_text(text, encoding="utf-8")
        assert {line.split(": ")[1] for line in names_of_losses(path)} == (
            {said[text]} if text in said else set()
        ), text


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
_ONE = r"1(?:\.0)?f?"
_ORDER = r"(?:\w+\.)?(?:a|alpha|param|order)"
_POWER = rf"\(?\s*{_ONE}\s*-\s*{_ORDER}\s*\)?"
_LOG_P, _LOG_R = r"(?:lp|logp|log_p)", r"(?:lr|logr|log_r|ref_lp|ref_logp)"
_P, _R, _SUM = r"\b(?:p|probs?)", r"\b(?:r|ref_probs?)", r"\S*sum\b"
# What only the formula of a statistic contains, written with a fold's sums or with probabilities;
# each with lines that must be found. (1 - S) / (a (1 - a)) of alpha; log S / (a - 1) of renyi; the
# log of a sum of squares of col; a cross sum over a sum of rkl and fkl; log of the sum less a mean
# of ent.
FORMULAS = {
    "alpha": (
        rf"/\s*\(\s*{_ORDER}\s*\*\s*{_POWER}\s*\)",
        ("return -torch.expm1(s) / (a * (1.0 - a))", "-pk_expm1(o) / (p.alpha * (1 - p.alpha));"),
    ),
    "renyi": (
        rf"/\s*\(\s*{_ORDER}\s*-\s*{_ONE}\s*\)|/\s*\(\s*{_ONE}\s*-\s*{_ORDER}\s*\)",
        ("return overlap.log() / (a - 1.0)", "give(log_overlap(s, a) / (plan.order - 1.0f));"),
    ),
    "col": (
        r"log\w*\([^()]*\bsq\b[^()]*\)|\bsq\b[^+\-;]*\.log\(\)"
        rf"|\blogsumexp\(2(?:\.0)?\s*\*|{_P}\s*\*\s*{_P}\s*\)\.sum\("
        rf"|{_P}\.(?:square\(\)|pow\(2\))\.sum\(",
        (
            'return s["sq"].log() - 2.0 * log_s', "pk_log(s.sq) - 2.0 * log_s",
            "torch.logsumexp(2 * lp, -1)", "(p * p).sum(-1).log()", "p.square().sum(1).log()",
        ),
    ),
    "rkl": (
        rf"pol_cross\S*\s*/\s*{_SUM}|{_P}\s*\*\s*\(\s*{_LOG_P}\s*-\s*{_LOG_R}\s*\)\s*\)\s*\.sum",
        (
            'return s["pol_cross"] / s["sum"] + (log_r - log_s)', "s.pol_cross / s.pol.sum",
            "(p * (lp - lr)).sum(1)", "(probs * (logp - ref_logp)).sum(-1)",
        ),
    ),
    "fkl": (
        rf"ref_cross\S*\s*/\s*{_SUM}|{_R}\s*\*\s*\(\s*{_LOG_R}\s*-\s*{_LOG_P}\s*\)\s*\)\s*\.sum",
        ('s["ref_cross"] / s["ref_sum"]', "s.ref_cross / s.ref.sum", "(r * (lr - lp)).sum(1)"),
    ),
    "ent": (
        rf"(?:log_s|lse|log\(\w*\)|\.log\(\))\s*-\s*[^\s(]*\bx\b\S*\s*/\s*{_SUM}"
        rf"|{_P}\s*\*\s*{_LOG_P}\s*\)\s*\.sum|\bentr\(|\.entropy\(\)",
        (
            'return log_s - s["x"] / s["sum"]', "give(log_s - s.x / s.pol.sum);",
            "-(p * lp).sum(-1)", "torch.special.entr(p).sum(1)", "Categorical(logits=z).entropy()",
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_a_statistic_has_two_homes(name):
    pattern, planted = FORMULAS[name]
    unseen = [text for text in planted if not re.search(pattern, text)]
    assert not unseen, unseen
    found = {
        path.relative_to(ROOT).as_posix()
        for folder, pattern_of_files in (
            ("prefkern", "*.py"), ("kernels", "*.py"), ("csrc", "*.[hc]*"), ("benchmarks", "*.py"),
        )
        for path in (ROOT / folder).rglob(pattern_of_files)
        if "losses" not in path.parts and re.search(pattern, code_of(path))
    }  # fmt: skip
    assert found == HOMES, found


@cache
def code_of(path: Path) -> str:
    """The text without comments and, of Python, without documentation."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return re.sub(r"//[^\n]*", "", text)
    lines = re.sub(r"#[^\n]*", "", text).split("\n")
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            assert node.end_lineno is not None
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(lines)


def test_files_stay_short():
    long = {
        path.relative_to(ROOT).as_posix(): n
        for path in sources("prefkern", "kernels", "benchmarks")
        if (n := len(path.read_text(encoding="utf-8").splitlines())) > 420
    }
    assert not long, long
