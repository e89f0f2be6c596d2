"""Sampling from a model and from the mixture of two, and the judges of what was sampled."""

from __future__ import annotations

import pytest
import torch
from tiny_models import STORIES, config, tiny_model
from tiny_tokenizer import byte_tokenizer
from tokenizers import processors

from prefkern.train import models
from prefkern.train.data import Loader
from prefkern.train.recipes.online import judges
from prefkern.train.recipes.online.sampling import Mixture, mix_logits, prompt_ids, sample_answers
from prefkern.train.stored.reward_model import conversation_ids

ROWS = [{"prompt": "ab"}, {"prompt": "hello there"}]  # padded on the left to one length


@torch.no_grad()
def greedy(tokenizer, row, steps, logits) -> list[int]:
    """Greedy continuation by whole forwards of one sequence, without cache or padding."""
    ids = prompt_ids(tokenizer, row)
    start = len(ids)
    for _ in range(steps):
        ids.append(int(logits(torch.tensor([ids]))[0, -1].argmax()))
    return ids[start:]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mpt"])
@pytest.mark.parametrize("b", [0.0, 0.4, 1.0])
def test_the_mixture_is_that_of_the_logits(family, b):
    policy, reference = tiny_model(family, seed=0), tiny_model(family, seed=1)
    tokenizer = byte_tokenizer()
    found = sample_answers(
        policy, tokenizer, ROWS, num_generations=1, max_new_tokens=5, seed=0, temperature=0.0,
        reference=reference, mixture=b,
    )  # fmt: skip
    for row, (answer,) in zip(ROWS, found, strict=True):
        ids = greedy(
            tokenizer, row, 5, lambda x: (1 - b) * policy(x).logits + b * reference(x).logits
        )
        assert answer.text == tokenizer.decode(ids)
        assert not answer.finished


def test_the_second_model_reads_each_token_once_and_at_its_place():
    """A model with positions of its own, under padding on the left, token by token."""
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight.normal_()
    reads = []
    model.register_forward_pre_hook(
        lambda _, args, given: reads.append(given["input_ids"].shape[1]) if given else None,
        with_kwargs=True,
    )
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    tokens = torch.arange(10).view(2, 5) + 40
    second = Mixture(model, mask, 1.0)
    with torch.no_grad():
        for size in (5, 6, 7):
            found = second(tokens[:, :size], torch.zeros(2, 260))
            for logits, row, start in zip(found, tokens, (2, 0), strict=True):
                torch.testing.assert_close(logits, model(row[None, start:]).logits[0, -1])
            tokens = torch.cat([tokens, torch.tensor([[7], [9]]) * size], 1)
    assert reads == [5, 1, 1]


def test_answers_stand_with_their_prompts():
    """A nucleus that holds one token gives every answer to a prompt as greedy sampling does."""
    policy, tokenizer = tiny_model(), byte_tokenizer()
    options = dict(max_new_tokens=3, seed=0)
    rows = [*ROWS, {"prompt": "xyz"}]
    one = sample_answers(policy, tokenizer, rows, num_generations=1, temperature=0.0, **options)
    assert len({answer.text for (answer,) in one}) == 3
    for size in (2, 3):
        found = sample_answers(
            policy, tokenizer, rows, num_generations=2, top_p=1e-6, batch_size=size, **options
        )
        assert found == [[answer, answer] for (answer,) in one]


def test_the_reference_of_an_adapter_is_the_base_model():
    from peft import LoraConfig, get_peft_model

    base, tokenizer = tiny_model(seed=0), byte_tokenizer()
    options = dict(num_generations=1, max_new_tokens=5, seed=0, temperature=0.0)
    alone = sample_answers(base, tokenizer, ROWS, **options)
    policy = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    assert sample_answers(policy, tokenizer, ROWS, **options) != alone
    assert sample_answers(policy, tokenizer, ROWS, mixture=1.0, **options) == alone
    with pytest.raises(ValueError, match="has none"):
        sample_answers(tiny_model(), tokenizer, ROWS, mixture=0.5, **options)


def test_sampling_follows_the_mixture_and_the_seed():
    policy, reference, tokenizer = tiny_model(seed=0), tiny_model(seed=1), byte_tokenizer()
    row = {"prompt": "ab"}
    options = dict(num_generations=4000, max_new_tokens=1, reference=reference, mixture=0.3)
    state = torch.get_rng_state()
    found = sample_answers(policy, tokenizer, [row], seed=1, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert found == sample_answers(policy, tokenizer, [row], seed=1, **options)
    ids = torch.tensor([prompt_ids(tokenizer, row)])
    with torch.no_grad():
        z, other = policy(ids).logits[0, -1], reference(ids).logits[0, -1]
    p = torch.softmax(mix_logits(z, other, 0.3), -1)
    top = p[:256].topk(5)  # bytes 128 and up are no text of their own: single-byte ASCII only
    counted = 0
    for probability, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        text = tokenizer.decode([token])
        if len(text) != 1 or ord(text) > 127:
            continue
        share = sum(answer.text == text for answer in found[0]) / 4000
        assert share == pytest.approx(probability, abs=5 * (probability / 4000) ** 0.5)
        counted += 1
    assert counted


def test_a_model_folders_own_settings_do_not_bend_the_distribution():
    tokenizer, options = byte_tokenizer(), dict(num_generations=8, max_new_tokens=6, seed=3)
    plain, bent = tiny_model(seed=0), tiny_model(seed=0)
    settings = bent.generation_config
    settings.top_k, settings.repetition_penalty, settings.min_p = 2, 5.0, 0.5
    assert sample_answers(bent, tokenizer, ROWS, **options) == sample_answers(
        plain, tokenizer, ROWS, **options
    )
    # but its further end tokens end an answer
    (first, *_), _ = sample_answers(plain, tokenizer, ROWS, **options | {"max_new_tokens": 1})
    settings.eos_token_id = [tokenizer(first.text)["input_ids"][0]]
    assert sample_answers(bent, tokenizer, ROWS, **options)[0][0] == ("", True)


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the trained model stories260K")
def test_an_answer_continues_its_prompt_as_text():
    """A sentencepiece decoder drops the space in front of what it is given; prompt + answer must
    give the sampled tokens again, or training would see another text."""
    model = models.load_model(str(STORIES), config(STORIES, "m", "d")).eval()
    tokenizer = models.load_tokenizer(str(STORIES))
    prompt = "Once upon a time, there was a"
    (answers,) = sample_answers(
        model, tokenizer, [{"prompt": prompt}], num_generations=16, max_new_tokens=12, seed=0
    )
    assert sum(answer.text.startswith(" ") for answer in answers) >= 14
    ids = tokenizer([prompt + answer.text for answer in answers])["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    # not all: a model can spell a word in other pieces than the tokenizer would
    assert sum(len(x) == start + 12 for x in ids) >= 14


def test_prompts_are_read_as_training_reads_them():
    """The template gets the row's tools and arguments, and an end the tokenizer adds is cut."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for t in tools or [] %}<{{ t.name }}>{% endfor %}{{ mood }}"
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    row = {
        "prompt": [{"role": "user", "content": "hi"}], "tools": [{"name": "clock"}],
        "chat_template_kwargs": {"mood": "!"},
        "completion": [{"role": "assistant", "content": "yes"}],
    }  # fmt: skip
    (example,), _, _ = Loader(tokenizer=tokenizer, labelled=False).load([row])
    sequence = example.sequences[0]
    ids = prompt_ids(tokenizer, row)
    assert tokenizer.decode(ids) == "<clock>!u:hi;a:"
    assert ids == sequence.input_ids[: sequence.completion_start].tolist()

    class Ending:
        eos_token, eos_token_id = tokenizer.eos_token, tokenizer.eos_token_id

        def __call__(self, text, **options):
            return {"input_ids": [*tokenizer(text)["input_ids"], self.eos_token_id]}

    assert prompt_ids(Ending(), {"prompt": "ab"}) == tokenizer("ab")["input_ids"]


def test_a_forbidden_token_stays_forbidden():
    z = torch.tensor([0.0, -torch.inf]), torch.tensor([1.0, 2.0])
    assert mix_logits(*z, 0.5)[1] == -torch.inf and mix_logits(*z, 1.0)[1] == 2.0
    assert not mix_logits(*z[::-1], 0.0).isnan().any()


def test_judges(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Scale:\n    by: int = 1\n\n"
        "def length(row, answers):\n    return [Scale().by * len(a) for a in answers]\n"
    )
    scorer = judges.load_scorer(f"{tmp_path}/mine.py:length")
    assert judges.scorer_judge(scorer)(ROWS, [["a", "bb"], ["ccc"]]) == [[1.0, 2.0], [3.0]]
    for path, match in (
        ("mine", "module:function"),
        (f"{tmp_path}/other.py:f", "no file"),
        ("no_such_module:f", "PYTHONPATH"),
        (f"{tmp_path}/mine.py:width", "no function 'width'"),
    ):
        with pytest.raises(ValueError, match=match):
            judges.load_scorer(path)
    for number, (source, match) in enumerate(
        (
            ("def score(:", "cannot be loaded: SyntaxError: "),
            ("raise KeyError('x')", "cannot be loaded: KeyError: 'x'"),
            ("raise SystemExit(3)", "cannot be loaded: SystemExit: 3"),
            ("import no_such_module", "cannot be loaded: ModuleNotFoundError: No module named"),
        )
    ):
        (tmp_path / f"bad{number}.py").write_text(source)
        with pytest.raises(ValueError, match=rf"judge: .*bad{number}\.py {match}"):
            judges.load_scorer(f"{tmp_path}/bad{number}.py:score")

    def fails(row, answers):
        return row["no such column"]

    with pytest.raises(
        ValueError, match="judge mine failed on the prompt 'ab': KeyError: 'no such"
    ):
        judges.scorer_judge(fails, "mine")(ROWS[:1], [["a", "b"]])
    for bad in ([1.0], "x", [float("nan"), 1.0]):
        with pytest.raises(ValueError, match=r"mine must return"):
            judges.scorer_judge(lambda row, answers, bad=bad: bad, "mine")(ROWS[:1], [["a", "b"]])


def test_reward_model_reads_prompt_and_answer(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    small = dict(vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(**small, num_attention_heads=2, num_labels=1, pad_token_id=0)
    ).eval()
    model.save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    judge = judges.RewardModel(str(tmp_path), config(tmp_path, "m", "d"), torch.device("cpu"))
    scores = judge({"prompt": "ab"}, [" x", " yz"])
    with torch.no_grad():
        own = [
            float(model(torch.tensor([tokenizer(t)["input_ids"]])).logits)
            for t in ("ab x", "ab yz")
        ]
    assert scores == pytest.approx(own) and scores[0] != scores[1]


def test_a_prompt_is_sampled_from_with_one_bos():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    for prompt in ("<s>ab", "\n<s>ab", "ab"):
        row = {"prompt": prompt, "completion": "c"}
        (example,) = Loader(tokenizer=tokenizer, labelled=False).load([row]).examples
        ids = prompt_ids(tokenizer, row)
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids == example.sequences[0].input_ids[: len(ids)].tolist()
        whole = conversation_ids(tokenizer, tiny_model(), row, "c")
        assert whole == [*ids, *tokenizer("c")["input_ids"][1:]]


def test_prompts_and_models_that_cannot_be_sampled_from():
    options = dict(num_generations=1, max_new_tokens=3, seed=0)
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<{i}>" for i in range(9)]})
    policy = tiny_model()
    with pytest.raises(ValueError, match="gives id 265 and the model's embedding has 260 rows"):
        sample_answers(policy, tokenizer, [{"prompt": "a<8>"}], **options)
    robot = [{"role": "robot", "content": "beep"}]
    with pytest.raises(ValueError, match="column 'prompt' no such role: robot"):
        sample_answers(policy, tokenizer, [{"prompt": robot}], **options)
    with pytest.raises(ValueError, match="reward model's chat template refuses a row: no such"):
        conversation_ids(tokenizer, policy, {"prompt": robot}, "yes")
    with torch.no_grad():
        policy.lm_head.weight[7, 0] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="logits of LlamaForCausalLM are not finite"):
            sample_answers(policy, tokenizer, ROWS, temperature=temperature, **options)
