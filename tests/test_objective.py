"""preference_loss against full logits in fp64, its input forms against each other, its refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import prefkern
from prefkern import Head, PreferenceLoss, preference_loss

B, T, D, V = 6, 7, 5, 13


class Inputs:
    """Padded batch of three pairs: prompts of two tokens, one shorter answer, one empty answer."""

    def __init__(self, dtype=torch.float64, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.hidden = (
            torch.randn(B, T, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        )
        self.weight = torch.randn(V, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        self.targets = torch.randint(0, V, (B, T), generator=g)
        self.targets[:, :2] = -100
        self.targets[1, 4:] = -100
        self.targets[5, :] = -100
        self.ref_hidden = torch.randn(B, T, D, generator=g, dtype=torch.float64).to(dtype)
        self.ref_weight = torch.randn(V, D, generator=g, dtype=torch.float64).to(dtype)

    @property
    def ref(self):
        return {"ref_hidden": self.ref_hidden, "ref_head": self.ref_weight}

    def call(self, **args):
        return preference_loss(self.hidden, self.weight, self.targets, **args)

    def full(self):
        """(logp, ref_logp, fkl) [B, T] from full logits, 0 where ignored."""
        lp = F.log_softmax(self.hidden @ self.weight.T, -1)
        lr = F.log_softmax(self.ref_hidden @ self.ref_weight.T, -1)
        mask = self.targets != -100
        at = self.targets.clamp(min=0)[..., None]
        fkl = (lr.exp() * (lr - lp)).sum(-1)
        return [x * mask for x in (lp.gather(-1, at)[..., 0], lr.gather(-1, at)[..., 0], fkl)]


def expected(name, x: Inputs):
    logp, ref, fkl = (t.sum(1) for t in x.full())
    n = (x.targets != -100).sum(1).clamp(min=1)
    rho = logp - ref
    w, r = slice(0, None, 2), slice(1, None, 2)
    if name == "dpo":
        return -F.logsigmoid(0.1 * (rho[w] - rho[r])).mean()
    if name == "simpo":
        return -F.logsigmoid(2.0 * (logp[w] / n[w] - logp[r] / n[r] - 0.25)).mean()
    if name == "ipo":
        return ((rho[w] / n[w] - rho[r] / n[r] - 5.0) ** 2).mean()
    if name == "tdpo1":
        return -F.logsigmoid(0.1 * (rho[w] - rho[r] - (fkl[r] - fkl[w]))).mean()
    if name == "tdpo2":
        return -F.logsigmoid(0.1 * (rho[w] - rho[r] - 0.5 * (fkl[r] - fkl[w].detach()))).mean()
    raise AssertionError(name)


@pytest.mark.parametrize("name", ["dpo", "simpo", "ipo", "tdpo1", "tdpo2"])
def test_against_full_logits(name):
    x, y = Inputs(), Inputs()
    loss, _ = x.call(loss=name, **x.ref)
    want = expected(name, y)
    torch.testing.assert_close(loss, want)
    loss.backward()
    want.backward()
    torch.testing.assert_close(x.hidden.grad, y.hidden.grad)
    torch.testing.assert_close(x.weight.grad, y.weight.grad)


def test_reference_forms_agree():
    x = Inputs()
    _, ref, _ = x.full()
    base, m0 = x.call(loss="dpo", **x.ref)
    for args in ({"ref_logp": ref}, {"ref_seq_logp": ref.sum(1)}):
        got, m = x.call(loss="dpo", **args)
        torch.testing.assert_close(got, base)
        torch.testing.assert_close(m["rewards/margins"], m0["rewards/margins"])


def test_packed_and_halves_equal_padded_pairs():
    x = Inputs()
    base, m0 = x.call(loss="tdpo2", **x.ref)
    flat = {k: v.reshape(-1, D) for k, v in (("hidden", x.hidden), ("ref_hidden", x.ref_hidden))}
    cu = torch.arange(0, B + 1, dtype=torch.int32) * T
    packed, m1 = preference_loss(
        flat["hidden"], x.weight, x.targets.reshape(-1), cu, loss="tdpo2",
        ref_hidden=flat["ref_hidden"], ref_head=x.ref_weight,
    )  # fmt: skip
    assert torch.equal(base, packed)
    order = torch.tensor([0, 2, 4, 1, 3, 5])
    halves, m2 = preference_loss(
        x.hidden[order], x.weight, x.targets[order], loss="tdpo2", layout="halves",
        ref_hidden=x.ref_hidden[order], ref_head=x.ref_weight,
    )  # fmt: skip
    torch.testing.assert_close(base, halves)
    for k in m0:
        torch.testing.assert_close(m0[k], m1[k])
        torch.testing.assert_close(m0[k], m2[k])


def test_ragged_pack_drops_padding():
    x = Inputs()
    keep = [7, 4, 7, 7, 7, 0]  # the last sequence has no token at all
    rows = [x.hidden[i, :n] for i, n in enumerate(keep)]
    cu = torch.tensor([0, *torch.tensor(keep).cumsum(0).tolist()], dtype=torch.int32)
    packed, _ = preference_loss(
        torch.cat(rows), x.weight, torch.cat([x.targets[i, :n] for i, n in enumerate(keep)]), cu,
        loss="dpo", ref_hidden=torch.cat([x.ref_hidden[i, :n] for i, n in enumerate(keep)]),
        ref_head=x.ref_weight,
    )  # fmt: skip
    torch.testing.assert_close(packed, x.call(loss="dpo", **x.ref)[0])


@pytest.mark.parametrize("name", ["dpo", "ipo", "tdpo1", "tdpo2", "ld_dpo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_zero_is_exact(name, dtype):
    x = Inputs(dtype)
    same = {"ref_hidden": x.hidden.detach(), "ref_head": x.weight.detach()}
    _, m = x.call(loss=name, **same)
    assert m["rewards/margins"] == 0 and m["rewards/chosen"] == 0 and m["rewards/accuracies"] == 0
    _, shared = x.call(loss=name, ref_hidden=x.hidden.detach())  # the same head by default
    assert shared["rewards/margins"] == 0


def test_masked_rows_cannot_leak():
    clean, dirty = Inputs(), Inputs()
    bad = dirty.hidden.detach().clone()
    bad[dirty.targets == -100] = math.nan
    dirty.hidden = bad.requires_grad_()
    dirty.ref_hidden[dirty.targets == -100] = math.inf
    for x in (clean, dirty):
        x.loss = x.call(loss="tdpo1", **x.ref)[0]
        x.loss.backward()
    assert torch.equal(clean.loss, dirty.loss)
    assert torch.equal(clean.weight.grad, dirty.weight.grad)
    assert (dirty.hidden.grad[dirty.targets == -100] == 0).all()


def test_token_weights_learned_gradient_is_the_statistic():
    x = Inputs()
    w = torch.ones(B, T, dtype=torch.float64, requires_grad=True)
    loss, _ = x.call(loss="dpo", token_weights=w, **x.ref)
    torch.testing.assert_close(loss, x.call(loss="dpo", **x.ref)[0])
    loss.backward()
    logp, ref, _ = (t.detach() for t in x.full())
    rho = (logp - ref).sum(1)
    c = -torch.sigmoid(-0.1 * (rho[0::2] - rho[1::2])) * 0.1 / 3
    sign = torch.stack([c, -c], 1).reshape(-1, 1)
    torch.testing.assert_close(w.grad, sign * (logp - ref))


def test_logged_only_statistics_are_not_weighted():
    x = Inputs()
    _, plain = x.call(loss="dpo", **x.ref)
    _, weighted = x.call(
        loss="dpo", token_weights=torch.full((B, T), 0.5, dtype=torch.float64), **x.ref
    )
    assert weighted["mean_token_accuracy"] == plain["mean_token_accuracy"]
    torch.testing.assert_close(weighted["logits/chosen"], plain["logits/chosen"])
    torch.testing.assert_close(weighted["rewards/chosen"], plain["rewards/chosen"] / 2)


def test_accumulation_with_global_denominators():
    x, y = Inputs(), Inputs()
    x.call(loss="tdpo2", **x.ref)[0].backward()
    for rows in (slice(0, 2), slice(2, 6)):
        loss, _ = preference_loss(
            y.hidden[rows], y.weight, y.targets[rows], loss="tdpo2", num_items={"pairs": 3},
            ref_hidden=y.ref_hidden[rows], ref_head=y.ref_weight,
        )  # fmt: skip
        loss.backward()
    torch.testing.assert_close(x.hidden.grad, y.hidden.grad)
    torch.testing.assert_close(x.weight.grad, y.weight.grad)


def test_several_losses_add_up():
    x = Inputs()
    both, m = x.call(loss=["dpo", "simpo"], loss_weights=[1.0, 0.5], gamma_beta_ratio=0.3, **x.ref)
    dpo, simpo = x.call(loss="dpo", **x.ref)[0], x.call(loss="simpo", gamma_beta_ratio=0.3)[0]
    torch.testing.assert_close(both, dpo + 0.5 * simpo)
    torch.testing.assert_close(m["loss/simpo"], simpo.detach())


def test_listwise_and_unpaired():
    x = Inputs()
    labels = torch.tensor([2.0, 1.0, 0.0, 3.0, math.nan, 1.0], dtype=torch.float64)
    cu = torch.tensor([0, 3, 4, 6], dtype=torch.int32)  # one group has a single member
    loss, m = x.call(loss="plackett_luce", relevance=labels, cu_groups=cu, **x.ref)
    assert loss.isfinite() and {"rank/ndcg", "rank/pair_accuracy", "rewards/margins"} <= m.keys()
    logp, ref, _ = (t.sum(1) for t in x.full())
    s = 0.1 * (logp - ref)[:3]
    want = -(F.log_softmax(s, 0)[0] + F.log_softmax(s[1:], 0)[0]) / 3
    beta = torch.tensor(0.1)
    got = x.call(loss="plackett_luce", relevance=labels, cu_groups=cu, beta=beta.item(), **x.ref)[0]
    torch.testing.assert_close(got, want)
    loss, m = x.call(
        loss="kto",
        desirable=torch.tensor([True, False] * 3),
        kl_baseline=torch.tensor(0.0),
        **x.ref,
    )
    assert loss.isfinite() and "rewards/margins" in m


def test_frozen_head_and_metrics_off():
    x, y = Inputs(torch.float32), Inputs(torch.float32)
    x.weight.requires_grad_(False)
    loss, m = x.call(loss="tdpo1", metrics=False, **x.ref)
    assert m == {}
    loss.backward()
    y.call(loss="tdpo1", **y.ref)[0].backward()
    torch.testing.assert_close(x.hidden.grad, y.hidden.grad, rtol=1e-4, atol=1e-6)


def test_compile_fullgraph():
    x, y = Inputs(torch.float32), Inputs(torch.float32)

    def step(hidden, weight, ref_hidden, ref_weight):
        return preference_loss(
            hidden, weight, x.targets, loss="tdpo2", ref_hidden=ref_hidden, ref_head=ref_weight
        )[0]

    got = torch.compile(step, fullgraph=True, backend="aot_eager")(
        x.hidden, x.weight, x.ref_hidden, x.ref_weight
    )
    want = step(y.hidden, y.weight, y.ref_hidden, y.ref_weight)
    got.backward()
    want.backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(x.hidden.grad, y.hidden.grad)


def test_module():
    x = Inputs()
    module = PreferenceLoss("tdpo2", alpha=0.3)
    got = module(x.hidden, x.weight, x.targets, **x.ref)[0]
    assert torch.equal(got, x.call(loss="tdpo2", alpha=0.3, **x.ref)[0])
    assert "tdpo2" in repr(module) and not list(module.parameters())
    with pytest.raises(ValueError, match="tdpo2"):
        PreferenceLoss("tdpo3")


def test_loss_dtype():
    assert Inputs(torch.bfloat16).call(loss="simpo")[0].dtype == torch.float32
    assert Inputs().call(loss="simpo")[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"loss": "dpoo"}, "dpo"),
        ({"loss": "simpo", "betta": 1.0}, "beta"),
        ({"loss": ["simpo", "dpo"], "betta": 1.0}, "betta"),
        ({"loss": "dpo"}, "needs a reference"),
        ({"loss": "tdpo2", "ref_logp": torch.zeros(B, T)}, "whole distribution"),
        (
            {"loss": "dpo", "ref_logp": torch.zeros(B, T), "ref_seq_logp": torch.zeros(B)},
            "one form",
        ),
        ({"loss": "dpo", "ref_logp": torch.full((B, T), math.nan)}, "finite"),
        ({"loss": "dpo", "ref_seq_logp": torch.zeros(B - 1)}, r"\[S\]"),
        ({"loss": "ld_dpo", "ref_seq_logp": torch.zeros(B)}, "per token"),
        (
            {"loss": "dpo", "ref_seq_logp": torch.zeros(B), "token_weights": torch.ones(B, T)},
            "per token",
        ),
        (
            {"loss": "dpo", "ref_logp": torch.zeros(B, T, requires_grad=True)},
            "must not require grad",
        ),
        ({"loss": "dpo", "ref_hidden": torch.zeros(B, T, D + 1)}, "ref_hidden must be .* width of"),
        ({"loss": "dpo", "ref_hidden": torch.zeros(B, T, D).int()}, "ref_hidden must be float32"),
        ({"loss": "simpo", "layout": "columns"}, "layout"),
        ({"loss": "simpo", "loss_weights": [1.0, 2.0]}, "one number per loss"),
        ({"loss": []}, "loss must be a name"),
        (
            {"loss": "kto", "ref_logp": torch.zeros(B, T), "kl_baseline": torch.tensor(0.0)},
            "desirable",
        ),
        ({"loss": "plackett_luce", "ref_logp": torch.zeros(B, T)}, "relevance"),
        (
            {"loss": "plackett_luce", "ref_logp": torch.zeros(B, T), "relevance": torch.zeros(B)},
            "cu_groups",
        ),
        ({"loss": "simpo", "backend": "fast"}, "backend must be one of"),
        ({"loss": "simpo", "values": torch.zeros(V)}, "'ev'"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_refusals(args, text):
    with pytest.raises(ValueError, match=text):
        Inputs().call(**args)


def test_odd_number_of_sequences_and_empty_batch():
    x = Inputs()
    with pytest.raises(ValueError, match="multiple of 2"):
        preference_loss(x.hidden[:3], x.weight, x.targets[:3], loss="simpo")
    with pytest.raises(ValueError, match="at least one sequence"):
        preference_loss(x.hidden[:0], x.weight, x.targets[:0], loss="simpo")


def test_all_rows_ignored_is_a_differentiable_constant():
    x = Inputs()
    x.targets[:] = -100
    loss, _ = x.call(loss="dpo", **x.ref)
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert (x.hidden.grad == 0).all() and (x.weight.grad == 0).all()


def test_public_names():
    for name in prefkern.__all__:
        assert hasattr(prefkern, name)


def test_item_weights():
    x = Inputs()
    plain = x.call(loss="dpo", **x.ref)[0]
    same = x.call(loss="dpo", item_weights=torch.ones(3), **x.ref)[0]
    assert torch.equal(plain, same)
    per_pair = [
        preference_loss(
            x.hidden[i : i + 2], x.weight, x.targets[i : i + 2], loss="dpo",
            ref_hidden=x.ref_hidden[i : i + 2], ref_head=x.ref_weight,
        )[0]
        for i in (0, 2, 4)
    ]  # fmt: skip
    weighted = x.call(loss="dpo", item_weights=torch.tensor([2.0, 0.0, 0.5]), **x.ref)[0]
    torch.testing.assert_close(weighted, (2 * per_pair[0] + 0.5 * per_pair[2]) / 3)
    with pytest.raises(ValueError, match="item_weights"):
        x.call(loss="dpo", item_weights=torch.ones(6), **x.ref)


@pytest.mark.parametrize("loss", ["entropy_bonus", "kl_penalty"])
def test_weights_of_groups_reach_sequences_and_tokens(loss):
    x = Inputs()
    cu_groups = torch.tensor([0, 2, 4, 6], dtype=torch.int32)
    ref = x.ref if loss == "kl_penalty" else {}
    each = []
    for i in range(3):
        alone = torch.zeros(3)
        alone[i] = 1.0
        each.append(x.call(loss=loss, item_weights=alone, cu_groups=cu_groups, **ref)[0])
    whole = x.call(loss=loss, **ref)[0]
    assert sum(each).item() == pytest.approx(whole.item(), rel=1e-6)
    weights = torch.tensor([2.0, 0.0, 0.5])
    mixed = x.call(loss=loss, item_weights=weights, cu_groups=cu_groups, **ref)[0]
    assert mixed.item() == pytest.approx((2 * each[0] + 0.5 * each[2]).item(), rel=1e-6)


class FloatOps(TorchDispatchMode):
    """Notes every operator that reads floating-point numbers: boundaries of sequences and labels,
    which are checked first, are integers."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in leaves):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_diffusion_loss_is_refused_before_any_work():
    x = Inputs()
    with FloatOps() as ran, pytest.raises(ValueError, match="prediction errors"):
        x.call(loss="diff_dpo")
    assert ran.names == []
    with FloatOps() as ran:
        x.call(loss="dpo", **x.ref)
    assert any(name.startswith("prefkern.head_fwd") for name in ran.names), ran.names


@pytest.mark.parametrize("shared", [True, False])
def test_each_head_brings_its_own_numbers_on_both_roads(shared):
    """dpo reads the reference by linear_logps, tdpo2 (alpha = 0 is dpo) by linear_divergence."""
    x = Inputs()
    bias = torch.linspace(-1, 1, V, dtype=torch.float64)
    for numbers in ({}, {"softcap": 3.0, "scale": 0.7, "temperature": 1.2}):
        head = Head(x.weight, bias, softcap=2.0, scale=1.3)
        ref = {"ref_hidden": x.ref_hidden}
        if not shared:
            ref["ref_head"] = Head(x.ref_weight, 2 * bias, **numbers)
        dpo, tdpo = (
            preference_loss(x.hidden, head, x.targets, loss=loss, **ref, **args)[0]
            for loss, args in (("dpo", {}), ("tdpo2", {"alpha": 0.0}))
        )
        torch.testing.assert_close(dpo, tdpo)
        y = Inputs()
        y.weight = y.weight.detach()
        z = 2.0 * torch.tanh(1.3 * (y.hidden @ y.weight.T + bias) / 2.0)
        own = ref.get("ref_head", Head(y.weight, bias, softcap=2.0, scale=1.3))
        zr = own.scale * (y.ref_hidden @ own.weight.detach().T + own.bias)
        if own.softcap is not None:
            zr = own.softcap * torch.tanh(zr / own.softcap)
        zr = zr / own.temperature
        mask, at = y.targets != -100, y.targets.clamp(min=0)[..., None]
        logp, ref_logp = (
            (F.log_softmax(t, -1).gather(-1, at)[..., 0] * mask).sum(1) for t in (z, zr)
        )
        rho = logp - ref_logp
        torch.testing.assert_close(dpo, -F.logsigmoid(0.1 * (rho[0::2] - rho[1::2])).mean())
