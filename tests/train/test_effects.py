"""Systems that are a loss on stored rows: what a model says changes the way the rows prefer.

The model answers with letters a and b, each half of the time; rows prefer a. The share is the
model's own probability of a against b, without sampling.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from online_model import letters_model
from stored_commands import write_lines
from tiny_models import config

from prefkern import prep
from prefkern.train import models, train
from prefkern.train.precompute import precompute

TEXTS = ["".join(x) for n in (2, 3) for x in itertools.product("ab", repeat=n)]
PAIRS = [
    {"prompt": f"{'pqrs'[i % 4]}:", "chosen": x, "rejected": y}
    for i, (x, y) in enumerate(itertools.permutations(TEXTS, 2))
    if x.count("a") / len(x) > y.count("a") / len(y)
]
PROMPTS = [f"{x}:" for x in "pqrs"]
# System of docs/methods.md -> loss and options.
ON_PAIRS: dict[str, dict] = {
    "3D-Properties": dict(loss=("flex_dpo", "sft")),
    "Accelerated PO": dict(
        loss=("dpo",), num_rounds=2, round_extrapolation=0.5, max_steps=6, learning_rate=3e-3
    ),
    "ASFT": dict(loss=("asft",)),
    "f-DPO": dict(loss=("fdpo",), loss_args={"divergence": "forward_kl"}),
    "LD-DPO": dict(loss=("ld_dpo",)),
    "LLaMAntino-3-ANITA": dict(loss=("dpo",), lora_r=4),
    "LN-DPO": dict(loss=("ln_dpo",), loss_args={"beta": 2.0}),
    "rDPO": dict(loss=("robust",), loss_args={"label_smoothing": 0.1}),
    "RPO": dict(loss=("rpo",)),
    "SimPO": dict(loss=("simpo",), loss_args={"sft_weight": 0.1}),
    "SparsePO: mapo": dict(loss=("mapo",)),
    "TDPO: tdpo1": dict(loss=("tdpo1",)),
    "TBPO-A": dict(loss=("tbpo",), loss_args={"advantage": True, "beta": 1.0}),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("effects")
    letters_model(folder)
    return folder


def share_of_a(folder: Path, model: Path | str, prompts: list[str] = PROMPTS) -> float:
    """Probability of a, of a and b, after the prompt and after one letter, mean over both."""
    settings = config(folder, str(model), "none")
    policy, tokenizer = (
        models.load_model(str(model), settings).eval(),
        models.load_tokenizer(str(model)),
    )
    texts = [prompt + letter for prompt in prompts for letter in ("", "a", "b")]
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        letters = [tokenizer(text + x)["input_ids"][-1] for x in "ab"]
        with torch.no_grad():
            found.append(policy(input_ids=ids).logits[0, -1, letters].softmax(-1)[0].item())
    return sum(found) / len(found)


def after(start: Path, out: Path, rows: list[dict], **options) -> Path:
    data = write_lines(out.parent / f"{out.name}.jsonl", rows)
    common = dict(max_steps=12, learning_rate=5e-3, per_device_train_batch_size=16)
    train(config(out, str(start / "letters0"), str(data), **common | options))
    return out


@pytest.mark.parametrize("system", ON_PAIRS)
def test_pairs(start, tmp_path, system):
    out = after(start, tmp_path / "out", PAIRS, **ON_PAIRS[system])
    assert share_of_a(start, out) > share_of_a(start, start / "letters0") + 0.15


@pytest.mark.slow
def test_a_preferring_teacher(start, tmp_path):
    """DCKD and ADPA take over what a model that was trained on the pairs prefers, DCKD from its
    distribution, ADPA from how it differs from the reference's; pairs stand in both orders."""
    teacher = after(start, tmp_path / "teacher", PAIRS, loss=("dpo",), max_steps=20)
    other = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS]
    before, wanted = (share_of_a(start, m) for m in (start / "letters0", teacher))
    assert wanted > before + 0.15
    for loss, models_ in (
        ("dckd", dict(ref_model=str(teacher))),
        ("adpa", dict(ref_model=str(start / "letters0"), aux_model=str(teacher))),
    ):
        out = after(start, tmp_path / loss, [*PAIRS, *other], loss=(loss,), max_steps=20, **models_)
        assert share_of_a(start, out) > before + 0.1, loss


@pytest.mark.slow
def test_a_fused_reference(start, tmp_path):
    """InfiFPO with the start as pivot and one source that prefers a."""
    source = after(start, tmp_path / "source", PAIRS, loss=("dpo",), max_steps=20)
    data = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    cache = precompute(config(tmp_path / "cache", str(source), str(data)))[0]
    out = after(start, tmp_path / "out", PAIRS, loss=("infifpo",), fused_ref=(str(cache),))
    assert share_of_a(start, out) > share_of_a(start, start / "letters0") + 0.15


def test_triples(start, tmp_path):
    """TPO: the gold answer is imitated, chosen and rejected are compared."""
    rows = [row | {"gold": "aaa"} for row in PAIRS]
    for loss in ("tpo", "tpo_l"):
        out = after(start, tmp_path / loss, rows, loss=(loss,))
        assert share_of_a(start, out) > share_of_a(start, start / "letters0") + 0.15, loss


def test_single_answers(start, tmp_path):
    """BCO on answers with a label."""
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in PAIRS for side in ("chosen", "rejected")
    ]  # fmt: skip
    out = after(start, tmp_path / "out", rows, loss=("bco",))
    assert share_of_a(start, out) > share_of_a(start, start / "letters0") + 0.15


def test_system_messages_steer(start, tmp_path):
    """Janus: under one message a is better, under the other b."""
    rows = [row | {"system": "A"} for row in PAIRS]
    rows += [
        row | {"system": "B", "chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS
    ]
    rows = prep.system_messages(rows, separator=" ")
    out = after(start, tmp_path / "out", rows, loss=("orpo",), max_steps=30)
    share = {x: share_of_a(start, out, [f"{x} {p}" for p in PROMPTS]) for x in "AB"}
    assert share["A"] > share["B"] + 0.15


def test_prompts_of_two_sides(start, tmp_path):
    """DOVE: prompt and answer are one text; the sides differ in the prompt alone."""
    rows = [{"prompt": "p:", "chosen": x, "prompt_rejected": "q:", "rejected": x} for x in TEXTS]
    out = after(start, tmp_path / "out", rows, loss=("dpo",), score_prompt=True)

    def gap(model):
        settings = config(start, str(model), "none")
        policy, tokenizer = (
            models.load_model(str(model), settings).eval(),
            models.load_tokenizer(str(model)),
        )
        with torch.no_grad():
            logps = []
            for prompt in ("p:", "q:"):
                ids = torch.tensor([tokenizer(prompt + "ab")["input_ids"]])
                z = policy(input_ids=ids).logits[0, :-1].log_softmax(-1)
                logps.append(z.gather(-1, ids[0, 1:, None]).sum().item())
        return logps[0] - logps[1]

    assert gap(out) > gap(start / "letters0") + 0.3
