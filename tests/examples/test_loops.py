"""Loops and routers around the losses: what each example promises is there."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")


def test_router_sends_to_people_what_the_model_gets_wrong(example):
    router = example("hybrid_router")
    found = router.main()
    for tag in router.TAGS:
        rest = [found[f"gain_{x}"] for x in ("chat", "code")]
        if tag in router.TAGS[router.BIASED]:
            assert found[f"gain_{tag}"] > max(0.03, *rest), tag
        if tag in router.TAGS[router.CARELESS]:
            assert found[f"gain_{tag}"] < min(-0.03, *rest), tag
    assert found["correlation"] > 0.5  # on mixes the regression has not seen
    others = max(found[name] for name in ("all_model", "all_people", "random"))
    assert found["routed"] > others + 0.05 and found["to_people"] <= 1 / 3


def test_router_recovers_the_gains_of_a_linear_score(example):
    import torch

    router = example("hybrid_router")
    draw = torch.Generator().manual_seed(0)
    data = router.pairs(100, seed=0)
    counts = torch.stack([router.counts(data, router.random_mix(data, draw)) for _ in range(20)])
    gains = torch.tensor([0.03, -0.01, 0.0, 0.02, -0.02, 0.01]).double()
    predictor = router.fit_predictor(counts, 0.5 + counts @ gains)
    torch.testing.assert_close(predictor.gains, gains)
    routed = router.route(data, predictor, 40)
    gain = data.tags.double() @ gains
    assert routed.sum() <= 40 and gain[routed].min() > 0
    assert gain[routed].min() >= gain[~routed].max() - 1e-9
    with pytest.raises(ValueError, match="more mixes than tags"):
        router.fit_predictor(counts[:6], counts[:6] @ gains)


def test_veripo_teaches_the_way_that_the_reward_does_not_see(example):
    found = example("veripo_rounds").main()
    before, alone, last = found["before"], found["grpo_alone"], found["aligned_2"]
    assert before["outcome"] < 0.5 and before["verified"] < 0.15
    assert found["explored_1"]["outcome"] > before["outcome"] + 0.1
    for number in (1, 2):  # what DPO adds to the exploration before it
        explored, aligned = found[f"explored_{number}"], found[f"aligned_{number}"]
        assert aligned["verified"] > explored["verified"] + 0.05
    assert last["outcome"] > 0.8 and last["verified"] > alone["verified"] + 0.3
    assert min(found["pairs"]) >= 16


def test_veripo_curates_rollouts(example):
    veripo = example("veripo_rounds")
    prompt = "tell of the cat :"

    def answer(a, animal, b, c):
        return f" a {a} {animal} sees the {b} ball by the house with a {c} friend ."

    right = answer("kind", "cat", "warm", "calm")
    wrong_way, wrong_animal = (
        answer("mean", "cat", "warm", "calm"),
        answer("kind", "dog", "warm", "calm"),
    )
    wrong_end = answer("kind", "cat", "warm", "mean")
    answers = dict.fromkeys([wrong_end, wrong_way, right, wrong_animal, " a friend", ""])
    pairs = veripo.curate({prompt: answers, "tell of the dog :": answers}, per_prompt=3)
    assert {pair["chosen"] for pair in pairs if pair["prompt"] == prompt} == {right}
    rejected = [pair["rejected"] for pair in pairs if pair["prompt"] == prompt]
    assert rejected == [wrong_way, wrong_animal, wrong_end]  # right outcomes come first
    assert [p["chosen"] for p in pairs if p["prompt"] != prompt] == [wrong_animal] * 3
    assert veripo.curate({prompt: {wrong_way: None}}, per_prompt=3) == []


def test_knowpat_orders_answers_by_the_triples_they_use(example):
    import random

    knowpat = example("knowpat_sets")
    triples = knowpat.graph()
    question, rng = "tell of the fox :", random.Random(0)
    own = knowpat.retrieve(question, triples)
    assert len(own) == 4 and {triple.head for triple in own} == {"fox"}
    for _ in range(20):
        row = knowpat.knowledge_set(question, triples, rng)
        assert len(set(row["scores"])) == len(row["scores"])
        assert row["scores"][0] == 4.0 and len(row["scores"]) >= 2
        assert [knowpat.used(x, own) for x in row["responses"]] == row["scores"]
        style = knowpat.style_set(question, triples, rng)
        assert [knowpat.used(x, own) for x in style["responses"]] == [4, 4, 4]
    found = knowpat.main()
    before, plain, aligned = found["before"], found["likelihood"], found["knowpat"]
    assert (
        before["triples"] < 0.4
        and min(aligned["triples"], plain["triples"]) > before["triples"] + 0.2
    )
    assert aligned["tone"] > max(0.6, before["tone"] + 0.2)


def test_meet_tunes_control_tokens_with_the_model_frozen(example):
    pytest.importorskip("peft")
    import torch

    meet = example("meet_soft_prompts")
    start = meet.reader()  # the same weights again
    found = meet.main()
    model, rows = found["model"], found["rows"]
    frozen = model.get_base_model().state_dict()
    assert all(torch.equal(frozen[name], value) for name, value in start.state_dict().items())
    for kind in meet.SIDES:  # at the head, without virtual tokens: as PEFT's own forward
        model.set_adapter(kind)
        batch = meet.side_batch(rows[:4], kind)
        given = meet.with_prompt(model, batch)
        want = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        got = model.get_base_model()(
            inputs_embeds=given["inputs_embeds"], attention_mask=given["attention_mask"]
        ).logits
        torch.testing.assert_close(got, want)
    assert found["soft_good"] > found["soft_bad"] + 0.4
    assert found["tuned_good"] > found["tuned_bad"] + 0.4 and found["tuned_good"] > 0.7
