"""The published samples beside the repository, where they are: counts that their README states."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from transformers import AutoTokenizer

from prefkern.train.data import IGNORE, Loader, collate, length_baseline, plan_batches

SHARED = Path(__file__).resolve().parents[4] / "shared"
DATA, MODELS = SHARED / "data", SHARED / "models"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no sample data beside the repository")


@pytest.fixture(scope="module")
def gpt2():
    return AutoTokenizer.from_pretrained(MODELS / "gpt2_tokenizer")


@pytest.fixture(scope="module")
def stories():
    return AutoTokenizer.from_pretrained(MODELS / "stories260K")


ROWS = {
    "hh_pairs_train": ("pairs", 1186),
    "hh_pairs_test": ("pairs", 500),
    "mixed_pairs_test": ("pairs", 1322),
    "hh_unpaired_train": ("unpaired", 1186),
    "unpaired_test": ("unpaired", 1120),
    "ranked_short_train": ("lists", 283),
    "ranked_short_test": ("lists", 98),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_usable_without_truncation(name, gpt2):
    layout, rows = ROWS[name]
    path = DATA / f"{name}.jsonl.gz"
    examples, found, report = Loader(tokenizer=gpt2, max_length=None, strict=True).load(path)
    assert (found, len(examples), report.total) == (layout, rows, 0)
    assert [e.row for e in examples] == list(range(1, rows + 1))


def test_texts_survive(gpt2):
    import gzip
    import json

    path = DATA / "hh_pairs_test.jsonl.gz"
    examples = Loader(tokenizer=gpt2, max_length=None).load(path).examples
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line, example in zip(lines, examples, strict=True):
            row = json.loads(line)
            for key, seq in zip(("chosen", "rejected"), example.sequences, strict=True):
                want = row["prompt"] + row[key] + "<|endoftext|>"
                assert gpt2.decode(seq.input_ids) == want
                assert gpt2.decode(seq.input_ids[seq.completion_start :]) == row[key] + (
                    "<|endoftext|>"
                )


def test_counts_of_the_data_readme(gpt2, stories):
    # GPT-2: 95 % of hh_pairs_test fit 512 tokens; stories260K: 310 of 500 fit its context of 512.
    path = DATA / "hh_pairs_test.jsonl.gz"
    _, _, report = Loader(tokenizer=gpt2, max_length=512).load(path)
    assert report.kept + report.total == 500
    # A row may also be lost or cut for its EOS, which the README's table does not count.
    assert abs((report.kept - report.truncated) / 500 - 0.95) < 0.01
    _, _, report = Loader(tokenizer=stories, max_length=512, model_context=512).load(path)
    assert report.kept - report.truncated == 310
    baseline = length_baseline(Loader(tokenizer=gpt2, max_length=None).load(path).examples)
    assert abs(baseline - 0.61) < 0.02


def test_conversations_with_a_real_template():
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "minimind_tokenizer")
    path = DATA / "hh_pairs_test_conversational.jsonl.gz"
    examples, layout, report = Loader(tokenizer=tokenizer, max_length=None).load(path)
    assert (layout, len(examples), report.total) == ("pairs", 497, 0)
    chosen = examples[0].sequences[0]
    prompt = tokenizer.decode(chosen.input_ids[: chosen.completion_start])
    # This template opens an assistant's turn with an empty block of thought.
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    answer = tokenizer.decode(chosen.input_ids[chosen.completion_start :])
    assert answer.startswith("Is this a fun project") and answer.endswith("<|im_end|>\n")


def test_batches_of_real_lists(stories):
    path = DATA / "ranked_short_train.jsonl.gz"
    examples = Loader(tokenizer=stories, max_length=512).load(path).examples
    plan = plan_batches(examples, seed=0, token_budget=4096)
    for indices in plan[:10]:
        batch = collate([examples[i] for i in indices])
        assert batch.num_tokens <= 4096 and batch.relevance.shape[0] == batch.cu_groups[-1]
        assert batch.num_scored == int((batch.targets != IGNORE).sum())


def test_truncated_copy_reports_what_was_read(tmp_path, gpt2):
    whole = (DATA / "hh_pairs_test.jsonl.gz").read_bytes()
    path = tmp_path / "hh_pairs_test.jsonl.gz"
    path.write_bytes(whole[:100_000])
    examples, _, report = Loader(tokenizer=gpt2, max_length=None).load(path)
    assert 200 < len(examples) < 400 and report.counts == {"damaged file": 1}
    assert f"{len(examples)} whole lines were read before" in report.examples[0]
