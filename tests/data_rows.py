"""A conversation and a loader of rows at hand, for tests of data."""

from __future__ import annotations

from tiny_tokenizer import byte_tokenizer

from prefkern.train.data import Loaded, load_examples

CHAT = {
    "prompt": [{"role": "user", "content": "Rain?"}],
    "chosen": [{"role": "assistant", "content": "Yes."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}


def load(*rows, chat=False, **options) -> Loaded:
    return load_examples(list(rows), tokenizer=byte_tokenizer(chat=chat), **options)
