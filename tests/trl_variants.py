"""Variants of TRL's DPO: options of the configuration, the model and PEFT, and the loss of prefkern
whose formula is the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    config: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    peft: dict[str, Any] | None = None
    same_reference: bool = False  # the reference is a copy of the policy
    # loss_type and loss_args of prefkern's own formula; None: it has none
    own: dict[str, Any] | None = None


def _loss(name: str, own: str | None = None, **config: Any) -> Variant:
    """A loss type of TRL and its twin: the loss of the same name, TRL's beta given."""
    args = {"beta": 0.1} | ({"label_smoothing": s} if (s := config.get("label_smoothing")) else {})
    twin = {"loss_type": own or name, "loss_args": args}
    return Variant({"loss_type": name, **config}, own=twin)


_STEEP = {"learning_rate": 1e-4}  # rounding grows past any bound at ten times that
_DPO = {"loss_type": "dpo", "loss_args": {"beta": 0.1}}
_LORA = dict(r=4, lora_alpha=8, lora_dropout=0.0, init_lora_weights=False)
_ATTENTION = ["q_proj", "v_proj"]

VARIANTS: dict[str, Variant] = {
    "sigmoid": _loss("sigmoid", "dpo"),
    "hinge": _loss("hinge"),
    "ipo": _loss("ipo", learning_rate=1e-4),
    "exo_pair": _loss("exo_pair", label_smoothing=1e-3),
    "nca_pair": _loss("nca_pair"),
    "robust": _loss("robust", label_smoothing=0.1),
    "bco_pair": _loss("bco_pair"),
    "sppo_hard": _loss("sppo_hard", "sppo", learning_rate=1e-4),
    "aot": _loss("aot"),
    "aot, smoothed": _loss("aot", label_smoothing=0.1),
    "aot_unpaired": _loss("aot_unpaired"),
    "apo_zero": _loss("apo_zero"),
    "apo_down": _loss("apo_down"),
    "discopop": Variant(
        {"loss_type": "discopop", "discopop_tau": 0.2, **_STEEP},
        own={"loss_type": "discopop", "loss_args": {"beta": 0.1, "tau": 0.2}, "discopop_tau": 0.05},
    ),
    "sft": Variant({"loss_type": "sft"}),
    "sigmoid_norm": _loss("sigmoid_norm", "ln_dpo"),
    "mixed": Variant(
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        own={"loss_type": ["dpo", "bco_pair", "sft"], "loss_args": {"beta": 0.1}},
    ),
    "sft first": Variant(
        {"loss_type": ["sft", "sigmoid"], "loss_weights": [0.3, 1.0]},
        own={"loss_type": ["sft", "dpo"], "loss_args": {"beta": 0.1}},
    ),
    **{
        f"f-divergence {name}": Variant(
            {"f_divergence_type": name, **_STEEP},
            own={
                "loss_type": "fdpo", "f_divergence_type": "reverse_kl",
                "loss_args": {"beta": 0.1, "divergence": ours},
            },
        )
        for name, ours in (
            ("forward_kl", "forward_kl"), ("js_divergence", "js"), ("alpha_divergence", "alpha"),
        )
    },
    "weighting": Variant(
        {"use_weighting": True},
        own={
            "loss_type": "wpo", "use_weighting": False,
            "loss_args": {"beta": 0.1, "clamp": False},
        },
    ),
    "ld_alpha": Variant(
        {"ld_alpha": 0.3},
        own={"loss_type": "ld_dpo", "ld_alpha": None, "loss_args": {"beta": 0.1, "alpha": 0.3}},
    ),
    "beta": Variant({"beta": 0.5}, own={"loss_type": "dpo"}),
    "precomputed reference": Variant({"precompute_ref_log_probs": True}, own=_DPO),
    # one width of all batches: the backbone's products round differently at another one
    "precomputed copy": Variant(
        {"precompute_ref_log_probs": True, "pad_to_multiple_of": 48}, same_reference=True, own=_DPO
    ),
    "accumulation": Variant(
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, own=_DPO
    ),
    "checkpointing": Variant({"gradient_checkpointing": True}, own=_DPO),
    "evaluation": Variant({"eval_strategy": "steps", "eval_steps": 3}, own=_DPO),
    "soft cap": Variant({}, {"family": "gemma2"}, own=_DPO),
    "tied weights": Variant({}, {"tie_word_embeddings": True}, own=_DPO),
    "left padding": Variant({}, {"side": "left"}, own=_DPO),
    "router loss": Variant({}, {"family": "mixtral"}, own=_DPO),
    "peft attention": Variant({}, peft=dict(target_modules=_ATTENTION, **_LORA), own=_DPO),
    "peft all-linear": Variant({}, peft=dict(target_modules="all-linear", **_LORA), own=_DPO),
    "peft saved head": Variant(
        {}, peft=dict(target_modules=_ATTENTION, modules_to_save=["lm_head"], **_LORA), own=_DPO
    ),
    "peft precomputed": Variant(
        {"precompute_ref_log_probs": True}, peft=dict(target_modules=_ATTENTION, **_LORA), own=_DPO
    ),
}  # fmt: skip
