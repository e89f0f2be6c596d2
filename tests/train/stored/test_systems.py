"""Systems whose rows come out of `prefkern sample`, `score` or `precompute`: two commands each, and
what they change in a tiny model that answers with letters a and b."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from online_model import letters_model
from stored_commands import log_of, prefkern, rows_of, trained, write_lines

JUDGES = """
def share(row, answers):
    return [text.count("a") / max(len(text), 1) for text in answers]

def share_of_a(row, answers):
    return [6.0 * x for x in share(row, answers)]

def share_of_b(row, answers):
    return [-6.0 * x for x in share(row, answers)]
"""
TEXTS = ["".join(x) for n in (2, 3) for x in itertools.product("ab", repeat=n)]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A folder with a model (`letters0`), judges, prompts and pairs that prefer the letter a."""
    folder = tmp_path_factory.mktemp("systems")
    letters_model(folder)
    (folder / "judge.py").write_text(JUDGES)
    write_lines(folder / "prompts.jsonl", [{"prompt": f"{x}:"} for x in "pqrs"] * 3)
    pairs = [
        {"prompt": f"{'pqrs'[i % 4]}:", "chosen": x, "rejected": y}
        for i, (x, y) in enumerate(itertools.permutations(TEXTS, 2))
        if x.count("a") / len(x) > y.count("a") / len(y)
    ]
    write_lines(folder / "pairs.jsonl", pairs)
    return folder


@pytest.fixture(scope="module")
def both(start) -> Path:
    """Every pair, and the same with the other answer preferred."""
    rows = rows_of(start / "pairs.jsonl")
    other = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    return write_lines(start / "both.jsonl", [*rows, *other])


@pytest.fixture(scope="module")
def lists(start) -> Path:
    """Samples of the model with the share of a as their score."""
    out = start / "lists.jsonl"
    prefkern(
        "sample", "--distinct", "--drop-unfinished", model=start / "letters0",
        dataset=start / "prompts.jsonl", output=out, num_generations=4, max_new_tokens=8,
        judge=f"{start}/judge.py:share",
    )  # fmt: skip
    return out


def share_of_a(start: Path, model: Path, prompts: str = "prompts.jsonl") -> float:
    """Mean share of the letter a in new samples."""
    out = model / f"samples-{Path(prompts).stem}.jsonl"
    prefkern(
        "sample", model=model, dataset=start / prompts, output=out, num_generations=6, seed=7,
        max_new_tokens=8, judge=f"{start}/judge.py:share",
    )  # fmt: skip
    scores = [score for row in rows_of(out) for score in row["scores"]]
    return sum(scores) / len(scores)


@pytest.fixture(scope="module")
def before(start) -> float:
    return share_of_a(start, start / "letters0")


@pytest.mark.parametrize(
    ("loss", "more"),
    [
        ("lipo", dict(loss_arg="beta=0.5")),
        ("pro", {}),
        ("dpo", dict(round_data="stages", num_rounds=0, max_steps=4)),  # Curry-DPO
    ],
    ids=["LiPO", "PRO", "Curry-DPO"],
)
def test_lists_of_samples(start, lists, before, tmp_path, loss, more):
    after = trained(start / "letters0", lists, tmp_path / "out", loss=loss, **more)
    assert share_of_a(start, after) > before + 0.15


def test_rso(start, before, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    prefkern(
        "sample", "--distinct", "--drop-unfinished", model=start / "letters0",
        dataset=start / "prompts.jsonl", output=pairs, num_generations=10, max_new_tokens=8,
        judge=f"{start}/judge.py:share",
        prep=("rejection_sample:num_samples=3,beta=0.3", "tournament_pairs:ties=skip"),
    )  # fmt: skip
    made = rows_of(pairs)
    assert all(row["chosen_score"] > row["rejected_score"] for row in made)
    # drawn as exp(score / beta): better than the model's own answers
    drawn = [row[f"{side}_score"] for row in made for side in ("chosen", "rejected")]
    assert sum(drawn) / len(drawn) > before + 0.05
    after = trained(start / "letters0", pairs, tmp_path / "out", loss="hinge")
    assert share_of_a(start, after) > before + 0.15


def test_modpo_follows_the_other_objective(start, both, tmp_path):
    """Labels that contradict each other leave the choice to the margin reward."""
    found = {}
    for judge in ("share_of_a", "share_of_b"):
        scored = tmp_path / f"{judge}.jsonl"
        prefkern(
            "score", dataset=both, output=scored, judge=f"{start}/judge.py:{judge}",
            name="margin_reward_{answer}",
        )  # fmt: skip
        after = trained(start / "letters0", scored, tmp_path / judge, loss="modpo")
        found[judge] = share_of_a(start, after)
    assert found["share_of_a"] > found["share_of_b"] + 0.3


def test_madpo_doubts_pairs_that_a_reward_model_contradicts(start, both, before, tmp_path):
    scored = tmp_path / "scored.jsonl"
    prefkern("score", dataset=both, output=scored, judge=f"{start}/judge.py:share_of_a",
             margin="rm_margin")  # fmt: skip
    after = trained(start / "letters0", scored, tmp_path / "madpo", loss="madpo")
    assert share_of_a(start, after) > before + 0.15


def test_reward_augmented_data(start, tmp_path):
    scored = tmp_path / "scored.jsonl"
    prefkern(
        "score", dataset=start / "pairs.jsonl", output=scored,
        judge=f"{start}/judge.py:share", prep="score_conditioned:template={score}>",
    )  # fmt: skip
    after = trained(start / "letters0", scored, tmp_path / "out", loss="dpo", max_steps=60)
    shares = []
    for wanted in (0, 1):
        name = tmp_path / f"under-{wanted}.jsonl"
        write_lines(name, [{"prompt": f"{wanted}>\n\n{x}:"} for x in "pqrs"] * 4)
        shares.append(share_of_a(start, after, str(name)))
    assert shares[1] > shares[0] + 0.2


def test_poft_reads_caches(start, tmp_path):
    """Two baselines, from caches and from a column: the same run, and the policy passes them."""
    weak = start / "start0"
    for name, model in (("weak", weak), ("strong", start / "letters0")):
        prefkern("precompute", model=model, dataset=start / "pairs.jsonl",
                 output_dir=tmp_path / name)  # fmt: skip
    caches = trained(
        weak, start / "pairs.jsonl", tmp_path / "caches", loss="poft",
        precomputed_baseline=(tmp_path / "weak", tmp_path / "strong"),
    )  # fmt: skip
    scored = tmp_path / "scored.jsonl"
    prefkern("score", dataset=start / "pairs.jsonl", output=scored, name="baseline_mean_logps",
             model=(weak, start / "letters0"))  # fmt: skip
    column = trained(weak, scored, tmp_path / "column", loss="poft")
    assert log_of(caches, "loss") == pytest.approx(log_of(column, "loss"), rel=1e-5)
    after = tmp_path / "after.jsonl"
    prefkern("score", dataset=scored, output=after, name="mean", model=caches)
    gaps = [row["chosen_mean"] - row["chosen_baseline_mean_logps"] for row in rows_of(after)]
    assert sum(gap > 0 for gap in gaps) > 0.9 * len(gaps)
