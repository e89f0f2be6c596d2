"""Golden vectors through preference_loss: from logits to logit gradients, learned masks included.

With the identity as head, hidden states are logits, so the vectors' logit gradients are d_hidden.
"""

from __future__ import annotations

import pytest
import torch
import vectors

import prefkern
from prefkern.objective.preference_loss import preference_loss

NAMES = {
    "DPO": "dpo", "LD-DPO": "ld_dpo", "SimPO": "simpo", "TDPO1": "tdpo1", "TDPO2": "tdpo2",
    "SparsePO": "sparsepo", "MaPO": "mapo", "TGDPO": "tgdpo", "LN-DPO": "ln_dpo", "R-DPO": "r_dpo",
}  # fmt: skip
CASES = {
    c["id"]: c
    for c in vectors.load("token")["cases"]
    if c["method"] in NAMES and "rejected" in c["inputs"]["sequences"]
}
SIDES = ("chosen", "rejected")


def flat(case: dict, key: str) -> list:
    return [row for side in SIDES for row in case["inputs"]["sequences"][side][key]]


def loss_arguments(case: dict) -> tuple[dict, dict]:
    given, leaves = dict(case["inputs"]["hparams"]), {}
    given.pop("activation_mapping", None)
    extra = case["inputs"]["extra"]
    if case["method"] == "SparsePO":
        independent = given.setdefault("rw_kl_independent", True)
        for name, key in (("reward_mask", "m_u"), ("kl_mask", "m_d")):
            if key == "m_d" and not independent:
                given[name] = None
                continue
            for side in SIDES:
                mask = vectors.tensor(extra.get(f"{key}_{side}", [1.0] * 5))
                leaves[f"{key}_{side}"] = mask.requires_grad_()
            given[name] = torch.cat([leaves[f"{key}_{side}"] for side in SIDES])
    elif case["method"] == "MaPO":
        features = vectors.tensor(extra["activations_hook_t_d"]).mean(-1)
        given |= {
            "activations": torch.cat([features] * 2, 1),
            "hook_type": torch.tensor(extra["hook_type"]),
        }
    elif case["method"] == "TGDPO":
        aux = torch.log_softmax(vectors.tensor(flat(case, "aux1_logits")), -1)
        given["aux_logp"] = aux.gather(1, torch.tensor(flat(case, "targets"))[:, None])[:, 0]
    return given, leaves


@pytest.mark.parametrize("name", CASES)
def test_vector(name, backend):
    case = CASES[name]
    out = case["outputs"]
    record = prefkern.losses.LOSSES[NAMES[case["method"]]]
    given, leaves = loss_arguments(case)
    if record.needs_reference:
        given["ref_hidden"] = vectors.tensor(flat(case, "ref_logits"))
    hidden = vectors.tensor(flat(case, "policy_logits")).requires_grad_()
    head = torch.eye(5, dtype=torch.float64)
    loss, metrics = preference_loss(
        hidden,
        head,
        torch.tensor(flat(case, "labels")),
        torch.tensor([0, 5, 10], dtype=torch.int32),
        loss=record.name,
        backend=backend,
        **given,
    )
    assert loss.item() == pytest.approx(out["loss"], rel=1e-10)
    loss.backward()
    want = [row for side in SIDES for row in out["grad_policy_logits"][side]]
    vectors.assert_close("logits", hidden.grad, want, relative=1e-9, scale=1.0)
    for key, right in out.get("grad_extra", {}).items():
        vectors.assert_close(key, leaves[key].grad, right, relative=1e-9, scale=1.0)
    if "seq_kl" in out:
        u = out["u"] + out["seq_kl"]["chosen"] - out["seq_kl"]["rejected"]
        assert metrics["rewards/margins"].item() == pytest.approx(given["beta"] * u, rel=1e-9)
