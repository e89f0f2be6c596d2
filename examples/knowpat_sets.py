"""KnowPAT's preference sets (arXiv 2311.06503) from the triples of a knowledge graph.

    python examples/knowpat_sets.py

Of each question the triples about what it asks for are retrieved. Answers of a knowledge set state
all, some or none of them and are ordered by how many; answers of a style set state all and are
ordered by their tone. One loss learns both. A triple counts as used where its words are in the
answer. The paper has language models write the answers; here they are put together from words.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import ranked_lists
import tiny
import torch

from prefkern.integrations.preference_model import PreferenceModel
from prefkern.train.recipes.online.sampling import sample_answers


class Triple(NamedTuple):
    head: str
    relation: str
    tail: str


# relation -> how an answer says it, and what the tail may be
WORDS = {
    "does": ("{} the", tiny.VERBS),
    "looks at": ("{} by", tiny.THINGS),
    "lives near": ("by the {} with", tiny.PLACES),
    "friend is": ("a {} friend", tiny.GOOD),
}
HEADS = tiny.ANIMALS[:3]


def graph(seed: int = 0) -> list[Triple]:
    """One triple per animal and relation."""
    rng = random.Random(seed)
    return [
        Triple(animal, relation, rng.choice(tails))
        for animal in HEADS
        for relation, (_, tails) in WORDS.items()
    ]


def retrieve(question: str, triples: Sequence[Triple]) -> list[Triple]:
    """The triples whose head the question names."""
    return [triple for triple in triples if triple.head in question.split()]


def used(answer: str, triples: Sequence[Triple]) -> int:
    """How many of the triples the answer states."""
    said = f" {answer.strip()} "
    return sum(f" {WORDS[t.relation][0].format(t.tail)} " in said for t in triples)


def written(animal: str, triples: Sequence[Triple], tone: Sequence[str], rng: random.Random) -> str:
    """An answer that states the triples and is wrong elsewhere, with two words of tone."""
    told = {triple.relation: triple.tail for triple in triples}
    known = {relation: tails for relation, (_, tails) in WORDS.items()}
    does, thing, place, friend = (
        told.get(relation) or rng.choice(tails) for relation, tails in known.items()
    )
    begin = f" a {tone[0]} {animal} {does} the {tone[1]} {thing}"
    return f"{begin} by the {place} with a {friend} friend ."


def knowledge_set(
    question: str, triples: Sequence[Triple], rng: random.Random
) -> dict[str, Any] | None:
    """Answers told all, two, one and none of the triples; scores are the numbers used, which chance
    may raise. None where fewer than two numbers are left."""
    own = retrieve(question, triples)
    answers = {}
    for count in (len(own), 2, 1, 0):
        tone = [rng.choice(tiny.GOOD + tiny.BAD) for _ in range(2)]
        answer = written(own[0].head, rng.sample(own, count), tone, rng)
        answers.setdefault(used(answer, own), answer)
    if len(answers) < 2:
        return None
    return {"prompt": question, "responses": [*answers.values()], "scores": [*map(float, answers)]}


def style_set(question: str, triples: Sequence[Triple], rng: random.Random) -> dict[str, Any]:
    """Answers with all triples and two, one and no friendly words, which are the scores."""
    own = retrieve(question, triples)
    tones = [
        [rng.choice(tiny.GOOD if i < good else tiny.BAD) for i in range(2)] for good in (2, 1, 0)
    ]
    responses = [written(own[0].head, own, tone, rng) for tone in tones]
    return {"prompt": question, "responses": responses, "scores": [2.0, 1.0, 0.0]}


def sets(triples: Sequence[Triple], count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` questions, a knowledge and a style set of each."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        question = f"tell of the {rng.choice(HEADS)} :"
        made = (knowledge_set(question, triples, rng), style_set(question, triples, rng))
        rows += [row for row in made if row is not None]
    return rows


def measure(policy: Any, triples: Sequence[Triple]) -> tuple[float, float]:
    """Of sampled answers: share of the question's triples used, share of friendly words."""
    rows = [{"prompt": f"tell of the {animal} :"} for animal in HEADS]
    answers = sample_answers(
        policy, tiny.tokenizer(), rows, num_generations=16, max_new_tokens=20, seed=5
    )
    facts, tones = [], []
    for row, found in zip(rows, answers, strict=True):
        own = retrieve(row["prompt"], triples)
        for answer in found:
            facts.append(used(answer.text, own) / len(own))
            words = [word for word in answer.text.split() if word in tiny.GOOD + tiny.BAD]
            tones.append(sum(word in tiny.GOOD for word in words[:2]) / 2)
    return sum(facts) / len(facts), sum(tones) / len(tones)


def fit(policy: Any, rows: list[dict[str, Any]], rate: float = 5e-3, **args: Any) -> None:
    step = PreferenceModel(policy, "knowpat", metrics=False, **args)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate)
    for at in range(0, len(rows), 8):
        step(**ranked_lists.batch_of(rows[at : at + 8])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main(questions: int = 240) -> dict[str, dict[str, float]]:
    triples, policy = graph(), tiny.start()
    found = {"before": measure(policy, triples)}
    for weight in (0.0, 1.0):  # likelihood of the best alone, then the alignment beside it
        tuned = copy.deepcopy(policy)
        rows = sets(triples, questions)
        fit(tuned, rows, knowpat_weight=weight)
        found["likelihood" if weight == 0 else "knowpat"] = measure(tuned, triples)
    print(found)
    return {name: {"triples": facts, "tone": tone} for name, (facts, tone) in found.items()}


if __name__ == "__main__":
    main()
