"""Byte-level tokenizers built in memory: one token per byte, and the merges a test asks for."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no such role: ' + m.role) }}{% endif %}"
    "{{ '[' + m.role + ']' + m.content }}{% if not (loop.last and continue_final_message) %}"
    "{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def byte_tokenizer(
    merges: tuple[tuple[str, str], ...] = (),
    *,
    eos: str | None = "</s>",
    pad: str | None = None,
    chat: bool = False,
    padding_side: str = "right",
) -> PreTrainedTokenizerFast:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    for a, b in merges:
        vocab[a + b] = len(vocab)
    inner = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    special = {k: v for k, v in (("eos_token", eos), ("pad_token", pad)) if v is not None}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, padding_side=padding_side, **special
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
