"""Answers sampled from a model, or token by token from its mixture with a second one.

transformers' `generate` does the sampling; prompts are read by the tokenizer as the training data
are. B prompts of a batch, k answers each, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ..integrations import hf
from .data.rows import Text, template_args

# A model folder's own generation settings would change the distribution that is sampled from.
_NEUTRAL = {"top_k": 0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0}


class Answer(NamedTuple):
    text: str
    finished: bool  # the model ended it; False: max_new_tokens did


class Mixture(LogitsProcessor):
    """Replaces logits z by (1 - b) z + b z_ref: the geometric mixture of two models (IPO-MD).

    The second model reads the same left-padded prompts with a key-value cache of its own. `off` is
    the context in which it is called: where the reference is the policy without its adapter, both
    are one module.

    Args:
        model: The reference.
        attention_mask: [B * k, T] of the prompts, 0 on padding.
        b: Share of the reference in [0, 1].
        off: Makes the context, default one that does nothing.
    """

    def __init__(
        self,
        model: hf.Model,
        attention_mask: Tensor,  # [B * k, T]
        b: float,
        off: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.model, self.mask, self.b, self.off = model, attention_mask, b, off
        self.cache: Any = None
        self.read = 0  # tokens in the cache

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # [B * k, T], [B * k, V]
        grown = input_ids.shape[1] - self.mask.shape[1]
        if grown:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), grown)], 1)
        arguments: dict[str, Any] = {}
        if hf.takes_position_ids(self.model):
            positions = (self.mask.cumsum(1) - 1).clamp(min=0)
            arguments["position_ids"] = positions[:, self.read :]
        with self.off():
            out = hf.causal_lm(self.model)(
                input_ids=input_ids[:, self.read :], attention_mask=self.mask,
                past_key_values=self.cache, use_cache=True, **arguments,
            )  # fmt: skip
        self.cache, self.read = out.past_key_values, input_ids.shape[1]
        other = out.logits[:, -1].to(scores)
        return mix_logits(scores, other, self.b)


def mix_logits(logits: Tensor, ref_logits: Tensor, b: float) -> Tensor:
    """(1 - b) z + b z_ref; an entry that either model forbids (-inf) stays forbidden at 0 < b < 1.

    b = 0 and b = 1 give one of the two bit for bit.
    """
    if b in (0.0, 1.0):
        return ref_logits if b else logits
    return (1.0 - b) * logits + b * ref_logits


def prompt_ids(tokenizer: Any, row: Mapping[str, Any]) -> list[int]:
    """The tokens of a row's prompt: plain text, or messages up to where the answer begins."""
    prompt: Text = row["prompt"]
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt, verbose=False)["input_ids"])
        # some tokenizers end every text with EOS, after which there is nothing to answer
        ended = ids[-1:] == [tokenizer.eos_token_id] and not prompt.endswith(tokenizer.eos_token)
        return ids[:-1] if ended else ids
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "the prompts are conversations and this tokenizer has no chat template; set "
            "tokenizer.chat_template, or pass plain-text prompts."
        )
    ends_open = prompt[-1]["role"] == "assistant"
    text = tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=not ends_open,
        continue_final_message=ends_open, **template_args(row),
    )  # fmt: skip
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@torch.no_grad()
def sample_answers(
    policy: hf.Model,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    num_generations: int,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 16,
    reference: hf.Model | None = None,
    mixture: float = 0.0,
) -> list[list[Answer]]:
    """`num_generations` answers to the prompt of every row; the same seed gives the same answers.

    Args:
        policy: A causal model, left in the mode (train or eval) it came in.
        tokenizer: Its tokenizer, with an EOS token.
        rows: Each with a `prompt`.
        num_generations: Answers per prompt.
        max_new_tokens: Longest answer.
        seed: Of the sampling; the generators of the process are left as they were.
        temperature: 0 is greedy.
        top_p: Nucleus, 1 for the whole distribution.
        batch_size: Prompts answered at once.
        reference: Second model of the mixture; None with mixture > 0 takes the policy with its
            adapter switched off.
        mixture: Share b of the reference in the logits, (1 - b) z + b z_ref.

    Raises:
        ValueError: a tokenizer without EOS, a prompt without tokens, two models whose
            vocabularies differ.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("sampling ends an answer at EOS, and this tokenizer has no eos_token.")
    settings = getattr(hf.causal_lm(policy), "generation_config", None)
    also = getattr(settings, "eos_token_id", None) or []  # chat models end their turns with these
    eos = [tokenizer.eos_token_id, *(also if isinstance(also, list) else [also])]
    if mixture and reference is not None:
        own, other = (hf.read_head(m).weight.shape[0] for m in (policy, reference))
        if own != other:
            raise ValueError(f"a mixture needs one vocabulary, got heads of {own} and {other}.")
    if mixture and reference is None:
        hf.adapter_off(policy)  # refuses a policy without an adapter
    modes = [(model, model.training) for model in (policy, reference) if model is not None]
    device = next(policy.parameters()).device
    answers: list[list[Answer]] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for model, _ in modes:
            model.eval()
        for start in range(0, len(rows), batch_size):
            ids = [prompt_ids(tokenizer, row) for row in rows[start : start + batch_size]]
            if not all(ids):
                raise ValueError(f"the prompt of row {start + ids.index([])} has no tokens.")
            width = max(map(len, ids))
            pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
            tokens = torch.tensor([[pad] * (width - len(x)) + x for x in ids], device=device)
            mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in ids], device=device)
            processors = LogitsProcessorList()
            if mixture:
                processors.append(
                    Mixture(
                        policy if reference is None else reference,
                        mask.repeat_interleave(num_generations, 0),
                        mixture,
                        nullcontext if reference is not None else policy.disable_adapter,
                    )
                )
            options = (
                {"do_sample": True, "temperature": temperature, "top_p": top_p}
                if temperature
                else {"do_sample": False}
            )
            out = policy.generate(
                input_ids=tokens, attention_mask=mask, max_new_tokens=max_new_tokens,
                num_return_sequences=num_generations, eos_token_id=eos, pad_token_id=pad,
                logits_processor=processors, use_cache=True, **_NEUTRAL, **options,
            )[:, width:].tolist()  # fmt: skip
            for number, prompt in enumerate(ids):
                own = out[number * num_generations :][:num_generations]
                answers.append([_answer(tokenizer, prompt, x, eos) for x in own])
    for model, training in modes:
        model.train(training)
    return answers


def _answer(tokenizer: Any, prompt: list[int], ids: list[int], eos: list[int]) -> Answer:
    """The text that the tokens add to that of the prompt: alone they may lose a space in front."""
    end = next((i for i, token in enumerate(ids) if token in eos), None)
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *ids[:end]], skip_special_tokens=True)
    if whole.startswith(before):
        return Answer(whole[len(before) :], end is not None)
    return Answer(tokenizer.decode(ids[:end], skip_special_tokens=True), end is not None)
