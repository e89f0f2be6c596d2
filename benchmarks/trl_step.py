"""A DPO step inside TRL's DPOTrainer: reference forward, policy forward, backward, no optimizer.

A model of two layers, width D, V tokens; a third of every sequence is prompt. Variants are the
trainer as it comes, the same trainer with another `_compute_loss`, and prefkern's. The limit is the
head's bare products and both models without heads.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import BETA, IGNORE, Case


@dataclass
class TrlInputs:
    """Both models, which every trainer shares, and one batch [chosen..., rejected...]."""

    model: Any
    ref_model: Any
    batch: dict[str, Tensor]  # input_ids, attention_mask, completion_mask, each [2 P, T]

    @functools.cached_property
    def args(self) -> Any:
        """One for all trainers: a second one would reset the first one's accelerator."""
        from trl import DPOConfig

        return DPOConfig(
            output_dir=tempfile.gettempdir(), report_to=[], use_cpu=True, bf16=False, beta=BETA,
            gradient_checkpointing=False, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The gradient of the embedding has come through dH and every layer."""
        return {
            "d_hidden": self.model.get_input_embeddings().weight,
            "d_weight": self.model.get_output_embeddings().weight,
        }

    @property
    def gradient_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)


def make_inputs(case: Case, seed: int = 0) -> TrlInputs:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = case.shape
    size = LlamaConfig(
        vocab_size=shape.V, hidden_size=shape.D, intermediate_size=2 * shape.D, num_hidden_layers=2,
        num_attention_heads=max(2, shape.D // 64), max_position_embeddings=2 * shape.tokens,
        tie_word_embeddings=False, initializer_range=shape.D**-0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(size).to(case.torch_dtype)
    ref_model = copy.deepcopy(model)
    with torch.no_grad():
        for p in ref_model.parameters():
            p += 0.05 * p.std() * torch.randn_like(p)
    ids = torch.randint(3, shape.V, (2 * shape.pairs, shape.tokens))
    mask = torch.ones_like(ids)
    answer = mask.clone()
    answer[:, : shape.tokens // 3] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "completion_mask": answer}
    return TrlInputs(model, ref_model, batch)


def sequence_logps(model: Any, batch: dict[str, Tensor]) -> Tensor:  # [2 P]
    """From full logits, in fp32 or fp64."""
    ids = batch["input_ids"]
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False).logits
    lp = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    lp = lp.gather(-1, ids[:, 1:, None])[..., 0]
    return (lp * batch["completion_mask"][:, 1:]).sum(1)


def dpo(policy: Tensor, reference: Tensor) -> Tensor:
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def truth(case: Case, x: TrlInputs) -> tuple[Tensor, dict, dict[str, Tensor]]:
    """(loss, {}, gradients) in float64, one pair at a time."""
    exact = TrlInputs(copy.deepcopy(x.model).double(), copy.deepcopy(x.ref_model).double(), x.batch)
    pairs, total = case.shape.pairs, torch.zeros((), dtype=torch.float64)
    for i in range(pairs):
        pair = {name: t[[i, i + pairs]] for name, t in x.batch.items()}
        with torch.no_grad():
            reference = sequence_logps(exact.ref_model, pair)
        loss = dpo(sequence_logps(exact.model, pair), reference) / pairs
        loss.backward()
        total += loss.detach()
    return total, {}, {name: leaf.grad for name, leaf in exact.leaves.items()}


def layers_alone(x: TrlInputs) -> Callable[[], None]:
    """What a step costs without heads and loss: the reference's layers forward, the policy's
    forward and, from some gradient of its hidden states, backward."""
    given = {name: x.batch[name] for name in ("input_ids", "attention_mask")}

    def states(model: Any) -> Tensor:
        found: Tensor = model.base_model(**given, use_cache=False).last_hidden_state
        return found

    upstream = torch.randn_like(states(x.ref_model))

    def call() -> None:
        with torch.no_grad():
            states(x.ref_model)
        states(x.model).backward(upstream)
        x.clear()

    return call


# ---- trainers ------------------------------------------------------------------------------------
def _stock() -> type:
    from trl import DPOTrainer

    return DPOTrainer


def _full_logits() -> type:
    class FullLogits(_stock()):
        def _compute_loss(self, model, inputs, return_outputs):
            with torch.no_grad():
                reference = sequence_logps(self.ref_model, inputs)
            return dpo(sequence_logps(model, inputs), reference)

    return FullLogits


def _liger() -> type:
    """Liger's loss over the hidden states, as TRL called it before it had a fused head; its
    `use_liger_kernel` of today replaces layers alone, with Triton kernels that need a GPU."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    class Liger(_stock()):
        def _compute_loss(self, model, inputs, return_outputs):
            ids = inputs["input_ids"]
            labels = ids.masked_fill(inputs["completion_mask"] == 0, IGNORE)[:, 1:].contiguous()

            def states(m: Any) -> Tensor:
                found = m.base_model(ids, attention_mask=inputs["attention_mask"], use_cache=False)
                return found.last_hidden_state[:, :-1].contiguous()

            with torch.no_grad():
                reference = states(self.ref_model)
            loss = LigerFusedLinearDPOLoss(ignore_index=IGNORE, beta=BETA, compiled=False)
            weights = (m.get_output_embeddings().weight for m in (model, self.ref_model))
            weight, ref_weight = weights
            found, _ = loss(
                weight, states(model), labels, ref_input=reference, ref_weight=ref_weight
            )
            return found

    return Liger


def _prefkern() -> type:
    from prefkern.integrations.trl import DPOTrainer

    return DPOTrainer


def _prefkern_keeps_all() -> Callable[..., Any]:
    """With a budget that holds the logits of V = 151,936 too."""
    return functools.partial(_prefkern(), memory_budget=1 << 30)


def _modules_of_its_own(model: Any) -> Any:
    """The same parameters in other modules: trainers replace the forward of the model they get."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _build(trainer_class: Callable[[], Callable[..., Any]], case: Case, x: TrlInputs):
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )
    # the trainer wants data to start with; the steps get the batch of the case
    data = Dataset.from_list([{"prompt": "a", "chosen": " a", "rejected": " a a"}])
    trainer = trainer_class()(
        model=_modules_of_its_own(x.model), ref_model=_modules_of_its_own(x.ref_model), args=x.args,
        processing_class=tokenizer, train_dataset=data,
    )  # fmt: skip

    def step(x: TrlInputs) -> tuple[Tensor, dict]:
        return trainer.compute_loss(trainer.model, dict(x.batch)), {}

    return step


# name -> (how it is built, the distribution whose version stands in the row)
TRAINERS = {
    name: (functools.partial(_build, trainer), package)
    for name, trainer, package in (
        ("TRL", _stock, "trl"), ("TRL + Liger", _liger, "liger-kernel"),
        ("TRL, full logits", _full_logits, "trl"), ("TRL + prefkern", _prefkern, "prefkern"),
        ("TRL + prefkern, 1 GiB", _prefkern_keeps_all, "prefkern"),
    )
}  # fmt: skip
