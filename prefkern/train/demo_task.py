"""The demonstration's task: doubling numbers, where the common mistake is a wrong carry.

    double 27 4 12 38 =   right: 54 8 24 76 .   wrong: 44 8 24 76 . (the carry is forgotten)
                                                   or: 54 8 34 76 . (a carry too many)

Every number of an answer is a decision of its own, visible in one token. The demonstrations get
half of all numbers wrong: likelihood training learns to double and to err, and so prefers neither
side. Preference pairs name the right answer; the two answers differ where one errs. Answers also
end in one of several ways that mean nothing, so that neither length nor ending tells right from
wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

NUMBERS = 50  # 0 .. 49 are doubled
ENDINGS = (".", "that is all .", "there you go .")
ENDING_SHARES = (0.5, 0.3, 0.2)
SPECIAL = ("<pad>", "<s>", "</s>")


@dataclass(frozen=True, slots=True)
class Question:
    numbers: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return f"double {' '.join(map(str, self.numbers))} ="

    def answer(self, errs: np.ndarray) -> list[str]:
        """The doubled numbers; where `errs`, with the carry forgotten or a carry too many."""
        return [
            str(2 * x + (0 if not err else -10 if x % 10 >= 5 else 10))
            for x, err in zip(self.numbers, errs, strict=True)
        ]

    @property
    def right(self) -> list[str]:
        return self.answer(np.zeros(len(self.numbers), dtype=bool))


def questions(rng: np.random.Generator, taken: set[tuple[int, ...]]) -> Iterator[Question]:
    """Questions of 4 to 6 numbers, none of them in `taken`, none twice."""
    while True:
        numbers = tuple(int(x) for x in rng.integers(0, NUMBERS, rng.integers(4, 7)))
        if numbers not in taken:
            taken.add(numbers)
            yield Question(numbers)


def answer_text(rng: np.random.Generator, numbers: list[str]) -> str:
    """An answer with one of the endings; the space before it belongs to the answer."""
    ending = ENDINGS[rng.choice(len(ENDINGS), p=ENDING_SHARES)]
    return " " + " ".join(numbers) + " " + ending


def demonstration(rng: np.random.Generator, question: Question) -> dict[str, Any]:
    """One row of the likelihood corpus: each number is wrong with probability one half."""
    errs = rng.random(len(question.numbers)) < 0.5
    text = answer_text(rng, question.answer(errs))
    return {"prompt": question.prompt, "completion": text, "label": True}


def preference(rng: np.random.Generator, question: Question) -> dict[str, str]:
    """One pair: the right answer, and one as demonstrations have it, with at least one mistake."""
    errs = np.zeros(len(question.numbers), dtype=bool)
    while not errs.any():
        errs = rng.random(len(question.numbers)) < 0.5
    return {
        "prompt": question.prompt,
        "chosen": answer_text(rng, question.right),
        "rejected": answer_text(rng, question.answer(errs)),
    }


@dataclass(frozen=True, slots=True)
class Data:
    demonstrations: list[dict[str, Any]]
    pairs: list[dict[str, str]]
    held_out: list[dict[str, str]]
    held_out_questions: list[Question]


def make_data(seed: int, demonstrations: int, pairs: int, held_out: int) -> Data:
    """All rows of a demonstration run; no question appears in two of the parts."""
    rng = np.random.default_rng(seed)
    source = questions(rng, set())
    kept = [next(source) for _ in range(held_out)]
    return Data(
        demonstrations=[demonstration(rng, next(source)) for _ in range(demonstrations)],
        pairs=[preference(rng, next(source)) for _ in range(pairs)],
        held_out=[preference(rng, question) for question in kept],
        held_out_questions=kept,
    )


def make_tokenizer() -> Any:
    """One token per word: the special ones, the words of the task, and the numbers 0 to 99."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys(" ".join(("double", "=", *ENDINGS)).split())
    vocab = {word: i for i, word in enumerate((*SPECIAL, *words, *map(str, range(2 * NUMBERS))))}
    inner = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def make_model(tokenizer: Any, seed: int, *, hidden: int = 128, layers: int = 2) -> Any:
    """A Llama-architecture model with random weights, about 340 000 parameters by default, and the
    keyword `at_head`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..integrations.head import at_head

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    at_head(model)
    return model
