"""Which options of the loop go together: syncs, rounds, online answers, two speeds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import TrainConfig

# Options that mean something in online rounds only, with the value that leaves them out.
_ONLINE = {
    "judge": None, "judge_model": None, "judge_ref_model": None, "generation_mixture": 0.0,
    "soft_judge": False, "keep_unfinished": False, "prompts_per_round": None,
}  # fmt: skip


def has_rounds(config: TrainConfig) -> bool:
    """Whether the run is a sequence of rounds (train.rounds) and not one run of the loop."""
    return config.num_rounds != 1 or config.round_data != "same" or config.round_extrapolation > 0


def supplied(config: TrainConfig) -> frozenset[str]:
    """Tensors of a loss that an option of the loop gives, so that no column has to."""
    found: set[str] = set()
    if config.slow_learning_rate is not None:
        found |= {"slow_chosen_logps", "slow_rejected_logps"}
    if config.fused_ref:
        found |= {"source_chosen_mean_logps", "source_rejected_mean_logps"}
    return frozenset(found)


def check(config: TrainConfig) -> None:
    """Raises ValueError for options that contradict each other, with what to do."""
    _check_sync(config)
    if has_rounds(config):
        _check_rounds(config)
    if config.round_data == "online":
        _check_online(config)
    else:
        for name, off in _ONLINE.items():
            if getattr(config, name) != off:
                raise ValueError(f"{name} is for answers sampled in rounds; set round_data=online.")
    if config.slow_learning_rate is not None:
        _check_speeds(config)
    if config.fused_ref and "infifpo" not in config.loss:
        raise ValueError(
            f"fused_ref is the reference of loss infifpo, got {list(config.loss)}; add that loss "
            "or drop fused_ref."
        )
    if config.precomputed_aux is not None and config.aux_model is not None:
        raise ValueError("aux_model and precomputed_aux are two sources of one thing; give one.")


def _check_sync(config: TrainConfig) -> None:
    if not 0.0 < config.ref_model_mixup_alpha <= 1.0:
        raise ValueError(
            f"ref_model_mixup_alpha must be in (0, 1], got {config.ref_model_mixup_alpha}."
        )
    if not config.sync_ref_model:
        return
    if config.precomputed_ref or config.reference == "columns":
        what = "precomputed_ref holds" if config.precomputed_ref else "the columns hold"
        raise ValueError(
            f"sync_ref_model moves the reference while training, but {what} the numbers of one "
            "that stands still; drop one of the two (reference=model computes it as it moves)."
        )
    if config.reference in ("adapter", "none"):
        raise ValueError(
            f"sync_ref_model needs a reference with weights of its own, and reference="
            f"{config.reference} has none (the adapter switched off is the base model, which must "
            "not change); set reference=model, which keeps a second model in memory."
        )


def _check_rounds(config: TrainConfig) -> None:
    if config.num_rounds == 0 and config.round_data != "stages":
        raise ValueError("num_rounds=0 means one round per stage; it needs round_data=stages.")
    moves = config.round_reference == "previous" and config.num_rounds != 1
    if (moves or config.round_data != "same") and (
        config.precomputed_ref or config.reference == "columns"
    ):
        raise ValueError(
            "precomputed reference log-probabilities are those of one model on one data set, and "
            "rounds change the reference or the data; drop precomputed_ref (or the columns): each "
            "round then computes its reference."
        )
    if moves and config.reference == "adapter":
        raise ValueError(
            "reference=adapter is always the base model, so the model of the previous round cannot "
            "be the reference; use reference=model or auto, or round_reference=start."
        )
    if moves and config.sync_ref_model and config.lora_r:
        raise ValueError(
            "with lora_r the reference of the second round would be an adapter, whose weights "
            "sync_ref_model cannot move; use round_reference=start."
        )
    if config.round_extrapolation and config.lora_r:
        raise ValueError(
            "round_extrapolation works on the weights, and an adapter's change of them is a "
            "product of two matrices, which does not extrapolate; set lora_r=0."
        )
    if config.round_data != "same" and (config.fused_ref or config.precomputed_aux):
        raise ValueError(
            "fused_ref and precomputed_aux belong to one data set; with round_data="
            f"{config.round_data} every round has its own: use aux_model, or round_data=same."
        )


def _check_online(config: TrainConfig) -> None:
    if (config.judge is None) == (config.judge_model is None):
        raise ValueError(
            "round_data=online scores sampled answers: give exactly one of judge and judge_model."
        )
    if (config.judge == "implicit") != (config.judge_ref_model is not None):
        raise ValueError(
            "judge=implicit and judge_ref_model go together: the implicit reward is the policy's "
            "log-ratio to the model it was trained from (to itself it is 0 everywhere)."
        )
    if not 0.0 <= config.generation_mixture <= 1.0:
        raise ValueError(f"generation_mixture must be in [0, 1], got {config.generation_mixture}.")
    if not 0.0 < config.generation_top_p <= 1.0:
        raise ValueError(f"generation_top_p must be in (0, 1], got {config.generation_top_p}.")
    if config.score_prompt:
        raise ValueError(
            "score_prompt is for stored rows: samples are judged and weighed by the log-"
            "probabilities of the answers alone; drop it with round_data=online."
        )
    if config.target_beta <= 0.0:
        raise ValueError(f"target_beta must be > 0, got {config.target_beta}.")
    if config.generation_temperature == 0.0 and config.num_generations > 1:
        raise ValueError(
            "generation_temperature=0 gives the same answer every time; use a temperature above 0 "
            "for num_generations > 1."
        )


def _check_speeds(config: TrainConfig) -> None:
    if not config.lora_r:
        raise ValueError("slow_learning_rate trains a second LoRA adapter; set lora_r.")
    if config.loss != ("dpo_second_reference",):
        raise ValueError(
            "slow_learning_rate needs loss dpo_second_reference (the slow adapter itself trains "
            f"with dpo), got {list(config.loss)}."
        )
    if config.gradient_checkpointing:
        raise ValueError(
            "slow_learning_rate cannot go with gradient_checkpointing: activations would be "
            "recomputed under the other adapter."
        )
    if config.sync_ref_model:
        raise ValueError("slow_learning_rate cannot go with sync_ref_model: two moving references.")
