"""Answers sampled from a model, or token by token from its mixture with a second one.

transformers' `generate` does the sampling; prompts are read by the tokenizer as the training data
are. B prompts of a batch, k answers each, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ....integrations import hf
from ....integrations.output_layer import output_layer_of
from ....prep.cells import text
from ...data.encode import Encoder
from ...data.rows import BadRow, ParsedRow, template_args

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


class Numbers(LogitsProcessor):
    """Refuses logits that are no numbers, of which sampling would make any token."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # [B * k, T], [B * k, V]
        # -inf forbids a token; a row of nothing else, or of nan and inf, has no distribution
        if not bool(scores.amax(-1).isfinite().all()):
            raise ValueError(f"the logits of {self.name} are not finite; check its weights.")
        return scores


def mix_logits(logits: Tensor, ref_logits: Tensor, b: float) -> Tensor:
    """(1 - b) z + b z_ref; an entry that either model forbids (-inf) stays forbidden at 0 < b < 1.

    b = 0 and b = 1 give one of the two bit for bit.
    """
    if b in (0.0, 1.0):
        return ref_logits if b else logits
    return (1.0 - b) * logits + b * ref_logits


def prompt_ids(tokenizer: Any, row: Mapping[str, Any]) -> list[int]:
    """The tokens of a row's prompt, as in training: plain text, or messages up to the answer.

    Raises:
        ValueError: the prompt, or what the row gives the chat template, cannot be used.
    """
    encoder = Encoder(
        tokenizer, max_length=None, model_context=None, vocab_size=None, append_eos=False
    )
    try:
        prompt = text(row["prompt"], "prompt")
        given = ParsedRow(prompt, [], [], template_args=template_args(row))
        return encoder.prompt_ids(given)
    except BadRow as why:
        raise ValueError(f"column {why.column!r} {why.detail}.") from None


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
        policy, tokenizer: A causal model, left in the mode (train or eval) it came in, and its
            tokenizer with an EOS token.
        rows: Each with a `prompt`.
        num_generations, max_new_tokens: Answers per prompt, and the longest answer.
        seed: Of the sampling; the generators of the process are left as they were.
        temperature, top_p: 0 is greedy; a nucleus of 1 is the whole distribution.
        batch_size: Prompts answered at once.
        reference: Second model of the mixture; None with mixture > 0 takes the policy with its
            adapter switched off.
        mixture: Share b of the reference in the logits, (1 - b) z + b z_ref.

    Raises:
        ValueError: a tokenizer without EOS, a prompt without tokens, two models whose
            vocabularies differ.
    """
    eos = _end_tokens(policy, tokenizer)
    if mixture:
        _check_mixture(policy, reference)
    options: dict[str, Any] = {"do_sample": False}
    if temperature:
        options = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    options |= {"num_return_sequences": num_generations, "max_new_tokens": max_new_tokens}
    device = next(policy.parameters()).device
    answers: list[list[Answer]] = []
    with ExitStack() as stack:
        for model in (policy, reference):
            if model is not None:
                stack.callback(model.train, model.training)
                model.eval()
        stack.enter_context(
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        )
        torch.manual_seed(seed)
        for start in range(0, len(rows), batch_size):
            ids = [prompt_ids(tokenizer, row) for row in rows[start : start + batch_size]]
            if not all(ids):
                raise ValueError(f"the prompt of row {start + ids.index([])} has no tokens.")
            out = _continued(policy, ids, eos, tokenizer, reference, mixture, options)
            for number, prompt in enumerate(ids):
                own = out[number * num_generations :][:num_generations]
                answers.append([_answer(tokenizer, prompt, x, eos) for x in own])
    return answers


def _continued(
    policy: hf.Model,
    ids: list[list[int]],
    eos: list[int],
    tokenizer: Any,
    reference: hf.Model | None,
    mixture: float,
    options: Mapping[str, Any],
) -> list[list[int]]:
    """The tokens that `generate` adds to each prompt, all those of a prompt behind each other."""
    device = next(policy.parameters()).device
    rows = hf.causal_lm(policy).get_input_embeddings().weight.shape[0]
    if (largest := max(map(max, ids))) >= rows:
        raise ValueError(
            f"the tokenizer gives id {largest} and the model's embedding has {rows} rows; pass the "
            "tokenizer that belongs to the model."
        )
    pad = tokenizer.pad_token_id
    if pad is None or pad >= rows:  # a pad token that the embedding has no row for
        pad = eos[0]
    tokens, mask = _left_padded(ids, pad, device)
    every = mask.repeat_interleave(options["num_return_sequences"], 0)
    out = policy.generate(
        input_ids=tokens, attention_mask=mask, eos_token_id=eos, pad_token_id=pad,
        logits_processor=_processors(policy, reference, every, mixture),
        use_cache=True, **_NEUTRAL, **options,
    )  # fmt: skip
    return out[:, tokens.shape[1] :].tolist()


def _end_tokens(policy: hf.Model, tokenizer: Any) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise ValueError("sampling ends an answer at EOS, and this tokenizer has no eos_token.")
    settings = getattr(hf.causal_lm(policy), "generation_config", None)
    also = getattr(settings, "eos_token_id", None) or []  # chat models end their turns with these
    return [tokenizer.eos_token_id, *(also if isinstance(also, list) else [also])]


def _check_mixture(policy: hf.Model, reference: hf.Model | None) -> None:
    if reference is None:
        hf.adapter_off(policy)  # refuses a policy without an adapter
        return
    own, other = (output_layer_of(m).vocabulary for m in (policy, reference))
    if own != other:
        raise ValueError(f"a mixture needs one vocabulary, got heads of {own} and {other}.")


def _left_padded(
    ids: list[list[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:  # [B, T], [B, T]
    width = max(map(len, ids))
    tokens = [[pad] * (width - len(x)) + x for x in ids]
    mask = [[0] * (width - len(x)) + [1] * len(x) for x in ids]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


def _processors(
    policy: hf.Model, reference: hf.Model | None, mask: Tensor, mixture: float
) -> LogitsProcessorList:
    """The mixture of two models, where there is one; without reference that of the adapter."""
    found: list[LogitsProcessor] = []
    if mixture and reference is None:
        found = [Mixture(policy, mask, mixture, policy.disable_adapter)]
    elif mixture:
        found = [Mixture(reference, mask, mixture)]
    return LogitsProcessorList([*found, Numbers(type(hf.causal_lm(policy)).__name__)])


def _answer(tokenizer: Any, prompt: list[int], ids: list[int], eos: list[int]) -> Answer:
    """The text that the tokens add to that of the prompt: alone they may lose a space in front."""
    end = next((i for i, token in enumerate(ids) if token in eos), None)
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *ids[:end]], skip_special_tokens=True)
    if whole.startswith(before):
        return Answer(whole[len(before) :], end is not None)
    return Answer(tokenizer.decode(ids[:end], skip_special_tokens=True), end is not None)
