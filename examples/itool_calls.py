"""iTool: easy requests first, then rounds of search over the fragments of tool calls and SimPO.

    python examples/itool_calls.py

A request wants one call or two; a call is a tool's name, a room and a value, each a step. What the
policy has read of two-call requests is deficient: an argument in three is wrong. A node is worth
the share of right fragments of one answer sampled from it, and 1 more for the whole. The best and
the worst answer of a tree form a pair; the fragments that both begin with go to the prompt.

Source: arXiv 2501.09766, from descriptions: warm-up from easy to hard, search over fragments,
rounds. How the paper values a fragment and picks branches was not available.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from step_search import Node, Words, fit, sample, search

from prefkern import prep
from prefkern.integrations.preference_model import PreferenceModel

TOOLS, ROOMS = ["heat", "light", "music"], ["hall", "attic", "cellar", "kitchen"]
VALUES = ["low", "mid", "high"]
WORDS = Words(f"want and : ( , ) ; . {' '.join(TOOLS + ROOMS + VALUES)}")
STOPS = ("(", ",", ";", ".")  # a fragment ends here
ANSWER = 14  # words of two calls


def request(rng: random.Random, calls: int) -> tuple[str, list[str]]:
    """A request and the fragments of the right calls."""
    wanted = [[rng.choice(part) for part in (TOOLS, ROOMS, VALUES)] for _ in range(calls)]
    steps: list[str] = []
    for tool, room, value in wanted:
        steps += [f"{tool} (", f"{room} ,", f"{value} ) ;"]
    steps[-1] = steps[-1].replace(";", ".")
    return f"want {' and '.join(map(' '.join, wanted))} :", steps


def requests(count: int, seed: int) -> dict[str, list[str]]:
    """Of two calls."""
    rng = random.Random(seed)
    return dict(request(rng, 2) for _ in range(count))


def lessons(count: int, seed: int) -> list[dict[str, Any]]:
    """Right answers to requests of one call, deficient ones to requests of two."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        calls = rng.randint(1, 2)
        prompt, steps = request(rng, calls)
        if calls == 2:
            for i, step in enumerate(steps):
                if rng.random() < 1 / 3:
                    old, *rest = step.split()
                    part = next(part for part in (TOOLS, ROOMS, VALUES) if old in part)
                    steps[i] = " ".join([rng.choice(part), *rest])
        rows.append({"prompt": prompt, "chosen": " ".join(steps), "difficulty": calls})
    return rows


def start(seed: int = 0, count: int = 3000) -> Any:
    """Warm-up: easy requests come first."""
    model, rows = WORDS.model(seed), lessons(count, seed)
    rows.sort(key=lambda row: row["difficulty"])
    fit(model, WORDS, rows, rate=3e-3, batch=32)
    return model


def fragments(text: str) -> list[str]:
    """The steps of an answer."""
    steps, now = [], []
    for word in text.split():
        now.append(word)
        if word in STOPS:
            steps.append(" ".join(now))
            now = []
    return steps + ([" ".join(now)] if now else [])


def worth(answer: str, steps: list[str]) -> float:
    """Share of fragments that are right, and 1 more for all."""
    found = fragments(answer)
    hits = sum(a == b for a, b in zip(found, steps, strict=False))
    return hits / max(len(found), len(steps)) + (found == steps)


def share_right(policy: Any, wanted: dict[str, list[str]]) -> float:
    answers = sample(policy, WORDS, list(wanted), (".",), ANSWER)
    right = [fragments(a) == s for (a, _), s in zip(answers, wanted.values(), strict=True)]
    return sum(right) / len(right)


def trees(policy: Any, wanted: dict[str, list[str]], simulations: int) -> list[Node]:
    def propose(nodes: list[Node]) -> list[list[tuple[str, float]]]:
        steps = sample(policy, WORDS, [n.text for n in nodes for _ in range(3)], STOPS, 3)
        return [steps[i : i + 3] for i in range(0, len(steps), 3)]

    def judge(nodes: list[Node]) -> list[float]:
        texts = [node.text for node in nodes]
        rest = [i for i, text in enumerate(texts) if not text.endswith(".")]
        if rest:
            more = sample(policy, WORDS, [texts[i] for i in rest], (".",), ANSWER)
            for i, (answer, _) in zip(rest, more, strict=True):
                texts[i] = f"{texts[i]} {answer}"
        for node, text in zip(nodes, texts, strict=True):
            node.ends.append(text)
        split = [text.split(" : ", 1) for text in texts]
        return [worth(answer, wanted[f"{asked} :"]) for asked, answer in split]

    return search(list(wanted), propose, judge, end=".", simulations=simulations, c=1.0)


def pairs(roots: list[Node], wanted: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Per tree the best answer seen against the worst, from the first fragment that differs."""
    rows = []
    for root in roots:
        ends = (end for node in root.nodes() for end in node.ends)
        seen = dict.fromkeys(end.removeprefix(f"{root.text} ") for end in ends)
        order = sorted(seen, key=lambda answer: worth(answer, wanted[root.text]))
        if worth(order[-1], wanted[root.text]) > worth(order[0], wanted[root.text]):
            rows.append({
                "prompt": root.text, "chosen_steps": fragments(order[-1]),
                "rejected_steps": fragments(order[0]),
            })  # fmt: skip
    rows = prep.shared_steps_to_prompt(rows, joint=" ")
    return [row | {"prompt": row["prompt"].strip()} for row in rows]


def main(rounds: int = 2, prompts: int = 64, simulations: int = 12, begin: Any = None) -> Any:
    policy, held_out = begin or start(), requests(200, seed=1)
    found: dict[str, Any] = {"before": share_right(policy, held_out), "pairs": []}
    for k in range(rounds):
        wanted = requests(prompts, seed=10 + k)
        rows = pairs(trees(policy, wanted, simulations), wanted)
        fit(PreferenceModel(policy, "simpo"), WORDS, rows * 2, rate=5e-4, batch=16)
        found["pairs"].append(rows)
        found[f"after round {k + 1}"] = share_right(policy, held_out)
    print({k: round(v, 3) for k, v in found.items() if k != "pairs"})
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
