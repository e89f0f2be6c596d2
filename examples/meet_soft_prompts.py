"""MEET (arXiv 2310.00819): control tokens tuned as soft prompts, then model and tokens together.

    python examples/meet_soft_prompts.py

First stage: PEFT's prompt tuning, one prompt for good answers and one for bad, the model frozen.
A loss at the head knows no virtual tokens, so the prompt is put before the embedded text and the
base model called with that: the logits are never made and the loss is that of PEFT's own forward.
Then the vectors become words of the vocabulary. Second stage: `control_prefix` writes these words
before the prompts and `sft` trains everything.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import peft
import tiny
import torch
from tokenizers import processors
from torch import Tensor

from prefkern.integrations.collate import PairCollator
from prefkern.integrations.preference_model import PreferenceModel
from prefkern.prep import control_prefix
from prefkern.train.recipes.online.sampling import sample_answers

LENGTH = 4  # virtual tokens of a prompt
SIDES = {"good": "chosen", "bad": "rejected"}
PREFIX = {kind: " ".join(f"<{kind}-{i}>" for i in range(LENGTH)) for kind in SIDES}


def reader(steps: int = 160) -> Any:
    """A model that has read answers of both kinds, three of four behind a word of their tone."""
    rng, rows = random.Random(0), []
    for number, row in enumerate(tiny.pairs(16 * steps, seed=100)):
        kind, words = (("chosen", tiny.GOOD), ("rejected", tiny.BAD))[number % 2]
        hint = f"{rng.choice(words)} : " if number % 8 < 6 else ""
        rows.append({"prompt": hint + row["prompt"], "chosen": row[kind], "rejected": row[kind]})
    model = tiny.model()
    tiny.fit(PreferenceModel(model, "sft", metrics=False), rows, rate=5e-3)
    return model


def side_batch(rows: list[dict[str, str]], kind: str) -> dict[str, Tensor]:
    """The answers of one kind alone, each once."""
    twice = [{**row, "chosen": row[SIDES[kind]], "rejected": row[SIDES[kind]]} for row in rows]
    return {name: x[::2] for name, x in PairCollator(tiny.tokenizer())(twice).items()}


def with_prompt(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with the active soft prompt before every row, as embeddings."""
    ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    embedded = model.get_base_model().get_input_embeddings()(ids)  # [B, T, D]
    ahead = mask.new_ones(len(ids), LENGTH)
    return {
        "inputs_embeds": torch.cat([model.get_prompt(len(ids)), embedded], 1),
        "attention_mask": torch.cat([ahead, mask], 1),
        "labels": torch.cat([torch.full_like(ahead, -100), labels], 1),
    }


def first_stage(base: Any, rows: list[dict[str, str]], rate: float = 0.1, batch: int = 16) -> Any:
    """A PEFT model with the adapters good and bad; base is frozen and unchanged."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    model = peft.get_peft_model(base, config, adapter_name="good")
    model.add_adapter("bad", config)
    step = PreferenceModel(model.get_base_model(), "sft", layout="unpaired", metrics=False)
    for kind in SIDES:
        model.set_adapter(kind)
        own = model.prompt_encoder[kind].requires_grad_(True)
        optimizer = torch.optim.AdamW(own.parameters(), lr=rate)
        for at in range(0, len(rows), batch):
            loss = step(**with_prompt(model, side_batch(rows[at : at + batch], kind))).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def as_words(model: Any) -> tuple[Any, Any]:
    """Base model and tokenizer with the soft prompts as words; a row reads prefix, <s>, prompt."""
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.add_tokens([word for text in PREFIX.values() for word in text.split()])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    base = copy.deepcopy(model.get_base_model()).requires_grad_(True)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    with torch.no_grad():
        for kind, text in PREFIX.items():
            ids = tokenizer.convert_tokens_to_ids(text.split())
            embedding[ids] = model.prompt_encoder[kind].embedding.weight
            head[ids] = 0.0  # logits of 0: never wanted as an answer
    return base, tokenizer


def prefixed(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Two rows of a pair, each answer as `chosen` behind its own control words."""
    begun = [{**row, "prompt": f"<s> {row['prompt']}"} for row in rows]
    return control_prefix(
        begun, good_prefix=PREFIX["good"], bad_prefix=PREFIX["bad"], separator=" "
    )


def second_stage(base: Any, tokenizer: Any, rows: list[dict[str, str]]) -> list[float]:
    """Likelihood of all answers behind their prefixes, every parameter trained; the losses."""
    step = PreferenceModel(base, "sft", metrics=False)
    collate, table = PairCollator(tokenizer), prefixed(rows)
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-3)
    losses = []
    for at in range(0, len(table), 16):
        loss = step(**collate(table[at : at + 16])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def good_words(base: Any, tokenizer: Any, kind: str) -> float:
    """Share of good words among the adjectives of answers sampled behind a prefix."""
    rows = [{"prompt": f"{PREFIX[kind]} <s> tell of the {x} :"} for x in tiny.ANIMALS]
    found = sample_answers(base, tokenizer, rows, num_generations=16, max_new_tokens=18, seed=3)
    words = [word for row in found for answer in row for word in answer.text.split()]
    good = sum(word in tiny.GOOD for word in words)
    return good / max(1, good + sum(word in tiny.BAD for word in words))


def main(pairs: int = 320) -> dict[str, Any]:
    rows, found = tiny.pairs(pairs), {}
    model = first_stage(reader(), rows * 2)
    base, tokenizer = as_words(model)
    found["soft_good"], found["soft_bad"] = (good_words(base, tokenizer, kind) for kind in SIDES)
    found["losses"] = second_stage(base, tokenizer, rows)
    found["tuned_good"], found["tuned_bad"] = (good_words(base, tokenizer, kind) for kind in SIDES)
    print({name: value for name, value in found.items() if name != "losses"})
    return {**found, "model": model, "rows": rows}


if __name__ == "__main__":
    main()
