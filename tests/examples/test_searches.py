"""Searches and self-made preferences as examples: trees of steps, tested programs, own verdicts."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def same_samples():
    torch.manual_seed(0)


def test_osp_writes_better_by_its_own_word(example):
    osp = example("osp_asks_itself")
    begin = osp.start()
    for loss in ("soft_label", "soft_pairs"):
        found = osp.main(loss, 2, begin)
        assert found["before"] < 0.45
        assert found["after round 2"] > found["before"] + 0.2, loss


def test_itool_calls(example):
    itool = example("itool_calls")
    found = itool.main()
    assert found["after round 2"] > found["before"] + 0.15
    for row in found["pairs"][0]:
        assert itool.fragments(row["chosen"])[0] != itool.fragments(row["rejected"])[0]


def test_mcts_dpo(example):
    mcts = example("mcts_dpo")
    found = mcts.main()
    assert found["before"] < 0.45
    assert found["after round 2"] > found["before"] + 0.15
    rows = [row for rows in found["pairs"] for row in rows]
    assert all(row["chosen_score"] > row["rejected_score"] for row in rows)
    assert any(row["pref_prob"] > 0.8 for row in rows)
    followed = [
        [row[side] in mcts.ROADS[row["prompt"].split()[-1]] for side in ("chosen", "rejected")]
        for row in found["pairs"][0] if row["prompt"].split()[-1] in "bcdef"
    ]  # fmt: skip
    chosen, rejected = zip(*followed, strict=True)
    assert sum(chosen) > sum(rejected) + 0.3 * len(followed)


def test_codedpo(example):
    code = example("codedpo")
    found = code.main()
    (right, fast), (right_after, fast_after) = found["before"], found["after round 2"]
    assert right_after > right + 0.15 and fast_after > fast + 0.1
    answers = {task: texts[:2] for task, texts in code.PROGRAMS.items()}
    right_ones = [
        [row[side] in answers[row["prompt"].split()[1]] for side in ("chosen", "rejected")]
        for row in found["by_score"]
    ]
    chosen, rejected = zip(*right_ones, strict=True)
    assert sum(chosen) > sum(rejected) + 0.5 * len(right_ones)
    for row in found["by_time"]:
        assert row["chosen_score"] > row["rejected_score"]  # minus the run times


def test_the_sandbox_holds(example):
    """A program that does what it may not fails its tests, whatever it returns."""
    run = example("sandboxed_runner").run
    tests = [((1, 2), 3), ((2, 2), 4)]

    def passed(*lines: str) -> list[int]:
        return run("\n    ".join(("def f(a, b):", *lines)), tests, cpu_seconds=1).passed

    assert passed("return a + b") == [1, 1]
    assert passed("return a * b") == [0, 1]
    assert passed("return float(a + b)") == [0, 0]
    assert passed("if a == 2: raise SystemExit", "return a + b") == [1, 0]
    assert passed("while a == 2: pass", "return a + b") == [1, 0]
    assert passed("open('x', 'w')", "return a + b") == [0, 0]
    assert passed("x = [0] * 10**9", "return a + b") == [0, 0]
    assert passed("print(a + b)") == [0, 0]
    # the parts of a socket that need no import from disk: a descriptor is refused
    assert passed("import os", "os.pipe()", "return a + b") == [0, 0]
    assert passed("import os", "return a + b + len(os.environ.get('HOME', ''))") == [1, 1]


def test_search_visits_what_is_worth_it(example):
    """Two steps of a or b; an answer is worth the share of a."""
    found = example("step_search").search(
        [":"], lambda nodes: [[("a", 0.5), ("b", 0.5)] for _ in nodes],
        lambda nodes: [n.text.count("a") / 2 for n in nodes], end="z", simulations=8, c=0.5,
    )[0]  # fmt: skip
    a, b = found.children
    assert found.visits == 8 == a.visits + b.visits
    assert a.visits > b.visits and a.value > b.value
