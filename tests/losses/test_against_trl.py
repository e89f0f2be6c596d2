"""preference_loss against TRL's own trainers, loss type by loss type, from hidden states.

TRL's loss methods run on a stub model that returns log-probabilities of the same logits; loss and
gradient with respect to the hidden states must agree. Runs where trl is installed.
"""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from prefkern import losses, preference_loss

pytest.importorskip("trl", reason="trl is not installed: TRL's losses are an optional reference")
trainers = pytest.importorskip("trl.trainer.dpo_trainer")
P, T, D, V = 3, 6, 5, 11
BETA = 0.3


class Data:
    """P pairs as TRL lays them out: all chosen answers, then all rejected ones."""

    def __init__(self, dtype=torch.float64, rows: int = 2) -> None:
        g = torch.Generator().manual_seed(5)
        n = rows * P
        self.hidden = (torch.randn(n, T, D, generator=g).to(dtype)).requires_grad_()
        self.weight = torch.randn(V, D, generator=g).to(dtype)
        self.ids = torch.randint(0, V, (n, T + 1), generator=g)
        self.mask = torch.ones(n, T + 1, dtype=torch.int64)
        self.mask[:, :2] = 0  # prompt
        self.mask[1, 5:] = self.mask[4, 4:] = 0
        self.labels = self.ids.masked_fill(self.mask == 0, -100)[:, 1:]
        ref = torch.randn(n, T, V, generator=g).to(dtype)
        self.ref_logp = self.target_logp(torch.log_softmax(ref, -1))

    def target_logp(self, table: torch.Tensor) -> torch.Tensor:  # [n, T], 0 where not scored
        found = table.gather(-1, self.labels.clamp(min=0)[..., None])[..., 0]
        return torch.where(self.labels == -100, 0.0, found)

    def logits(self) -> torch.Tensor:
        return self.hidden @ self.weight.T

    def model(self, **_: object) -> SimpleNamespace:
        """What TRL's fused head returns, from plain logits."""
        logits = self.logits()
        table = torch.log_softmax(logits, -1)
        wide = torch.cat([logits, logits[:, -1:]], 1)  # row t predicts token t + 1
        return SimpleNamespace(
            log_probs=self.target_logp(table), entropy=-(table.exp() * table).sum(-1),
            log_sum_sq_probs=torch.logsumexp(2 * table, -1), mean_logits=logits.mean(-1),
            is_top1=logits.argmax(-1) == self.labels, logits=wide,
        )  # fmt: skip

    def inputs(self, tail: float | None = None) -> dict:
        scale = torch.ones_like(self.ref_logp)
        if tail is not None:  # LD-DPO: tokens past the shorter answer count `tail`
            place = (self.labels != -100).cumsum(1)
            shared = place[:, -1].reshape(2, P).amin(0).repeat(2)
            scale = torch.where(place > shared[:, None], tail * scale, scale)
        chosen, rejected = (self.ref_logp * scale).sum(1).chunk(2)
        return {
            "input_ids": self.ids, "attention_mask": torch.ones_like(self.ids),
            "completion_mask": self.mask, "ref_chosen_logps": chosen,
            "ref_rejected_logps": rejected,
        }  # fmt: skip

    def ours(self, **args: object) -> torch.Tensor:
        loss, _ = preference_loss(
            self.hidden, self.weight, self.labels, layout="halves", ref_logp=self.ref_logp,
            backend="eager", **args,
        )  # fmt: skip
        return loss


def bare(cls: type, **attributes: object):
    """A trainer without its constructor: loss methods read plain attributes only."""
    trainer = object.__new__(cls)
    gather = SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x
    )
    common = {
        "accelerator": gather, "model": torch.nn.Identity(), "_metrics": defaultdict(
            lambda: defaultdict(list)
        ), "_total_train_tokens": 0, "_tp_size": 1, "aux_loss_enabled": False, "beta": BETA,
        "label_smoothing": 0.0, "precompute_ref_logps": True,
    }  # fmt: skip
    for name, value in {**common, **attributes}.items():
        setattr(trainer, name, value)
    return trainer


def dpo_trainer(*loss_types: str, **attributes: object):
    defaults = {
        "loss_types": list(loss_types), "loss_weights": [1.0] * len(loss_types), "ld_alpha": None,
        "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "use_weighting": False,
        "args": SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
    }  # fmt: skip
    return bare(trainers.DPOTrainer, **{**defaults, **attributes})


def agree(theirs: torch.Tensor, ours: torch.Tensor, data: Data, relative: float = 1e-10) -> None:
    assert ours.item() == pytest.approx(theirs.item(), rel=relative)
    want, got = (torch.autograd.grad(x, data.hidden)[0] for x in (theirs, ours))
    assert (got - want).abs().max() <= relative * want.abs().max()


TYPES = re.findall(r'loss_type == "(\w+)"', inspect.getsource(trainers.DPOTrainer._compute_loss))
SMOOTHED = {"robust": 0.2, "exo_pair": 0.1, "aot": 0.1, "aot_unpaired": 0.1}


@pytest.mark.parametrize("name", TYPES)
def test_every_loss_type_of_dpo(name):
    data = Data()
    smoothing = SMOOTHED.get(name, 0.0)
    trainer = dpo_trainer(name, label_smoothing=smoothing)
    theirs = trainer._compute_loss(data.model, data.inputs(), False)
    args: dict = {} if name == "sft" else {"beta": BETA}
    if smoothing:
        args["label_smoothing"] = smoothing
    if name == "discopop":
        args["tau"] = 0.05
    # TRL keeps exo's smoothing in fp32
    agree(theirs, data.ours(loss=name, **args), data, 1e-7 if name == "exo_pair" else 1e-10)


@pytest.mark.parametrize(
    ("kind", "args", "dtype"),
    [
        ("reverse_kl", {"divergence": "reverse_kl"}, torch.float64),
        ("forward_kl", {"divergence": "forward_kl"}, torch.float64),
        ("js_divergence", {"divergence": "js"}, torch.float64),
        # TRL's coefficient is one less ours, and it has no fp64 clamp
        ("alpha_divergence", {"divergence": "alpha", "alpha": 0.3}, torch.float32),
    ],
)
def test_divergences_of_dpo(kind, args, dtype):
    data = Data(dtype)
    trainer = dpo_trainer("sigmoid", f_divergence_type=kind, f_alpha_divergence_coef=0.7)
    theirs = trainer._compute_loss(data.model, data.inputs(), False)
    ours = data.ours(loss="fdpo", beta=BETA, **args)
    agree(theirs, ours, data, 1e-10 if dtype == torch.float64 else 2e-5)


def test_length_desensitised_weighted_and_summed():
    data = Data()
    theirs = dpo_trainer("sigmoid", ld_alpha=0.4)._compute_loss(data.model, data.inputs(0.4), False)
    agree(theirs, data.ours(loss="ld_dpo", beta=BETA, alpha=0.4), data)
    theirs = dpo_trainer("sigmoid", use_weighting=True)._compute_loss(
        data.model, data.inputs(), False
    )
    agree(theirs, data.ours(loss="wpo", beta=BETA, clamp=False), data)
    theirs = dpo_trainer("sigmoid", "sft", loss_weights=[0.7, 0.2])._compute_loss(
        data.model, data.inputs(), False
    )
    ours = data.ours(loss=["sigmoid", "sft"], loss_weights=[0.7, 0.2], beta=BETA)
    agree(theirs, ours, data)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_unpaired(name):
    module = pytest.importorskip("trl.trainer.kto_trainer")
    data = Data()
    label = torch.tensor([True, False, True, True, False, False])
    kl, ref_kl = torch.full((6,), -3.0).double(), torch.linspace(-4, -3, 6).double()
    trainer = bare(
        module.KTOTrainer, loss_type=name, desirable_weight=1.2, undesirable_weight=0.8,
        calculate_KL=name == "kto", _compute_kl_logps=lambda *_: kl,
    )  # fmt: skip
    inputs = data.inputs() | {
        "label": label, "ref_logps": data.ref_logp.sum(1), "ref_KL_logps": ref_kl
    }  # fmt: skip
    theirs = trainer._compute_loss(data.model, inputs, False)
    args: dict = {"kl_baseline": (kl - ref_kl).mean().clamp(min=0)} if name == "kto" else {}
    ours = data.ours(
        loss=name, beta=BETA, desirable=label, desirable_weight=1.2, undesirable_weight=0.8, **args
    )
    agree(theirs, ours, data)


@pytest.mark.parametrize(
    ("name", "attributes", "args"),
    [
        ("cpo", {"loss_type": "sigmoid"}, {"beta": BETA, "cpo_alpha": 0.0}),
        (
            "simpo", {"loss_type": "simpo", "simpo_gamma": 0.2},
            {"beta": BETA, "gamma_beta_ratio": 0.2 / BETA},
        ),
        (
            "alphapo", {"loss_type": "simpo", "simpo_gamma": 0.2, "alpha": 0.25},
            {"beta": BETA, "gamma": 0.2, "alpha": 0.25},
        ),
    ],
)  # fmt: skip
def test_reference_free(name, attributes, args):
    module = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    data = Data()
    trainer = bare(module.CPOTrainer, **{"alpha": 0.0, **attributes})
    logps = data.model().log_probs.sum(1)
    if name != "cpo":
        logps = logps / (data.labels != -100).sum(1)
    theirs = trainer.cpo_loss(*logps.chunk(2))[0].mean()
    agree(theirs, data.ours(loss=name, **args), data)


def test_orpo_scores_the_prompt():
    module = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    data = Data(torch.float32)
    trainer = bare(module.ORPOTrainer)
    logps = data.model().log_probs.sum(1) / (data.labels != -100).sum(1)
    odds = trainer.odds_ratio_loss(*logps.chunk(2))[0].mean()
    whole = data.ids[:, 1:].clone()
    whole[1, 4:] = whole[4, 3:] = -100  # padding
    nll = torch.nn.functional.cross_entropy(
        data.logits()[:P].reshape(-1, V), whole[:P].reshape(-1), ignore_index=-100
    )
    ours = data.ours(loss="orpo", lam=BETA, likelihood_targets=whole)
    agree(nll - odds, ours, data, 2e-5)


@pytest.mark.parametrize(("name", "args"), [("sigmoid", {}), ("tpo-l", {"gamma": 0.2})])
def test_triples(name, args):
    module = pytest.importorskip("trl.experimental.tpo.tpo_trainer")
    data = Data(rows=3)
    inputs = {
        "input_ids": data.ids, "attention_mask": torch.ones_like(data.ids),
        "completion_mask": data.mask,
    }  # fmt: skip
    trainer = bare(module.TPOTrainer, loss_type=name, tpo_alpha=0.6, tpo_l_gamma=0.2)
    theirs = trainer._compute_loss(data.model, inputs, False)
    loss, _ = preference_loss(
        data.hidden, data.weight, data.labels, layout="halves", backend="eager",
        loss="tpo" if name == "sigmoid" else name, beta=BETA, tpo_alpha=0.6, **args,
    )  # fmt: skip
    agree(theirs, loss, data)


def test_every_alias_is_a_name_of_trl():
    """Each alias is a loss type of one of the trainers above, and names an existing loss."""
    known = {*TYPES, "tpo-l", "aot_pair"}  # the last one up to TRL 0.28
    assert set(losses.ALIASES) <= known
    assert {losses.resolve(name)[0].name for name in TYPES} <= set(losses.LOSSES)
