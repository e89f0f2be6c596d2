"""Faults of score, sample and the reward head (rows.of)."""

from __future__ import annotations

from rows import TESTS, TRAIN, Row, of

MUTANTS: list[Row] = [
    *of(
        f"{TRAIN}stored/reward_model.py",
        f"{TESTS}stored/test_score.py {TESTS}recipes/reward/test_reward_head.py",
        ('f"{prompt}{answer}"', 'f"{answer}{prompt}"'),
        ("return [*ids, end] if ended else ids", "return ids"),
        ("found[0] if len(found) == 1 else found", "found[0]"),
    ),
    *of(
        f"{TRAIN}stored/scorers.py",
        f"{TESTS}stored/test_score.py",
        ("return beta * float(", "return float("),
        ("/ len(there)", "/ 1"),
        ("not math.isfinite(part)", "part is None"),
        ("or len(values) != count:", "or not values:"),
    ),
    *of(
        f"{TRAIN}stored/score.py",
        f"{TESTS}stored/test_score.py",
        ("return chosen - rejected", "return rejected - chosen"),
        ("    if len(sizes) > 1:", "    if len(sizes) > 9:"),
        (
            "range(len(work.rows), len(rows), config.batch_size)",
            "range(0, len(rows), config.batch_size)",
        ),
        ("if taken is not None or list(names).count(name) > 1:", "if list(names).count(name) > 1:"),
    ),
    *of(
        f"{TRAIN}stored/scorers.py",
        f"{TESTS}stored/test_mistakes.py",
        ('_check_finite(f"ref_model {config.ref_model}", other)', "pass"),
    ),
    *of(
        f"{TRAIN}stored/work.py",
        f"{TESTS}stored/test_score.py",
        ("and not overwrite and not _linked(path)", "and not path.name"),
        ("other and len(lines) > 1 and not self.overwrite", "not self.key"),
        ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
    ),
    *of(
        f"{TRAIN}stored/work.py",
        f"{TESTS}stored/test_score.py::test_what_stands_before_a_damaged_line_is_kept",
        (
            "                if not isinstance(batch, list):",
            "                if batch is Ellipsis:",
        ),
    ),
    *of(
        f"{TRAIN}stored/work.py",
        f"{TESTS}stored/test_score.py::test_an_output_that_a_kill_left_linked_is_finished",
        ("    return path.exists() and whole.exists() and", "    return whole.is_dir() and"),
    ),
    *of(
        f"{TRAIN}stored/work.py",
        f"{TESTS}stored/test_mistakes.py",
        ("other and len(lines) > 1", "other"),
        ('if getattr(self, "rows", None) == []:', "if False:"),
    ),
    *of(
        f"{TRAIN}recipes/answer_logps.py",
        f"{TESTS}stored/test_mistakes.py",
        ("vocab_size=hf.text_config(model).vocab_size", "vocab_size=None"),
    ),
    *of(
        f"{TRAIN}stored/sample.py",
        f"{TESTS}stored/test_sample.py",
        ('f"{seed}:{start}"', 'f"{seed}"'),
        ("if config.drop_unfinished and not answer.finished:", "if config.drop_unfinished:"),
        ("if config.distinct and (repeated", "if (repeated"),
        ("+ config.max_new_tokens < room", "< 10 * room"),
    ),
    *of(
        f"{TRAIN}recipes/baseline.py",
        f"{TESTS}stored/test_systems.py",
        ("stored], 1).mean(1)", "stored], 1).amax(1)"),
    ),
    *of(
        f"{TRAIN}recipes/reward/step.py",
        f"{TESTS}recipes/reward/test_reward_head.py",
        ("ref_logp=torch.zeros_like(scores)", "ref_logp=scores.detach()"),
        (
            "            **{**self.loss_args, **given, **further},",
            "            **{**self.loss_args, **given},",
        ),
    ),
    *of(
        f"{TRAIN}recipes/reward/model.py",
        f"{TESTS}recipes/reward/test_reward_head.py",
        ("place.argmax(-1)]", "0]"),
        ("            models.check_adapter(model, name)\n", ""),
        ('if kind != "SEQ_CLS":', "if False:"),
    ),
    *of(
        f"{TRAIN}recipes/reward/model.py",
        f"{TESTS}recipes/reward/test_reward_head.py"
        "::test_a_reward_model_is_trained_on_with_its_outputs",
        ("if fresh else settings.num_labels)", "if fresh else 3)"),
    ),
    *of(
        f"{TRAIN}recipes/reward/ideal_points.py",
        f"{TESTS}recipes/reward/test_reward_head.py",
        ("self.user_logits[user]", "self.user_logits[0 * user]"),
        ("        logits[: self.known] = found", "        logits[: self.known] = 0.0"),
    ),
    *of(
        f"{TRAIN}recipes/reward/sources.py",
        f"{TESTS}recipes/reward/test_reward_head.py",
        ("gradients, means, present=present,", "gradients.flip(0), means, present=present,"),
    ),
    *of(
        f"{TRAIN}providers.py",
        f"{TESTS}recipes/reward/test_reward_head.py",
        ("            if part.refused:", "            if not part.name:"),
        ("for p in providers if p.makes_parts for", "for p in providers for"),
    ),
    *of(
        "prefkern/prep/conditioning.py",
        f"{TESTS}recipes/reward/test_reward_head.py tests/prep",
        ("swapped(data, (context, context_rejected))", "dict(data)"),
    ),
]
