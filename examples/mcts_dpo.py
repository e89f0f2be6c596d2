"""MCTS-DPO: siblings of a search tree over steps as soft-labelled pairs, in rounds.

    python examples/mcts_dpo.py

The task is to walk from a to the place that is asked for. ROADS says which places are joined. The
policy has read walks of which three moves in ten follow no road and two in five end elsewhere, and
moves with a true yes or no. A node is worth its own confidence in the last move, plus 1 or -1 for
where one walk sampled from there ends. Best and worst sibling by value form a pair, its label comes
from their visits, and tokens count from the first that differs. Each round's reference is the
policy it began with.

Search and pairs follow the description of arXiv 2405.00451, selection, label and cut its authors'
code.
"""

from __future__ import annotations

import copy
import random
import re
from itertools import pairwise
from typing import Any

import torch
from step_search import Node, Words, fit, next_logps, sample, search

from prefkern import prep
from prefkern.integrations.preference_model import PreferenceModel

ROADS = {"a": "bc", "b": "de", "c": "ef", "d": "xy", "e": "yz", "f": "zx"}
NEAR = {"a": "bc", "b": "def", "c": "def", "d": "xyz", "e": "xyz", "f": "xyz"}  # moves one tries
ENDS = ("x", "y", "z")
WORDS = Words(f"to : ? yes no {' '.join('abcdef')} {' '.join(ENDS)}")
MOVES = 3
WIDTH = 3  # moves sampled per node


def problems(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [f"to {rng.choice(ENDS)} : a" for _ in range(count)]


def right(text: str) -> bool:
    """Every move follows a road, and the last one reaches the goal."""
    found = re.fullmatch(r"to (.) : ((?:[a-f] )+\1)", text)
    walk = found[2].split() if found else []
    roads = (there in ROADS.get(here, "") for here, there in pairwise(walk))
    return bool(walk) and all(roads)


def lessons(count: int, seed: int) -> list[dict[str, str]]:
    """What the policy has read: careless walks, and moves with a true yes or no."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        walk, goal = ["a"], rng.choice(ENDS)
        while (here := walk[-1]) not in ENDS:
            closed = [place for place in NEAR[here] if place not in ROADS[here]]
            astray = bool(closed) and rng.random() < 0.3
            walk.append(rng.choice(closed if astray else ROADS[here]))
            if closed:
                asked = f"to {goal} : {' '.join(walk)} ?"
                rows.append({"prompt": asked, "chosen": "no" if astray else "yes"})
        if rng.random() < 0.6:
            goal = walk[-1]
        rows.append({"prompt": f"to {goal} : a", "chosen": " ".join(walk[1:])})
    rng.shuffle(rows)
    return rows


def start(seed: int = 0, count: int = 1200) -> Any:
    model = WORDS.model(seed)
    fit(model, WORDS, lessons(count, seed), rate=3e-3, batch=32)
    return model


def share_right(policy: Any, prompts: list[str]) -> float:
    walks = sample(policy, WORDS, prompts, ENDS, MOVES)
    return sum(right(f"{p} {w}") for p, (w, _) in zip(prompts, walks, strict=True)) / len(prompts)


def confidence(policy: Any, texts: list[str]) -> list[float]:
    """The policy's probability of yes, of yes and no, when asked about the last move."""
    logps = next_logps(policy, WORDS, [f"{text} ?" for text in texts])
    two = logps[:, WORDS.encode("yes no")].softmax(-1)
    return two[:, 0].tolist()


def trees(policy: Any, prompts: list[str], simulations: int) -> list[Node]:
    def propose(nodes: list[Node]) -> list[list[tuple[str, float]]]:
        moves = sample(policy, WORDS, [n.text for n in nodes for _ in range(WIDTH)], (), 1)
        return [moves[i : i + WIDTH] for i in range(0, len(moves), WIDTH)]

    def judge(nodes: list[Node]) -> list[float]:
        texts = [node.text for node in nodes]
        ends, rest = list(texts), [i for i, text in enumerate(texts) if not text.endswith(ENDS)]
        if rest:
            walks = sample(policy, WORDS, [texts[i] for i in rest], ENDS, MOVES)
            for i, (walk, _) in zip(rest, walks, strict=True):
                ends[i] = f"{texts[i]} {walk}"
        sure = confidence(policy, texts)
        return [s + (1.0 if right(end) else -1.0) for s, end in zip(sure, ends, strict=True)]

    return search(prompts, propose, judge, end=ENDS, simulations=simulations, c=2.0)


def pairs(roots: list[Node]) -> list[dict[str, Any]]:
    lists = []
    for node in (node for root in roots for node in root.nodes()):
        seen = [child for child in node.children if child.visits]
        if len(seen) >= 2:
            lists.append({
                "prompt": node.text, "responses": [child.step for child in seen],
                "scores": [child.value for child in seen],
                "visits": [child.visits for child in seen],
            })  # fmt: skip
    rows = prep.pairs_from_lists(lists, pairs="best_vs_worst", aligned=("visits",), ties="skip")
    rows = [row | {f"{side}_ids": WORDS.encode(row[side]) for side in ("chosen", "rejected")}
            for row in prep.visit_labels(rows)]  # fmt: skip
    return prep.divergence_weights(rows)


def main(
    rounds: int = 2, prompts: int = 48, simulations: int = 16, seed: int = 0
) -> dict[str, Any]:
    policy, held_out = start(seed), problems(300, seed=1)
    found: dict[str, Any] = {"before": share_right(policy, held_out), "pairs": []}
    for k in range(rounds):
        rows = pairs(trees(policy, problems(prompts, seed=10 + k), simulations))
        random.Random(k).shuffle(rows)
        step = PreferenceModel(policy, "soft_label", ref=copy.deepcopy(policy), beta=0.2)
        fit(step, WORDS, rows * 2, rate=5e-4, batch=16)
        found["pairs"].append(rows)
        found[f"after round {k + 1}"] = share_right(policy, held_out)
    print({k: round(v, 3) for k, v in found.items() if k != "pairs"})
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
