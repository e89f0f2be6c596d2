"""A loss is declared where it is defined, and looks like the function it is."""

from __future__ import annotations

import ast
import inspect
import pickle
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loss_examples import ALL, EVERY, PAIRWISE, POINTWISE, Example
from torch import Tensor

import prefkern
from prefkern import SeqStats, losses, preference_loss
from prefkern.losses import docstrings, meanings
from prefkern.losses.declare import formula, listwise, pairwise, pointwise
from prefkern.losses.record import LOSSES, Supervised

pytestmark = pytest.mark.filterwarnings("ignore:loss .* is provisional:UserWarning")
FOLDER = Path(losses.__file__).parent
FAMILIES = ("pairwise", "pointwise", "listwise", "tokenwise", "diffusion")


@pytest.fixture
def own_losses():
    """Losses that a test declares are taken back."""
    before = dict(LOSSES)
    yield
    LOSSES._found = before


# ---- what a reader of the name sees --------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_a_loss_looks_like_its_function(name):
    fn = getattr(losses, name)
    record = LOSSES[name]
    assert inspect.isfunction(fn) and record.fn is fn and record.name == fn.__name__ == name
    assert fn.__module__ == f"prefkern.losses.{record.family}.{fn.__module__.rpartition('.')[2]}"
    assert inspect.signature(fn) == inspect.signature(formula(fn))
    assert fn.__annotations__ == formula(fn).__annotations__
    assert pickle.loads(pickle.dumps(fn)) is fn
    shown = pydoc.plain(pydoc.render_doc(fn))
    assert shown.startswith(f"Python Library Documentation: function {name} in module")
    for parameter in inspect.signature(fn).parameters.values():
        assert f"{parameter.name}: {parameter.annotation!r}" in shown
    assert docstrings.read(fn.__doc__).formula.split("\n")[0].strip() in shown


@pytest.mark.parametrize("name", [name for name in ALL if LOSSES[name].stats])
def test_statistics_without_gradient_are_declared(name):
    """The ops keep and compute nothing for those; a loss that differentiates one would get 0."""
    example = Example(name, offsets=(0.3, -0.2))
    out = example()
    if out.requires_grad:
        out.sum().backward()
    for field in set(LOSSES[name].stats) - {"logp"}:
        leaves = [getattr(row, field) for row in example.rows]
        reached = any(x is not None and x.grad is not None for x in leaves)
        assert reached != (field in LOSSES[name].constant), field


def test_help_of_dpo_by_hand():
    shown = pydoc.plain(pydoc.render_doc(prefkern.losses.dpo))
    for line in (
        "dpo(chosen: 'SeqStats', rejected: 'SeqStats', *, pair_weight: 'float | Tensor' = 1.0,",
        "DPO: logistic loss of the log-ratio margin.",
        "chosen, rejected: Statistics of the two answers, each field `[P]`; needs `logp`, "
        "`ref_logp`.",
        "beta: Strength of the pull to the reference, > 0, number or `[P]`. Default 0.1.",
        "label_smoothing: Probability eps in [0, 0.5] that a label is wrong. Default 0.0.",
        "Unreduced loss `[P]`.",
        ">>> round(dpo(answer, answer).item(), 6)",
    ):
        assert line in shown, f"{line} is not in\n{shown}"


def test_names_stand_in_the_source_for_editors():
    """Type checkers and editors read the imports of catalogue.py: one line per loss, `as` itself,
    from a module in which it is a function with a docstring."""
    tree = ast.parse((FOLDER / "catalogue.py").read_text(encoding="utf-8"))
    found = {}
    for node in tree.body[1:]:
        assert isinstance(node, ast.ImportFrom) and node.level == 1 and len(node.names) == 1
        (alias,) = node.names
        assert alias.asname == alias.name
        found[alias.name] = node.module
    assert set(found) == set(LOSSES)
    lines = list(found.items())
    assert lines == sorted(lines, key=lambda row: (row[1], row[0]))
    for name, module in found.items():
        file = ast.parse((FOLDER / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        (node,) = [n for n in file.body if isinstance(n, ast.FunctionDef) and n.name == name]
        assert ast.get_docstring(node) and len(node.decorator_list) == 1
    (checking,) = [
        node for node in ast.parse((FOLDER / "__init__.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]  # fmt: skip
    assert [ast.unparse(node) for node in checking.body] == ["from .catalogue import *"]


def test_losses_are_imported_when_they_are_asked_for():
    """Each snippet in a process of its own, where no loss was looked at before."""
    snippets = (
        "import prefkern; assert 'prefkern.losses.catalogue' not in sys.modules\n"
        "from prefkern.losses import kto, advantages; assert kto.__name__ == 'kto'\n"
        "assert len(prefkern.LOSSES) > 100 and 'dpo' in dir(prefkern.losses)\n"
        "assert prefkern.losses.dpo is prefkern.LOSSES['dpo'].fn",
        # a file of a loss is imported before the rest: `losses.core` is asked for on the way
        "from prefkern.losses.pairwise.tgdpo import tgdpo; import prefkern\n"
        "assert prefkern.losses.tgdpo is tgdpo and prefkern.losses.catalogue.tgdpo is tgdpo",
        # a compiled function is the first to look
        "import prefkern, torch; row = prefkern.SeqStats(torch.zeros(2), torch.zeros(2))\n"
        "step = torch.compile(lambda r: prefkern.losses.dpo(r, r), fullgraph=True, backend='eager')"
        "\nassert step(row).shape == (2,)",
        "import prefkern, torch; hidden = torch.randn(2, 3, 4)\n"
        "step = torch.compile(lambda h: prefkern.preference_loss(h, torch.ones(5, 4), torch.ones(\n"
        "    2, 3, dtype=torch.long), loss='simpo')[0], fullgraph=True, backend='eager')\n"
        "assert step(hidden).shape == ()",
    )
    running = [
        subprocess.Popen([sys.executable, "-c", f"import sys\n{code}"], stderr=subprocess.PIPE)
        for code in snippets
    ]
    for code, process in zip(snippets, running, strict=True):
        error = process.communicate()[1].decode()
        assert process.returncode == 0, f"{code}\n{error}"


# ---- what the declaration says is so -------------------------------------------------------------


def needed(example: Example) -> set[str]:
    """Fields of SeqStats without which the loss raises."""
    rows, found = example.rows, set()
    for field in SeqStats._fields:
        if getattr(rows[0], field) is None:
            continue
        example.rows = [row._replace(**{field: None}) for row in rows]
        try:
            example()
        except ValueError as error:
            assert repr(field) in str(error)
            found.add(field)
    example.rows = rows
    return found


@pytest.mark.parametrize("name", PAIRWISE + POINTWISE)
def test_reads_is_what_the_function_reads(name):
    example = Example(name, 3)
    record = example.record
    reads = record.reads if isinstance(record.reads, tuple) else record.reads()
    told = {field.partition(":")[0] for field in reads}
    told |= {"ref_logp"} if record.reference else set()
    # ipo_md reads the length with reduction="mean" only, as its docstring says
    assert needed(example) == told - ({"length"} if name == "ipo_md" else set())


@pytest.mark.parametrize("name", EVERY)
def test_every_argument_is_documented_once_and_nothing_else(name):
    record = LOSSES[name]
    text = docstrings.cut(inspect.getdoc(record.fn), 0)
    args = docstrings.entries(text["Args"], 4)
    assert list(args) == list(inspect.signature(record.fn).parameters)
    through = docstrings.entries(text[docstrings.THROUGH], 4)
    own = set(record.inputs.arguments) - set(inspect.signature(record.fn).parameters)
    assert set(through) == own
    for argument, meaning in {**args, **through}.items():
        parameter = record.inputs.arguments.get(argument)
        said = meaning.lower().count("default ") - meaning.count("default is")
        has = parameter is not None and parameter.default is not parameter.empty
        assert said == has, f"{argument}: {meaning}"
        if has:
            shown = re.sub(r"\.0\b|'", "", docstrings.default_of(parameter))
            assert shown in re.sub(r"\.0\b", "", meaning), f"{argument}: {meaning}"
    assert text["Returns"].rstrip().endswith(".") and text["Raises"].startswith("    ValueError: ")


def test_every_shared_meaning_is_shared():
    """An entry that one loss alone takes belongs into its docstring."""
    takers = {name: 0 for name in (*meanings.MEANINGS, *meanings.RECORDS)}
    for record in LOSSES.values():
        source = inspect.getsource(formula(record.fn))
        for name in inspect.signature(record.fn).parameters:
            # counted where the docstring in the source leaves it out
            if name in takers and f"        {name}: " not in source:
                takers[name] += 1
    assert {name: n for name, n in takers.items() if n < 2} == {}


# ---- a loss of one's own -------------------------------------------------------------------------


def test_a_loss_of_ones_own(own_losses):
    @pairwise(source="none", status="a test", reference=True, supervised=Supervised("nll", 0.5))
    def tripled(
        chosen: SeqStats, rejected: SeqStats, *, pull: float = 3.0, label_smoothing: float = 0.0
    ) -> Tensor:
        """Three times DPO's margin.

        l = softplus(-m),  m = pull (logratio(chosen) - logratio(rejected))

        Args:
            pull: Strength, > 0.
        """
        return formula(losses.dpo)(chosen, rejected, beta=pull, label_smoothing=label_smoothing)

    assert LOSSES["tripled"].rows == ("chosen", "rejected")
    assert "pull: Strength, > 0. Default 3.0." in tripled.__doc__
    assert "label_smoothing: Probability eps in [0, 0.5] that a label is wrong. Default 0.0." in (
        tripled.__doc__
    )
    assert "nll: Weight of the likelihood term" in tripled.__doc__
    hidden, head = torch.randn(2, 3, 4), torch.randn(5, 4)
    targets, ref = torch.tensor([[1, 2, 3], [0, 1, -100]]), torch.randn(2, 3, 4)
    want, _ = preference_loss(hidden, head, targets, loss="dpo", beta=2.0, ref_hidden=ref)
    for loss in ("tripled", tripled, LOSSES["tripled"], [tripled]):
        got, found = preference_loss(
            hidden, head, targets, loss=loss, pull=2.0, nll=0.0, ref_hidden=ref
        )
        assert torch.equal(got, want) and "rewards/margins" in found
    with pytest.raises(ValueError, match="loss 'tripled' has no argument 'beta'"):
        preference_loss(hidden, head, targets, loss="tripled", beta=2.0, ref_hidden=ref)


def test_a_declaration_that_does_not_hold(own_losses):
    with pytest.raises(ValueError, match=r"'bare' says nothing of its arguments \['width'\]"):

        @pointwise(source="none", status="a test")
        def bare(seq: SeqStats, *, beta: float = 1.0, width: float = 1.0) -> Tensor:
            """l = 0"""
            return seq.logp

    with pytest.raises(ValueError, match=r"'stale' documents \['gone'\], which it does not take"):

        @pointwise(source="none", status="a test")
        def stale(seq: SeqStats) -> Tensor:
            """l = 0

            Args:
                gone: Nothing.
            """
            return seq.logp

    with pytest.raises(ValueError, match="two losses are named 'dpo'"):

        @pairwise(source="none", status="a test")
        def dpo(chosen: SeqStats, rejected: SeqStats) -> Tensor:
            """l = 0"""
            return chosen.logp

    assert not {"bare", "stale"} & set(LOSSES) and LOSSES["dpo"].fn is losses.dpo


def test_a_cell_may_be_run_again(own_losses):
    for factor in (1.0, 2.0):

        @listwise(source="none", status="a test")
        def again(scores: Tensor, relevance: Tensor, cu_groups: Tensor) -> Tensor:
            """l = factor sum of scores"""
            return factor * scores.sum()[None]  # noqa: B023

        one = torch.ones(2)
        assert LOSSES["again"](one, one, torch.tensor([0, 2])).item() == 2 * factor


def test_resolve_takes_names_functions_and_records():
    for loss in ("kto", losses.kto, LOSSES["kto"]):
        assert losses.resolve(loss) == (LOSSES["kto"], {})
        assert losses.required(loss) == ("desirable", "kl_baseline")
    assert losses.resolve("aot_unpaired") == (LOSSES["aot"], {"paired": False})
    assert losses.bind("aot_unpaired", {}).args == {"paired": False}
    for wrong in (None, 3, formula(losses.dpo), torch.nn.Linear):
        with pytest.raises(ValueError, match="loss must be a name of"):
            losses.resolve(wrong)
