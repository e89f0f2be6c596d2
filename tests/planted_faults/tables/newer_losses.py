"""Faults of the newer losses: (name, file, old text, new text, tests ...)."""

from __future__ import annotations

W, L = "prefkern/losses/weights/", "prefkern/losses/"
TEST = "tests/losses/test_newer_losses.py"

MUTANTS = [
    (
        "target_added_on_one_side",
        L + "pairwise/lcpo.py",
        "links.logistic(-margin - target) - links",
        "links.logistic(-margin) - links",
        "tests/losses/test_lcpo_bases.py",
    ),
    (
        "means_by_sums",
        L + "pairwise/lcpo.py",
        "core.difference(chosen.mean_logratio, rejected.mean_logratio)",
        "core.logratio_gap(chosen, rejected)",
        "tests/losses/test_lcpo_bases.py",
    ),
    (
        "reliability_by_another_target",
        L + "pairwise/lcpo.py",
        "_simpo_contrast(chosen, rejected, beta, gamma_beta_ratio), ema",
        "_simpo_contrast(chosen, rejected, beta, 0.0), ema",
        "tests/losses/test_lcpo_bases.py",
        "tests/train/recipes/test_states.py::test_lcpo_learns_each_annotator_around_every_base",
    ),
    (
        "decay_starts_late",
        W + "length.py",
        "scored) - 1).clamp(min=0)",
        "scored)).clamp(min=0)",
        TEST,
    ),
    (
        "selects_the_dull_tokens",
        W + "model_ratios.py",
        "ragged.rank(reward, scored, cu_seqlens, descending=True)",
        "ragged.rank(reward, scored, cu_seqlens)",
        TEST,
    ),
    (
        "likelihood_of_found_answers",
        L + "pairwise/uni_dpo.py",
        "(ratio.detach() < 0)",
        "(ratio.detach() > 0)",
        TEST,
    ),
    (
        "focal_as_in_vision",
        L + "pairwise/focal_po.py",
        "logsigmoid(margin))",
        "logsigmoid(-margin))",
        TEST,
    ),
    (
        "shift_of_both",
        L + "pairwise/dpo_shift.py",
        "(chosen.logratio,",
        "(shift * chosen.logratio,",
        TEST,
    ),
    (
        "one_position_short",
        L + "tokenwise/tbpo.py",
        "(ordinal <= before[first + 1] - before[first])",
        "(ordinal < before[first + 1] - before[first])",
        TEST,
    ),
    (
        "ratio_upside_down",
        L + "tokenwise/tbpo.py",
        "delta - delta[partner]",
        "delta[partner] - delta",
        TEST,
    ),
    (
        "baseline_not_centred",
        L + "tokenwise/tbpo.py",
        "(segment_sum(w, cu_seqlens) / shared)",
        "(0.0 * shared)",
        TEST,
    ),
    (
        "advantage_below_the_reference",
        L + "tokenwise/tbpo.py",
        'delta + token.field(tokens, "fkl", scored)',
        'delta - token.field(tokens, "fkl", scored)',
        TEST,
    ),
    (
        "bad_steps_of_the_chosen",
        L + "tokenwise/full_step_dpo.py",
        "_softmax(sign * reward_temp",
        "_softmax(-sign * reward_temp",
        TEST,
    ),
    (
        "rejected_drift_alone",
        L + "tokenwise/full_step_dpo.py",
        "torch.sigmoid(drift - drift[first])",
        "torch.sigmoid(drift)",
        TEST,
    ),
    (
        "mixture_towards_the_reference",
        L + "pairwise/selfie.py",
        "mix:{1.0 - mixture!r}",
        "mix:{mixture - 1.0!r}",
        "tests/losses/test_catalogue_options.py",
    ),
    ("published_lsif", L + "tokenwise/tbpo.py", "2.0 * (-z).exp()", "2.0 * z.exp()", TEST),
    (
        "drift_with_the_token_itself",
        W + "prefix.py",
        "so_far - size - start[owner]",
        "so_far - start[owner]",
        TEST,
    ),
    ("drift_of_the_batch", W + "prefix.py", "so_far - size - start[owner]", "so_far - size", TEST),
    (
        "gain_upside_down",
        W + "prefix.py",
        "ref_logp.detach() - logp.detach()",
        "logp.detach() - ref_logp.detach()",
        TEST,
    ),
]
