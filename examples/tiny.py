"""A small model and preferences about single words: what the examples run on without a download.

Every sentence has three adjectives. Good ones are preferred, so it is known which words decide a
pair. The model first reads the worse answers and so starts by preferring them.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from prefkern.integrations.collate import PairCollator
from prefkern.integrations.preference_model import PreferenceModel

GOOD = ("kind", "warm", "bright", "calm", "gentle", "clean")
BAD = ("mean", "cold", "dull", "angry", "rough", "dirty")
ANIMALS = ("cat", "dog", "fox", "owl", "bear", "mouse")
THINGS = ("ball", "book", "lamp", "cup", "boat", "bell")
PLACES = ("house", "garden", "river", "hill", "barn", "road")
VERBS = ("sees", "finds", "wants", "paints")


@functools.cache
def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "tell", "of", "the", ":", "a", "by", "with", "friend", "."]
    words += [*GOOD, *BAD, *ANIMALS, *THINGS, *PLACES, *VERBS]
    vocab = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def model(seed: int = 0, hidden: int = 48, layers: int = 2) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=64, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def lists(count: int, seed: int = 0, sizes: tuple[int, ...] = (4,)) -> list[dict[str, Any]]:
    """Rows of prompt, responses and scores: the number of good words, 0 to 3."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        animal, thing, place, verb = map(rng.choice, (ANIMALS, THINGS, PLACES, VERBS))
        responses, scores = [], []
        for good in rng.sample(range(4), rng.choice(sizes)):
            kinds = [GOOD] * good + [BAD] * (3 - good)
            rng.shuffle(kinds)
            a, b, c = map(rng.choice, kinds)
            responses.append(
                f" a {a} {animal} {verb} the {b} {thing} by the {place} with a {c} friend ."
            )
            scores.append(float(good))
        rows.append({"prompt": f"tell of the {animal} :", "responses": responses, "scores": scores})
    return rows


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of prompt, chosen and rejected."""
    rows = []
    for row in lists(count, seed):
        order = sorted(range(4), key=lambda i: -row["scores"][i])
        worse = order[1 + len(rows) % 3]
        answers = {"chosen": row["responses"][order[0]], "rejected": row["responses"][worse]}
        rows.append({"prompt": row["prompt"], **answers})
    return rows


def start(seed: int = 0, steps: int = 80, **size: int) -> Any:
    """A model that has read the worse answers."""
    made = model(seed, **size)
    step = PreferenceModel(made, "sft", metrics=False)
    fit(step, pairs(16 * steps, seed=seed + 100), rate=5e-3, batch=16, sides=("rejected",) * 2)
    return made


def fit(
    step: Any, rows: list[dict[str, str]], *, rate: float, batch: int = 16,
    sides: tuple[str, str] = ("chosen", "rejected"),
) -> list[Any]:  # fmt: skip
    """One pass of AdamW over rows; step(**batch) returns (loss, metrics). The outputs."""
    collate = PairCollator(tokenizer())
    groups = getattr(step, "parameter_groups", step.parameters)()  # some have their own rate
    optimizer = torch.optim.AdamW(groups, lr=rate)
    outputs = []
    for at in range(0, len(rows), batch):
        part = [
            {"prompt": r["prompt"], "chosen": r[sides[0]], "rejected": r[sides[1]]}
            for r in rows[at : at + batch]
        ]
        out = step(**collate(part))
        out[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        outputs.append(out)
    return outputs


@torch.no_grad()
def accuracy(policy: Any, rows: list[dict[str, str]]) -> float:
    """Share of pairs whose chosen answer has the higher log-probability."""
    batch = PairCollator(tokenizer())(rows)
    labels = batch.pop("labels")[:, 1:]
    logp = policy(**batch).logits[:, :-1].log_softmax(-1)
    logp = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    total = logp.masked_fill(labels == -100, 0.0).sum(1)
    return (total[0::2] > total[1::2]).float().mean().item()
