"""LLaMA-Factory's adapters, v0 and v1, against the call shapes that were read.

As in test_recorded_shapes: each stand-in has the library's signature and computes what it documents
from full logits.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import trl_runs as runs
from recorded_calls import Plain, halves, same_gradients, shift, token_logps

from prefkern.integrations import llama_factory, llama_factory_v1


class FactoryTrainer:
    def __init__(self, loss_type="sigmoid", ld_alpha=None):
        self.loss_type, self.ld_alpha, self.accelerator = loss_type, ld_alpha, Plain()

    def concatenated_forward(self, model, batch, is_ref_model=False):
        targets = shift(batch["labels"])
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        logps = token_logps(model(**inputs).logits, targets)
        length = (targets != -100).sum(1)
        if self.ld_alpha is not None and not is_ref_model:
            shorter = torch.minimum(*length.chunk(2)).repeat(2)
            factor = torch.ones_like(logps)
            for i, length_ in enumerate(shorter):  # positions, masked ones among them
                factor[i, int((targets[i] != -100).int().argmax()) + length_ :] = self.ld_alpha
            logps = logps * factor
        sums = logps.sum(1)
        if self.loss_type in ("ipo", "orpo", "simpo"):
            sums = sums / length
        half = len(sums) // 2
        average = sums[:half] / (1 if self.loss_type in ("ipo", "orpo", "simpo") else length[:half])
        return {
            "chosen_logps": sums[:half], "rejected_logps": sums[half:], "chosen_logps_avg": average,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("loss_type", "alpha", "reference"),
    [("sigmoid", None, False), ("simpo", None, False), ("sigmoid", 0.3, False),
     ("sigmoid", 0.3, True)],
)  # fmt: skip
def test_llama_factory(loss_type, alpha, reference):
    batch = halves()
    for row in batch["labels"]:  # a token that does not count inside each answer
        row[(row != -100).nonzero().flatten()[2]] = -100
    results = []
    for cls in (llama_factory.trainer_class(FactoryTrainer), FactoryTrainer):
        policy = runs.model()
        out = cls(loss_type, alpha).concatenated_forward(policy, dict(batch), reference)
        (out["chosen_logps"].sum() - 0.5 * out["rejected_logps"].square().sum() / 100).backward()
        results.append((out, policy))
    (mine, ours), (theirs, other) = results
    for key, value in theirs.items():
        assert torch.allclose(mine[key], value, rtol=1e-5, atol=1e-4), key
    assert mine["chosen_logits"].dim() == 1 and mine["chosen_logits"].mean().isfinite()
    same_gradients(ours, other)


def test_llama_factorys_class_is_replaced_where_run_dpo_looks(monkeypatch):
    names = ["llamafactory", "llamafactory.train", "llamafactory.train.dpo"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    trainer = types.ModuleType("llamafactory.train.dpo.trainer")
    trainer.CustomDPOTrainer = FactoryTrainer
    workflow = types.ModuleType("llamafactory.train.dpo.workflow")
    workflow.run_dpo = lambda value: (value, trainer.CustomDPOTrainer)
    monkeypatch.setitem(sys.modules, trainer.__name__, trainer)
    monkeypatch.setitem(sys.modules, workflow.__name__, workflow)
    sys.modules["llamafactory.train.dpo"].trainer = trainer
    sys.modules["llamafactory.train.dpo"].workflow = workflow
    value, cls = llama_factory.run_dpo(3)
    assert value == 3 and issubclass(cls, FactoryTrainer) and cls is not FactoryTrainer
    assert llama_factory.use() is cls  # a second time changes nothing


class FactoryTrainerV1:
    """One row: the chosen answer's conversation, behind it the rejected one's."""

    def __init__(self, model, ref_model=None, ld_alpha=None):
        self.model, self.ref_model, self.ld_alpha = model, ref_model, ld_alpha
        self.device = torch.device("cpu")

    @property
    def _unwrapped_model(self):
        return self.model

    def _extract_chosen_rejected_logps(self, logits, labels, token_type_ids, use_ld=True):
        logps = token_logps(logits[:, :-1], labels[:, 1:])
        sums, lengths = [], []
        masks = [(labels[:, 1:] != -100) & (token_type_ids[:, 1:] == kind) for kind in (1, 2)]
        shorter = torch.minimum(*(m.sum(1) for m in masks))
        for mask in masks:
            factor = torch.ones_like(logps)
            if use_ld and self.ld_alpha is not None:
                for i, length in enumerate(shorter):
                    factor[i, int(mask[i].int().argmax()) + length :] = self.ld_alpha
            sums.append((logps * factor * mask).sum(1))
            lengths.append(mask.sum(1) + 1e-6)
        return *sums, sums[0] / lengths[0], sums[1] / lengths[1]

    def compute_loss(self, batch):
        ids, labels, kinds = (batch[k] for k in ("input_ids", "labels", "token_type_ids"))
        inputs = {"input_ids": ids, "attention_mask": kinds.clamp(max=1)}
        logits = self.model(**inputs, use_cache=False, return_dict=True).logits.float()
        found = self._extract_chosen_rejected_logps(logits, labels, kinds)
        chosen, rejected, average, _ = found
        score = average.mean()
        if self.ref_model is not None:
            with torch.no_grad():
                plain = self.ref_model(**inputs, use_cache=False, return_dict=True).logits.float()
            first, second, *_ = self._extract_chosen_rejected_logps(
                plain, labels, kinds, use_ld=False
            )
            chosen, rejected = chosen - first, rejected - second
        means = logits[:, :-1].mean(-1)
        counted = [(labels[:, 1:] != -100) & (kinds[:, 1:] == kind) for kind in (1, 2)]
        self._step_metrics = {
            "logps/chosen": found[0].mean().item(),
            "logits/chosen": means[counted[0]].mean().item(),
            "logits/rejected": means[counted[1]].mean().item(),
        }
        return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean() - 0.1 * score


@pytest.mark.parametrize(("alpha", "lora"), [(None, False), (0.3, False), (0.3, True)])
def test_llama_factory_v1(alpha, lora):
    """v1 counts the prompt into its logged logits; the stand-in does what the adapter says."""
    made = halves()
    chosen, rejected = ({k: v[half] for k, v in made.items()} for half in (slice(4), slice(4, 8)))
    batch = {k: torch.cat([chosen[k], rejected[k]], 1) for k in ("input_ids", "labels")}
    batch["token_type_ids"] = torch.cat(
        [chosen["attention_mask"], 2 * rejected["attention_mask"]], 1
    )
    results = []
    for cls in (llama_factory_v1.trainer_class(FactoryTrainerV1), FactoryTrainerV1):
        policy = runs.model()
        reference = runs.perturbed(policy)
        if lora:
            import peft

            torch.manual_seed(1)
            policy = peft.get_peft_model(
                policy,
                peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False),
            )
        trainer = cls(policy, reference, alpha)
        loss = trainer.compute_loss(batch)
        loss.backward()
        results.append((loss, trainer._step_metrics, policy))
        assert policy(batch["input_ids"]).logits.shape[-1] == 264  # the hooks are gone
    (mine, logged, ours), (theirs, want, other) = results
    assert torch.allclose(mine, theirs, rtol=1e-5)
    assert logged == pytest.approx(want, rel=1e-4, abs=1e-6)
    for (name, p), q in zip(ours.named_parameters(), other.parameters(), strict=True):
        if p.requires_grad:
            assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-6), name
