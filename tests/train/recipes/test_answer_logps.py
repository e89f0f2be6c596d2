"""Log-probabilities of single answers, against the model's own logits."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from tiny_models import config, tiny_model
from tiny_tokenizer import byte_tokenizer

from prefkern.train.recipes.answer_logps import answer_logps, as_completion, training_row

ROWS = [{"prompt": "ab:"}, {"prompt": "c:"}, {"prompt": "d" * 70}]
ANSWERS = [" x", " yz", " w"]
TOKENIZER = byte_tokenizer()


def by_hand(model, prompt: str, answer: str, end: bool = True) -> list[float]:
    ids = [*TOKENIZER(prompt + answer)["input_ids"], *([TOKENIZER.eos_token_id] if end else [])]
    start = len(TOKENIZER(prompt)["input_ids"])
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [logp[t - 1, ids[t]].item() for t in range(start, len(ids))]


def test_every_answer_in_its_place_and_none_for_what_cannot_be_read():
    model = tiny_model().train()
    settings = config("o", "m", "d", per_device_eval_batch_size=1)  # max_length 64
    first, second, third = answer_logps(model, TOKENIZER, ROWS, ANSWERS, settings)
    assert first.tolist() == pytest.approx(by_hand(model.eval(), "ab:", " x"), abs=1e-4)
    assert second.tolist() == pytest.approx(by_hand(model, "c:", " yz"), abs=1e-4)
    assert third is None  # its prompt alone fills max_length


def test_a_bad_row_moves_no_other():
    model, settings = tiny_model(), config("o", "m", "d")
    found = answer_logps(model, TOKENIZER, ROWS[::-1], ANSWERS[::-1], settings)
    assert found[0] is None and [len(x) for x in found[1:]] == [4, 3]


def test_without_an_end_token():
    model, settings = tiny_model(), config("o", "m", "d", append_eos=False)
    (found,) = answer_logps(model, TOKENIZER, ROWS[:1], ANSWERS[:1], settings)
    assert found.tolist() == pytest.approx(by_hand(model, "ab:", " x", end=False), abs=1e-4)


def test_the_context_and_the_mode_of_the_model():
    model, seen = tiny_model(attention_dropout=0.5).train(), []

    @contextmanager
    def off():
        seen.append(model.training)
        yield

    settings = config("o", "m", "d")
    one = answer_logps(model, TOKENIZER, ROWS[:1], ANSWERS[:1], settings, off=off)
    two = answer_logps(model, TOKENIZER, ROWS[:1], ANSWERS[:1], settings, off=off)
    assert seen == [False, False] and model.training
    assert torch.equal(one[0], two[0])  # no dropout


def test_what_of_a_prompt_goes_on():
    row = {"prompt": "x", "tools": [1], "chat_template_kwargs": {"a": 1}, "chosen": "y", "id": 3}
    assert training_row(row) == {"prompt": "x", "tools": [1], "chat_template_kwargs": {"a": 1}}
    assert training_row({"prompt": "x", "tools": None}) == {"prompt": "x"}
    assert as_completion({"prompt": "x"}, "y") == "y"
    turn = [{"role": "user", "content": "x"}]
    assert as_completion({"prompt": turn}, "y") == [{"role": "assistant", "content": "y"}]
