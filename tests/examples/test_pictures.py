"""Methods about pictures on a vision-language model of a few thousand weights."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")


def test_bdhs_samples_what_the_model_expects_and_unlearns_it(example):
    bdhs = example("bdhs")
    found = bdhs.main()
    assert found["masked"] == 0.0 and found["sees"] > 1.0  # no picture reaches a masked answer
    for name in ("bdhs", "plain"):
        assert found[f"{name}_most_similar"] < 0.95
    assert found["bdhs_pairs"] > found["plain_pairs"]
    assert found["bdhs_biased"] > found["plain_biased"] + 0.1
    assert found["after"] > found["before"] + 0.1, found


def test_bdhs_gives_up_on_rows_that_it_completes_well(example):
    """Nothing to reject where the picture is as expected: the row gives no pair."""
    bdhs = example("bdhs")
    assert (
        bdhs.similarity("a b c .", "a b d .") == 0.75 and bdhs.similarity("a b", "a b c d") == 0.5
    )
    begin = bdhs.tiny.model()  # says anything, so all rows give pairs, unless all is similar enough
    rows = bdhs.captions(4, seed=0, biased=1.0)
    assert len(bdhs.sample_rejected(begin, rows, seen=0.0)) == 4
    assert bdhs.sample_rejected(begin, rows, seen=0.0, threshold=0.0) == []


def test_mia_dpo_finds_answers_that_looked_elsewhere(example):
    mia = example("mia_dpo")
    found = mia.main()
    for form in mia.FORMATS:  # the ratio knows without anyone's judgement which answers are wrong
        assert found[f"{form}_wrong_low"] > found[f"{form}_wrong_high"] + 0.2, (form, found)
    assert found["pairs"] > 50
    gains = [found[f"{form}_after"] - found[f"{form}_before"] for form in mia.FORMATS]
    assert sum(gains) / 3 > 0.04, found


def test_attention_ratio_is_the_share_of_the_target(example):
    """All places of pictures are the target: 1; and the shares of the places add up to 1."""
    mia = example("mia_dpo")
    policy, rows = mia.tiny.model().eval(), mia.rows_of("sequence", 3, seed=0)
    answers = ["red .", "blue .", "red ."]
    ratios = mia.attention_ratios(policy, rows, answers)
    assert ((ratios > 0) & (ratios < 1)).all()
    rest = [{**row, "target": [i for i in range(8) if i not in row["target"]]} for row in rows]
    total = ratios + mia.attention_ratios(policy, rest, answers)
    torch.testing.assert_close(total, torch.ones(3))


@pytest.mark.slow
def test_re_align_prefers_the_picture_over_one_that_looks_alike(example):
    found = example("re_align").main()
    assert found["shared_retrieved"] > found["shared_random"] + 0.3
    assert found["pairs"] > 100
    assert found["rdpo_after"] > max(found["before"], found["dpo_after"]) + 0.05, found
    # nats between the two pictures: the third row is what teaches them
    assert found["rdpo_margin"] > 2 * found["dpo_margin"] > 0 and found["rdpo_margin"] > 2.0


@pytest.mark.slow
def test_pami_vdpo_chooses_clips_that_change_the_answer(example):
    found = example("pami_vdpo").main()
    assert found["aware_false"] < 0.5 * found["random_false"], found
    assert found["aware_after"] > found["before"] + 0.2
    assert found["aware_margin"] > max(found["before_margin"] + 0.5, found["random_margin"])
    assert abs(found["aware_bias"]) < 0.2  # clips that show the answer too are not unlearned


def test_augmented_clips_under_their_prompts(example):
    """Which clips show the same answer depends on what is asked."""
    pami = example("pami_vdpo")
    rows = pami.clips(2, seed=0)
    assert [row["prompt"] for row in rows] == ["first", "colours"]
    same = {
        (row["prompt"], how)
        for row in rows
        for how in pami.AUGMENTATIONS
        if pami._pair(row, pami.augmented(row, how, pami.random.Random(0)))["false"]
    }
    assert same == {
        ("first", "noise"), ("first", "recolour_last"), ("colours", "noise"), ("colours", "reverse")
    }  # fmt: skip
    policy = pami.tiny.model().eval()
    assert pami.js_divergence(policy, rows, rows).abs().max() < 1e-6
    flipped = [pami.augmented(row, "reverse", pami.random.Random(0)) for row in rows]
    assert (pami.js_divergence(policy, rows, flipped) > 0).all()


def test_tiny_pictures_show_their_cells(example):
    tiny = example("tiny_pictures")
    names = [*tiny.COLOURS]
    image = tiny.picture(*names, rng=tiny.random.Random(0))
    cells = torch.nn.functional.avg_pool2d(image, 4).flatten(1).T  # [4, 3]
    nearest = torch.cdist(cells, torch.tensor([*tiny.COLOURS.values()])).argmin(1)
    assert [names[i] for i in nearest] == names
    row = {"prompt": "describe :", "images": [image], "chosen": "red ."}
    batch = tiny.batch([row, row | {"images": [image, image]}], ("chosen", "chosen"))
    assert len(batch["pixel_values"]) == 6 and (batch["input_ids"] == 2).sum() == 6 * tiny.CELLS
