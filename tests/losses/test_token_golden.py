"""Weight stages and token-level pair losses against tests/golden/token.json.

The statistics come from a plain log-softmax over the five-entry vocabulary; what is proven here is
stage, sums, loss, and the gradient handed back to every statistic and learned weight.
"""

from __future__ import annotations

import pytest
import torch
import vectors

from prefkern import losses
from prefkern.losses import weights
from prefkern.ops.segment_sum import segment_sum
from prefkern.stats import SeqStats

CASES = {c["id"]: c for c in vectors.load("token")["cases"]}
FIELDS = {"logp": "logp", "fkl:ref": "fkl", "rkl:ref": "rkl"}  # statistics a loss here hands back
NAMES = {
    "DPO": "dpo", "LD-DPO": "ld_dpo", "SimPO": "simpo", "TDPO1": "tdpo1", "TDPO2": "tdpo2",
    "SparsePO": "sparsepo", "MaPO": "mapo", "TGDPO": "tgdpo", "LN-DPO": "ln_dpo", "R-DPO": "r_dpo",
    "IPO-MD": "ipo",
}  # fmt: skip
# The mask module's vector has one sequence and no loss record; it has a test of its own.
# ipo_md_soft moves IPO's target by a soft preference, which `ipo` does not take.
PAIRS = [
    k
    for k, c in CASES.items()
    if c["method"] in NAMES and "rejected" in c["inputs"]["sequences"] and k != "ipo_md_soft"
]


class Packed:
    """A pair packed into one token axis: leaves per statistic, masks, boundaries."""

    def __init__(self, case: dict, dtype: torch.dtype) -> None:
        sequences = [case["inputs"]["sequences"][n] for n in ("chosen", "rejected")]
        self.dtype = dtype
        self.scored = torch.tensor([m for s in sequences for m in s["mask"]]).bool()
        self.cu = torch.tensor(
            [0, len(sequences[0]["mask"]), self.scored.numel()], dtype=torch.int32
        )
        target = torch.tensor([y for s in sequences for y in s["targets"]])
        logp, ref = (
            torch.log_softmax(
                vectors.tensor([z for s in sequences for z in s.get(k, s["policy_logits"])]), -1
            )
            for k in ("policy_logits", "ref_logits")
        )
        self.stats = {
            "logp": logp.gather(1, target[:, None])[:, 0],
            "ref_logp": ref.gather(1, target[:, None])[:, 0],
            "fkl": (ref.exp() * (ref - logp)).sum(1),
            "rkl": (logp.exp() * (logp - ref)).sum(1),
        }
        self.stats = {k: v.to(dtype) for k, v in self.stats.items()}
        for name in ("logp", "fkl", "rkl"):
            self.stats[name].requires_grad_()
        if "aux1_logits" in sequences[0]:
            aux = torch.log_softmax(
                vectors.tensor([z for s in sequences for z in s["aux1_logits"]]), -1
            )
            self.aux_logp = aux.gather(1, target[:, None])[:, 0].to(dtype)

    def given(self) -> dict:
        """What preference_loss supplies to a weight stage."""
        counts = [
            int(self.scored[a:b].sum()) for a, b in zip(self.cu[:-1], self.cu[1:], strict=True)
        ]
        sign = torch.ones(self.scored.numel(), dtype=self.dtype)
        sign[self.cu[1] :] = -1.0
        return {
            "cu_seqlens": self.cu,
            "scored": self.scored,
            "ref_logp": self.stats["ref_logp"],
            "sign": sign,
            "public_length": torch.tensor([min(counts)] * 2),
        }

    def sums(self, names: tuple[str, ...], weights: object) -> tuple[SeqStats, SeqStats]:
        fields = {"length": segment_sum(self.scored.to(self.dtype), self.cu)}
        for name in (*names, "ref_logp"):
            w = weights
            if isinstance(weights, dict):
                w = weights.get("logp" if name == "ref_logp" else name)
            values = torch.where(self.scored, self.stats[name], 0.0)  # as every op does
            fields[name] = segment_sum(values, self.cu, weights=w)
        seq = SeqStats(**fields)
        return seq.index(slice(0, 1)), seq.index(slice(1, 2))


def _arguments(case: dict, packed: Packed) -> tuple[dict, dict[str, torch.Tensor]]:
    """Loss arguments of a case, and its trainable extras by their name in the vectors."""
    given = dict(case["inputs"]["hparams"])
    given.pop("activation_mapping", None)
    extra, leaves = case["inputs"]["extra"], {}
    if case["method"] == "IPO-MD":  # the loss is IPO with sums; the mixture only generates answers
        given = {"beta": given["tau"], "norm": "sum"}
    if case["method"] == "SparsePO":
        given.setdefault("rw_kl_independent", True)
        common = not given["rw_kl_independent"]
        for name, key in (("reward_mask", "m_u"), ("kl_mask", "m_d")):
            if common and key == "m_d":
                given[name] = None
                continue
            sides = []
            for side in ("chosen", "rejected"):
                values = extra.get(f"{key}_{side}", [1.0] * 5)
                leaves[f"{key}_{side}"] = vectors.tensor(values, packed.dtype).requires_grad_()
                sides.append(leaves[f"{key}_{side}"])
            given[name] = torch.cat(sides)
    elif case["method"] == "MaPO":
        features = vectors.tensor(extra["activations_hook_t_d"], packed.dtype).mean(-1)
        given["activations"] = torch.cat([features, features], 1)  # both sequences reuse them
        given["hook_type"] = torch.tensor(extra["hook_type"])
    elif case["method"] == "TGDPO":
        given["aux_logp"] = packed.aux_logp
    return given, leaves


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", PAIRS)
def test_pair_methods(name, dtype):
    case, packed = CASES[name], Packed(CASES[name], dtype)
    relative = 1e-10 if dtype == torch.float64 else 1e-5
    out = case["outputs"]
    record = losses.LOSSES[NAMES[case["method"]]]
    given, leaves = _arguments(case, packed)
    bound = losses.bind(record, given)
    stage = None
    if record.weights is not None:
        supplied = {k: v for k, v in packed.given().items() if k in record.inputs.stage}
        stage = record.weights(**supplied, **bound.stage)
    chosen, rejected = packed.sums(bound.stats, None if stage is None else stage.weights)
    loss = record(chosen, rejected, **bound.args)
    assert loss.shape == (1,)
    if "loss_without_l1" in out:
        assert loss.item() == pytest.approx(out["loss_without_l1"], rel=relative)
    total = loss.sum()
    if stage is not None and stage.penalty is not None:
        assert stage.penalty.shape == (2,)
        total = total + stage.penalty.sum()
    assert total.item() == pytest.approx(out["loss"], rel=relative)
    for side, part in (("chosen", slice(0, 5)), ("rejected", slice(5, 10))):
        for key, want in out["grad_per_token_stat"][side].items():
            if key not in FIELDS:
                assert not any(want), key
                continue
            leaf = packed.stats[FIELDS[key]]
            (grad,) = torch.autograd.grad(total, leaf, retain_graph=True)
            vectors.assert_close(
                f"{side} {key}", grad[part], want, relative=relative * 10, scale=1.0
            )
            assert (grad[part][~packed.scored[part]] == 0).all()
    for key, want in out.get("grad_extra", {}).items():
        (grad,) = torch.autograd.grad(total, leaves[key], retain_graph=True)
        vectors.assert_close(key, grad, want, relative=relative * 10, scale=1.0)
    for key in ("f_weights", "token_weights", "mask"):
        if key in out:
            got = stage.weights["logp"] if isinstance(stage.weights, dict) else stage.weights
            want = out[key]["chosen"] + out[key]["rejected"]
            vectors.assert_close(
                key, torch.where(packed.scored, got, 0.0), want, relative=relative * 10
            )
    if "seq_kl" in out:
        for side, seq in (("chosen", chosen), ("rejected", rejected)):
            reward = bound.hyper["beta"] * (seq.logratio.item() + out["seq_kl"][side])
            assert record.rewards(seq, **bound.hyper).item() == pytest.approx(
                reward, rel=relative * 10
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
def test_mask_module(dtype):
    case = CASES["sparsepo_mask_module"]
    relative = 1e-10 if dtype == torch.float64 else 1e-5
    out, extra = case["outputs"], case["inputs"]["extra"]
    module = weights.SparseMask(2, 3, layer_norm_eps=extra["layernorm_eps"], dtype=dtype)
    with torch.no_grad():
        module.layer_mask_weight.copy_(vectors.tensor(extra["w"]))
        module.layer_mask_bias.copy_(vectors.tensor(extra["b"]))
        module.mixer_mask_weight.copy_(vectors.tensor(extra["mix"]))
    mask = module(vectors.tensor(extra["reference_hidden_states"], dtype))
    vectors.assert_close("mask", mask, out["mask"], relative=relative)
    # The vector has a chosen answer only; an empty rejected one contributes 0 to the margin.
    chosen = case["inputs"]["sequences"]["chosen"]
    empty = {**chosen, "mask": [0] * 5}
    packed = Packed({"inputs": {"sequences": {"chosen": chosen, "rejected": empty}}}, dtype)
    both = torch.cat([mask, torch.zeros_like(mask)])
    stage = weights.sparsepo(packed.cu, packed.scored, both, None, rw_kl_independent=False)
    assert stage.penalty is None
    loss = losses.sparsepo(*packed.sums(("logp", "fkl"), stage.weights), beta=0.1).sum()
    assert loss.item() == pytest.approx(out["loss"], rel=relative)
    loss.backward()
    for key, parameter in (
        ("w", module.layer_mask_weight),
        ("b", module.layer_mask_bias),
        ("mix", module.mixer_mask_weight),
    ):
        vectors.assert_close(
            key, parameter.grad, out["grad_extra"][key], relative=relative * 10, scale=1.0
        )


def test_identities():
    packed = Packed(CASES["tdpo1"], torch.float64)
    plain = packed.sums(("logp", "fkl", "rkl"), None)
    ones = torch.ones(10, dtype=torch.float64)
    stage = weights.sparsepo(packed.cu, packed.scored, ones, ones)
    masked = packed.sums(("logp", "fkl"), stage.weights)
    assert torch.equal(losses.sparsepo(*masked), losses.tdpo1(*plain))
    assert torch.equal(losses.tdpo2(*plain, alpha=0.0), losses.dpo(*plain))
