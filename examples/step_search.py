"""A tree search over the steps of an answer, led by the policy that it later trains.

Used by itool_calls.py and mcts_dpo.py. Texts are words with spaces between, answers are steps. Many
prompts are searched side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


class Words:
    """A table of words for texts with spaces between them; 0 pads."""

    def __init__(self, text: str) -> None:
        self.words = ["<pad>", *dict.fromkeys(text.split())]
        self.ids = {word: i for i, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        return [self.ids[word] for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[i] for i in ids)

    def model(self, seed: int = 0) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=len(self.words), hidden_size=64, intermediate_size=128,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.1,
            pad_token_id=0,
        ))  # fmt: skip

    def batch(self, rows: Sequence[dict[str, Any]], sides: Sequence[str]) -> dict[str, Any]:
        """The answers `sides` of a row are neighbours; `<side>_weights` of 0 leave tokens out."""
        ids, labels = [], []
        for row in rows:
            prompt = self.encode(row["prompt"])
            for side in sides:
                answer = self.encode(row[side])
                weights = row.get(f"{side}_weights", [1.0] * len(answer))
                scored = [t if w else -100 for t, w in zip(answer, weights, strict=True)]
                ids.append(prompt + answer)
                labels.append([-100] * len(prompt) + scored)
        width = max(map(len, ids))
        return {
            "input_ids": torch.tensor([x + [0] * (width - len(x)) for x in ids]),
            "labels": torch.tensor([x + [-100] * (width - len(x)) for x in labels]),
        }


def fit(step: Any, words: Words, rows: list[dict[str, Any]], *, rate: float, batch: int) -> float:
    """One pass of AdamW; step(**batch)[0] is the loss, a plain model's own where rows have no
    `rejected`, else of pairs, with `pref_prob` where rows have it. The last loss."""
    sides = ("chosen", "rejected")[: 1 + ("rejected" in rows[0])]
    optimizer = torch.optim.AdamW(step.parameters(), lr=rate)
    for part in (rows[at : at + batch] for at in range(0, len(rows), batch)):
        probs = [row["pref_prob"] for row in part if "pref_prob" in row]
        more = {"pref_prob": torch.tensor(probs)} if probs else {}
        loss = step(**words.batch(part, sides), **more)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def next_logps(policy: Any, words: Words, texts: Sequence[str]) -> torch.Tensor:  # [S, V]
    """Log-probabilities of the word after each text."""
    ids = [words.encode(text) for text in texts]
    width = max(map(len, ids))
    rows = torch.tensor([x + [0] * (width - len(x)) for x in ids])  # causal: padding is not read
    last = torch.tensor([len(x) - 1 for x in ids])
    return policy(input_ids=rows).logits[torch.arange(len(ids)), last].log_softmax(-1)


def sample(
    policy: Any, words: Words, texts: Sequence[str], stops: Sequence[str], limit: int
) -> list[tuple[str, float]]:
    """What follows each text, to a stop or `limit` words, and its probability per word."""
    after, total = [""] * len(texts), [0.0] * len(texts)
    live = list(range(len(texts)))
    for _ in range(limit):
        logps = next_logps(policy, words, [f"{texts[i]} {after[i]}" for i in live])
        chosen = torch.multinomial(logps.exp(), 1)[:, 0].tolist()
        for row, (i, word) in enumerate(zip(live, chosen, strict=True)):
            after[i] = f"{after[i]} {words.words[word]}".strip()
            total[i] += logps[row, word].item()
        if not (live := [i for i in live if after[i].split()[-1] not in stops]):
            break
    return [(a, math.exp(t / len(a.split()))) for a, t in zip(after, total, strict=True)]


@dataclass
class Node:
    text: str  # prompt and steps so far
    prior: float = 1.0
    step: str = ""
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    value: float = 0.0  # mean over visits
    ends: list[str] = field(default_factory=list)  # for the judge: answers seen from here

    def follow(self, c: float) -> Node:
        """The child of highest value + c prior sqrt(visits here) / (1 + visits there); an
        unvisited child counts with the value of its parent."""
        return max(self.children, key=lambda child: (
            (child.value if child.visits else self.value)
            + c * child.prior * math.sqrt(self.visits) / (1 + child.visits)
        ))  # fmt: skip

    def nodes(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            yield from child.nodes()


def search(
    prompts: Sequence[str], propose: Callable[[list[Node]], list[list[tuple[str, float]]]],
    judge: Callable[[list[Node]], list[float]], *, end: str | tuple[str, ...],
    simulations: int, c: float,
) -> list[Node]:  # fmt: skip
    """The trees. propose gives steps and priors to nodes that have none, judge values to nodes."""
    roots = [Node(prompt) for prompt in prompts]
    for _ in range(simulations):
        leaves = roots
        while any(leaf.children for leaf in leaves):
            leaves = [leaf.follow(c) if leaf.children else leaf for leaf in leaves]
        open_leaves = [leaf for leaf in leaves if not leaf.text.endswith(end)]
        proposed = propose(open_leaves) if open_leaves else []
        for leaf, steps in zip(open_leaves, proposed, strict=True):
            priors = dict(steps)  # a step proposed twice is one child
            leaf.children = [Node(f"{leaf.text} {s}", p, s, leaf) for s, p in priors.items()]
        leaves = [leaf.follow(c) if leaf.children else leaf for leaf in leaves]
        for leaf, value in zip(leaves, judge(leaves), strict=True):
            node: Node | None = leaf
            while node is not None:
                node.visits += 1
                node.value += (value - node.value) / node.visits
                node = node.parent
    return roots
