"""Liger's classes by their names: constructors and calls as Liger's, results equal to Liger's own
where it runs on a CPU, and to the written formula where it needs a GPU."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn import functional as F

from prefkern.integrations import liger as ours

B, T, D, V = 6, 9, 16, 50
NAMES = ["DPO", "CPO", "SimPO", "ORPO", "KTO"]
AUX = (
    "chosen_logps", "rejected_logps", "chosen_logits_mean", "rejected_logits_mean", "nll",
    "chosen_rewards", "rejected_rewards", "log_odds_ratio", "log_odds_chosen",
)  # fmt: skip


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=g)
    weight = torch.randn(V, D, generator=g) * 0.5
    made = {
        "hidden": hidden, "weight": weight, "bias": torch.randn(V, generator=g),
        "ref_hidden": hidden + 0.2 * torch.randn(B, T, D, generator=g),
        "ref_weight": weight + 0.1 * torch.randn(V, D, generator=g),
    }  # fmt: skip
    target = torch.randint(0, V, (B, T), generator=g)
    target[:, :2] = -100
    target[1, 5:], target[4, 6:] = -100, -100
    return made | {"target": target}


def theirs(name):
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    return getattr(liger, f"LigerFusedLinear{name}Loss")


def both(name, data, settings, call):
    """[(loss, gradients, aux)] of Liger and of ours."""
    results = []
    for cls in (theirs(name), getattr(ours, f"LigerFusedLinear{name}Loss")):
        leaves = [data[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")]
        loss, aux = call(cls(compiled=False, **settings), *leaves)
        (3 * loss).backward()
        results.append((loss.detach(), [x.grad for x in leaves], aux))
    return results


def near(a, b):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 1e-5 * b.abs().max() + 2e-6


PAIRS = {
    **{f"DPO {t}": ("DPO", {"loss_type": t}, True) for t in (
        "sigmoid", "hinge", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop"
    )},
    "DPO robust": ("DPO", {"loss_type": "robust", "label_smoothing": 0.1}, True),
    "DPO robust, 0": ("DPO", {"loss_type": "robust"}, True),
    "DPO exo_pair": ("DPO", {"loss_type": "exo_pair", "label_smoothing": 0.1}, True),
    "DPO averaged": (
        "DPO", {"average_log_prob": True, "compute_nll_loss": True, "alpha": 0.3}, True,
    ),
    "DPO alone": ("DPO", {"use_ref_model": False, "beta": 0.5}, False),
    "DPO discopop tau": ("DPO", {"loss_type": "discopop", "discopop_tau": 0.3}, True),
    "CPO": ("CPO", {}, False),
    "CPO averaged": (
        "CPO", {"label_smoothing": 0.1, "average_log_prob": True, "alpha": 0.5}, False,
    ),
    "SimPO": ("SimPO", {}, False),
    "SimPO own": ("SimPO", {"beta": 2.0, "gamma": 1.0, "compute_nll_loss": False}, False),
    "SimPO smoothed": ("SimPO", {"label_smoothing": 0.2}, False),
    "ORPO": ("ORPO", {}, False),
    "ORPO alone": ("ORPO", {"compute_nll_loss": False, "beta": 0.5}, False),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS)
def test_pairs_equal_liger(case, data):
    name, settings, reference = PAIRS[case]
    more = (data["ref_hidden"], data["ref_weight"], data["bias"]) if reference else ()
    want, got = both(name, data, settings, lambda m, h, w, b: m(w, h, data["target"], b, *more))
    near(got[0], want[0])
    for a, b in zip(got[1], want[1], strict=True):
        near(a, b)
    assert len(got[2]) == len(want[2])
    for a, b, what in zip(got[2], want[2], AUX, strict=False):
        if "logits_mean" not in what:
            near(a.detach(), b.detach())


def test_orpos_likelihood_target(data):
    wide = torch.where(data["target"] == -100, 3, data["target"])
    want, got = both(
        "ORPO", data, {}, lambda m, h, w, b: m(w, h, data["target"], b, nll_target=wide)
    )
    near(got[0], want[0])
    for a, b in zip(got[1], want[1], strict=True):
        near(a, b)


@pytest.mark.parametrize("kl", [None, torch.tensor(0.3), torch.linspace(0, 1, B)])
@pytest.mark.parametrize("settings", [
    {"use_ref_model": True}, {}, {"use_ref_model": True, "average_log_prob": True, "beta": 0.7},
])  # fmt: skip
def test_kto_equals_liger(settings, kl, data):
    labels = torch.tensor([True, False, True, True, False, False])
    reference = (data["ref_hidden"], data["ref_weight"], data["bias"])
    if kl is not None and kl.dim():
        # Liger broadcasts kl [B] against chunks of one row: right only for one chunk of all rows
        settings = {**settings, "chunk_size": B}
    want, got = both(
        "KTO", data, settings,
        lambda m, h, w, b: m(h, w, data["target"], b, labels, *reference, kl),
    )  # fmt: skip
    near(got[0], want[0])
    for a, b in zip(got[1], want[1], strict=True):
        near(a, b)
    assert len(got[2]) == len(want[2]) == 6
    for i in (0, 1, 4, 5):
        near(got[2][i].detach(), want[2][i].detach())


def test_mean_logits_are_over_labelled_positions(data):
    logits = data["hidden"] @ data["weight"].T + data["bias"]
    scored = data["target"] != -100
    _, aux = ours.LigerFusedLinearCPOLoss()(
        data["weight"], data["hidden"], data["target"], data["bias"]
    )
    near(aux[2], logits[:3][scored[:3]].mean())
    near(aux[3], logits[3:][scored[3:]].mean())


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_ligers(name):
    other, own = theirs(name), getattr(ours, f"LigerFusedLinear{name}Loss")
    for method in ("__init__", "forward"):
        a, b = (inspect.signature(getattr(cls, method)).parameters for cls in (own, other))
        assert list(a) == list(b)
        assert [p.default for p in a.values()] == [p.default for p in b.values()]


def test_gradients_of_auxiliary_outputs_arrive(data):
    """Liger's claim to need one and drop it."""
    hidden = data["hidden"].clone().requires_grad_()
    _, aux = ours.LigerFusedLinearCPOLoss()(data["weight"], hidden, data["target"])
    aux[0].sum().backward()
    logits = (hidden @ data["weight"].T).log_softmax(-1)
    want = hidden.detach().clone().requires_grad_()
    logits = (want @ data["weight"].T).log_softmax(-1)
    scored = data["target"] != -100
    picked = logits.gather(-1, data["target"].clamp(min=0)[..., None])[..., 0] * scored
    picked[:3].sum().backward()
    near(hidden.grad, want.grad)


def test_ipo_which_liger_has_not(data):
    import prefkern

    loss, _ = ours.LigerFusedLinearDPOLoss(loss_type="ipo", beta=0.2)(
        data["weight"], data["hidden"], data["target"], None, data["ref_hidden"],
        data["ref_weight"],
    )  # fmt: skip
    want, _ = prefkern.preference_loss(
        data["hidden"], data["weight"], data["target"], loss="ipo", beta=0.2, layout="halves",
        ref_hidden=data["ref_hidden"], ref_head=data["ref_weight"],
    )  # fmt: skip
    near(loss, want)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"loss_type": "sigmoidal"}, "nearest"), ({"loss_type": "exo_pair"}, "label_smoothing"),
     ({"loss_type": "hinge", "label_smoothing": 0.1}, "Liger drops it"),
     ({"loss_type": "kto"}, "more than the log-probabilities"),
     ({"loss_type": "tdpo2"}, "call prefkern.preference_loss"),
     ({"loss_type": "soft_label"}, "more than the log-probabilities")],
)  # fmt: skip
def test_refused_settings(settings, reason, data):
    with pytest.raises(ValueError, match=reason):
        ours.LigerFusedLinearDPOLoss(**settings)(
            data["weight"], data["hidden"], data["target"], None, data["ref_hidden"],
            data["ref_weight"],
        )  # fmt: skip


def test_refused_calls(data):
    made = ours.LigerFusedLinearDPOLoss()
    with pytest.raises(ValueError, match="needs ref_input"):
        made(data["weight"], data["hidden"], data["target"])
    moving = data["ref_weight"].clone().requires_grad_()
    with pytest.raises(ValueError, match="must not require grad"):
        made(data["weight"], data["hidden"], data["target"], None, data["ref_hidden"], moving)
    with pytest.raises(ValueError, match="as many rejected"):
        ours.LigerFusedLinearCPOLoss()(data["weight"], data["hidden"][:5], data["target"][:5])


# ---- cross-entropy -------------------------------------------------------------------------------

CE = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.2},
    "weighted": {"ce_weight": True},
    "weighted, smoothed": {"ce_weight": True, "label_smoothing": 0.2},
    "soft cap": {"softcap": 3.0},
    "smoothed, sum": {"label_smoothing": 0.2, "reduction": "sum"},
    "z-loss": {"lse_square_scale": 1e-2, "return_z_loss": True},
    "z-loss, weighted": {"lse_square_scale": 1e-2, "ce_weight": True, "return_z_loss": True},
    "z-loss, sum": {"lse_square_scale": 1e-2, "reduction": "sum", "return_z_loss": True},
    "scaled": {"use_token_scaling": True},
    "all returns": {
        "return_z_loss": True, "return_token_accuracy": True, "return_predicted_tokens": True,
    },
    "all returns, none": {
        "return_token_accuracy": True, "return_predicted_tokens": True, "reduction": "none",
    },
}  # fmt: skip


def written(weight, hidden, target, bias, s):
    """Cross-entropy from full logits as PyTorch defines it, and the z-loss."""
    logits = hidden @ weight.T + bias
    if s.get("softcap"):
        logits = s["softcap"] * torch.tanh(logits / s["softcap"])
    kept = target != -100
    reduction = s.get("reduction", "mean")
    tokens = F.cross_entropy(
        logits, target, weight=s.get("ce_weight"), label_smoothing=s.get("label_smoothing", 0.0),
        reduction="none",
    )  # fmt: skip
    z = s.get("lse_square_scale", 0.0) * logits.logsumexp(-1).square() * kept
    total, count = kept.sum(), kept.sum()
    if s.get("ce_weight") is not None:
        total = s["ce_weight"][target[kept]].sum()
    if reduction == "mean":
        tokens, z = tokens / total, z / count
    tokens = tokens + z
    if s.get("use_token_scaling"):
        p = logits.softmax(-1).gather(-1, target.clamp(min=0)[:, None])[:, 0].detach()
        tokens, z = tokens * p, z * p
    top = logits.argmax(-1)
    right = ((top == target) & kept).float()
    if reduction != "none":
        tokens, z, right = tokens.sum(), z.sum(), right.sum() / count
    return tokens, z, right, torch.where(kept, top, -1)


@pytest.mark.parametrize("case", CE)
def test_cross_entropy(case, data):
    settings = dict(CE[case])
    if settings.get("ce_weight"):
        settings["ce_weight"] = torch.linspace(0.2, 2.0, V)
    target = data["target"].flatten()
    results = []
    for kind in ("ours", "written"):
        leaves = [data[k].clone() for k in ("hidden", "weight", "bias")]
        leaves[0] = leaves[0].flatten(0, 1)
        leaves = [x.requires_grad_() for x in leaves]
        h, w, b = leaves
        if kind == "ours":
            out = ours.LigerFusedLinearCrossEntropyLoss(**settings)(w, h, target, b)
            out = out if isinstance(out, tuple) else (out, None, None, None)
        else:
            out = written(w, h, target, b, settings)
        upstream = torch.linspace(1, 2, len(target)) if out[0].dim() else torch.tensor(2.0)
        (out[0] * upstream).sum().backward()
        results.append((out, [x.grad for x in leaves]))
    (got, mine), (want, full) = results
    near(got[0], want[0])
    for a, b in zip(mine, full, strict=True):
        near(a, b)
    for a, b, flag in zip(
        got[1:], want[1:], ("return_z_loss", "return_token_accuracy", "return_predicted_tokens"),
        strict=True,
    ):  # fmt: skip
        assert (a is None) == (flag not in settings)
        if a is not None:
            near(a.detach().to(b.dtype), b.detach())


def test_the_gradient_of_the_z_loss_arrives(data):
    hidden = data["hidden"].flatten(0, 1).clone().requires_grad_()
    out = ours.LigerFusedLinearCrossEntropyLoss(lse_square_scale=1e-2, return_z_loss=True)(
        data["weight"], hidden, data["target"].flatten()
    )
    out.z_loss.backward()
    assert hidden.grad.abs().sum() > 0


def test_cross_entropys_signature_is_ligers():
    kernels = pytest.importorskip("liger_kernel.transformers.fused_linear_cross_entropy")
    other, own = kernels.LigerFusedLinearCrossEntropyLoss, ours.LigerFusedLinearCrossEntropyLoss
    for method in ("__init__", "forward"):
        a, b = (inspect.signature(getattr(cls, method)).parameters for cls in (own, other))
        assert list(a) == list(b)
        assert [p.default for p in a.values()] == [p.default for p in b.values()]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"label_smoothing": 2.0}, r"\[0, 1\]"), ({"reduction": "max"}, "reduction"),
     ({"softcap": -1.0}, "softcap"),
     ({"softcap": 1.0, "label_smoothing": 0.1}, "leave one")],
)  # fmt: skip
def test_refused_cross_entropy(settings, reason):
    with pytest.raises(ValueError, match=reason):
        ours.LigerFusedLinearCrossEntropyLoss(**settings)
