"""What other libraries call our arguments, for the message of an unknown one."""

from __future__ import annotations

_PER_SEQUENCE = "ref_seq_logp, sums per sequence in the order of the batch"
_MASK = "targets, with ignore_index where a position is not scored"
_STATS = "prefkern.SeqStats with prefkern.losses.<name>, or prefkern.loss_from_stats"
_HIDDEN = "prefkern.preference_loss(hidden, head, targets), its positional arguments"

# Name in TRL, Transformers, Liger or Cut Cross-Entropy -> what to write here. Names that are ours
# too (beta, label_smoothing, desirable_weight, cpo_alpha, tpo_alpha, loss_weights ...) have no row.
FOREIGN: dict[str, str] = {
    # TRL: DPO, CPO, KTO, TPO and ORPO trainers
    "loss_type": "loss",
    "f_divergence_type": "loss='fdpo' with its argument divergence (js_divergence is 'js', "
    "alpha_divergence 'alpha')",
    "f_alpha_divergence_coef": "loss='fdpo' with its argument alpha = 1 - f_alpha_divergence_coef",
    "ld_alpha": "loss='ld_dpo' with its argument alpha",
    "discopop_tau": "loss='discopop' with its argument tau",
    "use_weighting": "loss='wpo' (with clamp=False as in TRL since 0.29)",
    "rpo_alpha": "loss=['dpo', 'sft'] with loss_weights, or loss='rpo'",
    "simpo_gamma": "loss='simpo' with its argument gamma_beta_ratio, which is simpo_gamma / beta",
    "tpo_l_gamma": "loss='tpo_l' with its argument gamma",
    "average_log_prob": "a length-normalised loss: loss='ln_dpo', loss='simpo' or loss='ipo'",
    "label": "desirable",
    "labels": "targets (token labels), relevance (lists) or desirable (single answers)",
    "completion_mask": _MASK,
    "precompute_ref_log_probs": "ref_logp or ref_seq_logp (`prefkern precompute` makes them)",
    "ref_chosen_logps": _PER_SEQUENCE,
    "ref_rejected_logps": _PER_SEQUENCE,
    "ref_logps": "ref_logp (per token) or ref_seq_logp (per sequence)",
    "reference_logps": "ref_logp (per token) or ref_seq_logp (per sequence)",
    "ref_KL_logps": "kl_baseline, from prefkern.losses.pointwise.kto.kl_baseline",
    "policy_chosen_logps": _STATS,
    "policy_rejected_logps": _STATS,
    "reference_chosen_logps": _STATS,
    "reference_rejected_logps": _STATS,
    "chosen_logps": _STATS,
    "rejected_logps": _STATS,
    "ref_model": "ref_hidden (and ref_head), that model's hidden states",
    "label_pad_token_id": "ignore_index",
    "padding_value": "ignore_index",
    "is_encoder_decoder": "nothing: decoder models alone are supported",
    # TRL: GRPO, RLOO, GKD and reward trainers
    "epsilon": "loss='grpo' with its argument eps",
    "epsilon_high": "loss='grpo' with its argument eps, one clip for both sides",
    "scale_rewards": "advantages, from prefkern.losses.advantages.group_advantages (scale)",
    "reward_weights": "advantages, from prefkern.losses.advantages.group_advantages (weights)",
    "multi_objective_aggregation": "advantages, from prefkern.losses.advantages.group_advantages "
    "(mode)",
    "normalize_advantages": "advantages, from prefkern.losses.advantages.whiten",
    "entropy_coef": "loss=['grpo', 'entropy_bonus'], the latter with its argument coef",
    "old_per_token_logps": "old_logp",
    "ref_per_token_logps": "ref_logp",
    "center_rewards_coefficient": "loss='bradley_terry' with its argument center",
    # Transformers
    "attention_mask": _MASK,
    "loss_mask": _MASK,
    "logits": "prefkern.logits_logps and prefkern.loss_from_stats",
    "num_items_in_batch": "num_items={'pairs': ...}",
    "reduction": "num_items (the denominators); prefkern.losses.<name> itself is unreduced",
    # Liger and Cut Cross-Entropy
    "input": _HIDDEN,
    "target": _HIDDEN,
    "weight": "head",
    "lin_weight": "head",
    "lm_head": "head",
    "bias": "head=Head(weight, bias)",
    "ref_input": "ref_hidden",
    "ref_weight": "ref_head",
    "ref_bias": "ref_head=Head(weight, bias)",
    "use_ref_model": "ref_hidden, ref_logp or ref_seq_logp where the loss has a reference",
    "preference_labels": "desirable",
    "kl": "kl_baseline, from prefkern.losses.pointwise.kto.kl_baseline",
    "compute_nll_loss": "loss=[..., 'sft'] with loss_weights, or a loss with a likelihood term",
    "nll_target": "likelihood_targets",
    "chunk_size": "memory_budget (bytes)",
    "impl": "backend",
    # what a head brings along
    "aux_weight": "aux_head",
    "scale": "head=Head(weight, scale=...)",
    "softcap": "head=Head(weight, softcap=...)",
    "temperature": "head=Head(weight, temperature=...)",
    "ref_scale": "ref_head=Head(weight, scale=...)",
    "ref_softcap": "ref_head=Head(weight, softcap=...)",
    "ref_temperature": "ref_head=Head(weight, temperature=...)",
}


def of_family(name: str, family: str) -> str | None:
    """What to write in a direct call of a loss of that family, where one word of ours is meant."""
    if name not in ("labels", "label", "preference_labels"):
        return None
    return {"listwise": "relevance", "pointwise": "desirable"}.get(family)
