"""Prefkern's losses under TRL's trainers of preferences.

Shapes: P pairs are 2P rows of T tokens, chosen first; lists are S rows in G groups.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing, prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import use_adapter

from ...ops.segment_sum import segment_sum
from .. import hf
from ..head import refuse_prompt_learning
from ..head_view import IGNORE, shifted
from ..loss_at_head import Other, loss_at_head, read_other
from . import batches, logs
from .data import LossData
from .fused_head import FusedHead, add_fused_lm_head
from .memory import LossMemory
from .plan import DPO_TYPES, LossPlan, plan_of

# Entries of a batch that are no arguments of the model.
_OWN_KEYS = frozenset({
    "completion_mask", "ref_chosen_logps", "ref_rejected_logps", "ref_logps", "label", "cu_groups",
    "relevance", batches.COLUMNS,
})  # fmt: skip


class PreferenceLosses(LossData, FusedHead):
    """Mixin before trl.DPOTrainer, trl.KTOTrainer or a subclass of one: prefkern's losses as
    `loss_type`, TRL's own types on prefkern's statistics.

    Args:
        aux_model: The third, frozen model that some losses read. Default None.
        The rest: `FusedHead`'s and the trainer's own.

    Raises:
        ValueError: before any work, for a loss, an argument, a reference or a data set that do not
            fit together.
    """

    packs = True
    families: tuple[str, ...] = ("pairwise", "pointwise", "listwise")
    trl_types = DPO_TYPES  # run by TRL's formulas

    def __init__(self, *args: Any, aux_model: Any = None, **kwargs: Any) -> None:
        self.aux_model, self.plan = aux_model, None
        self._memory: LossMemory | None = None
        super().__init__(*args, **kwargs)
        self._refuse_split_sequences()
        if self.plan is None:
            return
        self._use_collator(own=self._no_collator)
        if self.aux_model is not None:
            add_fused_lm_head(self.aux_model, **self._head_options)
            self.aux_model = self._frozen(self.aux_model)
        self._memory = LossMemory.of(self, self.plan)

    # ---- before TRL's constructor ----------------------------------------------------------------

    def _swaps(self, module: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        names = super()._swaps(module, arguments)
        config = arguments.get("args")
        if config is not None:
            aux = self.aux_model is not None
            self.plan = plan_of(config, self.families, self.trl_types, aux_model=aux)
        self._check_datasets(arguments)
        self._check_models(arguments)
        if self._head_options["packed"]:
            refuse_prompt_learning(_peft_settings(arguments), "padding_free")
        if self.plan is None:
            return names
        self._check_arguments(self.plan, config, arguments)
        self._no_collator = arguments.get("data_collator") is None
        peft = bool(_peft_settings(arguments))
        if not self.plan.needs.reference and not peft:
            # TRL would load a copy of the policy that nothing reads
            names.pop("BaseTunerLayer", None)
            own = module.create_model_from_path
            names["create_model_from_path"] = _OnlyThePolicy(own, arguments.get("model"))
        return names

    def _check_models(self, arguments: dict[str, Any]) -> None:
        """A reference and a third model score the policy's tokens."""
        policy, needs = arguments.get("model"), None if self.plan is None else self.plan.needs
        processor = arguments.get("processing_class")
        tokenizer = getattr(processor, "tokenizer", processor)
        whole = {
            "ref_model": needs is not None and needs.distribution,
            "aux_model": needs is not None and needs.aux == "head",
        }
        for name, other in (
            ("ref_model", arguments.get("ref_model")),
            ("aux_model", self.aux_model),
        ):
            if other is None:
                continue
            if not isinstance(other, torch.nn.Module):
                raise TypeError(
                    f"{name} must be a model, got {other!r}; load it with "
                    "AutoModelForCausalLM.from_pretrained."
                )
            if not isinstance(policy, torch.nn.Module) or tokenizer is None:
                continue
            mine, theirs = (hf.text_config(m).vocab_size for m in (policy, other))
            if theirs < min(mine, len(tokenizer)):
                raise ValueError(
                    f"{name} knows {theirs} tokens, the tokenizer {len(tokenizer)} and the policy "
                    f"{mine}: it cannot score all of them; use one with the policy's vocabulary."
                )
            if whole[name] and theirs != mine:
                raise ValueError(
                    f"loss {', '.join(self.plan.names if self.plan else [])} compares the policy's "
                    f"distribution over {mine} tokens with {name}'s over {theirs}; resize_token_"
                    "embeddings makes them one size."
                )

    def _check_arguments(self, plan: LossPlan, config: Any, arguments: dict[str, Any]) -> None:
        needs, names = plan.needs, ", ".join(plan.names)
        if any(getattr(s, "is_prompt_learning", False) for s in _peft_settings(arguments)):
            raise ValueError(
                f"loss {names}: prompt learning adds positions that carry no label; use LoRA."
            )
        several = needs.distribution or needs.tokens or self._many
        if config.precompute_ref_log_probs and needs.reference and several:
            what = "more answers than two of a row" if self._many else "the reference by the token"
            if needs.distribution:
                what = "the reference's whole distribution"
            raise ValueError(
                f"loss {names} reads {what}, and precompute_ref_log_probs keeps one number per "
                "answer of a pair; set it to False."
            )
        if not needs.reference:
            given = {
                "ref_model": arguments.get("ref_model") is not None,
                "precompute_ref_log_probs": config.precompute_ref_log_probs,
                "sync_ref_model": getattr(config, "sync_ref_model", False),
            }  # fmt: skip
            if asked := [name for name, there in given.items() if there]:
                raise ValueError(f"loss {names} reads no reference; drop {', '.join(asked)}.")
        if getattr(config, "truncation_mode", "keep_start") != "keep_start" and (
            needs.columns or self._many
        ):
            raise ValueError(
                f"loss {names} with lists or further columns cuts answers at their end; set "
                "truncation_mode='keep_start'."
            )

    def _refuse_split_sequences(self) -> None:
        """TRL's batches of preferences go whole to every rank: a rank's share of the ids would meet
        masks of whole sequences. An accelerate file sets it without a trace in the config."""
        trainer: Any = self
        parallelism = getattr(trainer.accelerator, "parallelism_config", None)
        for name in ("cp", "sp"):
            if getattr(parallelism, f"{name}_enabled", False):
                raise ValueError(
                    f"{type(self).__name__} needs whole sequences on every rank, and this run "
                    f"splits them (parallelism_config.{name}_size > 1), which TRL does for "
                    "SFTTrainer alone; set it to 1, or sum over ranks in a loop of your own "
                    "(prefkern.integrations.context_parallel)."
                )

    # ---- other models ----------------------------------------------------------------------------

    def _frozen(self, model: Any) -> Any:
        """A frozen model prepared as TRL prepares its reference."""
        trainer: Any = self
        model.requires_grad_(False).eval()
        if trainer.is_deepspeed_enabled:
            return prepare_deepspeed(model, trainer.accelerator)
        if trainer.is_fsdp_enabled:
            return prepare_fsdp(model, trainer.accelerator)
        return trainer.accelerator.prepare_model(model, evaluation_mode=True)

    def _read_reference(self, inputs: dict[str, Any], targets: Tensor) -> Other:
        trainer: Any = self
        assert self.plan is not None
        needs = self.plan.needs
        own = is_peft_model(trainer.model) and trainer.ref_model is None
        model = trainer.model if own else trainer.ref_model
        if model is None:
            raise ValueError("the reference is gone: it was there to precompute its sums alone.")
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            checkpointing = trainer.args.gradient_checkpointing_kwargs
            stack.enter_context(disable_gradient_checkpointing(trainer.model, checkpointing))
            if own:
                inner = trainer.accelerator.unwrap_model(trainer.model)
                name = "ref" if "ref" in inner.peft_config else None
                stack.enter_context(use_adapter(inner, adapter_name=name))
            return read_other(
                model, inputs, targets, distribution=needs.distribution, layers=needs.masks,
                backend=self._backend,
            )  # fmt: skip

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """TRL's, for its own types; else sums in fp64 as the loss forms them, rounded once."""
        if self.plan is None:
            return super().compute_ref_log_probs(model, inputs)  # type: ignore[misc]
        trainer: Any = self
        arguments, targets = self._split(inputs)
        with ExitStack() as stack:
            stack.enter_context(trainer.accelerator.autocast())
            if trainer.ref_model is None and is_peft_model(trainer.model):
                inner = trainer.accelerator.unwrap_model(trainer.model)
                name = "ref" if "ref" in inner.peft_config else None
                stack.enter_context(use_adapter(inner, adapter_name=name))
            logp = read_other(model, arguments, targets, distribution=False, backend=self._backend)
        assert isinstance(logp, Tensor)
        rows, width = targets.shape
        bounds = torch.arange(rows + 1, dtype=torch.int32, device=logp.device) * width
        sums = segment_sum(logp.reshape(1, -1), bounds, backend=self._backend)[0].float()
        return sums.chunk(2) if self.rows == "pairs" else (sums, None)

    # ---- what a run learns beside the policy -----------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if self._memory is not None:
            rate = getattr(self.args, "mask_learning_rate", None)  # type: ignore[attr-defined]
            self._memory.add_group(optimizer, rate)
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._memory is None:
            return super()._save(output_dir, state_dict)  # type: ignore[misc]
        trainer: Any = self
        if state_dict is None:
            state_dict = trainer.accelerator.unwrap_model(trainer.model).state_dict()
        super()._save(output_dir, self._memory.without_masks(state_dict))  # type: ignore[misc]
        self._memory.save(Path(trainer.args.output_dir if output_dir is None else output_dir))
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        if self._memory is not None:
            self._memory.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        best = self.state.best_model_checkpoint  # type: ignore[attr-defined]
        if self._memory is not None and best is not None:
            self._memory.load(Path(best))

    # ---- the loss --------------------------------------------------------------------------------

    def _split(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """(arguments of the model, targets [S, T]) of a batch."""
        arguments = {k: v for k, v in inputs.items() if k not in _OWN_KEYS and v is not None}
        arguments = {k: v for k, v in arguments.items() if not k.startswith("KL_")}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE)
        return arguments | {"use_cache": False}, shifted(labels)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        plan = self.plan
        if plan is None:
            return super()._compute_loss(model, inputs, return_outputs)  # type: ignore[misc]
        trainer: Any = self
        arguments, targets = self._split(inputs)
        given, chosen = self._judgements(inputs, targets)
        reference: Other = None
        if plan.needs.reference and trainer.precompute_ref_logps:
            sums = [inputs[k] for k in ("ref_chosen_logps", "ref_rejected_logps") if k in inputs]
            given["ref_seq_logp"] = torch.cat(sums) if sums else inputs["ref_logps"]
        elif plan.needs.reference:
            reference = self._read_reference(arguments, targets)
        aux: Other = None
        if self.aux_model is not None:
            aux = read_other(
                self.aux_model, arguments, targets, distribution=plan.needs.aux == "head",
                backend=self._backend,
            )  # fmt: skip
        memory = self._memory
        given |= plan.args | inputs.get(batches.COLUMNS, {})
        if memory is not None:
            given |= memory.arguments(trainer.model.training)
        objective = loss_at_head(
            targets, reference=reference, aux=aux, loss=plan.names, loss_weights=plan.weights,
            memory_budget=self._budget, backend=self._backend, **given,
        )  # fmt: skip
        if trainer.aux_loss_enabled:
            arguments["output_router_logits"] = True
        out = model(**arguments, at_head=objective)
        loss, metrics = out.value
        metrics |= {} if memory is None else memory.metrics()
        if trainer.aux_loss_enabled:
            loss = loss + trainer.router_aux_loss_coef * out.aux_loss
            metrics["aux_loss"] = out.aux_loss.detach()
        self._log(metrics, inputs, logs.token_counts(targets, chosen, IGNORE))
        if not return_outputs:
            return loss
        with torch.no_grad():  # compute_metrics reads logits, as in TRL: one more forward
            return loss, model(**arguments)

    def _judgements(
        self, inputs: dict[str, Any], targets: Tensor
    ) -> tuple[dict[str, Any], Tensor | None]:
        """(arguments of preference_loss that say what the rows are, the chosen rows [S])."""
        s = targets.shape[0]
        if "relevance" in inputs:
            return {"cu_groups": inputs["cu_groups"], "relevance": inputs["relevance"]}, None
        if self.rows == "answers":
            desirable = inputs["label"].bool()
            return {"desirable": desirable}, desirable
        position = torch.arange(s, device=targets.device)
        if self._many:
            assert self.plan is not None
            roles = len(self.plan.needs.roles)
            return {"layout": "pairs"}, position % roles == 0
        chosen = position < s // 2
        return {"layout": "halves", "desirable": chosen}, chosen

    def _log(
        self, metrics: dict[str, Tensor], inputs: dict[str, Any], counts: dict[str, Tensor]
    ) -> None:
        trainer: Any = self
        assert self.plan is not None
        mode = "train" if trainer.model.training else "eval"
        accelerator = trainer.accelerator
        found = logs.over_ranks(accelerator, metrics, counts) | self.plan.betas
        for name, value in found.items():
            trainer._metrics[mode][name].append(value)
        if mode == "train":
            tokens = accelerator.gather(inputs["attention_mask"].sum()).sum().item()
            trainer._total_train_tokens += tokens // trainer._tp_size
        trainer._metrics[mode]["num_tokens"] = [trainer._total_train_tokens]


class _OnlyThePolicy:
    """Stands in for TRL's create_model_from_path where no loss reads a reference: loads the policy
    when it came as a name, and nothing after it."""

    def __init__(self, own: Any, model: Any) -> None:
        self._own, self._left = own, int(isinstance(model, str))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._left:
            return None
        self._left -= 1
        return self._own(*args, **kwargs)


def _peft_settings(arguments: dict[str, Any]) -> list[Any]:
    """Of the adapters that the model has or is about to get."""
    found = [arguments.get("peft_config")]
    return [s for s in found if s is not None] + [
        *getattr(arguments.get("model"), "peft_config", {}).values()
    ]
