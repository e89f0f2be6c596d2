"""README and docs: blocks run, commands parse, links lead somewhere, quoted messages exist."""

from __future__ import annotations

import ast
import re
import shlex

import pytest
from doc_blocks import ROOT, blocks, run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.name)
def test_the_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran = run(page)
    if not ran:
        pytest.skip("needs " + ", ".join({m for b in blocks(page) for m in b.missing}))
    printed = capsys.readouterr().out
    if page.name == "README.md":
        loss, rewards = map(float, printed.split())
        assert 0.0 < loss < 50.0 and 0.0 <= rewards <= 1.0


@by_name
def test_the_commands_parse(page, tmp_path, monkeypatch):
    """Every `prefkern VERB ...` of a block: the verb is there, options of a run are known."""
    pytest.importorskip("tyro")
    from prefkern.cli import main, options
    from prefkern.train.stored.options import SampleConfig, ScoreConfig

    tables = {"score": ScoreConfig, "sample": SampleConfig}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("model: M\ndataset: D\n")
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for block in re.findall(r"^```(?:sh|bash)?\n(.*?)^```", text, re.M | re.S):
        for command in re.findall(r"^prefkern (.*)$", block, re.M):
            verb, *rest = shlex.split(command, comments=True)
            assert verb in main.VERBS, command
            if "|" not in rest and verb in ("train", "eval", "precompute", "view"):
                options.parse(verb, rest)
            elif "|" not in rest and verb in tables:
                options.parse_table_options(verb, tables[verb], rest)


def anchors(page):
    """Ids of the headings, as GitHub and the site form them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@by_name
def test_the_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), f"{page.name} -> {target}"
        if anchor:
            assert anchor in anchors(other), f"{page.name} -> {target}"


def test_every_page_of_the_navigation_is_there_and_no_page_is_forgotten():
    listed = re.findall(r"^ +- .*: (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert len(listed) == len(set(listed)) > 8
    assert set(listed) == {page.name for page in PAGES} - {"README.md"}


def said() -> str:
    """Every string of the package; `{}` where a value is put in."""
    found = []
    for path in sorted((ROOT / "prefkern").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_messages_of_the_troubleshooting_page_exist():
    text, strings, checked = (ROOT / "docs" / "troubleshooting.md").read_text(), said(), 0
    for row in re.findall(r"^\| (.*?) \|", text.split("## Numbers")[0], re.M):
        for quoted in re.findall(r"`([^`]{9,})`", row):
            assert quoted in strings, f"no message says {quoted!r}"
            checked += 1
    assert checked > 15
