"""The demonstration: its data is what it says, and a small run of it learns."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from prefkern.train import demo_task
from prefkern.train.data import Loader, length_baseline
from prefkern.train.demo import DemoSettings, measure, run_demo


def numbers_of(text):
    return [int(word) for word in text.split() if word.isdigit()]


def test_the_right_answer_is_twice_the_number():
    data = demo_task.make_data(0, demonstrations=500, pairs=500, held_out=200)
    for row in data.pairs + data.held_out:
        asked = numbers_of(row["prompt"])
        assert numbers_of(row["chosen"]) == [2 * x for x in asked]
        errors = np.array(numbers_of(row["rejected"])) - 2 * np.array(asked)
        assert errors.any() and set(errors) <= {-10, 0, 10}
        for x, error in zip(asked, errors, strict=True):
            # The carry of x + x is forgotten where there is one and made up where there is none.
            assert error in (0, -10 if 2 * (x % 10) >= 10 else 10)


def test_demonstrations_prefer_neither_side():
    data = demo_task.make_data(1, demonstrations=2000, pairs=1, held_out=1)
    wrong = [
        y != 2 * x
        for row in data.demonstrations
        for x, y in zip(numbers_of(row["prompt"]), numbers_of(row["completion"]), strict=True)
    ]
    # 10 000 fair coins: 0.5 +- 0.005, and four of those.
    assert abs(np.mean(wrong) - 0.5) < 0.02


def test_no_question_is_in_two_parts_and_the_seed_decides():
    data = demo_task.make_data(0, demonstrations=300, pairs=300, held_out=300)
    prompts = [row["prompt"] for row in data.demonstrations + data.pairs + data.held_out]
    assert len(set(prompts)) == 900
    assert data == demo_task.make_data(0, demonstrations=300, pairs=300, held_out=300)
    assert data != demo_task.make_data(1, demonstrations=300, pairs=300, held_out=300)


def test_length_says_nothing():
    tokenizer = demo_task.make_tokenizer()
    pairs = demo_task.make_data(0, demonstrations=1, pairs=4000, held_out=1).pairs
    baseline = length_baseline(Loader(tokenizer=tokenizer, strict=True).load(pairs).examples)
    assert abs(baseline - 0.5) < 0.03


def test_tokenizer_has_a_token_for_every_word():
    tokenizer = demo_task.make_tokenizer()
    data = demo_task.make_data(0, demonstrations=50, pairs=200, held_out=1)
    for row in data.pairs:
        text = row["prompt"] + row["chosen"]
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.pad_token_id not in ids
        assert tokenizer.decode(ids[1:]) == text
    (example,) = Loader(tokenizer=tokenizer).load(data.pairs[:1]).examples
    prompt_words = len(data.pairs[0]["prompt"].split())
    assert example.sequences[0].completion_start == 1 + prompt_words


SMALL = DemoSettings(
    likelihood_steps=20, likelihood_batch=8, pairs=64, held_out=20, steps=4, batch=8,
    measure_steps=2,
)  # fmt: skip


def test_small_run_writes_everything_and_repeats(tmp_path, capfd):
    said = []
    result = run_demo(tmp_path / "demo", SMALL, said.append)
    assert [row["step"] for row in result["history"]] == [0, 2, 4]
    assert result["before"] == result["history"][0] and result["after"] == result["history"][-1]
    stored = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert stored == json.loads(json.dumps(result))
    for path in ("tdpo2/model.safetensors", "likelihood/tokenizer.json", "data/pairs.jsonl"):
        assert (tmp_path / "demo" / path).is_file()
    names = {path.rsplit("/", 1)[1] for path in result["pictures"]}
    assert {"tokens.png", "tokens.html"} <= names
    assert {"demo.png", "loss.png", "margins.png", "accuracies.png", "kl.png"} <= names
    text = "\n".join(said)
    for word in (
        "tokens/s",
        "peak memory",
        "always preferring the longer",
        "Pictures: ",
        "brackets",
    ):
        assert word in text
    for row in result["answers"]:
        wanted = " ".join(str(2 * x) for x in numbers_of(row["prompt"]))
        assert row["right"] == wanted and f"  {row['prompt']}" in said
        for when in ("before", "after"):
            assert len(row[when].split()) == len(wanted.split())
    again = run_demo(tmp_path / "demo", SMALL, said.append)
    assert again["history"] == result["history"], "the same seed gives the same run, in place"
    capfd.readouterr()


def test_untrained_model_is_near_chance():
    tokenizer = demo_task.make_tokenizer()
    data = demo_task.make_data(0, demonstrations=1, pairs=1, held_out=300)
    pairs = Loader(tokenizer=tokenizer).load(data.held_out).examples
    model = demo_task.make_model(tokenizer, 0)
    found = measure(model, tokenizer, pairs, data.held_out_questions, 0)
    assert abs(found["preference_accuracy"] - 0.5) < 0.15
    assert found["greedy_right"] == found["sampled_right"] == 0.0


@pytest.mark.slow
def test_the_demonstration_shows_what_it_promises(tmp_path):
    settings = DemoSettings(likelihood_steps=400, pairs=1024, held_out=200, steps=96)
    result = run_demo(tmp_path, settings, lambda line: None)
    assert abs(result["before"]["preference_accuracy"] - 0.5) < 0.12
    assert result["before"]["greedy_right"] < 0.2
    assert result["after"]["preference_accuracy"] > 0.95
    assert result["after"]["greedy_right"] > 0.8
