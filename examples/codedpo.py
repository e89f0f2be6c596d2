"""CodeDPO: the policy writes programs and tests, which judge each other; the best is preferred.

    python examples/codedpo.py

Programs and tests are both samples of the policy, both often wrong. sandboxed_runner.py runs every
program on every test; scores pass between the two sides (0.85, ten rounds), and the best program of
a list is preferred to the worst. Among programs that pass the better half of the tests, run again
on those alone, the fastest is preferred to the slowest. The loss is DPO with a likelihood term.
Nothing else says which program is right.

Source: arXiv 2410.05605, scores and pairs from notes on the published version; it has 15 programs
and 15 tests a problem, and one round.
"""

from __future__ import annotations

import copy
import random
import re
from typing import Any

import torch
from sandboxed_runner import run
from step_search import Words, fit, sample

from prefkern import prep
from prefkern.integrations.preference_model import PreferenceModel

LOOP = "return sum ( 1 for i in range ( 40000 * ( {} ) ) ) // 40000"
# per task: a fast and a slow right program, then wrong ones
PROGRAMS = {
    "sum": ("return a + b", LOOP.format("a + b"), "return a * b", "return a + 1"),
    "product": ("return a * b", LOOP.format("a * b"), "return a + b", "return a"),
    "larger": ("return max ( a , b )", LOOP.format("max ( a , b )"), "return min ( a , b )",
               "return a"),
}  # fmt: skip
SHARES = (0.2, 0.25, 0.3, 0.25)
TRUTH = {"sum": lambda a, b: a + b, "product": lambda a, b: a * b, "larger": max}
SAID = " ".join(text for texts in PROGRAMS.values() for text in texts)
WORDS = Words(f"program test : = ; {' '.join(PROGRAMS)} {' '.join(map(str, range(11)))} {SAID}")
END, LIMIT = ";", 40


def lessons(count: int, seed: int) -> list[dict[str, str]]:
    """Programs as SHARES has them, and tests of which one in four expects a wrong value."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        task = rng.choice(list(PROGRAMS))
        (program,) = rng.choices(PROGRAMS[task], SHARES)
        rows.append({"prompt": f"program {task} :", "chosen": f"{program} {END}"})
        a, b = rng.randrange(4), rng.randrange(4)
        value = TRUTH[task](a, b) + (rng.random() < 0.25)
        rows.append({"prompt": f"test {task} :", "chosen": f"{a} {b} = {value} {END}"})
    return rows


def start(seed: int = 0, count: int = 1500) -> Any:
    model = WORDS.model(seed)
    fit(model, WORDS, lessons(count, seed), rate=3e-3, batch=32)
    return model


def distinct(policy: Any, prompt: str, count: int) -> list[str]:
    texts = [text for text, _ in sample(policy, WORDS, [prompt] * count, (END,), LIMIT)]
    return list(dict.fromkeys(text.removesuffix(f" {END}") for text in texts))


def source(answer: str) -> str:
    return f"def f(a, b):\n    {answer}"


def lists(policy: Any, per_task: int, programs: int = 5, tests: int = 8) -> list[dict[str, Any]]:
    """Rows of prompt, responses, what was tested, and `passed` [K][T]."""
    rows = []
    for task in list(PROGRAMS) * per_task:
        found = [re.fullmatch(r"(\d+) (\d+) = (\d+)", text)
                 for text in distinct(policy, f"test {task} :", tests)]  # fmt: skip
        wanted = [((int(m[1]), int(m[2])), int(m[3])) for m in found if m]
        answers = distinct(policy, f"program {task} :", programs)
        if len(answers) > 1 and wanted:
            passed = [run(source(answer), wanted, cpu_seconds=1).passed for answer in answers]
            row = {"prompt": f"program {task} :", "responses": answers}
            rows.append(row | {"tests": wanted, "passed": passed})
    return rows


def pairs(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(pairs by score, pairs by run time)"""
    scored = prep.rank_programs(rows)
    timed = []
    for row in scored:
        middle = sorted(row["test_scores"])[len(row["test_scores"]) // 2]
        trusted = [t for t, s in zip(row["tests"], row["test_scores"], strict=True) if s >= middle]
        again = [run(source(answer), trusted, cpu_seconds=1) for answer in row["responses"]]
        timed.append({
            "prompt": row["prompt"], "responses": row["responses"],
            "passed": [ran.passed for ran in again], "seconds": [ran.seconds for ran in again],
        })  # fmt: skip
    by_time = prep.rank_by_run_time(timed, ties="skip")
    both = [
        prep.pairs_from_lists(table, pairs="best_vs_worst", ties="skip") if table else []
        for table in (scored, by_time)
    ]
    return both[0], both[1]


def shares(policy: Any, count: int = 60) -> tuple[float, float]:
    """Of sampled programs, those that are right, and those that are right and fast."""
    right = fast = 0
    for task, (quick, slow, *_) in PROGRAMS.items():
        texts = sample(policy, WORDS, [f"program {task} :"] * count, (END,), LIMIT)
        right += sum(text in (f"{quick} {END}", f"{slow} {END}") for text, _ in texts)
        fast += sum(text == f"{quick} {END}" for text, _ in texts)
    return right / (count * len(PROGRAMS)), fast / (count * len(PROGRAMS))


def main(rounds: int = 2, per_task: int = 8, seed: int = 0) -> dict[str, Any]:
    policy = start(seed)
    found: dict[str, Any] = {"before": shares(policy), "by_score": [], "by_time": []}
    for k in range(rounds):
        step = PreferenceModel(policy, "rpo", ref=copy.deepcopy(policy), beta=0.3, eta=0.5)
        by_score, by_time = pairs(lists(policy, per_task))
        rows = [
            {"prompt": row["prompt"], **{s: f"{row[s]} {END}" for s in ("chosen", "rejected")}}
            for row in by_score + by_time
        ]
        random.Random(k).shuffle(rows)
        fit(step, WORDS, rows * 3, rate=5e-4, batch=8)
        found["by_score"] += by_score
        found["by_time"] += by_time
        found[f"after round {k + 1}"] = shares(policy)
    print({name: value for name, value in found.items() if not name.startswith("by")})
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
