"""docs/losses.md is what the code says, and says enough of every loss."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from loss_batch import Batch

import prefkern
from prefkern import losses
from prefkern.cli import main as cli
from prefkern.losses import page
from prefkern.losses.advice import ADVICE

PAGE = page.page()
FILE = Path(__file__).resolve().parents[2] / "docs" / "losses.md"


def test_the_committed_page_is_current(capsys):
    assert cli.main(["losses", "--markdown"]) == 0
    made = capsys.readouterr().out
    assert made == PAGE
    if made != FILE.read_text(encoding="utf-8"):
        pytest.fail("docs/losses.md is old; run: prefkern losses --markdown > docs/losses.md")


def test_the_contents_lead_somewhere():
    titles = re.findall(r"^##+ (.*)$", PAGE, re.M)
    anchors = {page._anchor(title) for title in titles}
    assert len(anchors) == len(titles)
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= anchors
    assert set(losses.LOSSES) <= set(titles)
    assert PAGE.isascii() and not re.search(r"[ \t]$", PAGE, re.M)
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) in (3, 4) for row in rows)  # no cell is cut


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_loss_has_its_formula_and_the_meaning_of_every_argument(name):
    record = losses.LOSSES[name]
    document = page.read(inspect.getdoc(record.fn))
    assert document.summary.endswith(".") and "l" in document.formula
    assert not any(line.startswith("Args") for line in document.notes)
    entry = PAGE.split(f"### {name}\n")[1].split("\n### ")[0]
    for argument in losses.arguments(record):
        if argument != "backend":
            row = re.search(rf"^\| `{argument}` \| (\S.*) \| (\S.*) \|$", entry, re.M)
            assert row, f"{argument} has no meaning"
    assert record.source.split(",")[0].split(" eq")[0].removeprefix("arXiv ")[:9] in entry


# ---- advice and the runnable line ----------------------------------------------------------------


def test_every_loss_has_advice_and_its_relations_are_losses():
    assert set(ADVICE) == set(losses.LOSSES)
    for name, advice in ADVICE.items():
        assert advice.when.endswith("."), name
        named = set(re.findall(r"`([^`]+)`", f"{advice.when} {advice.relations}"))
        assert named <= set(losses.LOSSES) - {name}, name
        assert losses.LOSSES[name].provisional == ("provisional" in advice.when), name


BLOCK = re.search(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
DIFFUSION = {
    "sigma": torch.rand(3) + 0.1, "labels": torch.ones(3), "p_win": torch.full((3,), 0.8),
    "phi": torch.tensor([1.0, 0.0, 0.5]), "cu_groups": torch.tensor([0, 3], dtype=torch.int32),
    "relevance": torch.tensor([2.0, 0.0, 1.0]),
    "score_dot": torch.rand(3).requires_grad_(), "score_gap": torch.rand(3),
    "err": torch.rand(3).requires_grad_(), "ref_err": torch.rand(3),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:loss .* is provisional:UserWarning")
@pytest.mark.parametrize("name", losses.LOSSES)
def test_the_line_of_every_loss_runs(name):
    names = {}
    exec(BLOCK[1], names)
    if losses.LOSSES[name].family == "diffusion":
        names |= DIFFUSION
        if name in ("dense_dpo", "tlpo"):  # errors per segment, per dimension
            for side in ("chosen_err", "rejected_err", "ref_chosen_err", "ref_rejected_err"):
                names[side] = (
                    names[side]
                    .detach()[:, None]
                    .expand(3, 2)
                    .clone()
                    .requires_grad_(not side.startswith("ref"))
                )
            names["labels"] = torch.ones(3, 2)
    else:  # the block has the shapes of this batch
        given = Batch().given(name)
        if "aux_head" in given:
            given |= {
                "aux_hidden": names["ref_hidden"].flip(0),
                "aux_head": names["head"].weight.detach(),
            }
        names |= given
    entry = PAGE.split(f"### {name}\n")[1].split("\n### ")[0].split("\n## ")[0]
    value = eval(entry.rsplit("```text\n", 1)[1].split("\n```")[0], names)
    loss = value[0] if isinstance(value, tuple) else value.sum()
    loss.backward()
    assert torch.isfinite(loss) and prefkern.LOSSES[name].name == name
