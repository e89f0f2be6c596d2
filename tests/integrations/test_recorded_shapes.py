"""Adapters of libraries that are not installed here, against the call shapes that were read.

Each stand-in has the library's signature and computes what its documentation says from full logits;
the adapter on top of it must give the same numbers and gradients.
"""

from __future__ import annotations

import itertools
import sys
import types
from dataclasses import dataclass

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import trl_runs as runs
from recorded_calls import Plain, halves, same_gradients, token_logps

import prefkern
from prefkern.integrations import (
    llama_factory,
    llama_factory_v1,
    ms_swift,
    nemo_rl,
    openrlhf,
    torchtitan,
    verl,
)
from prefkern.integrations.collate import PairCollator
from prefkern.integrations.signatures import check, imported

# ---- OpenRLHF ------------------------------------------------------------------------------------


class Actor(nn.Module):
    def __init__(self, temperature=1.0):
        super().__init__()
        self.model, self.temperature, self.packing_samples = runs.model(), temperature, False

    def forward(
        self, sequences, action_mask=None, attention_mask=None, return_output=False,
        allgather_logits=False, return_logprobs=False, ring_attn_group=None, packed_seq_lens=None,
        return_entropy=False, **mm_inputs,
    ):  # fmt: skip
        output = self.model(sequences, attention_mask=attention_mask)
        output["logits"] = output["logits"].float() / self.temperature
        if return_entropy:
            p = output["logits"].log_softmax(-1)
            output.entropy = -(p.exp() * p).sum(-1)[:, :-1]
        if action_mask is None and not return_logprobs:
            return output
        rolled = torch.roll(sequences, -1, 1)
        logps = output["logits"].log_softmax(-1).gather(-1, rolled[..., None])[..., 0][:, :-1]
        if action_mask is not None:
            logps = logps[:, -action_mask.shape[1] :] * action_mask.float()
        return (logps, output) if return_output else logps


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_openrlhf(temperature):
    batch = halves()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    kept = mask[:, 1:].bool()
    made, other = openrlhf.actor_class(Actor)(temperature), Actor(temperature)
    options = dict(attention_mask=mask, return_output=True, return_logprobs=True)
    mine, output = made(ids, **options, return_entropy=True)
    theirs, full = other(ids, **options, return_entropy=True)
    assert torch.allclose(mine[kept], theirs[kept], rtol=1e-5, atol=1e-4)
    assert (mine[~kept] == 0).all()
    assert torch.allclose(output.entropy[kept], full.entropy[kept], rtol=1e-4, atol=1e-4)
    assert "aux_loss" not in output and "logits" not in output
    with pytest.raises(AttributeError, match="without logits"):
        _ = output.logits
    (mine[kept].square().mean() - output.entropy[kept].mean()).backward()
    (theirs[kept].square().mean() - full.entropy[kept].mean()).backward()
    same_gradients(made, other)
    actions = kept[:, -6:]
    a, b = (m(ids, actions, mask) for m in (made, other))
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-4)
    assert made(ids, attention_mask=mask, return_output=True).logits.shape[-1] == 264


# ---- ms-swift ------------------------------------------------------------------------------------


class SwiftTrainer:
    def __init__(self):
        self.accelerator, self.is_encoder_decoder, self.label_pad_token_id = Plain(), False, -100
        self.template = types.SimpleNamespace(sequence_parallel_size=1)

    def get_use_logits_to_keep(self, default):
        return default

    def concatenated_forward(self, model, batch, is_ref_model=False):
        assert not self.get_use_logits_to_keep(True) or type(self) is SwiftTrainer
        batch = dict(batch)
        labels = torch.roll(batch.pop("labels"), -1, 1)
        logits = model(**batch, use_cache=False).logits
        logps, means, mask = self.get_per_token_logps(
            logits, labels, label_pad_token_id=self.label_pad_token_id
        )
        half = len(labels) // 2
        sums = logps.sum(-1)
        return {
            "chosen_logps": sums[:half], "rejected_logps": sums[half:],
            "mean_chosen_logits": means[:half][mask[:half]].mean(),
            "nll_loss": -logps[:half][mask[:half]].mean(),
        }  # fmt: skip

    def get_per_token_logps(self, logits, labels, label_pad_token_id=-100, reduction="mean"):
        mask = labels != label_pad_token_id
        return token_logps(logits, labels), logits.mean(-1) * mask, mask


def test_ms_swift():
    batch = halves()
    results = []
    for cls in (ms_swift.trainer_class(SwiftTrainer), SwiftTrainer):
        policy = runs.model()
        out = cls().concatenated_forward(policy, batch)
        (out["chosen_logps"] - out["rejected_logps"]).sigmoid().sum().backward()
        results.append((out, policy))
    (mine, ours), (theirs, other) = results
    for key, value in theirs.items():
        assert torch.allclose(mine[key], value, rtol=1e-5, atol=1e-4), key
    same_gradients(ours, other)


# ---- verl ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20,), (4, 5)])
def test_verl(shape):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(*shape, 16, generator=g), torch.randn(50, 16, generator=g)
    ids = torch.randint(0, 50, shape, generator=g, dtype=torch.int32)
    results = []
    for kind in ("ours", "logits"):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if kind == "ours":
            logps, entropy = verl.FusedLinearForPPO(chunk_size=7)(h, w, ids, temperature=0.8)
        else:
            p = (h @ w.T / 0.8).log_softmax(-1)
            logps = p.gather(-1, ids.long()[..., None])[..., 0]
            entropy = -(p.exp() * p).sum(-1)
        (logps.square().sum() + 0.1 * entropy.sum()).backward()
        results.append((logps, entropy, h.grad, w.grad))
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_verls_class_is_replaced_where_its_forward_looks(monkeypatch):
    class FusedLinearForPPO(nn.Module):
        def __init__(self, chunk_size=512, impl_backend="torch"):
            super().__init__()

        def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
            raise AssertionError("verl's own")

    for name in ("verl", "verl.utils", "verl.utils.experimental"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = types.ModuleType("verl.utils.experimental.torch_functional")
    module.FusedLinearForPPO = FusedLinearForPPO
    monkeypatch.setitem(sys.modules, module.__name__, module)
    sys.modules["verl.utils.experimental"].torch_functional = module
    verl.use()
    verl.use()
    assert module.FusedLinearForPPO is verl.FusedLinearForPPO


# ---- NeMo-RL -------------------------------------------------------------------------------------


def nemo_batch():
    batch = PairCollator(runs.tokenizer(), 40)([dict(row) for row in runs.pairs(4)])
    scored = (batch["labels"] != -100).float()
    g = torch.Generator().manual_seed(0)
    b, t = scored.shape
    return {
        "input_ids": batch["input_ids"], "token_mask": scored,
        "sample_mask": torch.tensor([1.0, 1, 1, 1, 0, 0, 1, 1]),
        "reference_policy_logprobs": -torch.rand(b, t, generator=g),
    }, -torch.rand(b, t - 1, generator=g)  # fmt: skip


def test_nemo_rls_dpo():
    """Its documented loss: rewards summed over tokens, logistic of their difference, divided by
    the pairs of the global batch."""
    data, logps = nemo_batch()
    seqs = torch.tensor(12.0)
    results = []
    for kind in ("ours", "written"):
        x = logps.clone().requires_grad_()
        if kind == "ours":
            loss, metrics = nemo_rl.PreferenceLossFn("dpo", beta=0.05)(
                next_token_logprobs=x, data=data, global_valid_seqs=seqs, global_valid_toks=None
            )
            assert metrics["num_valid_samples"] == 3
            logged = metrics["rewards/accuracies"], metrics["rewards/chosen"]
        else:
            ratio = (x - data["reference_policy_logprobs"][:, :-1]) * data["token_mask"][:, 1:]
            rewards = ratio.sum(-1)
            pairs = -torch.nn.functional.logsigmoid(0.05 * (rewards[::2] - rewards[1::2]))
            valid = data["sample_mask"][::2]
            loss = (pairs * valid).sum() / (seqs / 2)
            # what it logs is divided by the pairs of the global batch too, and added up
            right = (rewards[::2] > rewards[1::2]) * valid
            want = right.sum() / (seqs / 2), 0.05 * (rewards[::2] * valid).sum() / (seqs / 2)
            assert logged == pytest.approx([v.item() for v in want], rel=1e-5)
        loss.backward()
        results.append((loss.detach(), x.grad))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", ["apo_zero", "ipo", "simpo", "cpo"])
def test_nemo_rl_takes_losses_it_has_not(loss):
    data, logps = nemo_batch()
    value, metrics = nemo_rl.PreferenceLossFn(loss)(logps, data, torch.tensor(8.0))
    assert torch.isfinite(value) and metrics["loss"] == value.item()
    asked = {"sft_loss", "preference_loss", "accuracy", "rewards_chosen_mean", "num_valid_samples"}
    assert asked <= metrics.keys()  # by its validation


def test_nemo_rl_without_a_valid_pair_gets_a_zero_with_gradient():
    data, logps = nemo_batch()
    data["sample_mask"] = torch.zeros(8)
    x = logps.requires_grad_()
    loss, metrics = nemo_rl.PreferenceLossFn("dpo")(x, data, torch.tensor(8.0))
    loss.backward()
    assert loss == 0 and metrics["num_valid_samples"] == 0 and (x.grad == 0).all()


@pytest.mark.parametrize("loss", ["tdpo2", "kto", "lipo"])
def test_nemo_rl_refuses_what_it_cannot_give(loss):
    with pytest.raises(ValueError):
        nemo_rl.PreferenceLossFn(loss)


# ---- torchtitan ----------------------------------------------------------------------------------


class Wrapper:
    @dataclass(kw_only=True, slots=True)
    class Config:
        num_chunks: int = 8

    def __init__(self, config, *, compile_config=None):
        self.num_chunks, self.lm_head = config.num_chunks, None

    def set_lm_head(self, lm_head):
        self.lm_head = lm_head

    def __call__(self, pred, labels, global_valid_tokens=None, **loss_inputs):
        raise AssertionError("torchtitan's own")


def test_torchtitan():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 6, 16, generator=g, requires_grad=True)
    head = nn.Linear(16, 50, bias=False)
    labels = torch.randint(0, 50, (4, 6), generator=g)
    labels[:, :2] = -100
    cls = torchtitan.loss_class(Wrapper)
    made = cls(cls.Config(loss="simpo", loss_args={"beta": 1.5}, ranks=2))
    with pytest.raises(ValueError, match="set_lm_head"):
        made(hidden, labels)
    made.set_lm_head(head)
    seen = []
    head.register_forward_hook(lambda *_: seen.append(True))
    loss, metrics = made(hidden, labels, torch.tensor(16.0), positions=torch.arange(6))
    want, _ = prefkern.preference_loss(hidden, head.weight, labels, loss="simpo", beta=1.5)
    assert loss.item() == pytest.approx(want.item() / 2) and "rewards/margins" in metrics
    cu = torch.tensor([0, 6, 11, 18, 24], dtype=torch.int32)
    packed = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(cu)])
    row, _ = made(hidden.flatten(0, 1), labels.flatten(), positions=packed)
    want, _ = prefkern.preference_loss(
        hidden.flatten(0, 1), head.weight, labels.flatten(), cu, loss="simpo", beta=1.5
    )
    assert row.item() == pytest.approx(want.item() / 2)
    with pytest.raises(ValueError, match="positions say where they begin"):
        made(hidden.flatten(0, 1), labels.flatten())
    seen.pop()
    assert seen == [True]  # the head ran as a module, so its hooks did
    loss.backward()
    assert head.weight.grad.abs().sum() > 0 and hidden.grad.abs().sum() > 0
    assert head(torch.zeros(1, 16)).shape == (1, 50)  # and is itself again


# ---- what is refused -----------------------------------------------------------------------------


def test_a_changed_signature_is_refused():
    class Changed:
        def concatenated_forward(self, model, batch):
            pass

    with pytest.raises(ImportError, match=r"adapter knows .*is_ref_model.*llamafactory 0.9.5"):
        llama_factory.trainer_class(Changed)
    with pytest.raises(ImportError, match="adapter knows"):
        check(lambda a: None, ("a", "b"), "x 1.0")


@pytest.mark.parametrize("call", [
    llama_factory.use, llama_factory_v1.use, openrlhf.actor_class, ms_swift.use, verl.use,
    torchtitan.loss_class,
    lambda: nemo_rl.PreferenceLossFn("dpo").loss_type,
])  # fmt: skip
def test_an_absent_library_is_named(call, monkeypatch):
    for name in ("llamafactory", "openrlhf", "swift", "verl", "torchtitan", "nemo_rl"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"is not there .*; this adapter knows"):
        call()


def test_imported_finds_nested_names():
    assert imported("torch.nn:Linear.forward", "torch") is nn.Linear.forward
