"""A DPOTrainer whose losses come from full logits: what the fused one must equal."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import torch
from trl.trainer.utils import use_adapter

import prefkern
from prefkern import losses
from prefkern.integrations import trl as ours
from prefkern.integrations.trl import batches


class FullLogits(ours.DPOTrainer):
    """The same data and the same losses; logits [S, T, V] of both models, statistics from them."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        plan = self.plan
        assert plan is not None
        arguments, targets = self._split(inputs)
        given, _ = self._judgements(inputs, targets)
        stats: dict[str, None] = {"logp": None, "top1": None, "zmean": None, "ent": None}
        for name in plan.names:
            record, fixed = losses.resolve(name)
            known = losses.arguments(record)
            own = {**{k: v for k, v in plan.args.items() if k in known}, **fixed}
            call = losses.bind(record, own, supplied=(*losses.required(record), "desirable"))
            stats |= dict.fromkeys(call.stats)
        reference = None
        if plan.needs.reference:
            if plan.needs.logp:
                stats["ref_logp"] = None
            adapter = self.ref_model is None
            base = self.accelerator.unwrap_model(self.model)
            name = "ref" if adapter and "ref" in base.peft_config else None
            with torch.no_grad(), use_adapter(base, name) if adapter else nullcontext():
                other = self.model if adapter else self.ref_model
                reference = other(**arguments).logits
        tokens = prefkern.logits_logps(
            model(**arguments).logits, targets, ref_logits=reference, stats=tuple(stats)
        )
        more = dict(inputs.get(batches.COLUMNS, {}))
        if self.aux_model is not None:
            with torch.no_grad():
                logits = self.aux_model(**arguments).logits
                more["aux_logp"] = prefkern.logits_logps(logits, targets).logp
        loss, metrics = prefkern.loss_from_stats(
            tokens,
            targets,
            loss=plan.names,
            loss_weights=plan.weights,
            **plan.args,
            **given,
            **more,
        )
        found: dict[str, list[float]] = defaultdict(list)
        for key, value in metrics.items():
            found[key].append(float(value))
        for key, values in found.items():
            self._metrics["train"][key] += values
        return loss
