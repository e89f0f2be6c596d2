"""DiffusionPreference: what reaches the denoiser, the loss and the gradient; refusals."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from prefkern import diffusion as d
from prefkern import losses

pytestmark = pytest.mark.filterwarnings("ignore:loss .* is provisional:UserWarning")
SCHEDULE = d.Schedule.linear(40, 1e-3, 0.2)
P = 4


class Denoiser(nn.Module):
    """A linear map of samples and conditions that keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.drop = nn.Dropout(0.5)
        self.calls: list[tuple] = []

    def forward(self, x, time, cond):
        self.calls.append((x.detach(), time, cond, torch.is_grad_enabled(), self.training))
        vector = cond["caption"] if isinstance(cond, dict) else 0.0
        return self.linear(x) * 0.3 + vector + 0.01 * time[:, None]


def model(loss="diff_dpo", ref="frozen", **more):
    torch.manual_seed(0)
    policy = Denoiser()
    frozen = Denoiser()
    return d.DiffusionPreference(
        policy, SCHEDULE, loss, ref=frozen if ref == "frozen" else ref, **more
    )


def samples(seed=1, count=P):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


def captions(value=0.0, count=P):
    return {"caption": torch.full((count, 3), value)}


def test_the_loss_by_hand():
    module = model(kappa=3.0)
    batch = d.Pairs(samples(1), samples(2), captions())
    loss, metrics = module(batch, generator=torch.Generator().manual_seed(5))
    (x, level, _, grad, _), frozen = module.denoiser.calls[-1], module._ref[0].calls[-1]
    assert grad and not frozen[3] and torch.equal(frozen[0], x)
    assert torch.equal(level[:P], level[P:])  # one level and one noise for both sides of a pair
    signal, amount = (c[:, None].float() for c in SCHEDULE.coefficients(level))
    noise = (x - signal * torch.cat([batch.chosen, batch.rejected])) / amount
    torch.testing.assert_close(noise[:P], noise[P:], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(noise[0], noise[1], atol=0.1)
    noise = noise[:P].repeat(2, 1)
    error = {}
    for name, net in (("p", module.denoiser), ("q", module._ref[0])):
        error[name] = (net(x, level, captions(count=2 * P)) - noise).square().mean(1)
    delta = error["p"] - error["q"]
    want = torch.nn.functional.softplus(3.0 * (delta[:P] - delta[P:])).mean()
    torch.testing.assert_close(loss, want.double(), rtol=1e-4, atol=1e-5)
    (got,) = torch.autograd.grad(loss, module.denoiser.linear.weight)
    (right,) = torch.autograd.grad(want, module.denoiser.linear.weight)
    torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-4)
    assert metrics["rewards/accuracies"] == (delta[:P] < delta[P:]).double().mean()
    assert not any(value.requires_grad or value.dim() for value in metrics.values())


def test_what_belongs_to_the_module():
    module = model()
    assert {name.split(".")[0] for name in module.state_dict()} == {"denoiser"}
    assert len(list(module.parameters())) == 2
    module.double()
    assert module._ref[0].linear.weight.dtype == torch.float64
    batch = d.Pairs(samples().double(), samples(2).double(), captions(0.0)["caption"])
    module.train()
    module(batch).loss.backward()
    assert all(p.grad is None for p in module._ref[0].parameters())
    assert module.denoiser.training and module.denoiser.drop.training
    assert [call[4] for call in module._ref[0].calls] == [False]  # the reference without dropout
    assert [call[4] for call in module.denoiser.calls] == [True]


def test_each_side_has_its_own_caption():
    module = model("dcpo")
    module(d.Pairs(samples(), samples(2), captions(1.0), captions(2.0)))
    for net in (module.denoiser, module._ref[0]):
        assert net.calls[-1][2]["caption"][:, 0].tolist() == [1.0] * P + [2.0] * P
    named = model("diff_dpo")
    texts = list("abcd")
    named(d.Pairs(samples(), samples(2), (texts, samples()), (list("efgh"), samples())))
    assert named.denoiser.calls[-1][2][0] == list("abcdefgh")
    named(d.Pairs(samples(), samples(2), texts))
    assert named.denoiser.calls[-1][2] == texts * 2


def test_a_group_shares_level_and_noise():
    module, cu = model("lpo"), torch.tensor([0, 3, 4])
    batch = d.Ranked(torch.zeros(P, 3), cu, inputs={"relevance": torch.arange(4.0)})
    loss, metrics = module(batch, generator=torch.Generator().manual_seed(3))
    x, level = module.denoiser.calls[-1][:2]
    assert (x[0] == x[1]).all() and (x[1] == x[2]).all() and not torch.equal(x[2], x[3])
    assert len(set(level[:3].tolist())) == 1
    assert loss.isfinite() and set(metrics) == {"err", "ref_err"}


def test_levels_are_drawn_from_the_range():
    module = model(levels=(10, 12))
    module(d.Pairs(samples(1, 200), samples(2, 200)))
    assert set(module.denoiser.calls[-1][1].tolist()) == {10, 11}


def test_errors_per_segment():
    labels = torch.tensor([[1.0, 0.0, -1.0]]).expand(P, 3)
    module = model("dense_dpo", segments=torch.arange(3), num_segments=3, beta=2.0)
    batch = d.Pairs(samples(1), samples(2), inputs={"labels": labels})
    got = module(batch, generator=torch.Generator().manual_seed(5)).loss
    noised, cond = module.inputs(batch, torch.Generator().manual_seed(5))
    sums = module.errors(noised, cond)
    assert sums.err.shape == (2 * P, 3)
    delta = sums.err - sums.ref_err
    gap = (labels * (delta[:P] - delta[P:])).sum(1)
    torch.testing.assert_close(got, torch.nn.functional.softplus(2.0 * gap).mean())


def test_inverted_inputs_say_the_noise_that_leads_back():
    for by in ("reference", "policy"):
        module = model("inpo", source=d.Inverted(steps=4, by=by))
        batch = d.Pairs(samples(1), samples(2), captions())
        noised, _ = module.inputs(batch, torch.Generator().manual_seed(1))
        net = module._ref[0] if by == "reference" else module.denoiser
        clean = torch.cat([batch.chosen, batch.rejected])
        want = d.invert(net, clean, captions(count=2 * P), SCHEDULE, noised.level, steps=4)
        torch.testing.assert_close(noised.x, want)
        back = SCHEDULE.add_noise(clean, noised.target, noised.level)
        torch.testing.assert_close(back, noised.x)
    assert model("inpo").source == d.Inverted()
    assert model("smpo").source == d.Inverted(corrections=1)
    with pytest.raises(ValueError, match="no reference to invert with"):
        model("diffusion_mapo", ref=None, source="inverted")(d.Pairs(samples(1), samples(2)))


def test_a_peft_adapter_switched_off_is_the_reference():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    frozen = Denoiser()
    tuned = peft.get_peft_model(
        copy.deepcopy(frozen), peft.LoraConfig(r=2, target_modules=["linear"])
    )
    wrapped = nn.ModuleDict({"net": tuned})
    wrapped.forward = lambda x, time, cond: wrapped["net"](x, time, cond)
    module = d.DiffusionPreference(wrapped, SCHEDULE, kappa=1.0)
    batch = d.Pairs(samples(1), samples(2), captions())
    assert module(batch).loss.item() == pytest.approx(0.693147, abs=1e-6)  # B of LoRA is 0
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    draw = [torch.Generator().manual_seed(2) for _ in range(2)]
    got = module(batch, generator=draw[0]).loss
    other = d.DiffusionPreference(wrapped, SCHEDULE, ref=frozen, kappa=1.0)
    torch.testing.assert_close(got, other(batch, generator=draw[1]).loss)
    assert abs(got.item() - 0.693147) > 1e-3
    got.backward()
    assert all(("lora" in n) == (p.grad is not None) for n, p in tuned.named_parameters())


# ---- the policy's own samples --------------------------------------------------------------------


def test_own_negatives_are_points_of_the_policys_walk():
    net, noise = Denoiser(), samples(3, 50)
    g = torch.Generator().manual_seed(0)
    own = d.own_noised(net, noise, None, SCHEDULE, steps=5, generator=g)
    assert set(own.level.tolist()) == set(d.ladder(SCHEDULE, 5)[:-1].tolist())
    with torch.no_grad():
        torch.testing.assert_close(own.target, net(own.x, own.level, None))
    first = own.level == len(SCHEDULE) - 1
    assert torch.equal(own.x[first], noise[first])
    module = model("dro")
    module(d.Pairs(samples(1, 50), own))
    x, level = module.denoiser.calls[-1][:2]
    assert torch.equal(level[:50], own.level) and torch.equal(x[50:], own.x)


def test_walks_cut_short_go_on_noisier():
    net = Denoiser()
    cut = d.truncated(net, samples(3, 200), None, SCHEDULE, steps=4)
    assert cut.reading == "clean" and int(cut.level.min()) >= 9 and int(cut.level.max()) < 40
    module = model("self_npo", ref=None, error="huber:0.1")
    out = module(d.Single(cut))
    noised, _ = module.inputs(d.Single(cut))
    pred = module.denoiser(cut.x, cut.level, None)
    off = SCHEDULE.clean(pred, noised.x, noised.level) - cut.target
    want = ((off**2 + 0.01).sqrt() - 0.1).mean(1).mean()
    torch.testing.assert_close(out.loss, want.double(), rtol=1e-4, atol=1e-6)


def test_pairs_of_steps_follow_the_verdict():
    net, ladder = Denoiser(), d.ladder(SCHEDULE, 3)
    walks = [list(d.walk(net, samples(s), None, SCHEDULE, ladder, eta=1.0)) for s in (1, 2)]
    verdict = torch.tensor([1.0, -1.0, 0.0, 1.0])
    pairs = d.step_pairs(*walks, None, verdict)
    assert len(pairs) == 2  # the last step is deterministic
    for k, pair in enumerate(pairs):
        assert torch.equal(pair.chosen.target[0], walks[0][k].next[0])
        assert torch.equal(pair.chosen.target[1], walks[1][k].next[1])
        assert torch.equal(pair.rejected.x[1], walks[0][k].x[1])
        assert pair.inputs["h"].tolist() == [1.0, 1.0, 0.0, 1.0]
    module = model("d3po", beta=2.0)
    out = module(pairs[0])
    step, both = walks[0][0], d.noised.cat(pairs[0].chosen, pairs[0].rejected)
    u = [
        -(SCHEDULE.step(n(both.x, both.level, None), both.x, both.level, both.to, eta=1.0).mean
          - both.target).square().mean(1) / (2 * step.sigma[0] ** 2)
        for n in (module.denoiser, module._ref[0])
    ]  # fmt: skip
    ratio = (u[0] - u[1]).clamp(*torch.tensor([0.9, 1.1]).log().tolist())
    margin = 2.0 * pairs[0].inputs["h"] * (ratio[:P] - ratio[P:])
    want = torch.nn.functional.softplus(-margin).mean()
    torch.testing.assert_close(out.loss, want.double(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="no step of the walks is random"):
        d.step_pairs(*[list(d.walk(net, samples(), None, SCHEDULE, ladder))] * 2, None, verdict)
    for other in (walks[1][:1], walks[1][::-1]):
        with pytest.raises(ValueError, match="both walks must have the same levels"):
            d.step_pairs(walks[0], other, None, verdict)


def test_branches_pair_the_best_with_the_worst():
    net, levels = Denoiser(), []

    def scorer(x, level, cond):
        assert len(cond) == len(x) == 4 * P
        levels.append(set(level.tolist()))
        return 5.0 * x[:, 0]

    pairs = list(
        d.branches(
            net, samples(), list("abcd"), SCHEDULE, scorer, steps=8, first_step=3, threshold=0.5
        )
    )
    ladder = d.ladder(SCHEDULE, 8).tolist()
    assert levels == [{at} for at in ladder[4:-1]]
    for pair in pairs:
        gap = 5.0 * (pair.chosen.target - pair.rejected.target)[:, 0]
        assert (torch.tanh(gap / 2) > 0.5).all()
        assert torch.equal(pair.chosen.x, pair.rejected.x) and len(pair.cond) == len(gap)
    assert model("spo_step")(pairs[0]).loss.isfinite()
    for bad in (lambda x, *_: x, lambda x, *_: x[:, 0] * torch.nan):
        with pytest.raises(ValueError, match=r"scorer must return \[B\] = \[16\] finite"):
            list(d.branches(net, samples(), None, SCHEDULE, bad, steps=8))
    for bad in ({"candidates": 1}, {"eta": 0.0}):
        with pytest.raises(ValueError, match="candidates >= 2 and eta > 0"):
            list(d.branches(net, samples(), None, SCHEDULE, scorer, **bad))


def test_twins_share_the_start():
    g = torch.Generator().manual_seed(0)
    one, two = d.noised_twins(Denoiser(), samples(), None, SCHEDULE, top=9, steps=5, generator=g)
    assert one.shape == two.shape == (P, 3) and not torch.equal(one, two)


# ---- labels, conditions, guidance ----------------------------------------------------------------


def test_labels_from_rewards():
    rewards = torch.tensor([[1.0, 2.0], [0.0, 2.0], [-1.0, 3.0], [5.0, 5.0]])
    share = d.win_share(rewards, torch.tensor([0, 3, 4]))
    # two rivals and two models: wins and half ties of four comparisons
    assert share.tolist() == [2.5 / 4, 1.5 / 4, 2.0 / 4, 0.0]
    p = d.win_probability(torch.tensor([22.0, 20.0]), torch.tensor([20.0, 20.0]), low=16, high=26)
    scaled = [(22.0 - 16) / 10, (20.0 - 16) / 10]
    want = torch.tensor(scaled).softmax(0)[0]
    torch.testing.assert_close(p, torch.stack([want, torch.tensor(0.5)]))
    with pytest.raises(ValueError, match=r"rewards must be \[S, M\]"):
        d.win_share(rewards[:, 0], torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="rewards must be finite"):
        d.win_share(rewards / 0.0 * 0.0, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="low must be below high"):
        d.win_probability(p, p, low=1.0, high=1.0)


def test_users_left_out():
    vectors = torch.ones(1000, 2)
    kept = d.dropped(vectors, 0.3, generator=torch.Generator().manual_seed(0))
    assert set(kept.sum(1).tolist()) == {0.0, 2.0} and abs(kept.mean().item() - 0.7) < 0.05
    with pytest.raises(ValueError, match="share must be in"):
        d.dropped(vectors, 1.5)


def test_guidance_and_mixtures():
    one, two = Denoiser(), Denoiser()
    x, time = samples(), torch.ones(P)
    guided = d.Guided(one, two, 3.0, negative_cond=captions(1.0))
    want = two(x, time, captions(1.0)) * -2.0 + one(x, time, captions()) * 3.0
    torch.testing.assert_close(guided(x, time, captions()), want)
    base, a, b = (Denoiser().state_dict() for _ in range(3))
    mixed = d.mixed_weights(base, (0.5, a), (2.0, b))
    for name in base:
        torch.testing.assert_close(
            mixed[name], base[name] + 0.5 * (a[name] - base[name]) + 2.0 * (b[name] - base[name])
        )
    with pytest.raises(ValueError, match="same names, these differ"):
        d.mixed_weights(base, (1.0, {}))


# ---- refusals ------------------------------------------------------------------------------------

ONE, TWO = samples(1), samples(2)
STEP = d.Noised(ONE, torch.full((P,), 5), TWO, "mean", torch.full((P,), 2), torch.ones(P))
SHOWN = d.Noised(ONE, torch.full((P,), 5), TWO)
CU = torch.tensor([0, 2, 4])


@pytest.mark.parametrize(
    ("loss", "batch", "message"),
    [
        ("dcpo", d.Pairs(ONE, TWO, captions()), "needs a caption of each side"),
        ("ppd", d.Pairs(ONE, TWO, captions()), 'needs the user\'s embedding as an entry "user"'),
        ("dro", d.Pairs(ONE, TWO), "needs the policy's own samples as the rejected side"),
        ("d3po", d.Pairs(SHOWN, SHOWN), "compares sampling steps"),
        ("spo_step", d.Pairs(ONE, TWO), "compares sampling steps"),
        ("dense_dpo", d.Pairs(ONE, TWO, inputs={"labels": ONE}), "needs segments="),
        ("self_npo", d.Single(ONE), "regresses on samples cut short"),
        ("tlpo", d.Pairs(ONE, TWO), "is no loss of one denoiser"),
        ("rank_dpo", d.Pairs(ONE, TWO), "ranks groups of samples; pass a Ranked batch"),
        ("lpo", d.Single(ONE), "ranks groups of samples; pass a Ranked batch"),
        ("diff_dpo", d.Ranked(ONE, CU), "reads a batch of Pairs, got Ranked"),
        ("diff_instruct_star", d.Single(ONE), "is no loss of one denoiser"),
        ("rank_dpo", d.Ranked(ONE, CU), r"needs phi \(.*inputs= of the batch"),
        ("smpo", d.Pairs(ONE, TWO), "needs p_win"),
        ("diff_dpo", d.Pairs(ONE, TWO, inputs={"phi": ONE}), r"takes no input \['phi'\]"),
        ("diff_dpo", d.Pairs(ONE, TWO[:2]), "must have one shape"),
        ("diff_dpo", d.Pairs(ONE[:0], TWO[:0]), "at least one sample"),
        ("diff_dpo", d.Pairs(ONE.long(), TWO.long()), "must be float32"),
        ("diff_dpo", d.Pairs(ONE, TWO, captions(count=3)), "must have one entry per sample, 4"),
        ("diff_dpo", d.Pairs(ONE, TWO, ["a", None, "b", None]), r"misses entries \[1, 3\]"),
        ("diff_dpo", d.Pairs(ONE, TWO, None, captions()), "the chosen ones none; pass cond too"),
        ("diff_dpo", d.Pairs(ONE, TWO, captions(), ONE), "must be of one make"),
        ("diff_dpo", d.Pairs(ONE, TWO, "a caption"), "cond must be a tensor"),
        ("diff_dpo", d.Pairs(SHOWN, STEP), "must have one reading"),
        ("diff_dpo", d.Pairs(d.Noised(ONE, CU, TWO), TWO), r"must have x and target \[B, ...\]"),
        ("d3po", d.Pairs(*[d.Noised(ONE, STEP.level, TWO, "mean")] * 2), "needs to"),
        ("diff_dpo", d.Pairs(*[d.Noised(ONE, STEP.level + 40, TWO)] * 2), r"must be in \[0, 40"),
        ("lpo", d.Ranked(ONE, CU[:2], inputs={"relevance": ONE[:, 0]}), "must start at 0"),
        ("lpo", d.Ranked(ONE, CU, inputs={"relevance": ONE[:2, 0]}), r"must be a tensor \[4"),
    ],
)  # fmt: skip
def test_batches_that_do_not_fit(loss, batch, message):
    more = {"ref": None} if not losses.LOSSES[loss].needs_reference else {}
    with pytest.raises(ValueError, match=message):
        model(loss, **more)(batch)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"ref": None}, "denoiser has no adapter to switch off; pass ref="),
        ({"loss": "dpo"}, "reads log-probabilities, not prediction errors"),
        ({"loss": "diffusion_mapo"}, "reads no reference; drop ref"),
        ({"kapa": 1.0}, "no argument 'kapa'; nearest: kappa"),
        ({"levels": (0, 41)}, "levels must be a range within"),
        ({"levels": (5, 5)}, "levels must be a range within"),
        ({"source": "backward"}, "source must be one of"),
        ({"segments": torch.arange(3)}, "num_segments comes with segments"),
        ({"error": "huber:0.1"}, "has no reference's error"),
        ({"loss": "inpo", "source": d.Inverted, "by": "me"}, "no argument 'by'"),
    ],
)
def test_modules_that_cannot_be(more, message):
    with pytest.raises(ValueError, match=message):
        model(**more)


def test_what_makes_the_method_cannot_be_switched_off():
    batch = d.Pairs(ONE, TWO)
    with pytest.raises(ValueError, match="needs inverted inputs; leave source out"):
        model("inpo", source="forward")(batch)
    with pytest.raises(ValueError, match="by must be"):
        d.Inverted(by="me")


def test_a_denoiser_that_returns_something_else():
    module = model()
    for wrong, got in ((lambda x, *_: x[:, :1], r"\[8, 1\]"), (lambda x, *_: (x,), "tuple")):
        module.denoiser.forward = wrong
        with pytest.raises(ValueError, match=rf"of the shape of x, \[8, 3\], got {got}"):
            module(d.Pairs(ONE, TWO))


def test_the_block_of_the_page_runs():
    page = Path(__file__).resolve().parents[2] / "docs" / "diffusion.md"
    (block,) = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    names: dict = {}
    exec(compile(block, str(page), "exec"), names)
    assert names["loss"].isfinite() and names["net"].weight.grad.any()


@pytest.mark.parametrize("loss", sorted(d.methods.NEEDS))
def test_needs_are_of_diffusion_losses(loss):
    assert losses.LOSSES[loss].family == "diffusion"
